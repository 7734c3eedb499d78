"""FedBuff by hand: Nguyen et al., AISTATS 2022, Algorithm 1."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from worked import TRAINING, answer, clients, mlp, state_of, values

from tesserafl.core.errors import ConfigError
from tesserafl.core.method import State
from tesserafl.core.submodel import SubModel
from tesserafl.methods import FedBuff
from tesserafl.methods._staleness import decayed

MODEL = mlp(2)


def buffered(method: FedBuff, changes: dict[int, float], round: int = 5) -> State:
    """The model, 1 everywhere in the head's bias, after a buffer: staleness -> change."""
    asked = clients(*[1 + 2 * number for number in range(len(changes))])
    state = state_of(MODEL, round=round, head_bias=[1, 1])
    updates = []
    for client, (staleness, change) in zip(asked, changes.items(), strict=True):
        older = replace(state, round=round - staleness)
        (task,) = method.configure(MODEL, older, [client], TRAINING)
        updates.append(answer(task, change))
    return method.aggregate(MODEL, state, asked, updates)


def test_a_buffer_of_three_of_different_age() -> None:
    # K = 3, tau = (0, 3, 8), s = (1 + tau)^(-1/2) = (1, 1/2, 1/3); Delta = (1, 4, 12)
    # w + (1 + 2 + 4) / 3 = 1 + 7/3
    after = buffered(FedBuff(), {0: 1.0, 3: 4.0, 8: 12.0}, round=8)
    assert values(after.params, "head_bias") == pytest.approx([1 + 7 / 3] * 2)
    assert after.round == 9


def test_the_servers_rate() -> None:
    # eta_g = 1/2: w + 7/6
    after = buffered(FedBuff(server_lr=0.5), {0: 1.0, 3: 4.0, 8: 12.0}, round=8)
    assert values(after.params, "head_bias") == pytest.approx([1 + 7 / 6] * 2)


def test_the_age_lessens_a_change_and_not_its_weight() -> None:
    # 1/K, not 1 / sum of s: a buffer of stale updates alone takes a short step.
    after = buffered(FedBuff(), {3: 4.0})
    assert values(after.params, "head_bias") == [3.0, 3.0]


def test_weighted_by_examples() -> None:
    # n = 1 and 3: (1 x 1 x 4 + 3 x 1/2 x 8) / 4 = 4
    after = buffered(FedBuff(weighting="examples"), {0: 4.0, 3: 8.0})
    assert values(after.params, "head_bias") == [5.0, 5.0]


def test_the_mean_runs_over_those_that_trained_an_entry() -> None:
    # Of the output layer's 2 x 2 entries the narrow client trains the first column.
    method, asked = FedBuff(ratio=(1.0, 0.5)), clients(1, 1)
    state = state_of(MODEL, round=3)
    wide, narrow = method.configure(MODEL, state, asked, TRAINING)
    assert isinstance(narrow.submodel, SubModel)
    after = method.aggregate(MODEL, state, asked, [answer(wide, 2.0), answer(narrow, 6.0)])
    assert values(after.params, "head_weight") == [[4.0, 2.0], [4.0, 2.0]]


@pytest.mark.parametrize(
    ("decay", "a", "b", "expected"),
    [
        ("constant", 0.5, 4.0, [1, 1, 1, 1]),
        ("polynomial", 0.5, 4.0, [1, 1 / math.sqrt(2), 1 / math.sqrt(5), 1 / 3]),
        ("polynomial", 1.0, 4.0, [1, 1 / 2, 1 / 5, 1 / 9]),
        ("hinge", 0.5, 4.0, [1, 1, 1, 1 / (0.5 * 4 + 1)]),
        ("hinge", 10.0, 0.0, [1, 1 / 11, 1 / 41, 1 / 81]),
    ],
)
def test_how_age_counts(decay: str, a: float, b: float, expected: list[float]) -> None:
    found = [decayed(tau, decay, a, b) for tau in (0, 1, 4, 8)]  # type: ignore[arg-type]
    assert found == pytest.approx(expected)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"staleness": "linear"}, "FedBuff: staleness='linear'; allowed: constant, hinge"),
        ({"a": 0.0}, r"FedBuff: a must be positive and b 0 or more; got 0\.0 and 4\.0"),
        ({"b": -1.0}, r"got 0\.5 and -1\.0"),
        ({"server_lr": 0.0}, r"FedBuff: server_lr must be positive; got 0\.0"),
    ],
)
def test_settings_that_cannot_be(given: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FedBuff(**given)  # type: ignore[arg-type]
