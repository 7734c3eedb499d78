"""SGD's momentum buffers that go from one fit into the next."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tesserafl.core import seeds
from tesserafl.core.errors import ConfigError
from tesserafl.core.fit import CrossEntropy, Fit, Fitted, Training
from tesserafl.core.messages import Client, Task
from tesserafl.core.method import report_deltas
from tesserafl.core.submodel import cut
from tesserafl.data.examples import Examples, Spec
from tesserafl.engines.batches import batches, widest
from tesserafl.engines.client import ClientWorker, execute
from tesserafl.engines.cohort import Cohorts, Member
from tesserafl.engines.optimisers import Optimiser
from tesserafl.models import MLP
from tesserafl.models.scaling import forward_of, own_scales

VECTORS = Spec(kind="vector", task="vector-classification", shape=(6,), num_classes=3)
SIZES = (7, 1, 12, 5, 9)
TRAINING = Training(lr=0.1, momentum=0.9, weight_decay=0.01, epochs=2, batch_size=4)
MODEL = MLP(hidden=(8,)).build_model(VECTORS)
FORWARD = forward_of(MODEL, MODEL.whole(), MODEL.module().train(), "none")
ROUNDS = 3


def examples_of(count: int, client: int = 0) -> Examples:
    draw = seeds.generator(3, client)
    return Examples(inputs=torch.randn(count, 6, generator=draw), labels=torch.arange(count) % 3)


def draw_of(round: int, client: int = 0) -> torch.Generator:
    return seeds.generator(4, round, client, "batches")


def first_fit(**changes: object) -> Fit:
    return Fit(params=MODEL.init(0), training=TRAINING, keep_momentum=True, **changes)


def next_fit(fit: Fit, fitted: Fitted) -> Fit:
    return replace(fit, params={**fit.params, **fitted.params}, momentum=fitted.momentum)


def uninterrupted(fit: Fit, examples: Examples) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """One torch.optim.SGD over all rounds: parameters and buffers at the end."""
    params = {name: t.clone().requires_grad_() for name, t in fit.params.items()}
    training = fit.training
    sgd = torch.optim.SGD(
        params.values(), training.lr, training.momentum, weight_decay=training.weight_decay
    )
    for round in range(ROUNDS):
        draw = draw_of(round)
        for _ in range(training.epochs):
            for rows in batches(len(examples), training.batch_size, draw):
                sgd.zero_grad()
                CrossEntropy()(FORWARD, params, *examples.batch(rows), {}).backward()
                sgd.step()
    buffers = {name: sgd.state[t]["momentum_buffer"] for name, t in params.items()}
    return {name: t.detach() for name, t in params.items()}, buffers


def test_carried_momentum_is_one_uninterrupted_run_of_torchs_sgd() -> None:
    start, examples = first_fit(), examples_of(11)
    fit, fitted = start, None
    for round in range(ROUNDS):
        fit = fit if fitted is None else next_fit(fit, fitted)
        fitted = execute(fit, FORWARD, examples, draw_of(round))
    params, buffers = uninterrupted(start, examples)
    assert fitted.params.keys() == params.keys() == fitted.momentum.keys()
    for name in params:
        assert torch.equal(fitted.params[name], params[name])
        assert torch.equal(fitted.momentum[name], buffers[name])
        assert not fitted.momentum[name].requires_grad


def test_without_it_every_fit_starts_anew() -> None:
    examples = examples_of(11)
    fit = first_fit()
    carried = next_fit(fit, execute(fit, FORWARD, examples, draw_of(0)))
    anew = replace(carried, momentum=None, keep_momentum=False)
    one = execute(carried, FORWARD, examples, draw_of(1))
    other = execute(anew, FORWARD, examples, draw_of(1))
    assert other.momentum is None
    assert not torch.allclose(one.params["head.weight"], other.params["head.weight"], atol=1e-3)


def test_zeros_to_start_with_are_the_bits_of_none() -> None:
    fit, examples = first_fit(), examples_of(11)
    zeros = replace(fit, momentum={name: torch.zeros_like(t) for name, t in fit.params.items()})
    one, other = (execute(f, FORWARD, examples, draw_of(0)) for f in (fit, zeros))
    for name in fit.params:
        assert torch.equal(one.params[name], other.params[name])
        assert torch.equal(one.momentum[name], other.momentum[name])


def test_buffers_that_were_given_are_not_written_to() -> None:
    given = [torch.ones(3), torch.full((2, 2), 2.0)]
    weights = [torch.zeros(3), torch.zeros(2, 2)]
    optimiser = Optimiser(Training(lr=1.0, momentum=0.5), given)
    for _ in range(2):
        weights = optimiser.step(weights, [torch.ones(3), torch.ones(2, 2)])
    assert torch.equal(given[0], torch.ones(3)) and torch.equal(given[1], torch.full((2, 2), 2.0))
    assert optimiser.momenta[0].tolist() == [0.5 * (0.5 * 1 + 1) + 1] * 3
    assert weights[0].tolist() == [-1.5 - 1.75] * 3


def together(fits: list[Fit], round: int, sizes=SIZES, **how: object) -> list[Fitted]:
    cohorts = Cohorts(most=8, width=lambda size: max(widest(n, size) for n in sizes), **how)
    members = [
        Member(fit=fit, examples=examples_of(count, client), draw=draw_of(round, client))
        for client, (fit, count) in enumerate(zip(fits, sizes, strict=True))
    ]
    assert len({member.shape for member in members}) == 1
    return cohorts.train(members, FORWARD, "model")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch, in itself
@pytest.mark.parametrize(
    ("trainable", "sizes", "compiled"),
    [
        (None, SIZES, False),
        (frozenset({"head.weight", "head.bias"}), SIZES, False),
        (None, (4, 4), True),  # few shapes: compiling takes seconds
    ],
    ids=["all", "head", "compiled"],
)
def test_a_cohort_carries_momentum_as_each_client_alone(trainable, sizes, compiled) -> None:
    fits = [first_fit(trainable=trainable) for _ in sizes]
    for round in range(2):
        alone = [
            execute(fit, FORWARD, examples_of(count, client), draw_of(round, client))
            for client, (fit, count) in enumerate(zip(fits, sizes, strict=True))
        ]
        joint = together(fits, round, sizes, compiled=compiled)
        for one, other in zip(alone, joint, strict=True):
            assert one.params.keys() == other.params.keys() == other.momentum.keys()
            for name in one.params:
                for kind in ("params", "momentum"):
                    torch.testing.assert_close(
                        getattr(other, kind)[name], getattr(one, kind)[name], rtol=2e-4, atol=2e-6
                    )
        fits = [next_fit(fit, own) for fit, own in zip(fits, alone, strict=True)]


def test_members_may_carry_momentum_or_not() -> None:
    # Client 2 was there before, the others begin; only client 0 does not keep its buffers.
    fits = [first_fit() for _ in SIZES]
    fits[2] = next_fit(fits[2], execute(fits[2], FORWARD, examples_of(12, 2), draw_of(0, 2)))
    fits[0] = replace(fits[0], keep_momentum=False)
    joint = together(fits, 1)
    assert joint[0].momentum is None
    for client, (fit, count) in enumerate(zip(fits, SIZES, strict=True)):
        alone = execute(fit, FORWARD, examples_of(count, client), draw_of(1, client))
        for name in alone.params:
            torch.testing.assert_close(
                joint[client].params[name], alone.params[name], rtol=2e-4, atol=2e-6
            )
        assert (joint[client].momentum is None) == (alone.momentum is None)


def test_a_cohorts_buffers_do_not_hold_on_to_those_of_others() -> None:
    for fitted in together([first_fit() for _ in SIZES], 0):
        for tensor in fitted.momentum.values():
            assert tensor.untyped_storage().nbytes() == tensor.nbytes


@pytest.mark.parametrize(
    "changes", [{"momentum": 0.0}, {"optimiser": "adamw"}], ids=["no momentum", "adamw"]
)
@pytest.mark.parametrize("asks", ["keep", "start"])
def test_only_sgd_with_momentum_carries_it(changes: dict, asks: str) -> None:
    start = MODEL.init(0)
    fit = Fit(
        params=start,
        training=replace(TRAINING, **changes),
        momentum=start if asks == "start" else None,
        keep_momentum=asks == "keep",
    )
    with pytest.raises(ConfigError, match=r"training\.momentum to more than 0"):
        execute(fit, FORWARD, examples_of(4), draw_of(0))
    with pytest.raises(ConfigError, match=r"training\.momentum to more than 0"):
        together([fit] * len(SIZES), 0)


def test_buffers_have_the_names_and_shapes_of_what_is_trained() -> None:
    fit = first_fit(momentum=MODEL.init(0), trainable=frozenset({"head.bias"}))
    with pytest.raises(ConfigError, match=r"Fit\.momentum must have exactly the names head\.bias;"):
        execute(fit, FORWARD, examples_of(4), draw_of(0))
    fit = replace(fit, momentum={"head.bias": torch.zeros(4)})
    with pytest.raises(ConfigError, match=r"has the shape \(4,\); it must have \(3,\)"):
        together([fit] * len(SIZES), 0)


class Pull:
    """Features close to those of the start: no loss, as long as the two are the same."""

    def __call__(self, forward, params, inputs, labels, extra) -> Tensor:
        out = forward(params, inputs)
        return (out.features - extra["start"]).square().mean() + 0.0 * out.logits.sum()


class Carrying:
    """A client's hooks: scales, keeps momentum in memory, pulls towards features of the start."""

    def local(self, model, task, memory) -> Fit:
        return Fit(
            params=task.params,
            training=task.training,
            objective=Pull() if task.options["pull"] else CrossEntropy(),
            width_scaling="parameters",
            references={"start": task.params},
            momentum=memory or None,
            keep_momentum=True,
        )

    def report(self, model, task, fitted, memory):
        update, _ = report_deltas(self, model, task, fitted, memory)
        return update, fitted.momentum


def work(pull: bool, rounds: int) -> tuple[list[float], dict[str, Tensor], Task]:
    """Losses of a half-wide client over the rounds, its buffers at the end, its task."""
    model = MLP(hidden=(8, 8), norm="none").build_model(VECTORS)
    half = model.slice({axis: range(4) for axis in model.cuttable})
    worker = ClientWorker(
        model=model, method=Carrying(), examples=lambda client: examples_of(8, client), seed=0
    )
    memory: dict[str, Tensor] = {}
    losses = []
    for round in range(rounds):
        task = Task(
            round=round,
            client=Client(id=0, num_examples=8),
            submodel=half,
            params=cut(model.init(0), half),
            training=replace(TRAINING, weight_decay=0.0, epochs=1, batch_size=8),
            options={"pull": pull},
        )
        update, memory = worker.work(task, memory)
        losses.append(update.metrics["loss"])
        assert update.metrics["reference_examples"] == 8.0
    return losses, memory, task


def test_a_worker_scales_references_as_it_scales_the_parameters() -> None:
    losses, _, _ = work(pull=True, rounds=1)
    assert losses[0] < 1e-12  # the features of the start are the start's


def test_a_workers_buffers_stay_those_of_the_scaled_parameters() -> None:
    # One batch from the same start in both rounds: the same gradient g, so g and then 0.9 g + g.
    (_, once, _), (_, twice, task) = work(pull=False, rounds=1), work(pull=False, rounds=2)
    assert once.keys() == task.params.keys()
    for name in once:
        torch.testing.assert_close(twice[name], 1.9 * once[name])
    # What was scaled has the gradient of what was scaled: by hand, in the scaled space.
    model = MLP(hidden=(8, 8), norm="none").build_model(VECTORS)
    module = model.module(task.submodel.sizes).train()
    scales = own_scales(model, task.submodel, module)
    assert set(scales.values()) == {2.0}
    params = {n: (t * scales.get(n, 1.0)).requires_grad_() for n, t in task.params.items()}
    forward = forward_of(model, task.submodel, module, "parameters")
    CrossEntropy()(forward, params, *examples_of(8).batch(torch.arange(8)), {}).backward()
    for name, tensor in params.items():
        torch.testing.assert_close(once[name], tensor.grad)
