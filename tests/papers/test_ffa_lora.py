"""FFA-LoRA by hand: Sun et al., ICLR 2024."""

from __future__ import annotations

import pytest
import torch
from worked import (
    TRAINING,
    adapted,
    answer,
    clients,
    mean_product,
    products,
    state_of,
    trained,
    values,
)

from tesserafl.core.lowrank import Collected, aggregation_error
from tesserafl.core.messages import Task, Update
from tesserafl.core.method import weights_of
from tesserafl.core.model import Model
from tesserafl.core.params import Params, num_bytes
from tesserafl.methods import FedIT, FFALoRA

X, Y = [[1.0, -2.0], [0.5, 1.0], [2.0, 0.25]], [0, 1, 1]
FIRST = "layers.0.a"


def only_b(task: Task, change: float, **changes: list[object]) -> Update:
    """An update as FFA-LoRA's clients send it."""
    update = answer(task, change, **changes)
    delta = {name: d for name, d in update.delta.items() if not name.endswith(".a")}
    return Update(**{**vars(update), "delta": delta})


def error_of(
    model: Model, before: Params, after: Params, updates: list[Update], *num_examples: int
) -> float | None:
    kept = Collected(model, weights_of(clients(*num_examples), "examples"))
    for _ in kept.watching(before, updates):
        pass
    return aggregation_error(model, after, kept.shares)


def test_the_mean_of_b_times_a_is_the_mean_product() -> None:
    # n = 1, 3; A = (1 2).  B_0 = (4 0)^T, B_1 = (0 4)^T: B = (1 3)^T, B A = (1 2; 3 6)
    # 1/4 (4 8; 0 0) + 3/4 (0 0; 4 8) = (1 2; 3 6)
    model, asked, method = adapted(1, 2, 2), clients(1, 3), FFALoRA()
    state = state_of(model, layers_0_a=[[1, 2]])
    one, other = method.configure(model, state, asked, TRAINING)
    updates = [
        only_b(one, 0.0, layers_0_b=[[4.0], [0.0]]),
        only_b(other, 0.0, layers_0_b=[[0.0], [4.0]]),
    ]
    after = method.aggregate(model, state, asked, updates)
    assert values(after.params, "layers_0_b") == [[1.0], [3.0]]
    assert torch.equal(after.params[FIRST], state.params[FIRST])
    (product,) = products(model, after.params)
    assert product.tolist() == [[1.0, 2.0], [3.0, 6.0]]
    assert torch.equal(product, mean_product(model, [one, other], updates, [0.25, 0.75])[0])
    assert error_of(model, state.params, after.params, updates, 1, 3) == 0.0


def test_a_never_changes_and_b_does() -> None:
    model, asked, method = adapted(2, 2, 3, 2, classes=2), clients(3, 3), FFALoRA()
    first = state = method.init(model, 1, 4)
    for round in range(4):
        tasks = list(method.configure(model, state, asked, TRAINING))
        updates = [trained(method, model, task, X, Y) for task in tasks]
        before, state = state, method.aggregate(model, state, asked, updates)
        assert state.round == round + 1
        error = error_of(model, before.params, state.params, updates, 3, 3)
        assert error is not None
        assert error < 1e-6  # float32's rounding of B, and no more
    for pair in model.low_rank:
        assert torch.equal(state.params[pair.down], first.params[pair.down])
        assert not torch.equal(state.params[pair.up], first.params[pair.up])
    assert not torch.equal(state.params["head.weight"], first.params["head.weight"])


def test_one_client_alone_is_plain_local_training_of_b() -> None:
    # One step: the gradient of B does not know whether A is trained as well.
    model = adapted(2, 2, 2, classes=2)
    state = FFALoRA().init(model, 0, 1)
    (task,) = FFALoRA().configure(model, state, clients(3), TRAINING)
    update = trained(FFALoRA(), model, task, X, Y)
    plain = trained(FedIT(), model, task, X, Y)
    assert update.delta.keys() == plain.delta.keys() - {FIRST}
    after = FFALoRA().aggregate(model, state, clients(3), [update])
    for name, delta in update.delta.items():
        assert torch.equal(delta, plain.delta[name])
        torch.testing.assert_close(after.params[name], state.params[name] + delta)


@pytest.mark.parametrize("ratio", [(1.0,), (0.5,)])
def test_half_the_uplink_of_square_adapters(ratio: tuple[float, ...]) -> None:
    model, sizes = adapted(4, 2, 2, 2), {}
    for method in (FedIT(ratio=ratio), FFALoRA(ratio=ratio)):
        state = method.init(model, 0, 1)
        (task,) = method.configure(model, state, clients(3), TRAINING)
        update = trained(method, model, task, X, Y)
        sizes[type(method)] = update.num_bytes
        # A goes down all the same: a new client must have it.
        assert task.num_bytes == num_bytes(task.params) == sizes[FedIT]
    # Two adapters, 2 x r entries of 4 bytes each
    assert sizes[FFALoRA] == 2 * 2 * 4 * ratio[0] * 4
    assert sizes[FedIT] == 2 * sizes[FFALoRA]


def test_below_the_full_rank_the_first_columns_are_trained() -> None:
    model, asked, method = adapted(4, 2, 1), clients(1, 3), FFALoRA(ratio=(1.0, 0.5))
    state = method.init(model, 0, 1)
    one, other = method.configure(model, state, asked, TRAINING)
    updates = [only_b(one, 1.0), only_b(other, 4.0)]
    after = method.aggregate(model, state, asked, updates)
    # (1 + 3 x 4) / 4 for the ranks of both, 1 for those of client 0 alone
    assert values(after.params, "layers_0_b") == [[3.25, 3.25, 1.0, 1.0]]
    assert torch.equal(after.params[FIRST], state.params[FIRST])
    # Not the mean of the products, where those count 1/4: it is exact for equal ranks alone.
    error = error_of(model, state.params, after.params, updates, 1, 3)
    assert error is not None
    assert error > 0.01
