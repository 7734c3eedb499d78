"""What an edge does in a round of the node above, in virtual time and on devices alike.

It averages over those below it as often as its period says. Where that is once it hands on what it
got, a sub-sum; else what it made of its model (`Several`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from tesserafl.core.errors import ConfigError
from tesserafl.core.messages import Task
from tesserafl.core.method import Method, State
from tesserafl.core.model import Model
from tesserafl.core.schedule import Periods, Report, Seen, Situation
from tesserafl.engines.sums import Covered, Sums


@dataclass(frozen=True, kw_only=True)
class Patience:
    """How long a node waits for devices of its own in one of its averages.

    Who is late goes on working, is asked nothing meanwhile, and counts in the node's average in
    which its answer comes, or not at all.
    """

    quorum: float
    """share of `wanted` whose answers are enough"""
    wanted: int
    """answers that a round is for, of all nodes together"""
    asked: int
    """clients that are asked in the round, of all nodes together"""

    def needed(self, own: int) -> int:
        """Answers that end an average in which a node asks so many devices."""
        return min(own, rounded_up(self.quorum * self.wanted * own / self.asked)) if own else 0

    def closes(
        self, start: float, seconds: float, own: Sequence[tuple[float, bool]], late: Sequence[float]
    ) -> float:
        """When an average ends that begins at `start`.

        Args:
            start: in seconds.
            seconds: after which it ends with what there is; infinite: it has no deadline.
            own: of each device that is asked, when it has answered or failed, and whether it has
                answered.
            late: when those answer that were late before. Where nobody can be asked the first of
                them is waited for.
        """
        needed, answered = self.needed(len(own)), 0
        end = min(late, default=start) if not own else start
        for moment, good in sorted(own):
            end, answered = moment, answered + good
            if answered == needed:
                break
        return max(start, min(end, start + seconds))


def share_of(seconds: float, rounds: int) -> float:
    """What each average of an edge has of the time that the node above gives it.

    The edge must hand on in time: a tenth is for that.
    """
    return _SHARE * seconds / rounds


def rounded_up(number: float) -> int:
    """Rounded up, but for what floats are off: 10 x 1.1 is 11."""
    return math.ceil(round(number, 9))


_SHARE = 0.9
MOST_ROUNDS = 1000
"""Averages of an edge in a round of the node above are fewer."""
Schedule = Callable[[Model, State, Situation], Mapping[str, Periods]]
"""Decides on the periods of a round of the cloud."""


def decided(
    schedule: Schedule, model: Model, state: State, situation: Situation
) -> Mapping[str, Periods]:
    """The periods of a round; raises ConfigError if nodes cannot keep them."""
    periods = schedule(model, state, situation)
    for edge, each in periods.items():
        if not 1 <= each.rounds < MOST_ROUNDS or min(each.steps.values(), default=1) < 1:
            raise ConfigError(
                f"edge {edge!r}: periods are positive, and an edge averages fewer than "
                f"{MOST_ROUNDS} times in a round; the schedule says {each}"
            )
    return periods


def numbered(
    tasks: Iterable[Task], state: State, steps: Mapping[int, int], number: int
) -> Iterator[Task]:
    """Tasks of one average, each with its device's steps, and a round that no other has.

    In a star, and where edges hand on (`number` 1), a round has its own number.
    """
    for task in tasks:
        own = task.training
        if task.client.id in steps:
            own = replace(own, steps=steps[task.client.id])
        yield replace(task, round=round_of(state, number), training=own)


def round_of(state: State, number: int) -> int:
    """Of the tasks of an average."""
    return state.round if number == 1 else state.round + number * state.rounds


def staleness(round: int, task: int, rounds: int) -> int:
    """Rounds of the cloud, of which there are so many, since the one that a task is of."""
    return max(0, round - task % rounds)


def fits(method: Method, state: State, task: int, number: int) -> bool:
    """Whether late work on a task of a round can count in an average.

    What began with an edge's own model is known there alone: it cannot be handed on by itself.
    """
    return method.entrywise or number != 1 or task < state.rounds


@dataclass(kw_only=True)
class Several:
    """An edge's model while it averages several times; its round is that of the node above."""

    model: State
    covered: Covered = field(default_factory=dict)

    def average(self, total: Sums) -> None:
        """One average more."""
        self.model = replace(total.finish(self.model), round=self.model.round)
        self.covered |= total.reported()


def turns(rounds: int, number: int = 1) -> Iterator[int]:
    """Numbers of an edge's averages; `number` is that of the average above."""
    return iter(range(number * MOST_ROUNDS, number * MOST_ROUNDS + rounds))


def report_of(values: Mapping[str, Any]) -> Report:
    """What an edge took, from plain values, which have lists where we have tuples."""
    devices = tuple(Seen(**{**s, "sketch": tuple(s["sketch"])}) for s in values["devices"])
    return Report(**{**values, "devices": devices, "sketch": tuple(values["sketch"])})
