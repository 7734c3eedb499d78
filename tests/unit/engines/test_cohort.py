"""Clients trained together get what each gets alone, up to rounding, whatever their sizes."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from tesserafl.core import seeds
from tesserafl.core.axes import probe
from tesserafl.core.fit import CrossEntropy, Fit, Fitted, Training
from tesserafl.core.model import Model
from tesserafl.data.examples import Examples, Spec
from tesserafl.engines.batches import batches, widest
from tesserafl.engines.client import execute
from tesserafl.engines.cohort import Cohorts, Member, obstacle
from tesserafl.engines.graphs import trace
from tesserafl.methods._exits import WEIGHT, MutualDistillation
from tesserafl.models import CNN, MLP, Residual
from tesserafl.models.scaling import forward_of

VECTORS = Spec(kind="vector", task="vector-classification", shape=(6,), num_classes=3)
IMAGES = Spec(kind="image", task="image-classification", shape=(1, 8, 8), num_classes=3)
SIZES = (7, 1, 12, 5, 9)
"""With batches of 4: two, one, three, two (4 and 1 join) and two batches."""


def examples_of(spec: Spec, count: int, client: int) -> Examples:
    draw = seeds.generator(3, client)
    labels = torch.arange(count) % 2 + client % 2
    if spec.kind == "vector":
        return Examples(inputs=torch.randn(count, 6, generator=draw), labels=labels)
    pixels = torch.randint(0, 256, (count, *spec.shape), dtype=torch.uint8, generator=draw)
    return Examples(inputs=pixels, labels=labels)


def draw_of(client: int) -> torch.Generator:
    return seeds.generator(4, client, "batches")


def both_ways(
    model: Model, spec: Spec, fits: list[Fit], sizes=SIZES, most: int = 8, **how: object
) -> tuple[list[Fitted], list[Fitted]]:
    """What comes of each alone, and of all together."""
    held = [examples_of(spec, count, client) for client, count in enumerate(sizes)]
    forward = forward_of(model, model.whole(), model.module().train(), "none")
    alone = [execute(fits[c], forward, held[c], draw_of(c)) for c in range(len(sizes))]
    cohorts = Cohorts(most=most, width=lambda size: max(widest(n, size) for n in sizes), **how)
    members = [Member(fit=fits[c], examples=held[c], draw=draw_of(c)) for c in range(len(sizes))]
    return alone, cohorts.train(members, forward, "model")


def assert_alike(alone: list[Fitted], together: list[Fitted]) -> None:
    for one, other in zip(alone, together, strict=True):
        assert one.params.keys() == other.params.keys()
        for name in one.params:
            torch.testing.assert_close(other.params[name], one.params[name], rtol=2e-4, atol=2e-6)
        assert (one.num_examples, one.num_steps) == (other.num_examples, other.num_steps)
        assert other.metrics["loss"] == pytest.approx(one.metrics["loss"], rel=1e-4)
        assert torch.equal(one.classes, other.classes)


TRAININGS = {
    "sgd": Training(lr=0.1, epochs=2, batch_size=4),
    "momentum": Training(lr=0.1, momentum=0.9, weight_decay=0.01, epochs=3, batch_size=4),
    "clipped": Training(lr=0.5, clip_norm=0.1, momentum=0.5, epochs=2, batch_size=4),
    "adamw": Training(optimiser="adamw", lr=0.01, weight_decay=0.1, epochs=3, batch_size=4),
    "one batch": Training(lr=0.1, epochs=2, batch_size=64),
    "own classes": Training(lr=0.1, epochs=2, batch_size=4, mask_absent_classes=True),
}


@pytest.mark.parametrize("shared", [True, False], ids=["one start", "own starts"])
@pytest.mark.parametrize("name", TRAININGS)
def test_together_is_as_alone(name: str, shared: bool) -> None:
    model = MLP(hidden=(8, 8), norm="layer").build_model(VECTORS)
    starts = [model.init(0 if shared else client) for client in range(len(SIZES))]
    if shared:
        starts = [starts[0]] * len(SIZES)
    fits = [Fit(params=start, training=TRAININGS[name]) for start in starts]
    sizes = (7, 6, 12, 5, 9) if name == "own classes" else SIZES
    assert_alike(*both_ways(model, VECTORS, fits, sizes))


def test_a_convolutional_network_of_bytes() -> None:
    model = CNN(channels=(4, 8)).build_model(IMAGES)
    start = model.init(0)
    fits = [Fit(params=start, training=TRAININGS["momentum"])] * len(SIZES)
    assert_alike(*both_ways(model, IMAGES, fits))


def test_frozen_parameters_stay_and_are_not_reported() -> None:
    model = MLP(hidden=(8,)).build_model(VECTORS)
    start = model.init(0)
    trainable = frozenset({"head.weight", "head.bias"})
    fits = [Fit(params=start, training=TRAININGS["sgd"], trainable=trainable)] * len(SIZES)
    alone, together = both_ways(model, VECTORS, fits)
    assert_alike(alone, together)
    assert together[0].params.keys() == trainable


@dataclass(frozen=True)
class Anchored:
    """Cross-entropy and a pull to tensors that the method sent: FedProx's term."""

    def __call__(self, forward, params, inputs, labels, extra) -> Tensor:
        pull = (params["head.bias"] - extra["anchor"]).square().sum()
        return CrossEntropy()(forward, params, inputs, labels, {}) + extra["strength"] * pull


def test_an_objective_with_tensors_of_its_own() -> None:
    model = MLP(hidden=(8,)).build_model(VECTORS)
    start, strength = model.init(0), torch.tensor(0.5)
    fits = [
        Fit(
            params=start,
            training=TRAININGS["sgd"],
            objective=Anchored(),
            extra={"anchor": torch.full((3,), float(client)), "strength": strength},
        )
        for client in range(len(SIZES))
    ]
    assert_alike(*both_ways(model, VECTORS, fits))


@pytest.mark.parametrize("depth", [3, 1])
@pytest.mark.parametrize("name", ["momentum", "own classes"])
def test_exits_that_teach_each_other(depth: int, name: str) -> None:
    """Padding must count in no divergence; clients of five sizes are padded to one."""
    model = Residual(stream=8, inner=8, blocks=depth, exits=True).build_model(VECTORS)
    fits = [
        Fit(
            params=model.init(client),
            training=TRAININGS[name],
            objective=MutualDistillation(temperature=2.0),
            extra={WEIGHT: torch.tensor(0.7)},
        )
        for client in range(len(SIZES))
    ]
    sizes = (7, 6, 12, 5, 9) if name == "own classes" else SIZES
    assert_alike(*both_ways(model, VECTORS, fits, sizes))


def test_the_programs_of_one_round_serve_the_next_at_another_rate() -> None:
    model = MLP(hidden=(8,)).build_model(VECTORS)
    forward = forward_of(model, model.whole(), model.module().train(), "none")
    cohorts = Cohorts(most=4, width=lambda size: size)
    start = model.init(0)
    results = []
    for lr in (0.1, 0.2, 0.1):
        fit = Fit(params=start, training=Training(lr=lr, epochs=2, batch_size=4))
        members = [
            Member(fit=fit, examples=examples_of(VECTORS, 8, c), draw=draw_of(c)) for c in range(4)
        ]
        results.append(cohorts.train(members, forward, "model"))
        number = len(cohorts._programs)
        assert number == 2  # a first step from one start, and the others
    assert torch.equal(results[0][3].params["head.bias"], results[2][3].params["head.bias"])
    assert not torch.equal(results[0][3].params["head.bias"], results[1][3].params["head.bias"])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch, in itself
@pytest.mark.slow
def test_compiled_exits_teach_each_other_in_the_same_way() -> None:
    model = Residual(stream=4, inner=4, blocks=2, exits=True).build_model(VECTORS)
    fit = Fit(
        params=model.init(0),
        training=TRAININGS["sgd"],
        objective=MutualDistillation(temperature=1.0),
        extra={WEIGHT: torch.tensor(1.0)},
    )
    assert_alike(*both_ways(model, VECTORS, [fit] * 3, (4, 3, 4), most=3, compiled=True))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch, in itself
def test_compiled_programs_compute_the_same() -> None:
    model = MLP(hidden=(8,)).build_model(VECTORS)
    start = model.init(0)
    fits = [Fit(params=start, training=TRAININGS["momentum"])] * 3
    assert_alike(*both_ways(model, VECTORS, fits, (4, 4, 4), most=3, compiled=True))


@pytest.mark.parametrize(
    ("module", "training", "word"),
    [
        (nn.BatchNorm1d(3), Training(), "BatchNorm"),
        (nn.Dropout(0.1), Training(), "dropout"),
        (nn.Linear(2, 2), Training(augment=True), "augment"),
        (nn.Dropout(0.0), Training(), None),
    ],
)
def test_what_cannot_be_trained_together_is_known(module, training, word) -> None:
    reason = obstacle(nn.Sequential(module), training)
    assert reason is None if word is None else word in str(reason)


@pytest.mark.parametrize("total", range(1, 14))
def test_the_widest_batch(total: int) -> None:
    longest = max(len(rows) for rows in batches(total, 4, draw_of(0)))
    assert widest(total, 4) == longest


class Normalised(nn.Module):
    """With a buffer, an index that is a buffer, and a constant, as embeddings and scalings have."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.linspace(-0.1, 0.1, 6))
        self.register_buffer("order", torch.tensor([5, 4, 3, 2, 1, 0]))
        self.first, self.head = nn.Linear(6, hidden), nn.Linear(hidden, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        inputs = (inputs - self.mean)[:, self.order] * torch.tensor(2.0)
        return self.head(torch.relu(self.first(inputs)))


def test_buffers_and_constants_are_part_of_a_program() -> None:
    model = probe(
        lambda sizes: Normalised(sizes["hidden"]), {"hidden": 5}, lambda: torch.randn(2, 6)
    )
    fits = [Fit(params=model.init(0), training=TRAININGS["sgd"])] * len(SIZES)
    assert_alike(*both_ways(model, VECTORS, fits))


def test_parameters_in_another_order_take_a_program_of_their_own() -> None:
    model = MLP(hidden=(3, 3)).build_model(VECTORS)  # layers.1 and head are alike in shape
    start = model.init(0)
    forward = forward_of(model, model.whole(), model.module().train(), "none")
    cohorts = Cohorts(most=2, width=lambda size: size)
    results = []
    for names in (list(start), list(start)[::-1]):
        fit = Fit(params={n: start[n] for n in names}, training=TRAININGS["sgd"])
        members = [
            Member(fit=fit, examples=examples_of(VECTORS, 8, c), draw=draw_of(c)) for c in range(2)
        ]
        results.append(cohorts.train(members, forward, "model"))
    for one, other in zip(*results, strict=True):
        for name in start:
            torch.testing.assert_close(one.params[name], other.params[name])


def test_equal_numbers_of_other_types_are_other_operations() -> None:
    whole = torch.arange(4)

    def mixed(numbers: Tensor) -> list[Tensor]:
        return [numbers + 1, numbers + 1.0, numbers * 1.0]

    expected, got = mixed(whole), trace(mixed, [whole], compiled=False)(whole)
    for one, other in zip(expected, got, strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other)
