"""Answers of devices in real time, until there are enough: until a quorum or a deadline.

Who is late goes on working, and its answer counts in the round in which it comes, or not at all. A
server and an edge wait in the same way; a round of an edge is one of its averages.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

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
class Sent:
    """What a device was asked."""

    task: Task
    remembers: int | None
    """The round whose memory it began with."""
    under_way: bool = True
    """Whether this process has asked it."""
    begun: float = field(default_factory=time.monotonic)


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
    tasks: dict[int, Sent] = field(default_factory=dict)
    """Client -> what it was asked."""
    fits: Callable[[Task], bool] = lambda task: True
    """Whether the answer to a task of an earlier round can count in this one."""

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
        self._ask_again()
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
        remembers = self.engine.heard.get(task.client.id)
        self.tasks[task.client.id] = Sent(task=task, remembers=remembers)
        self.engine.submit([task])

    def _ask_again(self) -> None:
        """Those that were asked by a process before this one."""
        for client, sent in self.tasks.items():
            if not sent.under_way:
                self.engine.heard.pop(client, None)
                if sent.remembers is not None:
                    self.engine.heard[client] = sent.remembers
                self.engine.submit([sent.task])
                self.tasks[client] = replace(sent, under_way=True)

    def take(self, outcome: Outcome, round: int, large: Params, notes: Notes) -> Taken | None:
        """What came of a task, and its notes; None: of none, or of one that was answered before."""
        if (sent := self.tasks.pop(outcome.client, None)) is None:
            return None
        task = sent.task
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
        took, down = time.monotonic() - sent.begun, task.num_bytes
        counted = Counted(update=outcome.update, round=task.round, down=down, seconds=took)
        return Taken(own=own, counted=counted)
