"""Trees in virtual time whose nodes do not wait for all of their devices."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from worlds import (
    change_of,
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

from tesserafl.core.params import sha256
from tesserafl.core.wire import pack, unpack
from tesserafl.engines.clock import ClockSettings
from tesserafl.engines.device import INSTANT
from tesserafl.engines.fleet import CLOUD, Edge, Fleet
from tesserafl.methods import FedAvg, FedBuff, FedNova, HierFAVG
from tesserafl.run.averages import Patience
from tesserafl.run.rounds import Notes


def semi(**settings: Any) -> ClockSettings:
    return ClockSettings(mode="semi-synchronous", **settings)


def below(seconds: dict[str, tuple[float, ...]], **links: Any) -> Fleet:
    """Edges with devices without links, by what their 4 examples take."""
    homes = [edge for edge, each in seconds.items() for _ in each]
    times = [one for each in seconds.values() for one in each]
    edges = [Edge(name=edge, link=links.get(edge, INSTANT)) for edge in seconds if edge != CLOUD]
    return fleet_of([device(example=each / 4) for each in times], edges, homes)


def within(way: dict[str, Any]) -> dict[str, Any]:
    """Settings of a tree whose edges wait as a star does: a tenth of the time is for handing on."""
    seconds = way.get("deadline_seconds")
    return way if seconds is None else {**way, "deadline_seconds": seconds / 0.9}


def answered(notes: Notes) -> list[tuple[int, int]]:
    """(client, staleness), ascending."""
    return sorted((row["client"], row["staleness"]) for row in notes.clients)


WAYS = [
    {"quorum": 0.6},
    {"quorum": 0.3, "late": "refuse"},
    {"deadline_seconds": 2.5},
    {"over_selection": 0.5},
    {"quorum": 0.5, "deadline_seconds": 1.5, "over_selection": 0.3},
]


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("method", [FedAvg(), FedNova(), FedBuff()], ids=lambda m: type(m).__name__)
@pytest.mark.parametrize("asked", [3, 5])
def test_one_edge_that_hands_on_is_the_star(way: Any, method: Any, asked: int) -> None:
    """The same devices are waited for, asked and late, and the same updates make the model."""
    times = (1.0, 2.0, 7.0, 2.5, 3.0)
    star, tree = (
        made(setup_of((4,) * 5, method=method, clock=semi(**each), clients_per_round=asked), fleet)
        for made, each, fleet in (
            (timed_of, way, below({"a": times}).flat()),
            (tree_of, within(way), below({"a": times})),
        )
    )
    ours, theirs = play(tree, 8), play(star, 8)
    assert [answered(each) for each in ours] == [answered(each) for each in theirs]
    failed = [[sorted(f["client"] for f in each.failures) for each in n] for n in (ours, theirs)]
    assert failed[0] == failed[1]
    assert [n.virtual_seconds for n in ours] == [n.virtual_seconds for n in theirs]
    found, wanted = tree.federation.state.params, star.federation.state.params
    assert entry(found) == pytest.approx(entry(wanted), rel=1e-6)


def test_who_is_late_at_its_edge_counts_in_the_edges_next_average() -> None:
    clock = semi(quorum=0.5)
    fleet = below({"a": (1.0, 5.0), "b": (2.0, 2.0)}, b=link(1.0, 1.0))
    tree = tree_of(setup_of(method=HierFAVG(weighting="uniform"), clock=clock, rounds=4), fleet)
    before = entry(tree.federation.state.params)
    notes = play(tree, 3)
    # One answer of two is enough. b: 1 s down, 2 s, sums of 8 bytes 2 s up: a round takes 5 s, and
    # both of b's answer at once. Of a: device 1 is done at 5 s, when the second average begins.
    assert [n.virtual_seconds for n in notes] == pytest.approx([5.0] * 3)
    assert [answered(n) for n in notes] == [
        [(0, 0), (2, 0), (3, 0)],
        [(0, 0), (1, 1), (2, 0), (3, 0)],
        [(0, 0), (2, 0), (3, 0)],
    ]
    means = [
        sum(change_of(*each) for each in rows) / len(rows)
        for rows in (
            [(0, 0), (2, 0), (3, 0)],
            [(0, 1), (1, 0), (2, 1), (3, 1)],
            [(0, 2), (2, 2), (3, 2)],
        )
    ]
    assert entry(tree.federation.state.params) == pytest.approx(before + sum(means), abs=1e-6)
    assert {row["client"]: row["edge"] for row in notes[1].clients} == dict(
        zip(range(4), "aabb", strict=True)
    )
    late = next(row for row in notes[1].clients if row["client"] == 1)
    assert late["pieces"][1] == ["compute", 0.0, pytest.approx(5.0)]


def test_an_edge_whose_devices_all_miss_the_deadline_hands_on_nothing() -> None:
    clock = semi(deadline_seconds=2.0 / 0.9)
    tree = tree_of(setup_of(clock=clock, rounds=4), below({"a": (1.0, 1.0), "b": (3.0, 3.5)}))
    first, second, third = play(tree, 3)
    assert (answered(first), first.virtual_seconds) == ([(0, 0), (1, 0)], 2.0)
    # b has nobody to ask: it waits for the first that is late, at 3 s, and a is done then too.
    assert (answered(second), second.virtual_seconds) == ([(0, 0), (1, 0), (2, 1)], 1.0)
    assert answered(third) == [(0, 0), (1, 0), (3, 2)]
    assert not first.failures


def test_late_work_of_one_average_counts_in_the_next_of_the_same_round() -> None:
    clock = semi(quorum=0.5)
    method = HierFAVG(edge_rounds=3, local_steps=1, weighting="uniform")
    tree = tree_of(setup_of((4, 4), method=method, clock=clock, rounds=2), below({"a": (1.0, 1.9)}))
    (notes,) = play(tree)
    # The averages end at 1, 2 and 3 s: the first without device 1, which then is asked again.
    assert notes.virtual_seconds == pytest.approx(3.0)
    assert [row["client"] for row in notes.clients] == [0, 0, 0, 1]
    assert {row["staleness"] for row in notes.clients} == {0}
    assert list(tree.late.flights) == [1]


def test_averages_of_an_edge_share_the_time_of_the_round() -> None:
    """A round of 3 s: 2.7 s are the edge's, 0.9 s each average's. A device at the cloud has 3 s."""
    clock = semi(deadline_seconds=3.0)
    method = HierFAVG(edge_rounds=3, local_steps=1, weighting="uniform")
    fleet = below({"a": (0.5, 4.0), CLOUD: (2.9, 3.1)})
    (notes,) = play(tree_of(setup_of((4,) * 4, method=method, clock=clock, rounds=2), fleet))
    # The first ends at 0.9 s; in the others device 1 is not asked: 0.5 s each.
    assert [row["client"] for row in notes.clients] == [0, 0, 0, 2]
    assert [row["pieces"][-1][2] for row in notes.clients if row["client"] == 0] == pytest.approx(
        [0.5, 1.4, 3.0]
    )
    assert notes.virtual_seconds == 3.0


def test_who_is_late_may_be_refused() -> None:
    clock = semi(quorum=0.5, late="refuse")
    tree = tree_of(setup_of((4, 4), clock=clock, rounds=4), below({"a": (1.0, 2.5)}))
    notes = play(tree, 3)
    assert [answered(n) for n in notes] == [[(0, 0)]] * 3
    assert [(f["client"], f["reason"], f["edge"]) for f in notes[2].failures] == [
        (1, "expired", "a")
    ]
    assert "after its round had ended" in notes[2].failures[0]["text"]


def test_a_tree_that_is_restored_keeps_what_is_late() -> None:
    setup = setup_of((4,) * 4, clock=semi(quorum=0.5), rounds=9)
    fleet = below({"a": (1.0, 3.0), "b": (1.5, 6.0), CLOUD: ()})
    whole = tree_of(setup, fleet)
    notes = play(whole, 8)
    assert any(stale for each in notes for _, stale in answered(each))
    held = []
    for cut in range(1, 6):
        first = tree_of(setup, fleet)
        before = play(first, cut)
        values, tensors = first.held()
        held.append(len(values["late"]))
        _, tensors = unpack(pack({}, tensors))
        again = tree_of(setup, fleet)
        again.federation.restore(first.federation.held())
        again.restore(json.loads(json.dumps(values)), tensors)
        after = play(again, 8 - cut)
        assert [seen(each) for each in before + after] == [seen(each) for each in notes]
        assert sha256(again.federation.state.params) == sha256(whole.federation.state.params)
    assert sum(held) >= 3


def test_devices_that_take_no_time_are_synchronous_however_nodes_wait() -> None:
    fleet = below({"a": (1.0, 1.0), "b": (1.0, 1.0)})
    plain = tree_of(setup_of(method=FedNova(), rounds=5), fleet)
    patient = tree_of(setup_of(method=FedNova(), clock=semi(quorum=0.9), rounds=5), fleet)
    play(plain, 4)
    play(patient, 4)
    assert sha256(plain.federation.state.params) == sha256(patient.federation.state.params)
    assert entry(plain.federation.state.params) != entry(state_of(plain.setup).params)


def test_when_an_average_closes_by_hand() -> None:
    """Of 12 that are asked 10 are wanted, and half of these is enough: 5 / 12 of a node's own."""
    waits = Patience(quorum=0.5, wanted=10, asked=12)
    assert [waits.needed(own) for own in (0, 1, 2, 3, 6, 12)] == [0, 1, 1, 2, 3, 5]
    three = [(4.0, True), (5.0, False), (6.0, True)]
    assert waits.closes(3.0, 10.0, three, [3.5]) == 6.0
    assert waits.closes(3.0, 10.0, [(4.0, False), (5.0, True), (40.0, True)], []) == 13.0
    assert (
        waits.closes(3.0, 10.0, [(4.0, False), (5.0, False), (6.0, False)], []) == 6.0
    )  # all have
    assert waits.closes(3.0, 10.0, [], [9.0, 7.0]) == 7.0
    assert waits.closes(3.0, 10.0, [], [1.0]) == 3.0  # it came before
    assert waits.closes(3.0, 10.0, [], [99.0]) == 13.0
    assert waits.closes(3.0, math.inf, [], [99.0]) == 99.0
    assert waits.closes(3.0, 10.0, [], []) == 3.0
