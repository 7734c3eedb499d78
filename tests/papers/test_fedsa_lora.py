"""FedSA-LoRA by hand: Guo et al., ICLR 2025."""

from __future__ import annotations

import pytest
import torch
from worked import TRAINING, adapted, clients, mlp, state_of, values

from tesserafl.core.errors import ConfigError
from tesserafl.core.fit import Fitted
from tesserafl.core.messages import Memory, Task, Update
from tesserafl.core.method import State
from tesserafl.core.model import Model
from tesserafl.methods import FedSALoRA

A, B = "layers.0.a", "layers.0.b"


def fitted(method: FedSALoRA, model: Model, task: Task, change: float) -> tuple[Update, Memory]:
    """What a client reports and keeps after every parameter moved by `change`."""
    start = method.local(model, task, {}).params
    moved = {name: tensor + change for name, tensor in start.items()}
    done = Fitted(params=moved, num_examples=1, num_steps=1, metrics={}, classes=torch.tensor([0]))
    return method.report(model, task, done, {})


def played(ratio: tuple[float, ...], rank: int = 1) -> tuple[Model, State, list[Memory]]:
    """Two clients of 1 and 3 examples that move everything by 1 and by 2."""
    model, asked, method = adapted(rank, 2, 2, classes=2), clients(1, 3), FedSALoRA(ratio=ratio)
    state = state_of(model, layers_0_a=[[10, 20]] * rank)
    tasks = list(method.configure(model, state, asked, TRAINING))
    (one, first), (other, second) = (
        fitted(method, model, task, change) for task, change in zip(tasks, (1.0, 2.0), strict=True)
    )
    return model, method.aggregate(model, state, asked, [one, other]), [first, second]


def test_a_is_averaged_and_nothing_else_leaves_a_client() -> None:
    # A: (10 20) + (1 x 1 + 3 x 2) / 4 = (11.75 21.75); B and the head stay as they began.
    model, state, memories = played((1.0,))
    assert values(state.params, "layers_0_a") == [[11.75, 21.75]]
    assert values(state.params, "layers_0_b") == [[0.0], [0.0]]
    assert set(memories[0]) == {f"own/{name}" for name in model.shapes if name != A}
    assert memories[1][f"own/{B}"].tolist() == [[2.0], [2.0]]


def test_a_client_goes_on_with_the_mean_a_and_its_own_b() -> None:
    model, state, memories = played((1.0,))
    method = FedSALoRA()
    task = next(method.configure(model, state, clients(1), TRAINING))
    fit = method.local(model, task, memories[1])
    assert fit.params[A].tolist() == [[11.75, 21.75]]
    assert fit.params[B].tolist() == [[2.0], [2.0]]
    assert list(fit.params) == list(task.params)  # a gradient's norm depends on the order
    own = method.personal(model, state, memories[1])
    assert own.model.num_entries == model.num_entries
    assert own.params[A].tolist() == [[11.75, 21.75]] and own.params[B].tolist() == [[2.0], [2.0]]


def test_a_client_of_fewer_ranks_predicts_with_them() -> None:
    model, state, memories = played((1.0, 0.5), rank=2)
    whole, half = (FedSALoRA().personal(model, state, memory) for memory in memories)
    assert (whole.model.units("rank"), half.model.units("rank")) == (2, 1)
    assert whole.params[B].shape == (2, 2) and half.params[B].shape == (2, 1)
    assert half.params[A].tolist() == [[11.75, 21.75]]  # rank 0: both; rank 1: the first alone
    assert whole.params[A].tolist()[1] == [11.0, 21.0]
    inputs = torch.ones(1, 2)
    for each in (whole, half):
        module = each.model.module()
        torch.func.functional_call(module, each.params, (inputs,))


def test_who_was_never_asked_has_the_initial_rest() -> None:
    model, state, _ = played((1.0,))
    assert FedSALoRA().personal(model, state, {}).params[B].tolist() == [[0.0], [0.0]]


def test_a_model_without_adapters_is_refused() -> None:
    with pytest.raises(ConfigError, match="FedSALoRA averages low-rank adapters"):
        FedSALoRA().init(mlp(4), 0, 1)
