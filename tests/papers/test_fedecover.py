"""FedEcover by hand: Yang et al., ICDE 2025; pools without replacement."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from worked import TRAINING, answer, clients, mlp, state_of, units_of, values

from tesserafl.core.errors import ConfigError
from tesserafl.core.messages import Client
from tesserafl.core.method import State
from tesserafl.core.model import Model
from tesserafl.core.params import sha256
from tesserafl.methods import FedEcover


def drawn_units(
    method: FedEcover, model: Model, cohorts: list[list[Client]], state: State | None = None
) -> tuple[list[list[int]], State]:
    """The units of the first axis that each client got, in order, and the state after."""
    state = state or state_of(model)
    parts = []
    for asked in cohorts:
        tasks = method.configure(model, state, asked, TRAINING)
        parts += [units_of(model, task)["hidden1"] for task in tasks]
        state = method.aggregate(model, state, asked, [])
    return parts, state


def times_drawn(parts: list[list[int]], units: int) -> list[int]:
    return [sum(unit in part for part in parts) for unit in range(units)]


def test_each_unit_is_drawn_once_before_any_is_drawn_twice() -> None:
    # 8 units, 2 a client: clients 0..3 empty the pool, clients 4..7 the next, in another order.
    model, method = mlp(8), FedEcover(ratio=(0.25,))
    parts, _ = drawn_units(method, model, [clients(*[1] * 8)])
    assert [len(part) for part in parts] == [2] * 8
    assert times_drawn(parts[:4], 8) == times_drawn(parts[4:], 8) == [1] * 8
    assert parts[:4] != parts[4:]


def test_the_next_round_reads_on() -> None:
    model, method = mlp(8), FedEcover(ratio=(0.25,))
    at_once, _ = drawn_units(method, model, [clients(*[1] * 6)])
    in_rounds, state = drawn_units(method, model, [clients(1), clients(1, 1), clients(1, 1, 1)])
    assert in_rounds == at_once
    saved = replace(state, notes=json.loads(json.dumps(dict(state.notes))))  # a checkpoint
    rest, _ = drawn_units(method, model, [clients(1, 1)], saved)
    assert times_drawn(in_rounds[4:] + rest, 8) == [1] * 8


def test_axes_have_pools_of_their_own() -> None:
    model, method = mlp(16, 16), FedEcover(ratio=(0.5,))
    (task,) = method.configure(model, state_of(model), clients(1), TRAINING)
    kept = units_of(model, task)
    assert kept["hidden1"] != kept["hidden2"]


def test_asking_alone_empties_the_pool_whether_or_not_clients_answer() -> None:
    model, method, asked = mlp(8), FedEcover(ratio=(0.5,)), clients(1)
    state = state_of(model)
    (task,) = method.configure(model, state, asked, TRAINING)
    answered = method.aggregate(model, state, asked, [answer(task, 1.0)])
    silent = method.aggregate(model, state, asked, [])
    assert answered.notes == silent.notes != state.notes


@pytest.mark.parametrize(
    ("units", "ratio"),
    [(8, (0.5, 0.25)), (10, (0.3,)), (7, (0.5,)), (12, (0.75, 0.5, 0.25)), (5, (1.0, 0.4))],
)
def test_coverage_is_balanced_where_parts_do_not_divide_the_pool(
    units: int, ratio: tuple[float, ...]
) -> None:
    # Without replacement from a pool that is refilled when empty: after any client no unit was
    # drawn more than once oftener than another.
    model = mlp(units)
    parts, _ = drawn_units(FedEcover(ratio=ratio), model, [clients(*[1] * 12)] * 3)
    for number in range(1, len(parts) + 1):
        assert len(parts[number - 1]) == len(set(parts[number - 1]))
        times = times_drawn(parts[:number], units)
        assert max(times) - min(times) <= 1, f"after {number} clients: {times}"


def test_mixed_widths_get_their_own_number_of_units() -> None:
    model = mlp(8)
    parts, _ = drawn_units(FedEcover(ratio=(0.5, 0.25)), model, [clients(1, 1, 1, 1)] * 2)
    assert [len(part) for part in parts] == [4, 2] * 4


@pytest.mark.parametrize(
    ("round", "expected"),
    # eta_g = 1/2, gamma = 1/2, T = 8: 1/2, 1/4, 1/8, 1/16 over the quarters; the mean change is 16.
    [(0, 8.0), (1, 8.0), (2, 4.0), (4, 2.0), (7, 1.0)],
)
def test_the_servers_step_decays_at_each_quarter(round: int, expected: float) -> None:
    model, asked = mlp(2), clients(1, 1)
    method = FedEcover(ratio=(1.0,), step=0.5, step_decay=0.5)
    state = state_of(model, round=round, rounds=8, head_bias=[100, 100])
    one, other = method.configure(model, state, asked, TRAINING)
    after = method.aggregate(model, state, asked, [answer(one, 8.0), answer(other, 24.0)])
    assert values(after.params, "head_bias") == [100 + expected] * 2


def test_what_nobody_trained_keeps_its_bits_under_a_step() -> None:
    model, asked = mlp(4), clients(1)
    method = FedEcover(ratio=(0.5,), step=0.3)
    params = {name: torch.randn(shape) for name, shape in model.shapes.items()}
    state = replace(state_of(model), params=params)
    (task,) = method.configure(model, state, asked, TRAINING)
    kept = units_of(model, task)["hidden1"]
    after = method.aggregate(model, state, asked, [answer(task, 1.0)])
    others = [unit for unit in range(4) if unit not in kept]
    before_bits = sha256({"rest": params["layers.0.weight"][others]})
    assert sha256({"rest": after.params["layers.0.weight"][others]}) == before_bits


@pytest.mark.parametrize(("step", "step_decay"), [(0.0, 1.0), (-1.0, 1.0), (1.0, 0.0), (1.0, 2.0)])
def test_a_step_out_of_range_is_refused(step: float, step_decay: float) -> None:
    model = mlp(4)
    method = FedEcover(step=step, step_decay=step_decay)
    with pytest.raises(ConfigError, match=r"method\.step"):
        method.init(model, 0, 1)
