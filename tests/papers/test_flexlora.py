"""FlexLoRA by hand: Bai et al., NeurIPS 2024; against dense singular value decompositions."""

from __future__ import annotations

import itertools

import pytest
import torch
from worked import (
    TRAINING,
    adapted,
    answer,
    clients,
    mean_product,
    products,
    setting,
    state_of,
    trained,
    trained_factors,
)

from tesserafl.core.lowrank import Collected, aggregation_error
from tesserafl.core.messages import Task, Update
from tesserafl.core.method import State, weights_of
from tesserafl.core.model import Model
from tesserafl.core.params import sha256
from tesserafl.methods import FedAvg, FlexLoRA

A, B = "layers.0.a", "layers.0.b"
X, Y = [[1.0, -2.0], [0.5, 1.0], [2.0, 0.25]], [0, 1, 1]


def drawn(
    method: FlexLoRA, model: Model, *num_examples: int
) -> tuple[State, list[Task], list[Update], State]:
    """A round of clients whose factors are drawn: before, tasks, updates, after."""
    state, asked = method.init(model, 0, 1), clients(*num_examples)
    tasks = list(method.configure(model, state, asked, TRAINING))
    updates = [trained_factors(task, seed) for seed, task in enumerate(tasks)]
    return state, tasks, updates, method.aggregate(model, state, asked, updates)


def shares_of(*num_examples: int) -> list[float]:
    return [n / sum(num_examples) for n in num_examples]


def error_of(
    model: Model, before: State, after: State, updates: list[Update], *num_examples: int
) -> float | None:
    kept = Collected(model, weights_of(clients(*num_examples), "examples"))
    for _ in kept.watching(before.params, updates):
        pass
    return aggregation_error(model, after.params, kept.shares)


def test_a_round_by_hand() -> None:
    # n = 1, 3.  B_0 A_0 = (4 0)^T (1 0) = (4 0; 0 0);  B_1 A_1 = (0 4)^T (0 1) = (0 0; 0 4)
    # W = 1/4 (4 0; 0 0) + 3/4 (0 0; 0 4) = diag(1, 3): s = 3, 1 with the directions e_2, e_1.
    # Rank 2: B = (0 1; 3 0), A = (0 1; 1 0), up to signs that cancel.
    # A client of rank 1: B = (0 3)^T, A = (0 1)
    model, asked, method = adapted(2, 2, 2), clients(1, 3), FlexLoRA(ratio=(1.0, 0.5))
    state = state_of(model)
    one, other = method.configure(model, state, asked, TRAINING)
    updates = [
        setting(one, layers_0_a=[[1, 0], [0, 0]], layers_0_b=[[4, 0], [0, 0]]),
        setting(other, layers_0_a=[[0, 1]], layers_0_b=[[0], [4]]),
    ]
    after = method.aggregate(model, state, asked, updates)
    assert after.round == 1
    torch.testing.assert_close(after.params[A].abs(), torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
    torch.testing.assert_close(after.params[B].abs(), torch.tensor([[0.0, 1.0], [3.0, 0.0]]))
    torch.testing.assert_close(
        products(model, after.params)[0], torch.diag(torch.tensor([1, 3.0]).double())
    )
    _, small = method.configure(model, after, asked, TRAINING)
    torch.testing.assert_close(
        small.params[B] @ small.params[A], torch.tensor([[0.0, 0.0], [0.0, 3.0]])
    )
    # Uniform weights: W = diag(2, 2)
    even = FlexLoRA(ratio=(1.0, 0.5), weighting="uniform").aggregate(model, state, asked, updates)
    torch.testing.assert_close(products(model, even.params)[0], 2.0 * torch.eye(2).double())


@pytest.mark.parametrize("ratio", [(0.25,), (0.5, 0.25), (0.25, 0.125, 0.5)])
def test_with_room_for_all_directions_nothing_is_lost(ratio: tuple[float, ...]) -> None:
    # Ranks 2 2 2, 4 2 4 and 2 1 4: the mean has rank 6, 7 (the matrix's smaller side) and 7; ...
    model, method = adapted(8, 7, 8, 6), FlexLoRA(ratio=ratio)
    state, tasks, updates, after = drawn(method, model, 1, 2, 5)
    means = mean_product(model, tasks, updates, shares_of(1, 2, 5))
    for mean, found in zip(means, products(model, after.params), strict=True):
        # ... the global rank is 8.
        assert int(torch.linalg.matrix_rank(mean)) <= 8
        assert float((found - mean).norm() / mean.norm()) < 1e-5
    error = error_of(model, state, after, updates, 1, 2, 5)
    assert error is not None
    assert error < 1e-5


@pytest.mark.parametrize("ratio", [(1.0,), (1.0, 0.5), (0.5, 1.0, 1.0)])
def test_what_is_lost_are_the_smallest_singular_values(ratio: tuple[float, ...]) -> None:
    model, method = adapted(4, 20, 15, 18), FlexLoRA(ratio=ratio)
    state, tasks, updates, after = drawn(method, model, 3, 1, 2)
    lost = size = 0.0
    for mean, found in zip(
        mean_product(model, tasks, updates, shares_of(3, 1, 2)),
        products(model, after.params),
        strict=True,
    ):
        u, s, vh = torch.linalg.svd(mean, full_matrices=False)
        best = u[:, :4] * s[:4] @ vh[:4]
        torch.testing.assert_close(found, best, rtol=0, atol=1e-5 * float(s[0]))
        tail = float(s[4:].square().sum())
        assert float((found - mean).square().sum()) == pytest.approx(tail, rel=1e-5)
        assert tail > 0
        lost, size = lost + tail, size + float(s.square().sum())
    error = error_of(model, state, after, updates, 3, 1, 2)
    assert error == pytest.approx((lost / size) ** 0.5, rel=1e-5)


def test_every_client_gets_the_best_that_its_rank_can_hold() -> None:
    model, method = adapted(8, 20, 15), FlexLoRA(ratio=(1.0, 0.5, 0.125))
    _, tasks, updates, after = drawn(method, model, 1, 1, 1)
    mean = mean_product(model, tasks, updates, shares_of(1, 1, 1))[0]
    u, s, vh = torch.linalg.svd(mean, full_matrices=False)
    # Rows of A are unit vectors, the singular values are all in B.
    gram = after.params[A].double() @ after.params[A].double().T
    torch.testing.assert_close(gram, torch.eye(8).double(), rtol=0, atol=1e-6)
    torch.testing.assert_close(after.params[B].norm(dim=0).double(), s[:8], rtol=1e-5, atol=0)
    tasks = list(method.configure(model, after, clients(1, 1, 1), TRAINING))
    for task, rank in zip(tasks, (8, 4, 1), strict=True):
        assert task.submodel.sizes == {"rank": rank}
        (product,) = products(model, task.params)
        best = u[:, :rank] * s[:rank] @ vh[:rank]
        torch.testing.assert_close(product, best, rtol=0, atol=1e-5 * float(s[0]))


def test_directions_that_are_free_can_still_learn() -> None:
    # Only the client of rank 1 answers: one direction of four.
    model, asked, method = adapted(4, 6, 5), clients(1, 1), FlexLoRA(ratio=(1.0, 0.25))
    state = method.init(model, 3, 1)
    _, task = method.configure(model, state, asked, TRAINING)
    update = trained_factors(task, 0)
    after = method.aggregate(model, state, asked, [update])
    assert torch.equal(after.params[A][1:], state.params[A][1:])
    assert torch.equal(after.params[B][:, 1:], torch.zeros(5, 3))
    (mean,) = mean_product(model, [task], [update], [1.0])
    torch.testing.assert_close(products(model, after.params)[0], mean, rtol=1e-5, atol=1e-6)


def test_what_rounding_leaves_is_no_direction() -> None:
    # Both of rank 4, but only the first column of B was moved: W has rank 2 at most.
    model, asked, method = adapted(4, 6, 5), clients(1, 2), FlexLoRA()
    state = method.init(model, 3, 1)
    updates = []
    for task in method.configure(model, state, asked, TRAINING):
        update = trained_factors(task, task.client.id)
        update.delta[B][:, 1:] = 0.0
        updates.append(update)
    after = method.aggregate(model, state, asked, updates)
    assert torch.equal(after.params[A][2:], state.params[A][2:])
    assert torch.equal(after.params[B][:, 2:], torch.zeros(5, 2))
    assert bool((after.params[B][:, :2].norm(dim=0) > 1e-3).all())


def test_where_nothing_was_learnt_a_stays() -> None:
    model, asked, method = adapted(4, 6, 5), clients(1, 2), FlexLoRA()
    state = method.init(model, 3, 1)
    updates = [answer(t, 0.0) for t in method.configure(model, state, asked, TRAINING)]
    after = method.aggregate(model, state, asked, updates)
    assert sha256(after.params) == sha256(state.params)
    assert error_of(model, state, after, updates, 1, 2) is None


def test_one_client_alone_keeps_its_product() -> None:
    model, method = adapted(2, 2, 2, classes=2), FlexLoRA()
    state = method.init(model, 0, 1)
    (task,) = method.configure(model, state, clients(3), TRAINING)
    update = trained(method, model, task, X, Y)
    after = method.aggregate(model, state, clients(3), [update])
    (mean,) = mean_product(model, [task], [update], [1.0])
    torch.testing.assert_close(products(model, after.params)[0], mean, rtol=1e-5, atol=1e-6)
    for name in ("head.weight", "head.bias"):
        torch.testing.assert_close(after.params[name], state.params[name] + update.delta[name])
        assert bool(update.delta[name].any())


def test_what_is_no_factor_is_averaged_as_ever() -> None:
    model, asked = adapted(2, 4, 3, classes=2), clients(1, 3)
    heads = []
    for method in (FlexLoRA(), FedAvg()):
        state = method.init(model, 0, 1)
        tasks = method.configure(model, state, asked, TRAINING)
        updates = [trained_factors(task, task.client.id) for task in tasks]
        after = method.aggregate(model, state, asked, updates)
        heads.append({n: t for n, t in after.params.items() if n.startswith("head")})
    assert sha256(heads[0]) == sha256(heads[1])


def test_the_order_of_updates_changes_no_bit() -> None:
    model, method = adapted(4, 9, 7, 8, classes=3), FlexLoRA(ratio=(1.0, 0.5))
    state, _, updates, after = drawn(method, model, 1, 2, 3, 4)
    for order in itertools.permutations(updates):
        again = method.aggregate(model, state, clients(1, 2, 3, 4), order)
        assert sha256(again.params) == sha256(after.params)


def test_types_and_shapes_stay() -> None:
    model, method = adapted(2, 4, 3), FlexLoRA()
    _, _, _, after = drawn(method, model, 1, 1)
    assert {tensor.dtype for tensor in after.params.values()} == {torch.float32}
    assert {n: tuple(t.shape) for n, t in after.params.items()} == model.shapes
