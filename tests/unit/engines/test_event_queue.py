"""Virtual time never goes back, nothing is lost, and settings that cannot be are refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tesserafl.core.errors import ConfigError, TesseraError
from tesserafl.engines.clock import ClockSettings, EventQueue

fast = settings(max_examples=150, deadline=None)
# Few moments, so that many events share one.
moments = st.sampled_from([0.0, 0.5, 1.0, 1.0 + 2**-52, 2.0, 7.25, 1e9])
steps = st.lists(
    st.one_of(
        st.tuples(st.just("put"), moments, st.integers(0, 12)),
        st.tuples(st.just("take"), st.just(0.0), st.just(0)),
        st.tuples(st.just("wait"), moments, st.just(0)),
    ),
    max_size=60,
)


@given(steps)
@fast
def test_a_queue_is_a_list_that_is_sorted_by_time_and_key(
    asked: list[tuple[str, float, int]],
) -> None:
    queue: EventQueue[str] = EventQueue()
    waiting: list[tuple[float, int, str]] = []  # the model: all that is to come
    now, put, taken = 0.0, [], []
    for number, (what, moment, key) in enumerate(asked):
        if what == "put":
            event = f"event {number}"
            if moment < now or key in {other for _, other, _ in waiting}:
                with pytest.raises(TesseraError, match=r"cannot be put into|waits already"):
                    queue.put(moment, key, event)
            else:
                queue.put(moment, key, event)
                waiting.append((moment, key, event))
                put.append(event)
        elif what == "take" and waiting:
            waiting.sort()
            seconds, _, event = waiting.pop(0)
            assert queue.next_time() == seconds
            assert queue.take() == event
            assert queue.now == seconds >= now  # causality
            now = seconds
            taken.append(event)
        elif what == "wait":
            if now <= moment <= min((seconds for seconds, _, _ in waiting), default=math.inf):
                queue.wait_until(moment)
                now = moment
            else:
                with pytest.raises(TesseraError, match="time cannot be set"):
                    queue.wait_until(moment)
        assert (queue.now, len(queue), queue.taken) == (now, len(waiting), len(taken))
        assert queue.waiting() == sorted(waiting)
    while len(queue):
        taken.append(queue.take())
    assert sorted(taken) == sorted(put)  # nothing is lost, nothing comes twice
    assert queue.next_time() == math.inf


@given(st.lists(st.tuples(moments, st.integers(0, 99)), unique_by=lambda e: e[1]), st.randoms())
@fast
def test_who_put_an_event_in_first_does_not_matter(
    events: list[tuple[float, int]], random: Any
) -> None:
    orders = []
    for _ in range(2):
        queue: EventQueue[int] = EventQueue()
        for moment, key in events:
            queue.put(moment, key, key)
        orders.append([queue.take() for _ in events])
        random.shuffle(events)
    assert orders[0] == orders[1] == [key for _, key in sorted(events)]


def test_events_need_not_be_comparable() -> None:
    queue: EventQueue[object] = EventQueue()
    for key in (2, 1, 3):
        queue.put(1.0, key, object())
    assert [key for _, key, _ in queue.waiting()] == [1, 2, 3]


def test_a_refused_event_leaves_the_queue_as_it_was() -> None:
    queue: EventQueue[str] = EventQueue(now=5.0)
    with pytest.raises(TesseraError, match=r"at 4\.0 s cannot .* whose time is 5\.0 s"):
        queue.put(4.0, 1, "past")
    for never in (math.inf, math.nan):
        with pytest.raises(TesseraError, match="cannot be put"):
            queue.put(never, 1, "never")
    queue.put(5.0, 1, "now")  # its key was not taken
    with pytest.raises(TesseraError, match="key 1 waits already"):
        queue.put(6.0, 1, "twice")
    assert queue.take() == "now"
    queue.put(6.0, 1, "again")  # of all that wait, no two have one key
    assert len(queue) == 1


def test_time_is_not_set_beyond_what_happens() -> None:
    queue: EventQueue[str] = EventQueue()
    queue.put(3.0, 0, "event")
    queue.wait_until(3.0)
    assert (queue.now, queue.take()) == (3.0, "event")
    with pytest.raises(TesseraError, match=r"set to 2\.0 s: now is 3\.0 s"):
        queue.wait_until(2.0)


SEMI = "semi-synchronous"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"quorum": 0.5}, r"clock\.quorum is for clock\.mode 'semi-synchronous'; the mode is 'syn"),
        ({"deadline_seconds": 5.0}, r"clock\.deadline_seconds is for"),
        ({"over_selection": 0.5}, r"clock\.over_selection is for"),
        ({"late": "refuse"}, r"clock\.late is for"),
        ({"mode": "asynchronous", "late": "refuse"}, r"clock\.late .* the mode is 'asynchronous'"),
        ({"buffer": 2}, r"clock\.buffer is for clock\.mode 'asynchronous'"),
        ({"mode": SEMI, "quorum": 0.5, "concurrency": 2}, r"clock\.concurrency is for"),
        ({"mode": SEMI}, "ends at a quorum or a deadline; set clock.quorum below"),
        ({"mode": SEMI, "quorum": 0.0}, r"clock\.quorum is a share, in \(0, 1\]; got 0\.0"),
        ({"mode": SEMI, "quorum": 1.5}, r"got 1\.5"),
        ({"mode": SEMI, "quorum": math.nan}, "got nan"),
        ({"mode": SEMI, "over_selection": -0.1}, r"must be 0 or more; got -0\.1"),
        ({"mode": SEMI, "over_selection": math.nan}, "got nan"),
        ({"mode": SEMI, "over_selection": math.inf}, "got inf"),
        ({"mode": SEMI, "deadline_seconds": 0.0}, r"deadline_seconds must be positive; got 0\.0"),
        ({"mode": "asynchronous", "buffer": 0}, r"clock\.buffer must be positive; got 0"),
        ({"mode": "asynchronous", "concurrency": -1}, r"clock\.concurrency must be positive"),
        ({"horizon_seconds": -1.0}, r"clock\.horizon_seconds must be positive; got -1\.0"),
        ({"horizon_seconds": math.nan}, "got nan"),
    ],
)
def test_settings_of_the_clock_that_cannot_be(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ClockSettings(**given)


@pytest.mark.parametrize(
    "given",
    [
        {"mode": SEMI, "quorum": 0.8},
        {"mode": SEMI, "deadline_seconds": 3.0},
        {"mode": SEMI, "over_selection": 0.3},
        {"mode": "asynchronous", "buffer": 1, "concurrency": 9},
        {"horizon_seconds": 10.0},
    ],
)
def test_settings_of_the_clock_that_can_be(given: dict[str, Any]) -> None:
    made = ClockSettings(**given)
    assert {name: getattr(made, name) for name in given} == given
