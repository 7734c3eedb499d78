"""HetLoRA by hand: Cho et al., EMNLP 2024, as re-implemented. See docs/methods/hetlora.md."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from worked import (
    TRAINING,
    adapted,
    answer,
    clients,
    products,
    setting,
    state_of,
    trained,
    trained_factors,
    values,
)

from tesserafl.core.errors import ConfigError
from tesserafl.core.fit import CrossEntropy, Fitted
from tesserafl.core.messages import Task, Update
from tesserafl.core.method import State
from tesserafl.core.model import Model, Output
from tesserafl.core.params import Params, sha256
from tesserafl.methods import FedAvg, FedIT, HetLoRA
from tesserafl.methods._ranks import TailPenalty, kept_ranks, tail_norm, without_tail

A, B = "layers.0.a", "layers.0.b"
X, Y = [[1.0, -2.0], [0.5, 1.0], [2.0, 0.25]], [0, 1, 1]
PLAIN = HetLoRA(ratio=(1.0, 0.5), decay=1.0)
"""Nothing is penalised and nothing given up."""


# --- Averages -------------------------------------------------------------------------------------


def test_a_round_by_hand() -> None:
    # n does not matter.  Client 0, rank 2: A_0 = (1 0; 0 1), B_0 = (3 0; 0 4): ||B_0 A_0|| = 5.
    # Client 1, rank 1: A_1 = (3 4), B_1 = (0 3)^T: B_1 A_1 = (0 0; 9 12), norm 15.  Z = 20
    # A = 1/4 (1 0; 0 1) + 3/4 (3 4; 0 0) = (5/2 3; 0 1/4)
    # B = 1/4 (3 0; 0 4) + 3/4 (0 0; 3 0) = (3/4 0; 9/4 1)
    model, asked = adapted(2, 2, 2), clients(100, 1)
    state = state_of(model)
    one, other = PLAIN.configure(model, state, asked, TRAINING)
    updates = [
        setting(one, layers_0_a=[[1, 0], [0, 1]], layers_0_b=[[3, 0], [0, 4]]),
        setting(other, layers_0_a=[[3, 4]], layers_0_b=[[0], [3]]),
    ]
    for weighting in ("examples", "uniform"):
        method = replace(PLAIN, weighting=weighting)
        after = method.aggregate(model, state, asked, updates)
        assert values(after.params, "layers_0_a") == [[2.5, 3.0], [0.0, 0.25]]
        assert values(after.params, "layers_0_b") == [[0.75, 0.0], [2.25, 1.0]]
        assert after.round == 1
        assert after.notes == {"ranks": {"0": 2, "1": 1}}


def test_one_weight_for_all_adapters_of_a_client() -> None:
    # Norms 3 and 4 of client 0's two products: ||S_0|| = 5; 12 and 9 of client 1's: 15. Z = 20
    model, asked = adapted(1, 1, 1, 1), clients(1, 1)
    method, state = HetLoRA(ratio=(1.0,), decay=1.0), state_of(adapted(1, 1, 1, 1))
    one, other = method.configure(model, state, asked, TRAINING)
    updates = [
        setting(one, layers_0_a=[[1]], layers_0_b=[[3]], layers_1_a=[[4]], layers_1_b=[[1]]),
        setting(other, layers_0_a=[[3]], layers_0_b=[[4]], layers_1_a=[[1]], layers_1_b=[[9]]),
    ]
    after = method.aggregate(model, state, asked, updates)
    assert values(after.params, "layers_0_a") == [[0.25 * 1 + 0.75 * 3]]
    assert values(after.params, "layers_0_b") == [[0.25 * 3 + 0.75 * 4]]
    assert values(after.params, "layers_1_a") == [[0.25 * 4 + 0.75 * 1]]
    assert values(after.params, "layers_1_b") == [[0.25 * 1 + 0.75 * 9]]


@pytest.mark.parametrize("weighting", ["examples", "uniform"])
def test_weights_are_in_proportion_to_the_norms_of_products(weighting: Any) -> None:
    model, asked = adapted(4, 6, 5, 7), clients(1, 2, 5)
    method = HetLoRA(ratio=(1.0, 0.5, 0.25), decay=1.0, weighting=weighting)
    state = method.init(model, 0, 1)
    tasks = list(method.configure(model, state, asked, TRAINING))
    updates = [trained_factors(task, seed) for seed, task in enumerate(tasks)]
    trained = [
        {n: t + update.delta[n] for n, t in task.params.items()}
        for task, update in zip(tasks, updates, strict=True)
    ]
    norms = [sum(p.square().sum() for p in products(model, own)) ** 0.5 for own in trained]
    after = method.aggregate(model, state, asked, updates)
    for name, shape in model.shapes.items():
        padded = torch.zeros(shape).double()
        for own, norm in zip(trained, norms, strict=True):
            rows, columns = own[name].shape
            padded[:rows, :columns] += own[name] * norm / sum(norms)
        torch.testing.assert_close(after.params[name].double(), padded, rtol=1e-5, atol=1e-6)


def test_where_all_products_are_zero_examples_weigh() -> None:
    # A_0 moves to 8, A_1 to 16, B stays zero: 1/4 8 + 3/4 16 = 14; the second rank 1/4 8 = 2
    model, asked = adapted(2, 1, 1), clients(1, 3)
    state = state_of(model)
    one, other = PLAIN.configure(model, state, asked, TRAINING)
    updates = [setting(one, layers_0_a=[[8], [8]]), setting(other, layers_0_a=[[16]])]
    after = PLAIN.aggregate(model, state, asked, updates)
    assert values(after.params, "layers_0_a") == [[14.0], [2.0]]
    assert values(after.params, "layers_0_b") == [[0.0, 0.0]]


def test_one_client_alone_is_plain_local_training() -> None:
    model, method = adapted(2, 2, 2, classes=2), HetLoRA(ratio=(1.0,), decay=1.0)
    state = method.init(model, 0, 1)
    (task,) = method.configure(model, state, clients(3), TRAINING)
    update = trained(method, model, task, X, Y)
    assert sha256(update.delta) == sha256(trained(FedIT(), model, task, X, Y).delta)
    after = method.aggregate(model, state, clients(3), [update])
    for name, before in state.params.items():
        torch.testing.assert_close(after.params[name], before + update.delta[name])


def test_equal_norms_and_ranks_are_fedit() -> None:
    model, asked = adapted(2, 3, 3), clients(1, 1, 1)
    results = []
    for method in (HetLoRA(ratio=(1.0,), decay=1.0), FedIT()):
        state = method.init(model, 0, 1)
        tasks = method.configure(model, state, asked, TRAINING)
        updates = []
        for task, sign in zip(tasks, (1, 1, -1), strict=True):
            rows = torch.eye(2, 3) * sign
            updates.append(setting(task, layers_0_a=rows.tolist(), layers_0_b=rows.T.tolist()))
        results.append(method.aggregate(model, state, asked, updates).params)
    for name, tensor in results[0].items():
        torch.testing.assert_close(tensor, results[1][name])


def test_what_is_no_factor_is_averaged_as_ever() -> None:
    model, asked = adapted(2, 4, 3, classes=2), clients(1, 3)
    heads = []
    for method in (HetLoRA(ratio=(1.0,)), FedAvg()):
        state = method.init(model, 0, 1)
        tasks = method.configure(model, state, asked, TRAINING)
        updates = [trained_factors(task, task.client.id) for task in tasks]
        after = method.aggregate(model, state, asked, updates)
        heads.append({n: t for n, t in after.params.items() if n.startswith("head")})
    assert sha256(heads[0]) == sha256(heads[1])


def test_the_order_of_updates_changes_no_bit() -> None:
    model, asked, method = adapted(4, 9, 7, 8, classes=3), clients(1, 2, 3, 4), PLAIN
    state = method.init(model, 0, 1)
    tasks = method.configure(model, state, asked, TRAINING)
    updates = [trained_factors(task, task.client.id) for task in tasks]
    found = [method.aggregate(model, state, asked, o) for o in itertools.permutations(updates)]
    assert len({sha256(after.params) for after in found}) == 1
    assert all(after.notes == found[0].notes for after in found)


# --- Ranks that are given up ----------------------------------------------------------------------


def fitted(task: Task, update: Update) -> Fitted:
    """As if training had come to this update."""
    return Fitted(
        params={name: task.params[name] + delta for name, delta in update.delta.items()},
        num_examples=1,
        num_steps=1,
        metrics={},
        classes=torch.tensor([0, 1]),
    )


def reported(method: HetLoRA, model: Model, task: Task, **changes: list[object]) -> Update:
    """What a client answers when its factors have become these."""
    return method.report(model, task, fitted(task, setting(task, **changes)), {})[0]


def full(model: Model, **factors: Any) -> State:
    """A state of rank 4, ones in the first adapter."""
    return state_of(model, layers_0_a=[[1]] * 4, layers_0_b=[[1, 1, 1, 1]], **factors)


HALF = HetLoRA(ratio=(1.0,), decay=0.5)
"""A client that gives ranks up keeps half of them."""


@pytest.mark.parametrize(
    ("rank", "decay", "kept"),
    [
        (8, 0.99, 7),  # floor(7.92)
        (8, 0.5, 4),
        (8, 0.4, 3),  # floor(3.2)
        (8, 0.01, 1),  # never none
        (8, 1.0, 7),  # at least one is given up, if any
        (2, 0.99, 1),
        (1, 0.5, 1),
        (100, 0.29, 29),  # 0.29 x 100 is a little less than 29 in floating point
    ],
)
def test_how_many_ranks_are_kept(rank: int, decay: float, kept: int) -> None:
    assert kept_ranks(rank, decay) == kept


@given(st.integers(2, 64), st.floats(0.01, 1.0))
def test_one_rank_stays_and_one_goes(rank: int, decay: float) -> None:
    assert 1 <= kept_ranks(rank, decay) <= rank - 1


def test_the_norm_of_the_last_ranks_by_hand() -> None:
    # Of 4 ranks the last two: ||B[:, 2:]|| = ||(3, 4)|| = 5, ||A[2:]|| = ||(0, 2)|| = 2: 10.
    # The other adapter's: ||(0, 1)|| ||(6, 8)|| = 10
    model = adapted(4, 1, 1, 1)
    params = state_of(
        model,
        layers_0_a=[[9], [9], [0], [2]],
        layers_0_b=[[9, 9, 3, 4]],
        layers_1_a=[[9], [9], [6], [8]],
        layers_1_b=[[9, 9, 0, 1]],
    ).params
    assert tail_norm(model, params, 0.5) == pytest.approx(20.0)
    # Only the last: 4 x 2 + 1 x 8
    assert tail_norm(model, params, 0.99) == pytest.approx(16.0)


def test_ranks_that_shrank_are_given_up() -> None:
    model = adapted(4, 1, 1)
    state = full(model)
    (task,) = HALF.configure(model, state, clients(1), TRAINING)
    # The last two from ||(1, 1)|| ||(1, 1)|| = 2 to ||(1, 1)|| ||(0.5, 0.5)|| = 1; the first grew.
    update = reported(HALF, model, task, layers_0_b=[[7, 7, 0.5, 0.5]])
    assert update.delta[A].shape == (2, 1)
    assert update.delta[B].tolist() == [[6.0, 6.0]]
    assert update.submodel.views[A].shape == (2, 1)
    assert update.submodel.views[B].shape == (1, 2)
    after = HALF.aggregate(model, state, clients(1), [update])
    assert after.notes == {"ranks": {"0": 2}}
    # Zeros in the place of what was given up; nobody held it, so A stays and it can learn again.
    assert values(after.params, "layers_0_a") == [[1.0], [1.0], [1.0], [1.0]]
    assert values(after.params, "layers_0_b") == [[7.0, 7.0, 0.0, 0.0]]
    (task,) = HALF.configure(model, after, clients(1), TRAINING)
    assert task.submodel.sizes == {"rank": 2}


@pytest.mark.parametrize("last", [[1, 1], [3, 0.5]])
def test_ranks_that_did_not_shrink_stay(last: list[float]) -> None:
    # sqrt(9.25) sqrt(2) > 2, although one of them is smaller than before
    model = adapted(4, 1, 1)
    (task,) = HALF.configure(model, full(model), clients(1), TRAINING)
    update = reported(HALF, model, task, layers_0_b=[[0, 0, *last]])
    assert update.delta[A].shape == (4, 1)
    assert update.submodel is task.submodel


def test_without_decay_no_rank_is_ever_given_up() -> None:
    model = adapted(4, 1, 1)
    method = HetLoRA(ratio=(1.0,), decay=1.0)
    (task,) = method.configure(model, full(model), clients(1), TRAINING)
    update = reported(method, model, task, layers_0_b=[[1, 1, 0, 0]])
    assert update.delta[A].shape == (4, 1)


def test_what_is_given_up_is_remembered_for_that_client_alone() -> None:
    model, asked = adapted(4, 1, 1), clients(1, 1, 1)
    method = HetLoRA(ratio=(1.0, 0.5), decay=0.5)
    state = full(model)
    one, two, three = method.configure(model, state, asked, TRAINING)
    assert [len(task.params[A]) for task in (one, two, three)] == [4, 2, 4]
    updates = [
        reported(method, model, one, layers_0_b=[[2, 2, 0.5, 0.5]]),
        reported(method, model, two, layers_0_b=[[2, 0.5]]),
        reported(method, model, three, layers_0_b=[[2, 2, 2, 2]]),
    ]
    after = method.aggregate(model, state, asked, updates)
    assert after.notes == {"ranks": {"0": 2, "1": 1, "2": 4}}
    tasks = list(method.configure(model, after, asked, TRAINING))
    assert [task.submodel.sizes for task in tasks] == [{"rank": 2}, {"rank": 1}, {"rank": 4}]
    # Whoever does not take part keeps what it had, and a single rank is never given up.
    update = reported(method, model, tasks[1], layers_0_b=[[0]])
    assert update.delta[A].shape == (1, 1)
    later = method.aggregate(model, after, asked, [update])
    assert later.notes == after.notes
    again = list(method.configure(model, later, asked[::-1], TRAINING))
    assert [task.submodel.sizes["rank"] for task in again] == [4, 1, 2]
    # Nobody answers: all is as it was.
    assert method.aggregate(model, later, asked, []).notes == later.notes


def test_ranks_shrink_step_by_step_down_to_one() -> None:
    model, method = adapted(4, 1, 1), HetLoRA(ratio=(1.0,), decay=0.99)
    state, ranks = full(model), []
    for _ in range(5):
        (task,) = method.configure(model, state, clients(1), TRAINING)
        ranks.append(task.submodel.sizes["rank"])
        shrunk = (task.params[B] * 0.9).tolist()
        state = method.aggregate(
            model, state, clients(1), [reported(method, model, task, layers_0_b=shrunk)]
        )
    assert ranks == [4, 3, 2, 1, 1]


def test_all_adapters_give_up_together() -> None:
    # The first adapter's last ranks grow by 1, the second's shrink by 2: the sum counts.
    model = adapted(4, 1, 1, 1)
    state = full(model, layers_1_a=[[1]] * 4, layers_1_b=[[1, 1, 1, 1]])
    (task,) = HALF.configure(model, state, clients(1), TRAINING)
    grown: list[object] = [[1, 1, 1.5, 1.5]]
    gone: list[object] = [[1, 1, 0, 0]]
    update = reported(HALF, model, task, layers_0_b=grown, layers_1_b=gone)
    assert [len(update.delta[pair.down]) for pair in model.low_rank] == [2, 2]
    update = reported(HALF, model, task, layers_0_b=[[1, 1, 3.5, 3.5]], layers_1_b=gone)
    assert [len(update.delta[pair.down]) for pair in model.low_rank] == [4, 4]


def test_what_is_no_factor_is_reported_whole_and_masked_rows_stay_masked() -> None:
    model = adapted(4, 2, 2, classes=3)
    training = replace(TRAINING, mask_absent_classes=True)
    (task,) = HALF.configure(model, state_of(model), clients(1), training)
    update, _ = HALF.report(model, task, fitted(task, answer(task, 1.0)), {})
    cut = without_tail(model, update, 0.5)
    for part, rank in ((update, 4), (cut, 2)):
        shapes = {name: tuple(delta.shape) for name, delta in part.delta.items()}
        assert shapes == {A: (rank, 2), B: (2, rank), "head.weight": (2, 2), "head.bias": (2,)}
        assert shapes == {name: view.shape for name, view in part.submodel.views.items()}


# --- The loss -------------------------------------------------------------------------------------


def zero_logits(params: Params, inputs: Tensor) -> Output:
    """A model that knows nothing, and depends on nothing: cross-entropy log 2."""
    return Output(torch.zeros(len(inputs), 2), None)


PENALTY = TailPenalty(penalty=0.1, decay=0.5, pairs=((A, B),))
BATCH = (torch.tensor(X), torch.tensor(Y))


def test_the_penalty_by_hand() -> None:
    # ||B[:, 2:]|| = 5, ||A[2:]|| = 2 (see above): log 2 + 0.1 x 10
    params = {
        A: torch.tensor([[9.0], [9.0], [0.0], [2.0]]),
        B: torch.tensor([[9.0, 9.0, 3.0, 4.0]]),
    }
    loss = PENALTY(zero_logits, params, *BATCH, {})
    assert float(loss) == pytest.approx(0.693147 + 1.0, abs=1e-5)
    # d/dB = 0.1 x ||A|| B / ||B||: 0.1 x 2 x (3, 4) / 5; none for the first ranks
    up = params[B].requires_grad_()
    (gradient,) = torch.autograd.grad(PENALTY(zero_logits, params, *BATCH, {}), [up])
    torch.testing.assert_close(gradient, torch.tensor([[0.0, 0.0, 0.12, 0.16]]))


def test_a_client_is_trained_on_cross_entropy_and_the_penalty() -> None:
    model = adapted(4, 2, 2)
    method = HetLoRA(ratio=(1.0,), decay=0.5, penalty=0.1)
    (task,) = method.configure(model, method.init(model, 0, 1), clients(3), TRAINING)
    assert method.local(model, task, {}).objective == PENALTY
    for off in (replace(method, penalty=0.0), replace(method, decay=1.0)):
        assert off.local(model, task, {}).objective == CrossEntropy()


def test_where_b_begins_at_zero_the_first_steps_are_finite_and_not_held_back() -> None:
    model = adapted(4, 2, 2)
    method = HetLoRA(ratio=(1.0,), decay=0.5, penalty=0.1)
    (task,) = method.configure(model, method.init(model, 0, 1), clients(3), TRAINING)
    assert not bool(task.params[B].any())
    found, plain = (
        trained(each, model, task, X, Y).delta for each in (method, replace(method, penalty=0.0))
    )
    for name, delta in found.items():
        assert bool(delta.isfinite().all())
        torch.testing.assert_close(delta, plain[name])
    assert bool(found[B].any())


def test_a_penalty_keeps_the_last_ranks_small() -> None:
    model, norms = adapted(4, 2, 2), {}
    for penalty in (0.0, 1.0):
        method = HetLoRA(ratio=(1.0,), decay=0.5, penalty=penalty)
        state = method.init(model, 0, 1)
        training = replace(TRAINING, epochs=20, lr=0.1)
        (task,) = method.configure(model, state, clients(3), training)
        update = trained(method, model, task, X, Y)
        after = {name: task.params[name] + delta for name, delta in update.delta.items()}
        norms[penalty] = tail_norm(model, after, 0.5)
    assert norms[1.0] < 0.5 * norms[0.0]


def test_a_single_rank_has_no_tail() -> None:
    params = {A: torch.ones(1, 2), B: torch.ones(2, 1)}
    assert float(PENALTY(zero_logits, params, *BATCH, {})) == pytest.approx(0.693147, abs=1e-5)
    assert tail_norm(adapted(1, 2, 2), params, 0.5) == 0.0


@pytest.mark.parametrize("scale", [0.0, 1.0])
def test_many_clients_at_once_are_one_after_another(scale: float) -> None:
    model = adapted(4, 2, 2, 2)
    objective = replace(PENALTY, pairs=tuple((p.down, p.up) for p in model.low_rank))
    draw = torch.Generator().manual_seed(0)
    stack = {name: torch.randn(3, *shape, generator=draw) for name, shape in model.shapes.items()}
    stack |= {pair.up: scale * stack[pair.up] for pair in model.low_rank}
    module = model.module()

    def loss(params: Params) -> Tensor:
        def forward(params: Params, inputs: Tensor) -> Output:
            out: Output = torch.func.functional_call(module, params, (inputs,))
            return out

        return objective(forward, params, *BATCH, {})

    together, losses = torch.func.vmap(torch.func.grad_and_value(loss))(stack)
    for client in range(3):
        own = {name: tensor[client] for name, tensor in stack.items()}
        alone, value = torch.func.grad_and_value(loss)(own)
        torch.testing.assert_close(losses[client], value)
        for name, gradient in alone.items():
            assert bool(gradient.isfinite().all())
            torch.testing.assert_close(together[name][client], gradient)


# --- Settings -------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{"decay": 0.0}, {"decay": 1.1}, {"penalty": -0.1}])
def test_settings_that_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"method\.decay must be in \(0, 1\]"):
        HetLoRA(**settings).init(adapted(2, 2, 2), 0, 1)


@pytest.mark.parametrize("ratio", [(), (0.0,), (1.5,)])
def test_ratios_that_are_refused(ratio: tuple[float, ...]) -> None:
    model, method = adapted(2, 2, 2), HetLoRA(ratio=ratio)
    with pytest.raises(ConfigError, match=r"method\.ratio"):
        next(method.configure(model, method.init(model, 0, 1), clients(1), TRAINING))
