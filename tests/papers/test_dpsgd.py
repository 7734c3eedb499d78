"""D-PSGD by hand: Lian et al., NeurIPS 2017, Algorithm 1."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from worked import TRAINING, answer, clients, mlp, rounds_of, state_of, units_of, values

from tesserafl.core.method import State
from tesserafl.core.model import Model
from tesserafl.engines.network import Network, NetworkSettings
from tesserafl.engines.replicas import Replicas
from tesserafl.methods import DPSGD


def peers(
    model: Model, count: int, method: DPSGD | None = None, seed: int = 0, **settings: Any
) -> Replicas:
    """Peers on a graph whose copies are all zero."""
    network = Network(settings=NetworkSettings(**settings), peers=count, seed=seed)
    return Replicas(
        model=model,
        method=method or DPSGD(),
        network=network,
        gossip=True,
        begin=state_of(model).params,
        states=[state_of(model)],
        copy_of=[0] * count,
    )


def apart(federation: Replicas, model: Model) -> Replicas:
    """With a copy of its own for everybody: peer i's entries are all i + 1, but for the biases."""
    count = len(federation.copy_of)
    federation.states = []
    federation.begin = {n: torch.full(shape, -1.0) for n, shape in model.shapes.items()}
    for peer in range(count):
        params = {name: torch.full(shape, peer + 1.0) for name, shape in model.shapes.items()}
        params["layers.0.bias"] = torch.arange(4.0) ** peer
        federation.states.append(State(params=params, seed=0, rounds=10))
    federation.copy_of = list(range(count))
    return federation


def play(federation: Replicas, *changes: float, count: int | None = None) -> None:
    """A round in which peer i moves every entry that it trains by `changes[i]`."""
    asked = clients(*[1] * len(federation.copy_of))
    tasks = list(federation.tasks(asked, TRAINING))
    federation.fold(asked, [answer(task, changes[task.client.id]) for task in tasks])


def bias(federation: Replicas, peer: int) -> list[object]:
    return values(federation.states[federation.copy_of[peer]].params, "layers_0_bias")


def test_a_step_on_a_ring_of_four_by_hand() -> None:
    # From 0 they move by 1 2 3 4. Peer 0 hears 1 and 3: (1 + 2 + 4) / 3; peer 1 hears 0 and 2:
    # (1 + 2 + 3) / 3; peer 2: (2 + 3 + 4) / 3; peer 3: (3 + 4 + 1) / 3.
    federation = peers(mlp(4), 4, graph="ring")
    play(federation, 1.0, 2.0, 3.0, 4.0)
    for peer, expected in enumerate([7 / 3, 2.0, 3.0, 8 / 3]):
        assert bias(federation, peer) == pytest.approx([expected] * 4, abs=1e-6)
    # Then 0 moves by 3 and the others stay: peer 0 has (16/3 + 2 + 8/3) / 3 = 10/3,
    # peer 1 (16/3 + 2 + 3) / 3 = 31/9, peer 2 (2 + 3 + 8/3) / 3 = 23/9, peer 3 11/3.
    play(federation, 3.0, 0.0, 0.0, 0.0)
    for peer, expected in enumerate([10 / 3, 31 / 9, 23 / 9, 11 / 3]):
        assert bias(federation, peer) == pytest.approx([expected] * 4, abs=1e-6)
    assert [federation.states[n].round for n in federation.copy_of] == [2] * 4


def test_one_averaging_on_a_complete_graph_is_consensus() -> None:
    federation = peers(mlp(4), 3)
    play(federation, 3.0, 0.0, 0.0)
    assert [bias(federation, peer) for peer in range(3)] == [[1.0] * 4] * 3


def test_weights_of_unequal_degrees_by_hand(tmp_path: Path) -> None:
    # 0 - 1 - 2: 1 / (1 + 2) on both links. Begun at 0 and moved by 3, 6 and 12:
    # 2/3 3 + 1/3 6 = 4; (3 + 6 + 12) / 3 = 7; 1/3 6 + 2/3 12 = 10
    (tmp_path / "path").write_text("0 1\n1 2")
    federation = peers(mlp(4), 3, graph="file", file=tmp_path / "path")
    play(federation, 3.0, 6.0, 12.0)
    for peer, expected in enumerate([4.0, 7.0, 10.0]):
        assert bias(federation, peer) == pytest.approx([expected] * 4, abs=1e-3)


def test_examples_may_weigh_too() -> None:
    # Weights 1 and 3, and as much as that again by the network's: (0 + 3 x 4) / 4
    federation = peers(mlp(4), 2, DPSGD(weighting="examples"))
    asked = clients(1, 3)
    tasks = list(federation.tasks(asked, TRAINING))
    federation.fold(asked, [answer(tasks[0], 0.0), answer(tasks[1], 4.0)])
    assert bias(federation, 0) == bias(federation, 1) == [3.0] * 4


@pytest.mark.parametrize("silent", [False, True], ids=["no change", "no answer"])
@pytest.mark.parametrize("failure", [0.0, 0.3], ids=["whole", "with broken links"])
def test_without_training_the_mean_stays_and_copies_meet(silent: bool, failure: float) -> None:
    model = mlp(4)
    graph = {"graph": "erdos_renyi", "probability": 0.5, "failure": failure}
    federation = apart(peers(model, 6, seed=2, **graph), model)
    assert len({len(federation.network.neighbours(n)) for n in range(6)}) > 1
    before, distances = federation.assembled().params, []
    asked = clients(*[1] * 6)
    for _ in range(25):
        tasks = list(federation.tasks(asked, TRAINING))
        answers = [] if silent else [answer(task, 0.0) for task in tasks]
        distances.append(federation.fold(asked, answers).consensus)
        for name, tensor in federation.assembled().params.items():
            torch.testing.assert_close(tensor, before[name], rtol=1e-5, atol=1e-5)
    assert distances == sorted(distances, reverse=True)
    assert distances[-1] is not None
    assert distances[-1] < 0.05 * float(distances[0] or 0.0)


def test_whose_link_is_down_keeps_what_it_has() -> None:
    model = mlp(4)
    federation = apart(peers(model, 3, failure=1.0), model)
    play(federation, 0.0, 1.0, 0.0)
    assert bias(federation, 0) == [1.0] * 4  # 0^0 = 1
    assert bias(federation, 1) == [1.0, 2.0, 3.0, 4.0]
    assert bias(federation, 2) == [0.0, 1.0, 4.0, 9.0]


def test_the_windows_of_the_partial_variant_stay_and_are_spread_evenly() -> None:
    # K = 8 and 4 peers: they begin at 0, 2, 4, 6 and keep 3 or 4; the last ones wrap around.
    model = mlp(8)
    rounds = rounds_of(DPSGD(ratio=(0.375, 0.5)), model, 4, [0, 7])
    kept = [[units_of(model, task)["hidden1"] for task in tasks] for tasks in rounds]
    assert kept[0] == kept[1] == [[0, 1, 2], [2, 3, 4, 5], [4, 5, 6], [0, 1, 6, 7]]


def test_the_partial_variant_averages_over_neighbours_that_train_an_entry() -> None:
    # K = 4, r = 1/2, a ring of 4: windows 01, 12, 23, 30, moved by 1 2 3 4. Peer 0 hears 1 and 3:
    # unit 0 from 0 and 3: 2.5; unit 1 from 0 and 1: 1.5; unit 2 from 1 alone (2 is no neighbour);
    # unit 3 from 3 alone.
    federation = peers(mlp(4), 4, DPSGD(ratio=(0.5,)), graph="ring")
    play(federation, 1.0, 2.0, 3.0, 4.0)
    assert bias(federation, 0) == [2.5, 1.5, 2.0, 4.0]
    # Peer 2 hears 1 and 3: unit 0 from 3; unit 1 from 1; unit 2 from 1 and 2; unit 3 from 2 and 3
    assert bias(federation, 2) == [4.0, 2.0, 2.5, 3.5]
    # What is in nobody's window of the neighbourhood stays: r = 1/4 leaves out unit 2 for peer 0.
    federation = peers(mlp(4), 4, DPSGD(ratio=(0.25,)), graph="ring")
    play(federation, 1.0, 2.0, 3.0, 4.0)
    assert bias(federation, 0) == [1.0, 2.0, 0.0, 4.0]
