"""What an edge does in a round of the node above, in virtual time and on devices alike.

It averages over those below it as often as its period says. Where that is once it hands on what it
got, a sub-sum; else what it made of its model (`Several`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from tesserafl.core.errors import ConfigError
from tesserafl.core.messages import Task
from tesserafl.core.method import State
from tesserafl.core.model import Model
from tesserafl.core.schedule import Periods, Report, Seen, Situation
from tesserafl.engines.sums import Covered, Sums

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
        round = state.round if number == 1 else state.round + number * state.rounds
        yield replace(task, round=round, training=own)


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
