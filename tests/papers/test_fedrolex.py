"""FedRolex by hand: Alam et al., NeurIPS 2022, Algorithm 1 and Equation 3."""

from __future__ import annotations

import pytest
from worked import (
    TRAINING,
    answer,
    clients,
    mlp,
    rounds_of,
    share,
    state_of,
    times_trained,
    units_of,
    values,
)

from tesserafl.methods import FedRolex


def test_the_window_starts_at_the_round_and_wraps_around() -> None:
    # K = 4, r = 1/2: S^(j) = {j, j + 1} modulo 4
    model = mlp(4)
    tasks = [tasks[0] for tasks in rounds_of(FedRolex(ratio=(0.5,)), model, 1, range(5))]
    kept = [units_of(model, task)["hidden1"] for task in tasks]
    assert kept == [[0, 1], [1, 2], [2, 3], [0, 3], [0, 1]]


def test_layers_of_other_widths_wrap_at_their_own_width() -> None:
    # Round 5: 5 mod 4 = 1 and 5 mod 6 = 5; ceil(r K) = 2 and 3
    model = mlp(4, 6)
    ((task,),) = rounds_of(FedRolex(ratio=(0.5,)), model, 1, [5])
    assert units_of(model, task) == {"hidden1": [1, 2], "hidden2": [0, 1, 5]}


def test_clients_of_one_ratio_share_a_window_and_others_are_nested_at_its_start() -> None:
    model = mlp(8)
    (tasks,) = rounds_of(FedRolex(ratio=(0.25, 0.5)), model, 4, [6])
    kept = [units_of(model, task)["hidden1"] for task in tasks]
    assert kept == [[6, 7], [0, 1, 6, 7]] * 2


def test_a_round_by_hand() -> None:
    # Round 3 of K = 4: client 0 (r = 1/2) has units 3 and 0, client 1 (r = 3/4) 3, 0 and 1.
    # Changes 1 and 3: units 3 and 0 get 2, unit 1 gets 3, unit 2 stays.
    model, asked, method = mlp(4), clients(1, 1), FedRolex(ratio=(0.5, 0.75))
    state = state_of(model, round=3, layers_0_bias=[10, 20, 30, 40])
    one, other = method.configure(model, state, asked, TRAINING)
    assert values(one.params, "layers_0_bias") == [10.0, 40.0]
    after = method.aggregate(model, state, asked, [answer(one, 1.0), answer(other, 3.0)])
    assert values(after.params, "layers_0_bias") == [12.0, 23.0, 30.0, 42.0]
    assert after.round == 4


@pytest.mark.parametrize(
    ("widths", "s", "expected"),
    [
        # Pairs within a cyclic distance below r K: (2 r K - 1) / K between equal widths.
        ((128, 128), 2, 127 / 128),
        ((128, 128), 4, 63 / 128),
        ((128, 128), 8, 31 / 128),
        ((128, 128), 16, 15 / 128),
        # Digest 1.1
        ((64, 128), 2, 1.0),
        ((64, 128), 4, 0.734),
        ((64, 128), 8, 0.359),
        ((64, 128), 16, 0.172),
    ],
)
def test_only_a_band_of_the_weights_is_ever_trained(
    widths: tuple[int, int], s: int, expected: float
) -> None:
    # The windows repeat after 128 rounds.
    model = mlp(*widths)
    counts = times_trained(model, rounds_of(FedRolex(ratio=(1 / s,)), model, 1, range(128)))
    assert share(counts["layers.1.weight"]) == pytest.approx(expected, abs=5e-4)
    assert share(counts["layers.0.weight"]) == share(counts["head.weight"]) == 1.0


def test_every_unit_is_trained_equally_often() -> None:
    model = mlp(8)
    counts = times_trained(model, rounds_of(FedRolex(ratio=(0.25,)), model, 3, range(8)))
    assert counts["layers.0.bias"].tolist() == [3 * 2] * 8
