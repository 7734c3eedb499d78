"""Devices that take unequal numbers of steps: where averaging ends, on quadratics.

F_j(w) = (w - c_j)^2 / 2, so a step is w <- w - lr (w - c_j). PLAIN averaging ends at the minimum of
the re-weighted objective, sum of p_j tau_j F_j; per step (FedNova) at that of the sum of p_j F_j.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from tesserafl.core.axis import Tie, Width
from tesserafl.core.fit import Training
from tesserafl.core.messages import Client, Update
from tesserafl.core.method import State
from tesserafl.core.model import Model
from tesserafl.core.params import subtract
from tesserafl.methods import HierFAVG
from tesserafl.methods._normalised import NORM

CENTRES = {0: 0.0, 1: 1.0, 2: 5.0}
CLIENTS = {c: Client(id=c, num_examples=n) for c, n in {0: 2, 1: 1, 2: 1}.items()}
EDGES = {"a": (0, 1), "b": (2,)}
STEPS = {0: 1, 1: 3, 2: 8}
ROUNDS = {"a": 1, "b": 2}
"""Averages of an edge."""
TAU = {0: 1, 1: 3, 2: 16}
"""Steps in a round of the cloud."""
PLAIN, NORMALISED = HierFAVG(), HierFAVG(normalised=True)
SHARE = {0: 0.5, 1: 0.25, 2: 0.25}


class Point(torch.nn.Module):
    """One number."""

    def __init__(self) -> None:
        super().__init__()
        self.w = torch.nn.Parameter(torch.zeros(1))


MODEL = Model(
    build=lambda sizes: Point(),
    sizes={"one": 1},
    widths={"one": Width(units=1, quantum=1, size="one", cuttable=False)},
    depths={},
    ties={"w": (Tie("one", (1,)),)},
    shapes={"w": (1,)},
)


def answered(
    method: HierFAVG, state: State, devices: Sequence[int], lr: float, steps: Mapping[int, int]
) -> Iterator[Update]:
    """What devices report after their gradient steps."""
    training = Training(lr=lr)
    people = [CLIENTS[device] for device in devices]
    for task in method.configure(MODEL, state, people, training):
        device = task.client.id
        w = task.params["w"].double()
        for _ in range(steps[device]):
            w = w - lr * (w - CENTRES[device])
        yield Update(
            round=state.round,
            client=device,
            submodel=task.submodel,
            delta={"w": (w - task.params["w"].double()).float()},
            num_examples=task.client.num_examples,
            num_steps=steps[device],
            metrics={NORM: float(steps[device])},
        )


def cloud_round(
    method: HierFAVG, state: State, lr: float, steps: Mapping[int, int] = STEPS
) -> State:
    """Edges average as often as their periods say, then the cloud does."""
    updates, people = [], []
    for name, devices in EDGES.items():
        model, below = state, [CLIENTS[device] for device in devices]
        for _ in range(ROUNDS[name]):
            model = method.aggregate(
                MODEL, model, below, answered(method, model, devices, lr, steps)
            )
        edge = replace(below[0], num_examples=sum(client.num_examples for client in below))
        if method.normalised:
            updates.append(method.relayed(MODEL, state, model, edge))
        else:  # as the tree does it: the change of the edge's model
            delta = subtract(model.params, state.params)
            relayed = Update(
                round=state.round,
                client=edge.id,
                submodel=MODEL.whole(),
                delta=delta,
                num_examples=edge.num_examples,
                num_steps=1,
                metrics={},
            )
            updates.append(relayed)
        people.append(edge)
    return method.aggregate(MODEL, state, people, iter(updates))


def after(method: HierFAVG, rounds: int, lr: float, steps: Mapping[int, int] = STEPS) -> float:
    state = State(params={"w": torch.full((1,), 3.0)}, seed=0, rounds=rounds)
    for _ in range(rounds):
        state = cloud_round(method, state, lr, steps)
    return float(state.params["w"])


def minimum(weights: Mapping[int, float]) -> float:
    return sum(weights[c] * CENTRES[c] for c in CENTRES) / sum(weights.values())


TRUE = minimum(SHARE)
REWEIGHTED = minimum({c: SHARE[c] * TAU[c] for c in CENTRES})


def test_plain_averaging_ends_at_the_reweighted_minimum_and_per_step_at_the_true_one() -> None:
    assert pytest.approx((1.5, 83 / 21)) == (TRUE, REWEIGHTED)
    assert after(PLAIN, 800, 2e-3) == pytest.approx(REWEIGHTED, abs=0.05)
    assert after(NORMALISED, 800, 2e-3) == pytest.approx(TRUE, abs=0.05)


def test_what_is_left_of_the_gap_vanishes_with_the_learning_rate() -> None:
    # A finite step leaves a gap of the order of lr tau; with lr as 1 / sqrt(K) it goes with K.
    gaps = [abs(after(NORMALISED, rounds, 0.2 / rounds**0.5) - TRUE) for rounds in (50, 200, 800)]
    for larger, smaller in pairwise(gaps):
        assert smaller == pytest.approx(larger / 2, rel=0.25)


def test_the_gap_grows_with_the_most_steps() -> None:
    gaps = [abs(after(NORMALISED, 200, 2e-2, {**STEPS, 2: most}) - TRUE) for most in (1, 4, 16)]
    assert gaps[0] < gaps[1] < gaps[2]
    plain = [abs(after(PLAIN, 200, 2e-2, {**STEPS, 2: most}) - TRUE) for most in (1, 4, 16)]
    assert plain[0] < plain[1] < plain[2]
    # Per step it is far smaller where steps differ much.
    assert gaps[2] < plain[2] / 5


def test_equal_steps_leave_no_gap() -> None:
    """Where all take as many steps, both end at the true minimum, whatever the learning rate."""
    global_ = {0: 4, 1: 4, 2: 2}  # edge b averages twice: four steps each in a round of the cloud
    for method in (PLAIN, NORMALISED):
        assert after(method, 60, 0.1, global_) == pytest.approx(TRUE, abs=1e-4)
