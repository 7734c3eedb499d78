"""How a server waits, by hand; and laws: nothing is lost, nothing counts twice, all comes again."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from worlds import (
    Constant,
    change_of,
    costs_of,
    device,
    entry,
    fleet_of,
    play,
    restored,
    seen,
    setup_of,
    state_of,
    timed_of,
)

from tesserafl.core.coverage import Coverage
from tesserafl.core.errors import TesseraError, UpdateError
from tesserafl.core.params import sha256
from tesserafl.engines.clock import ClockSettings, EventQueue
from tesserafl.engines.device import INSTANT, Chain, Device
from tesserafl.engines.federation import Star
from tesserafl.engines.fleet import Fleet
from tesserafl.methods import FedAvg, FedBuff
from tesserafl.run.player import Untimed
from tesserafl.run.rounds import Notes
from tesserafl.run.setup import Setup, make_engine
from tesserafl.run.timed import Timed

WATTS = {"idle_watts": 1.0, "busy_watts": 10.0, "radio_watts": 3.0}


def semi(**settings: Any) -> ClockSettings:
    return ClockSettings(mode="semi-synchronous", **settings)


def free(**settings: Any) -> ClockSettings:
    return ClockSettings(mode="asynchronous", **settings)


def of_times(*seconds: float, **settings: Any) -> Fleet:
    """Devices without links, by what their 4 examples take."""
    return fleet_of([device(example=each / 4, **settings) for each in seconds])


def answered(notes: Notes) -> list[tuple[int, int]]:
    """(client, staleness), ascending."""
    return sorted((row["client"], row["staleness"]) for row in notes.clients)


# Synchronous.


def test_a_synchronous_round_ends_with_the_last() -> None:
    slow = device(example=2.0, down=1.0, up=2.0, **WATTS)
    quick = device(example=0.5, down=1.0, up=2.0, **WATTS)
    timed = timed_of(setup_of((4, 4)), fleet_of([slow, quick]))
    first, second = play(timed, 2)
    # Device 0: 1 + 8 + 2 = 11 s; device 1: 1 + 2 + 2 = 5 s and waits 6 s.
    assert first.virtual_seconds == pytest.approx(11.0)
    assert (timed.now, second.virtual_seconds) == (pytest.approx(22.0), pytest.approx(11.0))
    joules = {row["client"]: row["joules"] for row in first.clients}
    assert joules[0] == pytest.approx(3 * (1 + 2) + 10 * 8)
    assert joules[1] == pytest.approx(3 * (1 + 2) + 10 * 2 + 1 * 6)
    assert first.joules == pytest.approx(sum(joules.values()))
    pieces = {row["client"]: row["pieces"] for row in first.clients}
    assert [kind for kind, _, _ in pieces[0]] == ["download", "compute", "upload"]
    assert [kind for kind, _, _ in pieces[1]] == ["download", "compute", "upload", "wait"]
    assert pieces[1][-1][1:] == [pytest.approx(5.0), pytest.approx(11.0)]
    assert [answered(notes) for notes in (first, second)] == [[(0, 0), (1, 0)]] * 2


def test_a_synchronous_round_waits_for_a_failure_to_show() -> None:
    gone = device(example=5.0, leaves_seconds=7.0)
    timed = timed_of(setup_of((4, 4)), fleet_of([gone, device(example=0.5)]))
    first, second = play(timed, 2)
    assert (first.virtual_seconds, answered(first)) == (pytest.approx(7.0), [(1, 0)])
    assert [row["client"] for row in first.failures] == [0]
    # It is never asked again.
    assert (second.virtual_seconds, second.failures) == (pytest.approx(2.0), [])


def test_who_is_away_is_not_asked_and_a_round_waits_for_the_first_to_come() -> None:
    comes = fleet_of([device(example=0.25, joins_seconds=j) for j in (30.0, 10.0, 10.0)])
    timed = timed_of(setup_of((4, 4, 4)), comes)
    first, second, third = play(timed, 3)
    assert [answered(notes) for notes in (first, second)] == [[(1, 0), (2, 0)]] * 2
    assert (first.virtual_seconds, second.virtual_seconds) == (11.0, 1.0)
    assert timed.now == 13.0
    assert third.clients and answered(third) == [(1, 0), (2, 0)]


# Semi-synchronous.


def test_a_quorum_ends_a_round_and_the_late_count_later() -> None:
    timed = timed_of(setup_of((4, 4, 4), clock=semi(quorum=0.6)), of_times(1.0, 2.0, 7.0))
    notes = play(timed, 4)
    # ceil(0.6 x 3) = 2 answers. Rounds end at 2, 4, 6 (0 and 1 alone), 8; device 2 is done at 7.
    assert [answered(each) for each in notes] == [
        [(0, 0), (1, 0)],
        [(0, 0), (1, 0)],
        [(0, 0), (1, 0)],
        [(0, 0), (1, 0), (2, 3)],
    ]
    assert [each.virtual_seconds for each in notes] == pytest.approx([2.0] * 4)
    late = next(row for row in notes[3].clients if row["client"] == 2)
    assert late["pieces"][1] == ["compute", 0.0, pytest.approx(7.0)]
    assert late["pieces"][-1][0] == "upload"  # nobody waited for it, and it did not wait
    assert all(row["pieces"][-1][0] == "wait" for row in notes[0].clients if row["client"] == 0)


def test_who_is_late_may_be_refused_and_works_on_for_nothing() -> None:
    clock = semi(quorum=0.6, late="refuse")
    fleet = of_times(1.0, 2.0, 7.0, **WATTS)
    timed = timed_of(setup_of((4, 4, 4), clock=clock), fleet)
    notes = play(timed, 5)
    assert [answered(each) for each in notes[:4]] == [[(0, 0), (1, 0)]] * 4
    assert [row["reason"] for row in notes[3].failures] == ["expired"]
    assert "came after its round had ended" in notes[3].failures[0]["text"]
    assert notes[3].failures[0]["joules"] == pytest.approx(70.0)  # it worked for 7 s
    assert notes[3].failures[0]["bytes_up"] > 0
    assert entry(timed.federation.state.params) == pytest.approx(
        entry(setup_of().experiment.method.init(timed.setup.model, 0, 1).params)
        + sum((change_of(0, r) + change_of(1, r)) / 2 for r in range(5))
    )
    # Then it is asked again.
    assert 2 in {flight.client for _, _, flight in timed.queue.waiting()}


def test_a_deadline_ends_a_round_without_anybody() -> None:
    timed = timed_of(setup_of((4, 4), clock=semi(deadline_seconds=2.5)), of_times(2.0, 6.0))
    first, second, third = play(timed, 3)
    assert (answered(first), first.virtual_seconds) == ([(0, 0)], 2.5)
    assert (answered(second), second.virtual_seconds) == ([(0, 0)], 2.0)  # 1 was not asked again
    # Asked at 4.5; device 1 comes at 6 and was asked by round 0.
    assert answered(third) == [(0, 0), (1, 2)]
    assert timed.now == 6.5


def test_an_answer_at_the_deadline_is_in_time() -> None:
    timed = timed_of(setup_of((4, 4), clock=semi(deadline_seconds=2.0)), of_times(2.0, 6.0))
    assert answered(play(timed)[0]) == [(0, 0)]


@pytest.mark.parametrize(("wanted", "over", "asked"), [(10, 0.1, 11), (10, 0.25, 13), (3, 0.0, 3)])
def test_over_selection_asks_so_many_more_and_no_rounding_error_more(
    wanted: int, over: float, asked: int
) -> None:
    # 10 x (1 + 0.1) is a little more than 11 in floats.
    clock = semi(over_selection=over, deadline_seconds=100.0)
    setup = setup_of([4] * 16, clock=clock, clients_per_round=wanted)
    (notes,) = play(timed_of(setup, of_times(*range(1, 17))))
    assert len(notes.clients) + len(notes.failures) <= asked
    timed = timed_of(setup, of_times(*range(1, 17)))
    play(timed)
    assert timed.sent == asked


@pytest.mark.parametrize(
    ("quorum", "wanted", "needed"), [(0.07, 100, 7), (0.5, 5, 3), (0.01, 5, 1)]
)
def test_a_quorum_is_so_many_and_no_rounding_error_more(
    quorum: float, wanted: int, needed: int
) -> None:
    # 0.07 x 100 is a little more than 7 in floats.
    setup = setup_of([4] * wanted, clock=semi(quorum=quorum))
    (notes,) = play(timed_of(setup, of_times(*range(1, wanted + 1))))
    assert len(notes.clients) == needed


def test_when_all_work_a_round_waits_for_one_and_of_a_device_one_answer_makes_a_model() -> None:
    """What ended while the server waited and what the same device did next are two answers."""
    clock = semi(deadline_seconds=1.0)
    timed = timed_of(setup_of((4, 4), clock=clock, clients_per_round=2), of_times(1.5, 9.0))
    notes = play(timed, 5)
    # Round 0 ends at 1 with nothing. In round 1 device 0 is free at 1.5, and asked.
    assert [answered(each) for each in notes[:2]] == [[], [(0, 1)]]
    works = [
        (row["client"], n - row["staleness"]) for n, e in enumerate(notes) for row in e.clients
    ]
    assert len(works) == len(set(works))
    per_model = [[row["client"] for row in each.clients] for each in notes]
    assert all(len(set(clients)) == len(clients) for clients in per_model)


def test_two_answers_of_one_device_in_one_round() -> None:
    """As above, but the second answer is there before its round's deadline."""
    setup = setup_of((4, 4), clock=semi(deadline_seconds=1.0))
    timed = timed_of(setup, of_times(1.5, 30.0))
    (first,) = play(timed)
    timed.fleet = of_times(0.75, 30.0)  # a load is gone, for instance
    # At 1.5 the first work is there and the next begins; it is there at 2.25.
    second, third = play(timed, 2)
    assert [answered(each) for each in (first, second)] == [[], [(0, 1)]]
    assert (0, 1) in answered(third)


# Asynchronous.


def test_a_buffer_makes_a_model_whenever_it_is_full() -> None:
    clock = free(buffer=2, concurrency=3)
    timed = timed_of(setup_of((4, 4, 4), clock=clock), of_times(1.0, 2.0, 5.0))
    notes = play(timed, 3)
    # 0 and 1 at 1 and 2; again at 3 and 4; at 5 comes 2, and 0 for the third time.
    assert [answered(each) for each in notes] == [
        [(0, 0), (1, 0)],
        [(0, 0), (1, 0)],
        [(0, 0), (2, 2)],
    ]
    assert [each.virtual_seconds for each in notes] == pytest.approx([2.0, 2.0, 1.0])
    # Who trained the present model waits for the next.
    assert [row["pieces"][-1][0] for row in notes[0].clients] == ["upload", "upload"]


def test_no_more_work_than_the_concurrency() -> None:
    clock = free(buffer=1, concurrency=2)
    setup = setup_of([4] * 5, clock=clock, clients_per_round=3)
    timed = timed_of(setup, of_times(1.0, 2.0, 3.0, 4.0, 5.0))
    for _ in range(12):
        play(timed)
        assert len(timed.queue) <= 2
    assert timed.sent >= 12


def test_a_buffer_larger_than_the_fleet_takes_what_there_is() -> None:
    timed = timed_of(setup_of((4, 4), clock=free(buffer=5)), of_times(1.0, 3.0))
    first, second = play(timed, 2)
    assert [answered(each) for each in (first, second)] == [[(0, 0), (1, 0)]] * 2
    assert [each.virtual_seconds for each in (first, second)] == pytest.approx([3.0, 3.0])


@dataclass(kw_only=True)
class Bounded(EventQueue[Any]):
    """A queue that ends a test where time does not go on."""

    def take(self) -> Any:
        assert self.taken < 3000, "events without an end"
        return EventQueue.take(self)


def test_who_does_not_take_a_model_is_not_asked_for_the_same_again() -> None:
    """The draw would be the same, and time would not go on."""
    setup = setup_of([4] * 5, clock=free(buffer=2, concurrency=3), dropout=0.5)
    timed = timed_of(setup, of_times(1.0, 2.0, 3.0, 4.0, 5.0))
    timed.queue = Bounded()
    notes = play(timed, 12)
    for each in notes:
        silent = [row["client"] for row in each.failures]
        assert len(silent) == len(set(silent))
    assert sum(len(each.clients) for each in notes) > 10
    assert timed.now > 5.0


def test_who_broke_off_may_begin_again() -> None:
    # 1 s there and 1 s away, at the mean; works of 1.5 s are done sooner or later.
    comes = Chain(values=(1.0, 0.0), mean_seconds=(1.0, 1.0))
    timed = timed_of(setup_of((4,), clock=free()), of_times(1.5, online=comes))
    notes = play(timed, 3)
    assert [answered(each) for each in notes] == [[(0, 0)]] * 3
    assert sum(len(each.failures) for each in notes) > 0


# For good.

MODES = {
    "synchronous": ClockSettings(),
    "quorum": semi(quorum=0.5),
    "deadline": semi(deadline_seconds=1.0, over_selection=0.4, late="refuse"),
    "asynchronous": free(buffer=2),
}


@pytest.mark.parametrize("mode", MODES)
def test_devices_that_all_leave_for_good_are_an_error(mode: str) -> None:
    fleet = of_times(1.0, 2.0, 3.0, leaves_seconds=20.5)
    timed = timed_of(setup_of((4, 4, 4), clock=MODES[mode], rounds=1000), fleet)
    with pytest.raises(
        TesseraError, match=r"after \d+ virtual seconds no device can be reached any more; let"
    ):
        play(timed, 1000)
    assert 15 < timed.now <= 21
    assert timed.federation.round >= 5


def test_work_that_no_device_stays_for_is_an_error() -> None:
    """Each time it is asked a device goes offline at its work, and comes back: for ever."""
    short = Chain(values=(1.0, 0.0), mean_seconds=(0.01, 0.01))
    fleet = of_times(1000.0, 1000.0, online=short)
    timed = timed_of(setup_of((4, 4), clock=MODES["asynchronous"]), fleet)
    with pytest.raises(TesseraError, match=r"works in a row failed.*fleet\.online_minutes"):
        play(timed)
    assert len(timed.ended) > 200 and not any(flight.answered for flight in timed.ended)


@pytest.mark.parametrize("mode", MODES)
def test_work_that_is_all_refused_is_an_error(mode: str) -> None:
    """As in runs without a clock: a diverged run does not go on for nothing."""
    engine = Constant(bad=lambda task: task.round >= 2)
    timed = timed_of(setup_of((4, 4, 4), clock=MODES[mode]), of_times(0.4, 0.4, 0.4), engine)
    play(timed, 2)
    with pytest.raises(
        UpdateError, match=r"round \d: the work of every client failed; the first: "
    ):
        play(timed, 4)


@pytest.mark.parametrize("mode", MODES)
def test_a_bad_answer_does_not_cost_the_round(mode: str) -> None:
    engine = Constant(bad=lambda task: task.client.id == 1)
    timed = timed_of(setup_of((4, 4, 4), clock=MODES[mode]), of_times(0.4, 0.4, 0.4), engine)
    notes = play(timed, 5)
    assert all(each.clients for each in notes)
    errors = {row["client"] for each in notes for row in each.failures if row["reason"] == "error"}
    assert errors == {1}
    assert math.isfinite(entry(timed.federation.state.params))


@pytest.mark.parametrize("mode", MODES)
def test_no_round_begins_after_the_horizon(mode: str) -> None:
    clock = ClockSettings(**{**vars(MODES[mode]), "horizon_seconds": 5.0})
    timed = timed_of(setup_of((4, 4, 4), clock=clock, rounds=1000), of_times(1.0, 1.0, 1.0))
    begins = []
    while not timed.over:
        begins.append(timed.now)
        play(timed)
    assert begins and max(begins) < 5.0 <= timed.now
    few = timed_of(setup_of((4,), rounds=2), of_times(1.0))
    play(few, 2)
    assert few.over


# Laws.

present = st.one_of(
    st.just({}),
    st.builds(
        lambda here, away: {"online": Chain(values=(1.0, 0.0), mean_seconds=(here, away))},
        st.sampled_from([2.0, 6.0]),
        st.sampled_from([1.0, 4.0]),
    ),
    st.builds(lambda leaves: {"leaves_seconds": leaves}, st.sampled_from([3.0, 12.0])),
    st.builds(lambda joins: {"joins_seconds": joins}, st.sampled_from([1.0, 7.0])),
)
devices = st.builds(
    lambda seconds, way, when: device(example=seconds / 4, **way, **when, **WATTS),
    st.sampled_from([0.5, 1.0, 1.0, 2.0, 5.0]),
    st.sampled_from([{}, {"down": 0.5, "up": 1.0}]),
    present,
)
clocks = st.one_of(
    st.just(ClockSettings()),
    st.builds(
        semi,
        quorum=st.sampled_from([0.3, 0.5, 0.9]),
        deadline_seconds=st.sampled_from([None, 0.75, 3.0]),
        over_selection=st.sampled_from([0.0, 0.5]),
        late=st.sampled_from(["bank", "refuse"]),
    ),
    st.builds(
        free,
        buffer=st.sampled_from([None, 1, 2, 5]),
        concurrency=st.sampled_from([None, 1, 3]),
    ),
)


@st.composite
def worlds(draw: st.DrawFn) -> tuple[Setup, Fleet]:
    fleet = fleet_of(draw(st.lists(devices, min_size=1, max_size=5)), seed=draw(st.integers(0, 3)))
    setup = setup_of(
        [4] * len(fleet.devices),
        clock=draw(clocks),
        clients_per_round=draw(st.integers(1, len(fleet.devices))),
        dropout=draw(st.sampled_from([0.0, 0.0, 0.4])),
        seed=draw(st.integers(0, 3)),
        rounds=100,
    )
    return setup, fleet


ROUNDS = 8


def played(timed: Timed, rounds: int) -> list[Notes]:
    """At most so many rounds: devices may all have left."""
    notes = []
    for _ in range(rounds):
        try:
            notes += play(timed)
        except TesseraError as error:
            if "works in a row failed" in str(error):  # whoever comes does not stay for its work
                break
            assert "no device can be reached any more" in str(error)
            assert all(placed.online_from(timed.now) == math.inf for placed in timed.fleet.devices)
            break
    return notes


@given(worlds())
@settings(max_examples=60, deadline=None)
def test_nothing_is_lost_and_nothing_counts_twice(world: tuple[Setup, Fleet]) -> None:
    setup, fleet = world
    engine = Constant()
    timed = timed_of(setup, fleet, engine)
    timed.queue = Bounded()
    start = entry(timed.federation.state.params)
    notes = played(timed, ROUNDS)
    clock, ends = setup.experiment.clock, 0.0
    value, folded, rows = start, Counter[tuple[int, int]](), 0
    works: dict[int, list[tuple[float, float]]] = {}
    for version, each in enumerate(notes):
        assert each.virtual_seconds is not None and each.virtual_seconds >= 0
        ends += each.virtual_seconds
        own = [(row["client"], version - row["staleness"]) for row in each.clients]
        folded.update(own)
        # What was noted is what was folded, each with the weight of one.
        assert len({client for client, _ in own}) == len(own)
        value += sum(change_of(*work) for work in own) / max(1, len(own))
        assert each.joules == pytest.approx(
            sum(row["joules"] for row in (*each.clients, *each.failures))
        )
        if clock.mode == "synchronous" or clock.late == "refuse":
            assert all(row["staleness"] == 0 for row in each.clients)
        for row in (*each.clients, *each.failures):
            rows += 1
            spans = [span for span in row["pieces"] if span[0] != "wait"]
            assert all(a[2] == b[1] for a, b in zip(row["pieces"], row["pieces"][1:], strict=False))
            assert row["pieces"][-1][2] <= ends + 1e-9  # nobody knows what is to come
            works.setdefault(row["client"], []).append((spans[0][1], spans[-1][2]))
            if "reason" not in row:
                there = fleet.devices[row["client"]].online_until(spans[0][1])
                assert there >= spans[-1][2]
    assert timed.federation.round == len(notes)
    assert entry(timed.federation.state.params) == pytest.approx(value, abs=1e-4)
    assert all(count == 1 for count in folded.values())
    # Everything that was trained was folded, failed, or is still under way.
    still = [flight for _, _, flight in timed.queue.waiting()] + timed.ended
    pending = Counter((flight.client, flight.round) for flight in still)
    failed = Counter(
        (row["client"], version - row["staleness"])
        for version, each in enumerate(notes)
        for row in each.failures
    )
    assert set(folded) <= set(engine.trained)
    if len(notes) == ROUNDS:  # else an error ended the run, and what failed then is not noted
        assert timed.now == pytest.approx(ends)
        assert Counter(engine.trained) <= folded + pending + failed
        assert clock.mode == "synchronous" or timed.sent == rows + len(still)
    # A device does one thing at a time.
    for spans_of in works.values():
        spans_of.sort()
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(spans_of))


@given(worlds(), st.integers(0, 6))
@settings(max_examples=60, deadline=None)
def test_a_server_that_is_restored_goes_on_the_same(world: tuple[Setup, Fleet], cut: int) -> None:
    setup, fleet = world
    whole = timed_of(setup, fleet)
    notes = played(whole, 7)
    first = timed_of(setup, fleet)
    before = played(first, min(cut, len(notes)))
    again = restored(first, setup, fleet)
    after = played(again, 7 - len(before))
    assert [seen(each) for each in before + after] == [seen(each) for each in notes]
    assert sha256(again.federation.state.params) == sha256(whole.federation.state.params)
    assert (again.now, again.sent, again.queue.taken) == (whole.now, whole.sent, whole.queue.taken)


# Where waiting does not matter.


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("weighting", ["examples", "uniform"])
def test_devices_that_take_no_time_are_synchronous_however_one_waits(
    weighting: Any, dropout: float
) -> None:
    """Really trained, and against a run that has no clock at all."""
    zero = fleet_of([Device(gflops=math.inf, link=INSTANT)] * 5)
    sizes, results = (3, 4, 9, 17, 5), {}
    modes = {
        "synchronous": (ClockSettings(), FedAvg(weighting=weighting)),
        "everybody": (semi(deadline_seconds=1e9), FedAvg(weighting=weighting)),
        "buffered": (free(), FedBuff(weighting=weighting)),
        "asynchronous": (free(), FedAvg(weighting=weighting)),
    }
    for name, (clock, method) in modes.items():
        if dropout and name in ("buffered", "asynchronous"):
            continue  # there a buffer is filled up with others' answers
        setup = setup_of(
            sizes, clock=clock, method=method, clients_per_round=3, dropout=dropout, seed=2
        )
        timed = timed_of(setup, zero, make_engine(setup))
        notes = play(timed, 6)
        assert timed.now == 0.0
        results[name] = (
            sha256(timed.federation.state.params),
            [answered(each) for each in notes],
        )
    star = Star(model=setup.model, method=FedAvg(weighting=weighting), state=state_of(setup))
    setup = replace(setup, experiment=replace(setup.experiment, method=star.method))
    plain = Untimed(setup=setup, engine=make_engine(setup), federation=star, costs=costs_of(setup))
    coverage = Coverage(setup.model.shapes)
    who = [sorted((r["client"], 0) for r in plain.play(coverage).clients) for _ in range(6)]
    results["without a clock"] = (sha256(star.state.params), who)
    assert len({str(result) for result in results.values()}) == 1


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_a_quorum_of_everybody_is_a_synchronous_round(dropout: float) -> None:
    sizes = (3, 4, 9, 170, 5)
    results = []
    for clock in (ClockSettings(), semi(deadline_seconds=1e9)):
        setup = setup_of(
            sizes, clock=clock, method=FedAvg(), clients_per_round=4, dropout=dropout, seed=1
        )
        timed = timed_of(setup, of_times(1.0, 2.0, 3.0, 4.0, 5.0, **WATTS))
        notes = play(timed, 6)
        results.append((sha256(timed.federation.state.params), [seen(each) for each in notes]))
    assert results[0] == results[1]
