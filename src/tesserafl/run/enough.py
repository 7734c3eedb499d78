"""Answers of devices in real time, until there are enough: until a quorum or a deadline.

Who is late goes on working, and its answer counts in the round in which it comes, or not at all. A
server and an edge wait in the same way; a round of an edge is one of its averages.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from tesserafl.core.answers import check_update
from tesserafl.core.errors import UpdateError
from tesserafl.core.messages import Task, Update
from tesserafl.core.params import Params
from tesserafl.engines.remote import Remote
from tesserafl.engines.seam import Failed, Outcome
from tesserafl.run.costs import CostTable
from tesserafl.run.flights import LATE
from tesserafl.run.rounds import Notes, failure, note_answer
from tesserafl.run.setup import Setup


@dataclass(frozen=True, kw_only=True)
class Counted:
    """An answer that counts; its row is the last of the notes when it is given."""

    update: Update
    round: int
    """Of its task."""
    down: int
    """Bytes of the task."""
    seconds: float
    """From its task to here."""


@dataclass(frozen=True, kw_only=True)
class Taken:
    """What one device came to."""

    own: bool
    """Whether it was asked in this round, and not in one before."""
    counted: Counted | None
    """None: it failed, or its answer does not count."""


@dataclass(kw_only=True)
class Working:
    """Devices at work, of this round or of one before."""

    setup: Setup
    engine: Remote
    costs: CostTable
    banks: bool
    """Whether an answer that comes after its round counts."""
    tasks: dict[int, Task] = field(default_factory=dict)
    """Client -> what it was asked."""
    fits: Callable[[Task], bool] = lambda task: True
    """Whether the answer to a task of an earlier round can count in this one."""
    _begun: dict[int, float] = field(default_factory=dict)

    def until_enough(
        self,
        tasks: Iterator[Task],
        asked: int,
        needed: int,
        seconds: float | None,
        round: int,
        large: Params,
        notes: Notes,
    ) -> Iterator[Counted]:
        """Ask devices, and give the answers that count until enough of those asked have answered.

        Where nobody can be asked the first of those at work is waited for.

        Args:
            tasks: one for each device that is asked.
            asked: their number.
            needed: of their answers.
            seconds: after which it ends with what there is; None: it has no deadline.
            round: of these tasks.
            large: the model's parameters, read for shapes.
            notes: of the round.
        """
        until = self.engine.clock() + (math.inf if seconds is None else seconds)
        left, answered, came = asked, 0, False
        while self.engine.clock() < until:
            if answered >= needed if asked else came or not self.tasks:
                return
            while len(self.tasks) < self.engine.capacity and (task := next(tasks, None)):
                self.ask(task)
            for outcome in self.engine.poll(until - self.engine.clock()):
                if (taken := self.take(outcome, round, large, notes)) is None:
                    continue
                left, came = left - taken.own, True
                if taken.counted is not None:
                    answered += taken.own
                    yield taken.counted
            if asked and not left:
                return

    def ask(self, task: Task) -> None:
        """Send a device its task."""
        self.tasks[task.client.id], self._begun[task.client.id] = task, time.monotonic()
        self.engine.submit([task])

    def take(self, outcome: Outcome, round: int, large: Params, notes: Notes) -> Taken | None:
        """What came of a task, and its notes; None: of none, or of one that was answered before."""
        task = self.tasks.pop(outcome.client, None)
        if task is None:
            return None
        own, nothing = task.round == round, Taken(own=task.round == round, counted=None)
        if isinstance(outcome, Failed):
            notes.failures.append(failure(outcome.client, outcome.reason, outcome.text))
            return nothing
        if not own and not (self.banks and self.fits(task)):
            notes.failures.append(failure(outcome.client, "expired", LATE))
            return nothing
        try:
            check_update(task, outcome.update, large, self.setup.model)
        except UpdateError as error:
            notes.failures.append(failure(outcome.client, "error", str(error)))
            return nothing
        note_answer(task, outcome, self.costs, notes)
        begun = self._begun.get(outcome.client, time.monotonic())
        took, down = time.monotonic() - begun, task.num_bytes
        counted = Counted(update=outcome.update, round=task.round, down=down, seconds=took)
        return Taken(own=own, counted=counted)
