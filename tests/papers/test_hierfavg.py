"""HierFAVG by hand: Liu et al., ICC 2020, Algorithm 1."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
from worked import TRAINING, answer, clients, mlp, state_of, trained, values

from tesserafl.core.errors import ConfigError
from tesserafl.core.messages import Client
from tesserafl.core.method import State
from tesserafl.core.model import Model
from tesserafl.core.schedule import Periods, Situation
from tesserafl.engines.sums import Sums, sums_of
from tesserafl.methods import HierFAVG
from tesserafl.methods._normalised import NORM


def situation(*edges: tuple[str, Sequence[Client]]) -> Situation:
    return Situation(
        round=0,
        seconds=0.0,
        horizon=None,
        accuracy=None,
        edges={name: tuple(members) for name, members in edges},
        reports={},
    )


def averaged(
    method: HierFAVG, model: Model, state: State, members: Sequence[Client], changes: list[float]
) -> Sums:
    """One average of a node, whose devices move every entry by so much."""
    total = sums_of(model, method, {client.id: client for client in members}, state.params)()
    tasks = method.configure(model, state, members, TRAINING)
    for task, change in zip(tasks, changes, strict=True):
        total.add(answer(task, change))
    return total


def test_two_averages_of_edges_and_one_of_the_cloud() -> None:
    # kappa_2 = 2. Edge 1 has n = 1 and 3, edge 2 has n = 4; w = 0.
    # Edge 1: devices come to 4 and 0, (1 x 4 + 3 x 0) / 4 = 1; from there to 5 and 5, 5.
    # Edge 2: its device comes to 2 and then to 3.
    # Cloud: (4 x 5 + 4 x 3) / 8 = 4
    method, model = HierFAVG(edge_rounds=2), mlp(2)
    everybody = clients(1, 3, 4)
    state = state_of(model)
    cloud = sums_of(model, method, {c.id: c for c in everybody}, state.params)()
    for members, changes, expected in (
        (everybody[:2], ([4.0, 0.0], [4.0, 4.0]), [1.0, 5.0]),
        (everybody[2:], ([2.0], [1.0]), [2.0, 3.0]),
    ):
        edge, covered = state, {}
        for turn, mean in zip(changes, expected, strict=True):
            total = averaged(method, model, edge, members, turn)
            edge = total.finish(edge)
            covered |= total.reported()
            assert all((value == mean).all() for value in edge.params.values())
        cloud.add_change(state, edge, covered, members)
    after = cloud.finish(state)
    assert all((value == 4.0).all() for value in after.params.values())
    assert after.round == 1


def test_every_device_takes_kappa_1_steps_and_every_edge_kappa_2_averages() -> None:
    one, two, three = clients(10, 20, 30)
    seen = situation(("a", (one, two)), ("b", (three,)))
    model, method = mlp(2), HierFAVG(local_steps=6, edge_rounds=10)
    state = state_of(model)
    assert method.periods(model, state, seen) == {
        "a": Periods(rounds=10, steps={0: 6, 1: 6}),
        "b": Periods(rounds=10, steps={2: 6}),
    }
    # The same in every round; without kappa_1 devices train as training says.
    assert method.periods(model, replace(state, round=7), seen) == method.periods(
        model, state, seen
    )
    assert HierFAVG().periods(model, state, seen)["a"] == Periods(rounds=1, steps={})


def test_an_edge_takes_gradient_steps_like_fedavg() -> None:
    # As FedAvg's worked example: two devices with n = 1 and 3 and one full-batch step.
    method, model, asked = HierFAVG(), mlp(2), clients(1, 3)
    state = state_of(model, layers_0_weight=[[1, 0], [0, 1]])
    one, other = method.configure(model, state, asked, TRAINING)
    total = sums_of(model, method, {c.id: c for c in asked}, state.params)()
    total.add(trained(method, model, one, [[1.0, 2.0]], [0]))
    total.add(trained(method, model, other, [[2.0, 0.0]] * 3, [1] * 3))
    edge = total.finish(state)
    assert values(edge.params, "head_bias") == [-0.125, 0.125]
    assert values(edge.params, "head_weight") == [[-0.3125, 0.125], [0.3125, -0.125]]


def test_kappa_1_steps_of_one_device() -> None:
    # Zeros everywhere, so features and slopes of weights are 0; x never matters. y = 0.
    # b = (0, 0): p = (1/2, 1/2), b <- (1/4, -1/4). Then p_1 = 1 / (1 + e^(1/2)) = 0.37754,
    # b <- 1/4 + 0.37754 / 2 = 0.43877
    method, model, asked = HierFAVG(local_steps=2), mlp(2), clients(1)
    state = state_of(model)
    (task,) = method.configure(model, state, asked, replace(TRAINING, steps=2))
    update = trained(method, model, task, [[1.0, 2.0]], [0])
    assert update.num_steps == 2
    assert update.delta["head.bias"].tolist() == pytest.approx([0.438770, -0.438770], abs=1e-6)


def test_normalised_an_edge_counts_changes_per_step() -> None:
    # n = 1 and 3; 1 step changes by 2, 3 steps by 12: per step 2 and 4. tau_eff = (1 + 9) / 4
    # mean per step (2 + 12) / 4 = 3.5; 3.5 x 2.5 = 8.75. Plain: (2 + 36) / 4 = 9.5
    model, asked, state = mlp(2), clients(1, 3), state_of(mlp(2))
    for method, expected in ((HierFAVG(normalised=True), 8.75), (HierFAVG(), 9.5)):
        one, other = method.configure(model, state, asked, TRAINING)
        updates = [
            replace(answer(task, change), num_steps=steps, metrics={NORM: float(steps)})
            for task, change, steps in ((one, 2.0, 1), (other, 12.0, 3))
        ]
        after = method.aggregate(model, state, asked, updates)
        assert all((value == expected).all() for value in after.params.values())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"local_steps": 0}, "HierFAVG: local_steps must be at least 1; got 0"),
        ({"edge_rounds": 0}, "HierFAVG: edge_rounds must be at least 1; got 0"),
    ],
)
def test_periods_that_cannot_be(given: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        HierFAVG(**given)
