"""RAVAN by hand: Raje et al., NeurIPS 2025. See docs/methods/ravan.md."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from worked import TRAINING, adapted, clients, products, trained

from tesserafl.core.errors import ConfigError, UpdateError
from tesserafl.core.fit import Fitted, Training
from tesserafl.core.lowrank import aggregation_error
from tesserafl.core.messages import Task, Update
from tesserafl.core.method import State
from tesserafl.core.model import Model
from tesserafl.core.params import num_bytes, sha256
from tesserafl.core.submodel import index_tensor
from tesserafl.data.examples import Examples
from tesserafl.engines.client import ClientWorker
from tesserafl.engines.cohort import Cohorts
from tesserafl.methods import FedIT, Ravan

X, Y = [[1.0, -2.0], [0.5, 1.0], [2.0, 0.25]], [0, 1, 1]
WIDE = [[1.0, -2.0, 0.5, 3.0], [0.5, 1.0, -1.0, 0.0], [2.0, 0.25, 0.0, -1.0]]


def begun(
    method: Ravan, model: Model, *num_examples: int, seed: int = 0, training: Training = TRAINING
) -> tuple[State, list[Task]]:
    state = method.init(model, seed, 10)
    return state, list(method.configure(model, state, clients(*num_examples), training))


def answered(method: Ravan, model: Model, task: Task, **values: Any) -> Update:
    """The answer of a client whose cores and scales are these after training: `core_0=[...]`.

    What is not given is as it was before.
    """
    start = method.local(model, task, {})
    assert start.trainable is not None
    params = {name: start.params[name] for name in start.trainable}
    for name, value in values.items():
        shape = params[name.replace("_", "/")].shape
        params[name.replace("_", "/")] = torch.as_tensor(value, dtype=torch.float32).expand(shape)
    fitted = Fitted(
        params=params,
        num_examples=task.client.num_examples,
        num_steps=1,
        metrics={},
        classes=torch.arange(2),
    )
    return method.report(model, task, fitted, {})[0]


def drawn(method: Ravan, model: Model, task: Task, seed: int) -> Update:
    """The answer of a client whose cores and scales are drawn at random."""
    draw = torch.Generator().manual_seed(seed)
    beside = method.local(model, task, {})
    values = {
        name.replace("/", "_"): torch.randn(beside.params[name].shape, generator=draw)
        for name in sorted(beside.beside)
    }
    return answered(method, model, task, **values)


def bases(model: Model, state: State, heads: int, pair: int = 0) -> tuple[Tensor, Tensor]:
    """B [heads, out, r] and A [heads, r, in], read off factors between cores that are I."""
    method = Ravan(heads=heads)
    r = model.shapes[model.low_rank[pair].down][0] // heads
    (task,) = method.configure(model, state, clients(1), TRAINING)
    up = method.local(model, task, {}).extra[f"bases/{pair}"]
    down = state.params[model.low_rank[pair].down]
    return up.transpose(0, 1), down.reshape(heads, r, -1)


# --- Bases ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_all_heads_together_are_orthonormal_and_nothing_is_changed_at_first(heads: int) -> None:
    model = adapted(4, 6, 5, 8)
    state = Ravan(heads=heads).init(model, 3, 1)
    for number, pair in enumerate(model.low_rank):
        b, a = bases(model, state, heads, number)
        b = b.transpose(0, 1).reshape(-1, 4)
        torch.testing.assert_close(b.T @ b, torch.eye(4), atol=1e-6, rtol=0)
        a = state.params[pair.down]
        torch.testing.assert_close(a @ a.T, torch.eye(4), atol=1e-6, rtol=0)
        assert not state.params[pair.up].any()


def test_bases_follow_from_the_seed_alone() -> None:
    model, method = adapted(4, 6, 6, 6), Ravan()
    state = method.init(model, 3, 1)
    torch.manual_seed(9)
    again, other = method.init(model, 3, 1), method.init(model, 4, 1)
    for pair in model.low_rank:
        assert torch.equal(state.params[pair.down], again.params[pair.down])
        assert not torch.equal(state.params[pair.down], other.params[pair.down])
    for one, two in zip(bases(model, state, 4, 0), bases(model, state, 4, 1), strict=True):
        assert not torch.equal(one, two)
    b, a = bases(model, state, 4)
    assert not torch.equal(b.transpose(0, 1).reshape(6, 4), a.reshape(4, 6).T)
    for one, two in zip((b, a), bases(model, again, 4), strict=True):
        assert torch.equal(one, two)


def test_a_saved_adapter_is_not_dropped_without_a_word() -> None:
    model = adapted(2, 2, 2)
    saved = {name: torch.ones(shape) for name, shape in model.shapes.items()}
    with pytest.raises(ConfigError, match=r"leave --model\.adapter away"):
        Ravan(heads=2).init(replace(model, pretrained=lambda: saved), 0, 1)


@pytest.mark.parametrize("heads", [0, -1, 3, 8])
def test_heads_are_equal_parts_of_the_rank(heads: int) -> None:
    with pytest.raises(ConfigError, match=r"must divide model\.rank=4"):
        Ravan(heads=heads).init(adapted(4, 6, 6), 0, 1)


def test_more_ranks_than_a_side_cannot_be_orthogonal() -> None:
    with pytest.raises(ConfigError, match=r"set model\.rank to at most 3"):
        Ravan(heads=2).init(adapted(4, 6, 3), 0, 1)


# --- Training -------------------------------------------------------------------------------------


def test_one_head_of_full_rank_takes_the_step_of_the_whole_weight() -> None:
    # W + B H A with square orthogonal B, A: dL/dH = B^T G A^T, so a step of H moves the change by
    # -lr B B^T G A^T A = -lr G; and dL/ds = <G, B H A> = 0 where H = 0.
    model, method = adapted(2, 2, 2, classes=2), Ravan(heads=1)
    state, (task,) = begun(method, model, 3)
    update = trained(method, model, task, X, Y)
    after = method.aggregate(model, state, clients(3), [update])
    change = torch.zeros(2, 2, requires_grad=True)
    inputs, labels = torch.tensor(X), torch.tensor(Y)
    hidden = inputs @ (torch.eye(2) + change).T
    logits = hidden @ state.params["head.weight"].T + state.params["head.bias"]
    (gradient,) = torch.autograd.grad(torch.nn.functional.cross_entropy(logits, labels), change)
    (product,) = products(model, after.params)
    assert float(gradient.norm()) > 0.05
    torch.testing.assert_close(product.float(), -TRAINING.lr * gradient, atol=1e-6, rtol=0)


def test_what_is_sent_is_the_change_of_scale_times_core() -> None:
    training = Training(lr=0.5, batch_size=100, epochs=4)
    model, method = adapted(4, 4, 4, classes=2), Ravan(heads=2)
    state, (task,) = begun(method, model, 3, training=training)
    state = method.aggregate(model, state, clients(3), [drawn(method, model, task, 1)])
    (task,) = method.configure(model, state, clients(3), training)
    update = trained(method, model, task, WIDE, Y)

    b, a = bases(model, state, 2)
    begin = state.extra["core/0"]
    h, s = begin.clone().requires_grad_(), torch.ones(2, requires_grad=True)
    weight, bias = (state.params[f"head.{n}"].clone().requires_grad_() for n in ("weight", "bias"))
    leaves = [h, s, weight, bias]
    for _ in range(4):
        change = sum(s[i] * b[i] @ h[i] @ a[i] for i in range(2))
        logits = torch.tensor(WIDE) @ (torch.eye(4) + change).T @ weight.T + bias
        loss = torch.nn.functional.cross_entropy(logits, torch.tensor(Y))
        for leaf, gradient in zip(leaves, torch.autograd.grad(loss, leaves), strict=True):
            leaf.data -= 0.5 * gradient
    assert float((s.detach() - 1).abs().min()) > 1e-3  # the scales have learnt
    sent = (s[:, None, None] * h - begin).detach()
    torch.testing.assert_close(update.extra["core/0"], sent, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(
        update.delta["head.bias"], (bias - state.params["head.bias"]).detach(), atol=1e-5, rtol=0
    )


def test_training_begins_at_the_model_that_was_sent() -> None:
    model, method = adapted(4, 4, 4, classes=2), Ravan(heads=2, ratio=(0.5,))
    state, (task,) = begun(method, model, 3)
    state = method.aggregate(model, state, clients(3), [drawn(method, model, task, 1)])
    (task,) = method.configure(model, state, clients(3), TRAINING)
    fit = method.local(model, task, {})
    seen = []

    def forward(params: dict[str, Tensor], inputs: Tensor) -> Any:
        seen.append({name: params[name] for name in model.shapes})
        return torch.func.functional_call(model.module(), seen[-1], (inputs,))

    loss = fit.objective(forward, fit.params, torch.tensor(WIDE), torch.tensor(Y), fit.extra)
    assert sha256(seen[0]) == sha256(state.params)
    logits = torch.func.functional_call(model.module(), state.params, (torch.tensor(WIDE),)).logits
    assert torch.equal(loss, torch.nn.functional.cross_entropy(logits, torch.tensor(Y)))
    assert fit.beside == {"core/0", "scale/0"}
    assert fit.rebuilt == {model.low_rank[0].up}
    assert fit.trainable == {"core/0", "scale/0", "head.weight", "head.bias"}


# --- Averages -------------------------------------------------------------------------------------


def test_the_mean_of_scale_times_core_by_hand() -> None:
    # n = 1, 3; two heads of r = 1.  s_0 H_0 = 2 x 2, 1 x 4;  s_1 H_1 = 1 x 0, 1/2 x 8
    # 1/4 (4, 4) + 3/4 (0, 4) = (1, 4)
    model, method = adapted(2, 2, 2), Ravan(heads=2)
    state, (one, other) = begun(method, model, 1, 3)
    updates = [
        answered(method, model, one, core_0=[[[2.0]], [[4.0]]], scale_0=[2.0, 1.0]),
        answered(method, model, other, core_0=[[[0.0]], [[8.0]]], scale_0=[1.0, 0.5]),
    ]
    assert updates[0].extra["core/0"].flatten().tolist() == [4.0, 4.0]
    after = method.aggregate(model, state, clients(1, 3), updates)
    assert after.extra["core/0"].flatten().tolist() == [1.0, 4.0]
    b, a = bases(model, state, 2)
    expected = (b[0] @ a[0] + 4.0 * b[1] @ a[1]).double()
    torch.testing.assert_close(products(model, after.params)[0], expected, atol=1e-6, rtol=0)
    assert after.round == 1
    # The scales begin at 1 again, and the next change is one of the mean.
    (task,) = method.configure(model, after, clients(1), TRAINING)
    fit = method.local(model, task, {})
    assert fit.params["scale/0"].tolist() == [1.0, 1.0]
    assert fit.params["core/0"].flatten().tolist() == [1.0, 4.0]


def error_of(
    method: Ravan, model: Model, state: State, after: State, updates: list[Update], *shares: float
) -> float:
    factors = [method.factors(model, state, update) for update in updates]
    error = aggregation_error(model, after.params, list(zip(factors, shares, strict=True)))
    assert error is not None
    return error


def test_the_mean_of_the_products_is_exact_for_unequal_clients() -> None:
    model, method = adapted(4, 6, 8, 5), Ravan(heads=2)
    state, asked = method.init(model, 0, 5), clients(1, 2, 5)
    for round in range(3):
        tasks = list(method.configure(model, state, asked, TRAINING))
        updates = [drawn(method, model, task, 10 * round + task.client.id) for task in tasks]
        after = method.aggregate(model, state, asked, updates)
        assert error_of(method, model, state, after, updates, 1 / 8, 2 / 8, 5 / 8) < 1e-6
        assert error_of(method, model, state, after, updates, 1 / 3, 1 / 3, 1 / 3) > 0.01
        state = after


def test_what_a_client_trained_is_what_its_answer_stands_for() -> None:
    model, method = adapted(4, 6, 8), Ravan(heads=2, ratio=(1.0, 0.5))
    state, (one, _) = begun(method, model, 1, 1)
    state = method.aggregate(model, state, clients(1, 1), [drawn(method, model, one, 0)])
    _, task = method.configure(model, state, clients(1, 1), TRAINING)
    update = answered(method, model, task, core_0=3.0, scale_0=2.0)
    factors = method.factors(model, state, update)
    ((head,),) = task.options["heads"]
    cores = state.extra["core/0"].clone()
    cores[head] = 6.0
    b, a = bases(model, state, 2)
    expected = sum(b[i] @ cores[i] @ a[i] for i in range(2))
    product = factors["layers.0.b"] @ factors["layers.0.a"]
    torch.testing.assert_close(product, expected, atol=1e-5, rtol=0)


def test_the_order_of_updates_changes_no_bit() -> None:
    model, method = adapted(4, 6, 8, classes=3), Ravan(heads=4, ratio=(1.0, 0.5, 0.25))
    asked = clients(1, 2, 5)
    state, tasks = begun(method, model, 1, 2, 5)
    updates = [drawn(method, model, task, task.client.id) for task in tasks]
    after = [method.aggregate(model, state, asked, o) for o in itertools.permutations(updates)]
    assert len({(sha256(each.params), sha256(each.extra)) for each in after}) == 1


def test_without_answers_nothing_moves() -> None:
    model, method = adapted(4, 6, 8), Ravan()
    state, (task,) = begun(method, model, 1)
    state = method.aggregate(model, state, clients(1), [drawn(method, model, task, 0)])
    after = method.aggregate(model, state, clients(1), [])
    assert (sha256(after.params), sha256(after.extra)) == (
        sha256(state.params),
        sha256(state.extra),
    )
    assert after.round == state.round + 1


# --- Bytes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ratio", "sent"), [(1.0, 4), (0.5, 2), (0.3, 2), (0.25, 1)])
def test_cores_and_the_head_alone_travel(ratio: float, sent: int) -> None:
    model, method = adapted(8, 8, 8, 8, classes=2), Ravan(ratio=(ratio,))
    state, (task,) = begun(method, model, 3)
    head = 4 * (2 * 8 + 2)
    # Down go all cores, of both adapters: 4 heads of 2 x 2 numbers, 4 bytes each.
    assert task.num_bytes == head + 2 * 4 * (2 * 2) * 4
    update = trained(method, model, task, [[1.0] * 8, [-1.0] * 8], [0, 1])
    assert update.num_bytes == head + 2 * sent * (2 * 2) * 4
    # FedIT's adapters of this rank: 2 x 8 x (8 + 8) numbers.
    (plain,) = FedIT().configure(model, state, clients(3), TRAINING)
    assert plain.num_bytes == num_bytes(state.params) == head + 2 * 8 * 16 * 4


# --- Some of the heads ----------------------------------------------------------------------------


@pytest.mark.parametrize("choice", ["random", "largest"])
def test_a_head_is_averaged_over_those_that_trained_it(choice: Any) -> None:
    # n = 1, 3. Client 1 trains one of two heads: there (1 x 4 + 3 x 8) / 4 = 7, elsewhere 4.
    model, method = adapted(2, 2, 2, 2), Ravan(heads=2, ratio=(1.0, 0.5), choice=choice)
    state, (one, other) = begun(method, model, 1, 3)
    updates = [
        answered(method, model, one, core_0=4.0, core_1=4.0),
        answered(method, model, other, core_0=8.0, core_1=8.0),
    ]
    after = method.aggregate(model, state, clients(1, 3), updates)
    for number, (head,) in enumerate(other.options["heads"]):
        cores = after.extra[f"core/{number}"].flatten().tolist()
        assert (cores[head], cores[1 - head]) == (7.0, 4.0)
    # Alone it leaves the other head as it was, to the bit.
    alone = method.aggregate(model, after, clients(1, 3), [replace(updates[1], round=1)])
    picked = method.configure(model, after, clients(1, 3), TRAINING)
    for number, (head,) in enumerate(list(picked)[1].options["heads"]):
        left = after.extra[f"core/{number}"][1 - head]
        assert torch.equal(alone.extra[f"core/{number}"][1 - head], left)
        assert not torch.equal(
            alone.extra[f"core/{number}"][head], after.extra[f"core/{number}"][head]
        )


def test_an_untrained_head_works_on_and_stays() -> None:
    model, method = adapted(4, 4, 4, classes=2), Ravan(heads=2, ratio=(1.0, 0.5))
    state, (one, _) = begun(method, model, 3, 3)
    state = method.aggregate(model, state, clients(3, 3), [drawn(method, model, one, 2)])
    _, task = method.configure(model, state, clients(3, 3), TRAINING)
    ((head,),) = task.options["heads"]
    update = trained(method, model, task, WIDE, Y)
    assert update.extra["core/0"].shape == (1, 2, 2) and update.extra["core/0"].any()
    after = method.aggregate(model, state, clients(3, 3), [update])
    assert torch.equal(after.extra["core/0"][1 - head], state.extra["core/0"][1 - head])
    ranks = range(2 * head, 2 * head + 2)
    views = update.submodel.views
    for name, dim in (("layers.0.b", 1), ("layers.0.a", 0)):
        assert index_tensor(views[name].index[dim]).tolist() == list(ranks)
    # Without the other head the gradient is another one: it took part in the forward pass.
    lone = {"core/0": state.extra["core/0"].clone()}
    lone["core/0"][1 - head] = 0.0
    without = trained(method, model, replace(task, extra=lone), WIDE, Y)
    assert not torch.allclose(without.extra["core/0"], update.extra["core/0"], atol=1e-4)


def test_heads_are_drawn_anew_and_all_have_their_turn() -> None:
    model, method = adapted(8, 8, 8, 8), Ravan(heads=4, ratio=(0.5,))
    state = method.init(model, 0, 50)
    seen = [
        task.options["heads"]
        for round in range(30)
        for task in method.configure(model, replace(state, round=round), clients(1, 1), TRAINING)
    ]
    for pair in range(2):
        counts = [sum(head in heads[pair] for heads in seen) for head in range(4)]
        assert sum(counts) == 2 * 60 and min(counts) > 15
    assert any(heads[0] != heads[1] for heads in seen)


def test_the_largest_cores_are_chosen_and_equal_ones_at_random() -> None:
    model, method = adapted(4, 6, 6), Ravan(heads=4, ratio=(1.0, 0.5), choice="largest")
    state, (one, _) = begun(method, model, 1, 1)
    begin = {
        tuple(
            list(method.configure(model, state, clients(*[1] * 20), TRAINING))[i].options["heads"][
                0
            ]
        )
        for i in range(1, 20, 2)
    }
    assert len(begin) > 2  # all cores are zero
    update = answered(method, model, one, core_0=[[[1.0]], [[-3.0]], [[0.5]], [[2.0]]])
    state = method.aggregate(model, state, clients(1, 1), [update])
    _, task = method.configure(model, state, clients(1, 1), TRAINING)
    assert task.options["heads"] == [[1, 3]]


# --- Refusals and engines -------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, 1e6])
def test_cores_that_diverged_are_refused(wrong: float) -> None:
    model, method = adapted(2, 2, 2), Ravan(heads=2)
    state, (one, other) = begun(method, model, 1, 3)
    with pytest.raises(UpdateError, match="diverged"):  # on the client: it alone has failed
        answered(method, model, one, core_0=wrong)
    good = answered(method, model, other, core_0=1.0)
    bad = replace(good, client=0, extra={"core/0": torch.full((2, 1, 1), wrong)})
    with pytest.raises(UpdateError, match="finite"):
        method.aggregate(model, state, clients(1, 3), [good, bad])


def test_cores_of_other_shapes_or_names_are_refused() -> None:
    model, method = adapted(2, 2, 2), Ravan(heads=2, ratio=(0.5,))
    state, (task,) = begun(method, model, 1)
    good = answered(method, model, task, core_0=1.0)
    for extra in ({"core/0": torch.ones(2, 1, 1)}, {"core/1": torch.ones(1, 1, 1)}):
        with pytest.raises(UpdateError, match="core/"):
            method.aggregate(model, state, clients(1), [replace(good, extra=extra)])


@pytest.mark.parametrize("optimiser", ["sgd", "adamw"])
def test_clients_trained_together_do_what_they_do_alone(optimiser: Any) -> None:
    """Those of one number of heads are one cohort, whichever heads these are."""
    training = Training(optimiser=optimiser, lr=0.05, batch_size=4, epochs=3, clip_norm=1.0)
    model, method = adapted(4, 4, 4, classes=2), Ravan(heads=4, ratio=(0.5,))
    _, tasks = begun(method, model, *[9] * 4, training=training)
    assert len({str(task.options["heads"]) for task in tasks}) > 1

    def examples(client: int) -> Examples:
        draw = torch.Generator().manual_seed(client)
        inputs = torch.randn(9, 4, generator=draw)
        return Examples(inputs=inputs, labels=(inputs[:, 0] > 0).long())

    groups = []

    class Counting(Cohorts):
        def train(self, members: Any, forward: Any, key: object) -> list[Fitted]:
            groups.append(len(members))
            return super().train(members, forward, key)

    together = Counting(most=4, width=lambda size: size + 1)
    answers = []
    for cohorts in (None, together):
        worker = ClientWorker(
            model=model, method=method, examples=examples, seed=0, cohorts=cohorts
        )
        done = worker.work_together([(task, {}) for task in tasks])
        answers.append([answer[0] for answer in done if isinstance(answer, tuple)])
    assert groups == [4]
    assert len(answers[0]) == len(answers[1]) == 4
    for one, other in zip(*answers, strict=True):
        assert one.extra["core/0"].abs().max() > 0.01
        torch.testing.assert_close(one.extra, other.extra, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(one.delta, other.delta, atol=1e-5, rtol=1e-4)
