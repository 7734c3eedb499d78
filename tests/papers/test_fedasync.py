"""FedAsync by hand: Xie, Koyejo and Gupta, OPT 2020, Algorithm 1."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from worked import TRAINING, answer, clients, mlp, state_of, trained, values

from tesserafl.core.errors import ConfigError
from tesserafl.core.messages import Client, Task, Update
from tesserafl.core.method import State
from tesserafl.methods import FedAsync

MODEL = mlp(2)


def coming_to(task: Task, value: float) -> Update:
    """The answer of a client whose parameters are all this in the end."""
    values = {name: torch.full_like(tensor, value) for name, tensor in task.params.items()}
    return replace(answer(task, 0.0), delta={}, extra=values)


def mixed(
    method: FedAsync, now: float, answers: Sequence[tuple[int, float]], asked: Sequence[Client]
) -> State:
    """The model, `now` everywhere, after answers of this staleness and value."""
    state = state_of(MODEL, round=9)
    state = replace(state, params={n: torch.full_like(t, now) for n, t in state.params.items()})
    updates = []
    for client, (staleness, value) in zip(asked, answers, strict=True):
        older = replace(state, round=9 - staleness)
        (task,) = method.configure(MODEL, older, [client], TRAINING)
        updates.append(coming_to(task, value))
    return method.aggregate(MODEL, state, asked, updates)


@pytest.mark.parametrize(
    ("method", "staleness", "share"),
    [
        (FedAsync(alpha=0.6), 0, 0.6),
        (FedAsync(alpha=0.6), 3, 0.6 * 0.5),  # (1 + 3)^(-1/2)
        (FedAsync(alpha=0.5, staleness="constant"), 7, 0.5),
        (FedAsync(alpha=0.9, staleness="hinge", a=10.0, b=4.0), 4, 0.9),
        (FedAsync(alpha=0.9, staleness="hinge", a=0.5, b=4.0), 8, 0.9 / 3),
        (FedAsync(alpha=1.0), 0, 1.0),
    ],
)
def test_an_answer_is_mixed_in(method: FedAsync, staleness: int, share: float) -> None:
    # w = 8, w_new = 4: (1 - alpha_t) x 8 + alpha_t x 4
    after = mixed(method, 8.0, [(staleness, 4.0)], clients(5))
    expected = (1 - share) * 8 + share * 4
    for value in after.params.values():
        torch.testing.assert_close(value, torch.full_like(value, expected))
    assert after.round == 10


def test_what_is_mixed_in_is_where_the_client_came_to_and_not_how_far() -> None:
    """The server no longer has what an old answer began with."""
    method, state = FedAsync(alpha=0.5, staleness="constant"), state_of(MODEL)
    (task,) = method.configure(MODEL, state, clients(1), TRAINING)
    update = trained(method, MODEL, task, [[1.0, 2.0]], [0])
    # Zeros: p = (1/2, 1/2), b <- (1/4, -1/4).
    assert update.delta == {}
    assert update.extra["head.bias"].tolist() == [0.25, -0.25]
    now = state_of(MODEL, round=4, head_bias=[1, 1])
    after = method.aggregate(MODEL, now, clients(1), [update])
    assert values(after.params, "head_bias") == [0.625, 0.375]


def test_of_several_answers_the_mean_is_mixed_in() -> None:
    # w = 8. Fresh: 8 + 0.6 (4 - 8) = 5.6; of 3 versions ago: 8 + 0.3 (12 - 8) = 9.2; mean 7.4
    after = mixed(FedAsync(), 8.0, [(0, 4.0), (3, 12.0)], clients(1, 1))
    assert values(after.params, "head_bias") == pytest.approx([7.4, 7.4])
    # Weighted by examples, 3 and 1: 8 + (3 x -2.4 + 1 x 1.2) / 4 = 6.5
    weighted = mixed(FedAsync(weighting="examples"), 8.0, [(0, 4.0), (3, 12.0)], clients(3, 1))
    assert values(weighted.params, "head_bias") == pytest.approx([6.5, 6.5])


def test_a_part_is_mixed_into_its_place() -> None:
    method, asked = FedAsync(alpha=0.5, ratio=(0.5,)), clients(1)
    state = state_of(MODEL, head_weight=[[2, 2], [2, 2]])
    (task,) = method.configure(MODEL, state, asked, TRAINING)
    after = method.aggregate(MODEL, state, asked, [coming_to(task, 6.0)])
    assert values(after.params, "head_weight") == [[4.0, 2.0], [4.0, 2.0]]


def test_with_masked_classes_only_owners_report_rows() -> None:
    # The client has class 1 alone: row 0 of the output layer is not its to hold back.
    method, state = FedAsync(alpha=0.5), state_of(MODEL, head_bias=[1, 1])
    training = replace(TRAINING, mask_absent_classes=True)
    (task,) = method.configure(MODEL, state, clients(1), training)
    update = trained(method, MODEL, task, [[1.0, 2.0]], [1])
    later = state_of(MODEL, round=1, head_bias=[3, 1])
    after = method.aggregate(MODEL, later, clients(1), [update])
    assert after.params["head.bias"][0] == 3.0
    assert update.extra["head.bias"].shape == (1,)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"alpha": 0.0}, r"FedAsync: alpha must be in \(0, 1\]; got 0\.0"),
        ({"alpha": 1.5}, r"got 1\.5"),
        ({"staleness": "none"}, "FedAsync: staleness='none'; allowed"),
    ],
)
def test_settings_that_cannot_be(given: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FedAsync(**given)  # type: ignore[arg-type]
