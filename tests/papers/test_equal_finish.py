"""Equal finish by hand: the schedule that Hwamei (Qi et al., ICDCS 2023) makes explicit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest
from worked import TRAINING, answer, clients, mlp, state_of

from tesserafl.core.errors import ConfigError
from tesserafl.core.schedule import Periods, Report, Seen, Situation
from tesserafl.methods import EqualFinish

CLIENTS = clients(10, 20, 30, 40, 50)
MODEL = mlp(2)


def seen(client: int, steps: int, compute: float) -> Seen:
    return Seen(
        client=client, steps=steps, compute_seconds=compute, link_seconds=1.0, joules=1.0, change=1
    )


def report(rounds: int, seconds: float, link: float, *devices: Seen) -> Report:
    return Report(rounds=rounds, seconds=seconds, link_seconds=link, joules=1.0, devices=devices)


def situation(reports: Mapping[str, Report]) -> Situation:
    return Situation(
        round=len(reports),
        seconds=0.0,
        horizon=None,
        accuracy=None,
        edges={"a": tuple(CLIENTS[:3]), "b": tuple(CLIENTS[3:])},
        reports=reports,
    )


def periods(method: EqualFinish, reports: Mapping[str, Report]) -> Mapping[str, Periods]:
    return method.periods(MODEL, state_of(MODEL), situation(reports))


def test_before_anything_was_measured_all_are_alike() -> None:
    found = periods(EqualFinish(local_steps=4, edge_rounds=2), {})
    assert found == {
        "a": Periods(rounds=2, steps={0: 4, 1: 4, 2: 4}),
        "b": Periods(rounds=2, steps={3: 4, 4: 4}),
    }


REPORTS = {
    # t = 10 / 5 = 2, 5 / 5 = 1 and 12 / 3 = 4 s a step; Ts = 40 / 2 = 20 s, Tc = 5 s
    "a": report(2, 40.0, 5.0, seen(0, 5, 10.0), seen(1, 5, 5.0), seen(2, 3, 12.0)),
    # t = 1 and 3 s; Ts = 30 / 3 = 10 s, Tc = 40 s
    "b": report(3, 30.0, 40.0, seen(3, 2, 2.0), seen(4, 2, 6.0)),
}


def test_who_is_twice_as_fast_takes_twice_the_steps() -> None:
    # a: median t = 2, D = 10 s: 5, 10 and floor(10 / 4) = 2 steps.
    # b: median t = 2, D = 10 s: 10 and floor(10 / 3) = 3 steps.
    found = periods(EqualFinish(local_steps=5), REPORTS)
    assert found["a"].steps == {0: 5, 1: 10, 2: 2}
    assert found["b"].steps == {3: 10, 4: 3}
    # b's link takes as long as 4 averages, a's less than one: max(20 + 5, 4 x 10 + 40) = 80, so
    # a has (80 - 5) / 20 = 3.75 and b (80 - 40) / 10 = 4.
    assert (found["a"].rounds, found["b"].rounds) == (4, 4)


def test_an_edge_works_at_least_as_long_as_its_link_takes() -> None:
    devices = (seen(0, 5, 1.0),)
    for link, rounds in ((0.0, 1), (3.0, 1), (9.0, 2), (26.0, 5), (1000.0, 5)):
        reports = {edge: report(1, 5.0, link, *devices) for edge in "ab"}
        where = replace(situation(reports), edges=dict.fromkeys("ab", (CLIENTS[0],)))
        found = EqualFinish().periods(MODEL, state_of(MODEL), where)
        assert [each.rounds for each in found.values()] == [rounds, rounds]


def test_steps_and_averages_have_limits() -> None:
    method = EqualFinish(local_steps=5, most_steps=8)
    assert periods(method, REPORTS)["a"].steps == {0: 5, 1: 8, 2: 2}
    slow = {"a": report(1, 1.0, 0.0, *REPORTS["a"].devices), "b": REPORTS["b"]}
    # (50 - 0) / 1 = 50 averages, but 5 at most.
    assert periods(EqualFinish(), slow)["a"].rounds == 5
    assert periods(EqualFinish(most_rounds=30), slow)["a"].rounds == 30
    # A device that takes 100 times the median still takes a step.
    crawls = report(1, 50.0, 1.0, seen(0, 1, 1.0), seen(1, 1, 1.0), seen(2, 1, 100.0))
    assert periods(EqualFinish(), {"a": crawls})["a"].steps[2] == 1


def test_the_schedule_does_not_grow_by_itself() -> None:
    """An edge's time is that of one average: what it did last does not make it do more."""
    method = EqualFinish(most_rounds=50)
    rounds = {"a": 1, "b": 1, "c": 1}
    averages = {"a": 1.0, "b": 0.66, "c": 0.5}
    devices = (seen(0, 5, 1.0),)
    for _ in range(6):
        reports = {e: report(n, n * averages[e], 0.0, *devices) for e, n in rounds.items()}
        where = replace(situation(reports), edges=dict.fromkeys(rounds, (CLIENTS[0],)))
        found = method.periods(MODEL, state_of(MODEL), where)
        rounds = {edge: each.rounds for edge, each in found.items()}
        assert rounds == {"a": 1, "b": 2, "c": 2}


def test_who_was_not_seen_takes_what_the_median_takes() -> None:
    found = periods(EqualFinish(local_steps=5), {"a": report(1, 9.0, 1.0, seen(0, 5, 10.0))})
    assert found["a"].steps == {0: 5, 1: 5, 2: 5}
    assert found["b"] == Periods(rounds=1, steps={3: 5, 4: 5})
    # Devices and links that take no time at all.
    none = report(1, 0.0, 0.0, seen(0, 5, 0.0), seen(1, 5, 0.0), seen(2, 5, 0.0))
    assert periods(EqualFinish(edge_rounds=2), {"a": none})["a"] == Periods(
        rounds=2, steps={0: 5, 1: 5, 2: 5}
    )


def test_a_level_averages_as_hierfavg_does() -> None:
    # n = 10 and 30 of 40: (10 x 4 + 30 x 8) / 40 = 7
    method, asked, state = EqualFinish(), [CLIENTS[0], CLIENTS[2]], state_of(MODEL)
    one, other = method.configure(MODEL, state, asked, TRAINING)
    after = method.aggregate(MODEL, state, asked, [answer(one, 4.0), answer(other, 8.0)])
    assert all((value == 7.0).all() for value in after.params.values())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"local_steps": 0}, r"local_steps must be from 1 to most_steps \(25\); got 0"),
        ({"local_steps": 60}, r"local_steps must be from 1 to most_steps \(25\); got 60"),
        ({"edge_rounds": 6}, r"edge_rounds must be from 1 to most_rounds \(5\); got 6"),
    ],
)
def test_limits_that_cannot_be(given: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=f"EqualFinish: {message}"):
        EqualFinish(**given)
