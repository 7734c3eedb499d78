"""Federated Dropout by hand: Caldas et al., 2018, section 3.2."""

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
)

from tesserafl.core.coverage import Coverage
from tesserafl.methods import FederatedDropout


def test_every_client_layer_and_round_has_a_draw_of_its_own() -> None:
    # ceil(40 / 4) = 10 of 40 units: two equal draws among 30 have odds of about 1 in 2 million.
    model = mlp(40, 40)
    drawn = [
        tuple(units)
        for tasks in rounds_of(FederatedDropout(ratio=(0.25,)), model, 5, range(3))
        for task in tasks
        for units in units_of(model, task).values()
    ]
    assert len(drawn) == len(set(drawn)) == 30
    assert all(len(units) == len(set(units)) == 10 for units in drawn)


def test_a_draw_is_uniform() -> None:
    # 400 draws of 2 of 8 units: each unit 100 times on average, standard deviation 8.7.
    model = mlp(8)
    tasks = rounds_of(FederatedDropout(ratio=(0.25,)), model, 4, range(100))
    counts = times_trained(model, tasks)["layers.0.bias"]
    assert int(counts.sum()) == 800
    assert int(counts.min()) > 60 and int(counts.max()) < 140


def test_a_draw_does_not_depend_on_who_else_was_asked() -> None:
    model, method = mlp(40), FederatedDropout()
    state = state_of(model)
    one, other = clients(1, 1)
    alone = next(method.configure(model, state, [other], TRAINING))
    _, among = method.configure(model, state, [one, other], TRAINING)
    assert units_of(model, alone) == units_of(model, among)


def test_an_entry_is_averaged_over_those_who_drew_it() -> None:
    # Changes 1, 2, 4 of three clients: an entry becomes the mean over those who hold it, else 0.
    model, asked, method = mlp(6), clients(1, 1, 1), FederatedDropout(ratio=(0.5,))
    state = state_of(model)
    tasks = list(method.configure(model, state, asked, TRAINING))
    updates = [answer(task, change) for task, change in zip(tasks, (1, 2, 4), strict=True)]
    after = method.aggregate(model, state, asked, updates)
    for unit in range(6):
        held = [
            change
            for task, change in zip(tasks, (1, 2, 4), strict=True)
            if unit in units_of(model, task)["hidden1"]
        ]
        expected = sum(held) / len(held) if held else 0.0
        assert float(after.params["layers.0.bias"][unit]) == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize(("s", "expected"), [(8, 1.0), (16, 0.979)])
def test_coverage_of_ten_clients_over_a_hundred_rounds(s: int, expected: float) -> None:
    # Digest 1.1. 1 - (1 - 1/256)^1000 = .980; 1 - (1 - 1/64)^1000 = 1 - 1e-7
    model = mlp(128, 128)
    coverage = Coverage(model.shapes)
    for tasks in rounds_of(FederatedDropout(ratio=(1 / s,)), model, 10, range(100)):
        coverage.add([task.submodel for task in tasks])
    assert share(coverage.counts["layers.1.weight"]) == pytest.approx(expected, abs=0.004)
