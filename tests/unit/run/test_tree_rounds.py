"""Rounds of a tree: when they end and what they cost by hand, and the models they come to."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from worlds import (
    BYTES,
    Constant,
    change_of,
    data_of,
    device,
    entry,
    fleet_of,
    link,
    play,
    seen,
    setup_of,
    state_of,
    timed_of,
    tree_of,
)

from tesserafl.core import seeds
from tesserafl.core.errors import ConfigError, TesseraError, UpdateError
from tesserafl.core.fit import Training
from tesserafl.core.method import weights_of
from tesserafl.core.params import Params, sha256
from tesserafl.engines.device import INSTANT, Device
from tesserafl.engines.fleet import CLOUD, Edge, Fleet
from tesserafl.methods import EqualFinish, FedAvg, FedBRB, FedNova, HeteroFL, HierFAVG
from tesserafl.models import MLP
from tesserafl.run.rounds import Notes
from tesserafl.run.setup import make_engine
from tesserafl.run.timed import Timed
from tesserafl.run.tree import Tree

WATTS = {"idle_watts": 1.0, "busy_watts": 10.0, "radio_watts": 3.0}


def joules_of(notes: Notes) -> dict[int, float]:
    joules: dict[int, float] = {}
    for row in notes.clients:
        joules[row["client"]] = joules.get(row["client"], 0.0) + row["joules"]
    return joules


def two_edges() -> Fleet:
    """a: 1 s down and 2 s up for the model; b: 0.5 and 0.25 s. Device 3 stands at the cloud."""
    return fleet_of(
        [
            device(example=1.0, down=1.0, up=2.0, **WATTS),
            device(example=0.5, down=1.0, up=2.0, **WATTS),
            device(example=3.0, down=0.5, up=0.5, **WATTS),
            device(example=0.25, down=1.0, up=1.0, **WATTS),
        ],
        [Edge(name="a", link=link(1.0, 2.0)), Edge(name="b", link=link(0.5, 0.25))],
        ["a", "a", "b", CLOUD],
    )


def test_a_round_where_edges_average_once() -> None:
    tree = tree_of(setup_of(method=HierFAVG()), two_edges())
    (notes,) = play(tree)
    # a: 1 s down; device 0: 1 + 4 + 2, device 1: 1 + 2 + 2; 8-byte sums up: 4 s -> 12 s
    # b: 0.5 s down; device 2: 0.5 + 12 + 0.5; 0.5 s up -> 14 s. Device 3: 1 + 1 + 1 = 3 s.
    assert notes.virtual_seconds == tree.now == pytest.approx(14.0)
    assert notes.backhaul == 2 * (BYTES + 2 * BYTES)
    works = {0: 3 * 3 + 40, 1: 3 * 3 + 20, 2: 3 * 1 + 120, 3: 3 * 2 + 10}
    waits = {0: 14 - 7, 1: 14 - 5, 2: 14 - 13, 3: 14 - 3}  # for the task, and for the others
    assert joules_of(notes) == {
        client: pytest.approx(works[client] + waits[client]) for client in range(4)
    }
    assert notes.joules == pytest.approx(sum(works.values()) + sum(waits.values()))
    pieces = {row["client"]: row["pieces"] for row in notes.clients}
    assert [kind for kind, _, _ in pieces[0]] == ["wait", "download", "compute", "upload", "wait"]
    assert pieces[0][0] == ["wait", 0.0, pytest.approx(1.0)]
    assert pieces[0][-1][2] == pieces[3][-1][2] == tree.now
    assert {row["client"]: row["edge"] for row in notes.clients} == {
        0: "a",
        1: "a",
        2: "b",
        3: CLOUD,
    }
    # The devices of edges: their edge's link is not theirs.
    assert {row["bytes_up"] for row in notes.clients} == {BYTES}


def test_a_round_where_edges_average_twice() -> None:
    method = HierFAVG(edge_rounds=2, local_steps=3)  # of 4 examples: 12 a turn
    tree = tree_of(setup_of(method=method), two_edges())
    (notes,) = play(tree)
    # a: 1 s down; twice 1 + 12 + 2 (device 0; device 1 waits 6 s each); the model up: 2 s -> 33
    # b: 0.5 s down; twice 0.5 + 36 + 0.5; 0.25 s up -> 74.75
    # Device 3 is the cloud's own: as training says, one epoch: 3 s.
    assert notes.virtual_seconds == pytest.approx(74.75)
    assert notes.backhaul == 2 * 2 * BYTES
    assert sorted(row["client"] for row in notes.clients) == [0, 0, 1, 1, 2, 2, 3]
    busy = {0: 2 * 12, 1: 2 * 6, 2: 2 * 36, 3: 1}
    radio = {0: 2 * 3, 1: 2 * 3, 2: 2 * 1, 3: 2}
    assert joules_of(notes) == {
        client: pytest.approx(
            10 * busy[client] + 3 * radio[client] + 74.75 - busy[client] - radio[client]
        )
        for client in range(4)
    }
    rows = [row["pieces"] for row in notes.clients if row["client"] == 1]
    # It waits for its edge, for device 0, and for the round's end: no second is left out.
    whole = [piece for pieces in rows for piece in pieces]
    assert whole[0][1] == 0.0 and whole[-1][2] == tree.now
    assert all(a[2] == b[1] for a, b in itertools.pairwise(whole))
    report = tree.reports["a"]
    assert (report.rounds, report.seconds) == (2, pytest.approx(30.0))
    assert report.link_seconds == pytest.approx(3.0)
    assert report.joules == pytest.approx(joules_of(notes)[0] + joules_of(notes)[1])
    first, second = report.devices
    assert (first.client, first.steps, first.compute_seconds) == (0, 3, pytest.approx(12.0))
    assert first.link_seconds == pytest.approx(3.0)
    assert (second.client, second.compute_seconds) == (1, pytest.approx(6.0))
    assert notes.periods == {
        "a": {"rounds": 2, "steps": {0: 3, 1: 3}},
        "b": {"rounds": 2, "steps": {2: 3}},
    }


def test_a_round_of_three_levels() -> None:
    fleet = fleet_of(
        [device(example=1.0, down=1.0, up=1.0), device(example=2.0, down=1.0, up=1.0)],
        [
            Edge(name="top", link=link(1.0, 1.0)),
            Edge(name="left", parent="top", link=link(2.0, 2.0)),
            Edge(name="right", parent="top", link=link(0.5, 0.5)),
        ],
        ["left", "right"],
    )
    (once,) = play(tree_of(setup_of((4, 4), method=HierFAVG()), fleet))
    # top 1; left 2 + (1 + 4 + 1) + 4 = 12, right 0.5 + (1 + 8 + 1) + 1 = 11.5; top up 2 -> 15
    assert once.virtual_seconds == pytest.approx(15.0)
    assert once.backhaul == 3 * 3 * BYTES
    (twice,) = play(tree_of(setup_of((4, 4), method=HierFAVG(edge_rounds=2)), fleet))
    # left: 2 + 2 x 6 + 2 = 16; right: 0.5 + 2 x 10 + 0.5 = 21; top: 1 + 2 x 21 + 1 -> 44
    assert twice.virtual_seconds == pytest.approx(44.0)
    assert twice.backhaul == 2 * BYTES + 2 * 2 * 2 * BYTES
    assert sorted(row["client"] for row in twice.clients) == [0] * 4 + [1] * 4


def test_edges_without_clients_in_a_round_take_no_part() -> None:
    slow = Edge(name="b", link=link(50.0, 50.0))
    fleet = fleet_of(
        [device(example=1.0)] * 4, [Edge(name="a", link=INSTANT), slow], ["a", "a", "a", "b"]
    )
    setup = setup_of(method=HierFAVG(), clients_per_round=2)
    tree = tree_of(setup, fleet)
    for notes in play(tree, 6):
        asked = {row["edge"] for row in notes.clients}
        assert notes.virtual_seconds == pytest.approx(4.0 + 150.0 * ("b" in asked))
        assert set(notes.periods or {}) == asked


# What the models come to.


def test_an_edge_weighs_what_its_devices_weigh() -> None:
    """A device's changes are known: edge a moves by means over 4 and 8, the cloud by 12 and 16."""
    sizes = (4, 8, 16)
    edges = [Edge(name="a", link=INSTANT), Edge(name="b", link=INSTANT)]
    fleet = fleet_of([device(example=1.0)] * 3, edges, ["a", "a", "b"])
    setup = setup_of(sizes, method=HierFAVG(edge_rounds=2), rounds=10)
    engine = Constant()
    tree = tree_of(setup, fleet, engine)
    before = entry(tree.federation.state.params)
    play(tree)
    rounds = sorted({round for _, round in engine.trained})
    assert len(rounds) == 2  # every average has its own number: other batches are drawn
    a = sum((4 * change_of(0, r) + 8 * change_of(1, r)) / 12 for r in rounds)
    b = sum(change_of(2, r) for r in rounds)
    assert entry(tree.federation.state.params) - before == pytest.approx(
        (12 * a + 16 * b) / 28, rel=1e-5
    )


def test_works_of_all_rounds_have_numbers_of_their_own() -> None:
    engine = Constant()
    edges = [Edge(name="a", link=INSTANT), Edge(name="c", parent="a", link=INSTANT)]
    fleet = fleet_of([device(example=1.0)] * 3, edges, ["a", "c", CLOUD])
    setup = setup_of((4, 4, 4), method=HierFAVG(edge_rounds=3), rounds=7)
    play(tree_of(setup, fleet, engine), 7)
    assert len(engine.trained) == len(set(engine.trained)) == 7 * (3 + 9 + 1)


def trained(
    method: Any, fleet: Fleet | None, rounds: int = 3, sizes: Any = None, **settings: Any
) -> tuple[Params, list[Notes]]:
    """What comes of really training; without a fleet on a star of devices that take no time."""
    sizes = sizes or (5, 9, 4, 12, 7, 6)
    setup = setup_of(
        sizes,
        model=MLP(hidden=(8, 8)),
        method=method,
        rounds=rounds,
        **{"training": Training(lr=0.1, batch_size=4, momentum=0.5), **settings},
    )
    player: Timed | Tree
    if fleet is None:
        zero = fleet_of([Device(gflops=math.inf)] * len(sizes))
        player = timed_of(setup, zero, make_engine(setup))
    else:
        player = tree_of(setup, fleet, make_engine(setup))
    notes = play(player, rounds)
    return player.federation.state.params, notes


EQUAL = [device(example=0.01, down=0.1, up=0.1)] * 6
"""One speed class."""
ONE = fleet_of(EQUAL, [Edge(name="a", link=INSTANT)], ["a"] * 6)
TWO = fleet_of(
    EQUAL,
    [Edge(name="a", link=INSTANT), Edge(name="b", link=link(1.0, 2.0))],
    ["a", "b", "a", "b", CLOUD, "a"],
)
THREE = fleet_of(
    EQUAL,
    [
        Edge(name="top", link=INSTANT),
        Edge(name="left", parent="top", link=INSTANT),
        Edge(name="right", parent="top", link=INSTANT),
        Edge(name="other", link=INSTANT),
    ],
    ["left", "right", "other", "top", CLOUD, "left"],
)


@pytest.mark.parametrize("fleet", [ONE, TWO, THREE], ids=["one edge", "two levels", "three levels"])
@pytest.mark.parametrize(
    "method",
    [
        FedAvg(),
        HeteroFL(ratio=(0.5, 0.25), weighting="examples"),
        FedBRB(ratio=(0.5, 0.25), strict=False, weighting="examples"),
        FedNova(),
    ],
    ids=lambda method: type(method).__name__,
)
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_a_tree_whose_edges_hand_on_is_the_star_to_the_bit(
    method: Any, fleet: Fleet, dropout: float
) -> None:
    star, _ = trained(method, None, dropout=dropout, seed=3, clients_per_round=5)
    tree, _ = trained(method, fleet, dropout=dropout, seed=3, clients_per_round=5)
    assert sha256(tree) == sha256(star)


@pytest.mark.parametrize("fleet", [ONE, TWO, THREE], ids=["one edge", "two levels", "three levels"])
def test_hierfavg_with_period_one_is_fedavg_to_the_bit(fleet: Fleet) -> None:
    fedavg, _ = trained(FedAvg(), None)
    assert sha256(trained(HierFAVG(), fleet)[0]) == sha256(fedavg)
    # With kappa_1 for all, so that nobody may stand at the cloud.
    training = Training(lr=0.1, batch_size=4, momentum=0.5, steps=5)
    steps, _ = trained(FedAvg(), None, training=training)
    homes = [fleet.edges[-1].name if home == CLOUD else home for home in fleet.homes]
    at_edges = fleet_of(EQUAL, fleet.edges, homes)
    assert sha256(trained(HierFAVG(local_steps=5), at_edges)[0]) == sha256(steps)


# HierFAVG in plain torch, from its paper alone: kappa_1 steps, kappa_2 averages of edges.


def plain_steps(
    params: Params, client: int, size: int, steps: int, draw: torch.Generator, batch: int
) -> Params:
    """SGD with a rate of 0.1; a last batch of one example joins the one before."""
    examples = data_of_client(client, size)
    own = {name: value.clone().requires_grad_() for name, value in params.items()}
    queue: list[torch.Tensor] = []
    for _ in range(steps):
        if not queue:
            rows = torch.randperm(size, generator=draw)
            queue = list(rows.split(batch)) if size > batch else [rows]
            if len(queue) > 1 and len(queue[-1]) == 1:
                queue[-2:] = [torch.cat(queue[-2:])]
        rows = queue.pop(0)
        hidden = examples.inputs[rows]
        for layer in ("layers.0", "layers.1"):
            hidden = F.linear(hidden, own[f"{layer}.weight"], own[f"{layer}.bias"]).relu()
        logits = F.linear(hidden, own["head.weight"], own["head.bias"])
        loss = F.cross_entropy(logits, examples.labels[rows])
        for name, slope in zip(own, torch.autograd.grad(loss, list(own.values())), strict=True):
            own[name] = own[name].detach().add(slope, alpha=-0.1).requires_grad_()
    return {name: value.detach() for name, value in own.items()}


SIZES = (5, 9, 4, 12, 7, 6)


def data_of_client(client: int, size: int) -> Any:
    return data_of(SIZES).clients[client].train


def mean(models: list[Params], weights: list[int], before: Params) -> Params:
    """The weighted mean, in double precision, as what it is more than the model before."""
    total = sum(weights)
    return {
        name: (
            value.double()
            + sum(
                w * (model[name] - value).double() for w, model in zip(weights, models, strict=True)
            )
            / total
        ).float()
        for name, value in before.items()
    }


def plain_hierfavg(
    edges: list[list[int]], steps: int, turns: int, rounds: int, batch: int
) -> Params:
    setup = setup_of(SIZES, model=MLP(hidden=(8, 8)), method=HierFAVG(), rounds=rounds)
    cloud = state_of(setup).params
    for round in range(rounds):
        of_edges = []
        for members in edges:
            edge = cloud
            for turn in range(turns):
                models = []
                for client in members:
                    # Batches of a whole client's examples: no draw decides what is in them.
                    number = (round,) if turns == 1 else (round, turn)
                    draw = seeds.generator(0, *number, client, "batches")
                    models.append(plain_steps(edge, client, SIZES[client], steps, draw, batch))
                edge = mean(models, [SIZES[client] for client in members], edge)
            of_edges.append(edge)
        weights = [sum(SIZES[client] for client in members) for members in edges]
        if turns == 1:  # one mean over all, weighted by their examples, is the mean of means
            everybody = [client for members in edges for client in members]
            draws = {c: seeds.generator(0, round, c, "batches") for c in everybody}
            models = [plain_steps(cloud, c, SIZES[c], steps, draws[c], batch) for c in everybody]
            cloud = mean(models, [SIZES[c] for c in everybody], cloud)
        else:
            cloud = mean(of_edges, weights, cloud)
    return cloud


AT_EDGES = fleet_of(
    EQUAL,
    [Edge(name="a", link=INSTANT), Edge(name="b", link=link(1.0, 2.0))],
    ["a", "b", "a", "b", "b", "a"],
)
MEMBERS = [[0, 2, 5], [1, 3, 4]]


def test_hierfavg_is_a_plain_loop_to_the_bit() -> None:
    """Of mini-batches, in the draws of rounds and clients; sums are exact, so their split is not
    seen."""
    training = Training(lr=0.1, batch_size=4)
    tree, _ = trained(HierFAVG(local_steps=5), AT_EDGES, training=training, sizes=SIZES)
    plain = plain_hierfavg(MEMBERS, steps=5, turns=1, rounds=3, batch=4)
    assert {n: torch.equal(t, plain[n]) for n, t in tree.items()} == dict.fromkeys(tree, True)


@pytest.mark.parametrize(("steps", "turns"), [(2, 3), (4, 2)])
def test_hierfavg_that_averages_more_often_is_a_plain_loop(steps: int, turns: int) -> None:
    """To float32: the order of a full batch's examples is drawn, and an edge's change is rounded
    before the cloud adds it to others'."""
    training = Training(lr=0.1, batch_size=100)
    method = HierFAVG(local_steps=steps, edge_rounds=turns)
    tree, _ = trained(method, AT_EDGES, training=training, sizes=SIZES)
    plain = plain_hierfavg(MEMBERS, steps, turns, rounds=3, batch=100)
    start = state_of(setup_of(SIZES, model=MLP(hidden=(8, 8)), method=method)).params
    for name, value in tree.items():
        torch.testing.assert_close(value, plain[name], rtol=1e-5, atol=1e-6)
        assert (value - start[name]).abs().max() > 1e-3  # it moved far more than that


def test_one_speed_class_finishes_equally_by_equal_periods() -> None:
    """The heuristic then is HierFAVG, to the bit."""
    tree = fleet_of(
        EQUAL,
        [Edge(name="a", link=link(0.01, 0.01)), Edge(name="b", link=link(0.01, 0.01))],
        ["a", "b", "a", "b", "b", "a"],
    )
    training = Training(lr=0.1, batch_size=4)
    sizes = (8, 8, 8, 8, 8, 8)
    fixed, notes = trained(HierFAVG(local_steps=3), tree, 4, sizes, training=training)
    heuristic, others = trained(EqualFinish(local_steps=3), tree, 4, sizes, training=training)
    assert sha256(fixed) == sha256(heuristic)
    assert [each.virtual_seconds for each in notes] == [each.virtual_seconds for each in others]


@pytest.mark.parametrize("weighting", ["examples", "uniform"])
def test_normalised_edges_of_equal_steps_are_plain_ones(weighting: Any) -> None:
    """Up to rounding: there the mean is divided by the steps and made as long again."""
    unequal = fleet_of(EQUAL, AT_EDGES.edges, ["a", "b", "b", "b", "b", "a"])
    for turns in (1, 2):
        method = HierFAVG(local_steps=4, edge_rounds=turns, weighting=weighting)
        plain, _ = trained(method, unequal)
        normed, _ = trained(replace(method, normalised=True), unequal)
        for name in plain:
            torch.testing.assert_close(normed[name], plain[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("fleet", [AT_EDGES, THREE], ids=["two levels", "three levels"])
def test_an_edge_that_hears_nobody_changes_nothing(fleet: Fleet, normalised: bool) -> None:
    method = HierFAVG(edge_rounds=2, normalised=normalised)
    params, notes = trained(method, fleet, 6, dropout=0.8, seed=1)
    silent = [{"a", "b"} - {row["edge"] for row in each.clients} for each in notes if each.clients]
    assert any(silent)
    assert all(bool(value.isfinite().all()) for value in params.values())


@pytest.mark.parametrize("normalised", [False, True])
def test_the_cloud_weighs_only_those_that_were_heard(normalised: bool) -> None:
    edges = [Edge(name="a", link=INSTANT), Edge(name="b", link=INSTANT)]
    gone = device(example=1.0, leaves_seconds=1.0)
    fleet = fleet_of([device(example=1.0), gone, device(example=1.0)], edges, ["a", "a", "b"])
    setup = setup_of((4, 8, 4), method=HierFAVG(edge_rounds=2, normalised=normalised), rounds=10)
    engine = Constant()
    tree = tree_of(setup, fleet, engine)
    before = entry(tree.federation.state.params)
    play(tree)
    rounds = sorted({round for _, round in engine.trained})
    # Device 1 and its 8 examples are not heard: 4 and 4.
    expected = sum(change_of(0, r) + change_of(2, r) for r in rounds) / 2
    assert entry(tree.federation.state.params) - before == pytest.approx(expected, rel=1e-5)


# Over many rounds.


def test_a_tree_that_is_restored_goes_on_the_same() -> None:
    method = EqualFinish(local_steps=3, edge_rounds=2)
    setup = setup_of(method=method, rounds=10)
    whole = tree_of(setup, two_edges())
    notes = play(whole, 6)
    assert len({json.dumps(each.periods) for each in notes}) > 1  # it reads what it was told
    for cut in (1, 3):
        first = tree_of(setup, two_edges())
        before = play(first, cut)
        values, tensors = first.held()
        again = tree_of(setup, two_edges())
        again.federation.restore(first.federation.held())
        again.restore(json.loads(json.dumps(values)), tensors)
        after = play(again, 6 - cut)
        assert [seen(each) for each in before + after] == [seen(each) for each in notes]
        assert [each.periods for each in before + after] == [each.periods for each in notes]
        assert sha256(again.federation.state.params) == sha256(whole.federation.state.params)


@given(
    st.lists(st.sampled_from(["a", "b", "c", CLOUD]), min_size=2, max_size=6),
    st.integers(1, 3),
    st.booleans(),
    st.sampled_from([0.0, 0.5]),
    st.integers(0, 5),
)
@settings(max_examples=60, deadline=None)
def test_laws_of_a_tree(
    homes: list[str], turns: int, deep: bool, dropout: float, seed: int
) -> None:
    edges = [
        Edge(name="a", link=link(0.5, 0.25)),
        Edge(name="b", link=INSTANT),
        Edge(name="c", parent="a" if deep else CLOUD, link=link(0.1, 0.2)),
    ]
    speeds = [device(example=0.25 * (1 + n % 3), down=0.1, up=0.2, **WATTS) for n in range(6)]
    fleet = fleet_of(speeds[: len(homes)], edges, homes)
    method = HierFAVG(edge_rounds=turns, local_steps=2)
    setup = setup_of([4] * len(homes), method=method, dropout=dropout, seed=seed, rounds=9)
    engine = Constant()
    tree = tree_of(setup, fleet, engine)
    ends, rows = 0.0, 0
    for notes in play(tree, 3):
        assert notes.virtual_seconds is not None and notes.virtual_seconds >= 0
        ends += notes.virtual_seconds
        whole: dict[int, list[Any]] = {}
        rows_of = (*notes.clients, *notes.failures)
        for row in sorted(rows_of, key=lambda row: (row["pieces"][0][1], row["pieces"][-1][2])):
            whole.setdefault(row["client"], []).extend(row["pieces"])
        assert set(whole) == set(range(len(homes)))
        # Every second of every device is accounted for, and its watts are.
        for pieces in whole.values():
            assert pieces[0][1] == pytest.approx(ends - notes.virtual_seconds)
            assert pieces[-1][2] == pytest.approx(ends)
            assert all(a[2] == b[1] for a, b in itertools.pairwise(pieces))
        watts = {"wait": 1.0, "compute": 10.0, "download": 3.0, "upload": 3.0}
        assert notes.joules == pytest.approx(
            sum(watts[kind] * (b - a) for pieces in whole.values() for kind, a, b in pieces)
        )
        rows += len(notes.clients)
    assert tree.now == pytest.approx(ends)
    assert rows == len(engine.trained) == len(set(engine.trained))
    below = {name: 1 if name == CLOUD else turns for name in ("a", "b", CLOUD)}
    below["c"] = turns * turns if deep else turns
    if not dropout:
        assert rows == 3 * sum(below[home] for home in homes)


@pytest.mark.parametrize("rounds", [1000, 5000])
def test_too_many_averages_are_refused(rounds: int) -> None:
    tree = tree_of(setup_of(method=HierFAVG(edge_rounds=rounds)), two_edges())
    with pytest.raises(
        ConfigError, match=rf"edge 'a': .* fewer than 1000 times in a round; .*rounds={rounds}"
    ):
        play(tree)


def test_a_tree_that_everybody_left_is_an_error() -> None:
    gone = [device(example=1.0, leaves_seconds=leaves) for leaves in (5.0, 9.0)]
    fleet = fleet_of(gone, [Edge(name="a", link=INSTANT)], ["a", "a"])
    tree = tree_of(setup_of((4, 4), method=HierFAVG(), rounds=100), fleet)
    with pytest.raises(TesseraError, match="after 9 virtual seconds no device can be reached"):
        play(tree, 100)
    assert tree.federation.round == 3  # at 4 s, 8 s, and when the last one broke off


def test_a_tree_whose_work_is_all_refused_is_an_error() -> None:
    engine = Constant(bad=lambda task: True)
    tree = tree_of(setup_of(method=HierFAVG()), two_edges(), engine)
    with pytest.raises(UpdateError, match="round 0: the work of every client failed"):
        play(tree)


def test_weights_of_a_tree_are_those_of_a_star() -> None:
    setup = setup_of((4, 8), method=HierFAVG(weighting="uniform"))
    assert weights_of(setup.clients, "uniform") == {0: 1, 1: 1}
    fleet = fleet_of([device(example=1.0)] * 2, [Edge(name="a", link=INSTANT)], ["a", CLOUD])
    engine = Constant()
    tree = tree_of(setup, fleet, engine)
    before = entry(tree.federation.state.params)
    play(tree)
    moved = entry(tree.federation.state.params) - before
    assert moved == pytest.approx((change_of(0, 0) + change_of(1, 0)) / 2, rel=1e-5)
