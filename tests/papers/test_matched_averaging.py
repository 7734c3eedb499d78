"""Matched averaging by hand: units are assigned to the global model's, then averaged."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from worked import TRAINING, answer, clients, mlp, setting, state_of, trained, values

from tesserafl.core.method import State
from tesserafl.core.params import sha256
from tesserafl.methods import FedAvg, MatchedAveraging

# theta: unit 0 reads (1, 0) and answers (1, -1); unit 1 reads (0, 1) and answers (-1, 1).
THETA = {"layers_0_weight": [[1, 0], [0, 1]], "head_weight": [[1, -1], [-1, 1]]}
# The second client's: unit 0 reads (0, 2) and answers (-1, 1); unit 1 (2, 0) and (3, -3).
#   inner products with theta's   unit 0   unit 1
#   its unit 0                     0 - 2    2 + 2
#   its unit 1                     2 + 6    0 - 6
# In their order -2 - 6 = -8, changed 4 + 8 = 12: its units change places.
SWAPPED = {"layers_0_weight": [[0, 2], [2, 0]], "head_weight": [[-1, 3], [1, -3]]}


def test_units_that_changed_places_are_put_back_before_the_mean() -> None:
    model, asked, method = mlp(2), clients(1, 3), MatchedAveraging()
    state = state_of(model, **THETA)
    one, other = method.configure(model, state, asked, TRAINING)
    updates = [answer(one, 0.0), setting(other, **SWAPPED)]
    # 1/4 theta + 3/4 ((2, 0), (0, 2)) and 1/4 theta + 3/4 ((3, -1), (-3, 1))
    after = method.aggregate(model, state, asked, updates)
    assert values(after.params, "layers_0_weight") == [[1.75, 0.0], [0.0, 1.75]]
    assert values(after.params, "head_weight") == [[2.5, -1.0], [-2.5, 1.0]]
    assert values(after.params, "head_bias") == [0.0, 0.0]
    # As they came they destroy each other: FedAvg, and this method without its matching.
    plain = FedAvg().aggregate(model, state, asked, updates)
    assert values(plain.params, "layers_0_weight") == [[0.25, 1.5], [1.5, 0.25]]
    unmatched = replace(method, matching="none").aggregate(model, state, asked, updates)
    assert sha256(unmatched.params) == sha256(plain.params)


def test_biases_and_the_next_layer_move_with_their_unit() -> None:
    # Two hidden layers; the client permutes the units of the first, and adds 2 to a bias.
    model, asked, method = mlp(3, 2), clients(1), MatchedAveraging()
    state = state_of(
        model,
        layers_0_weight=[[1, 0], [0, 1], [-1, 0]],
        layers_0_bias=[4, 8, 16],
        layers_1_weight=[[1, 2, 3], [-1, 0, 5]],
        head_weight=[[1, 0], [0, 1]],
    )
    (task,) = method.configure(model, state, asked, TRAINING)
    update = setting(
        task,
        layers_0_weight=[[-1, 0], [1, 0], [0, 1]],
        layers_0_bias=[16, 6, 8],
        layers_1_weight=[[3, 1, 2], [5, -1, 0]],
    )
    after = method.aggregate(model, state, asked, [update])
    assert values(after.params, "layers_0_weight") == [[1, 0], [0, 1], [-1, 0]]
    assert values(after.params, "layers_0_bias") == [6, 8, 16]
    assert values(after.params, "layers_1_weight") == [[1, 2, 3], [-1, 0, 5]]


def test_what_only_was_trained_is_folded_as_it_came() -> None:
    # 2^-30 is lost in (theta + delta) - theta; where no unit moves, the delta itself is averaged.
    model, asked, method = mlp(2), clients(1), MatchedAveraging()
    state = state_of(model, layers_0_bias=[0, 0], **THETA)
    (task,) = method.configure(model, state, asked, TRAINING)
    update = answer(task, 2.0**-30)
    after = method.aggregate(model, state, asked, [update])
    assert sha256(after.params) == sha256(FedAvg().aggregate(model, state, asked, [update]).params)
    assert values(after.params, "layers_0_bias") == [2.0**-30] * 2


def test_rows_of_absent_classes_have_no_say_and_stay() -> None:
    # The second client has no example of class 1: its units are told apart by row 0 of the head,
    # -1 against 3 and 5 against -3, and row 1 is the first client's alone.
    model, asked, method = mlp(2), clients(1, 1), MatchedAveraging()
    state = state_of(model, **THETA)
    one, other = method.configure(model, state, asked, TRAINING)
    swapped = setting(other, **SWAPPED)
    rows = {name: {0: [0]} for name in swapped.delta if name.startswith("head")}
    swapped = replace(
        swapped,
        submodel=swapped.submodel.restrict(
            {name: {0: slice(0, 1)} for name in rows},
        ),
        delta={n: t[:1] if n in rows else t for n, t in swapped.delta.items()},
    )
    after = method.aggregate(model, state, asked, [answer(one, 0.0), swapped])
    assert values(after.params, "layers_0_weight") == [[1.5, 0.0], [0.0, 1.5]]
    assert values(after.params, "head_weight") == [[2.0, -1.0], [-1.0, 1.0]]


def first_steps(method: MatchedAveraging, state: State, width: int) -> list[str]:
    """Where two clients begin."""
    model = mlp(width)
    tasks = method.configure(model, state, clients(1, 1), TRAINING)
    return [sha256(method.local(model, task, {}).params) for task in tasks]


@pytest.mark.parametrize("ratio", [1.0, 0.25])
def test_own_starts_differ_in_the_first_round_and_are_gone_in_the_second(ratio: float) -> None:
    model = mlp(8)
    method = MatchedAveraging(start="own", ratio=(ratio,))
    state = method.init(model, 3, 10)
    one, other = first_steps(method, state, 8)
    assert len({one, other, sha256(state.params)}) == 3
    assert first_steps(method, state, 8) == [one, other]
    assert first_steps(method, replace(state, seed=4), 8)[0] not in (one, other)
    assert first_steps(method, replace(state, round=1), 8) == [sha256(state.params)] * 2
    shared = replace(method, start="shared")
    assert first_steps(shared, state, 8) == [sha256(state.params)] * 2


def test_an_own_start_is_reported_against_the_global_model() -> None:
    model, asked = mlp(2), clients(1)
    method = MatchedAveraging(start="own")
    state = method.init(model, 3, 10)
    (task,) = method.configure(model, state, asked, TRAINING)
    begun = method.local(model, task, {}).params
    still = replace(TRAINING, lr=1e-12)
    update = trained(method, model, replace(task, training=still), [[1.0, 2.0]], [0])
    for name, delta in update.delta.items():
        torch.testing.assert_close(state.params[name] + delta, begun[name], rtol=0, atol=1e-6)
