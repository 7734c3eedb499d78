"""One round of a tree's cloud: what every edge is asked, and what becomes of its answer."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from pydantic import BaseModel

from tesserafl.core.answers import MAX_METRIC
from tesserafl.core.errors import MessageError, TesseraError
from tesserafl.core.messages import Client, Task
from tesserafl.core.method import Method
from tesserafl.core.params import num_bytes
from tesserafl.core.schedule import Periods, Report, Seen
from tesserafl.engines.edge_orders import Sweep, Waits, member_of
from tesserafl.engines.federation import Star
from tesserafl.engines.handed import Below
from tesserafl.engines.parcels import Letter
from tesserafl.engines.seam import Failed
from tesserafl.engines.steps import Told
from tesserafl.engines.sums import Sums
from tesserafl.engines.swept import Swept, swept_of
from tesserafl.run.averages import Patience, numbered, staleness
from tesserafl.run.overdue import Overdue, without_values
from tesserafl.run.rounds import Notes, failure, training_of
from tesserafl.run.setup import Setup

_log = logging.getLogger(__name__)

_LEAST = 1e-9
"""Of what is measured; less is nothing."""


@dataclass(frozen=True, kw_only=True)
class _Asked:
    """What one edge is asked."""

    seat: int
    sweep: Sweep
    below: Below

    @property
    def most_bytes(self) -> int:
        """Of an honest answer."""
        return self.below.most_bytes

    def order(self, run: str, letter: Letter, most_bytes: int) -> BaseModel:
        """The order."""
        changes = {"run": run, "letter": letter.model_dump(), "most_bytes": most_bytes}
        return self.sweep.model_copy(update=changes)


@dataclass(kw_only=True)
class CloudRound:
    """One round of the cloud, while edges play it."""

    setup: Setup
    federation: Star
    cohort: Mapping[int, Client]
    """Who is asked, and after them whose late answers may come."""
    below: Mapping[int, Sequence[Client]]
    """Seat -> those below its edge that are asked."""
    names: Mapping[int, str]
    numbers: Mapping[int, Mapping[str, int]]
    """Seat -> device -> the client that it is."""
    periods: Mapping[str, Periods]
    heard: Mapping[int, int]
    seconds: float
    """That an edge has."""
    waiting: tuple[Patience, bool] | None = None
    """How long edges wait for their devices, and whether late answers count; None: for all."""
    late: Mapping[int, Overdue] = field(default_factory=dict)
    """Seat -> those below its edge that are at work."""
    stays: dict[int, Overdue] = field(default_factory=dict)
    """The same after the round."""
    backhaul: int = 0
    answered: dict[int, int] = field(default_factory=dict)
    """Client -> the round of the task that it answered last."""
    _asked: dict[int, _Asked] = field(default_factory=dict)

    def asks(self) -> Mapping[int, _Asked]:
        """Seat -> what its edge is asked."""
        several = {
            client.id
            for seat, clients in self.below.items()
            if self._of(seat).rounds > 1
            for client in clients
        }
        # Those whose edges hand on are the cloud's own clients, for a method that deals parts.
        busy = {client for each in self.late.values() for client in each}
        once = [client for client in self.cohort if client not in several | busy]
        for seat, clients in self.below.items():
            own, periods = [client.id for client in clients], self._of(seat)
            overdue = sorted(self.late.get(seat, ()))
            together = once
            if periods.rounds > 1:
                together = [client for client in self.cohort if client in own]
            sweep = Sweep(
                run="0" * 32,
                letter={},
                cohort=[member_of(client) for client in self.cohort.values()],
                together=together,
                own=own,
                numbers=dict(self.numbers[seat]),
                rounds=periods.rounds,
                steps=[[c, steps] for c, steps in sorted(periods.steps.items()) if c in own],
                heard=[[c, self.heard[c]] for c in (*own, *overdue) if c in self.heard],
                seconds=self.seconds,
                most_bytes=0,
                waits=self._waits(seat),
            )
            below = Below(
                model=self.setup.model,
                method=self._method,
                state=self.federation.state,
                clients={c: self.cohort[c] for c in (*own, *overdue)},
                rounds=periods.rounds,
                tasks=partial(self._tasks, seat, together, own, periods),
            )
            self._asked[seat] = _Asked(sweep=sweep, below=below, seat=seat)
        return self._asked

    def take(self, answer: Told | Failed, total: Sums, took: float, notes: Notes) -> Report | None:
        """Add what an edge answered to the cloud's sum and to the notes; what the edge took."""
        edge, asked = self.names[answer.client], self._asked[answer.client]
        if isinstance(answer, Told):
            try:
                return self._take(edge, asked, answer, total, took, notes)
            except TesseraError as error:
                answer = Failed(client=answer.client, reason="error", text=str(error))
            except Exception as error:  # nothing that an edge sends may end a run
                _log.exception("an answer of edge %r could not be read", edge)
                text = f"its answer could not be read: {error!r:.500}"
                answer = Failed(client=answer.client, reason="error", text=text)
        self.stays[asked.seat] = dict(self.late.get(asked.seat, {}))  # they are asked for again
        for client in asked.sweep.own:
            text = f"edge {edge!r}: {answer.text}"
            notes.failures.append({**failure(client, answer.reason, text), "edge": edge})
        return None

    def _take(
        self, edge: str, asked: _Asked, told: Told, total: Sums, took: float, notes: Notes
    ) -> Report:
        below, (header, groups) = asked.below, told.parts
        swept = swept_of(header, below.clients, below.rounds)
        trained = swept.trained(below.state.params)
        heard = {row.client for row in swept.rows}
        stays = self._staying(asked, swept)
        up = below.fold(total, (swept.handed, groups), heard)
        self.stays[asked.seat] = stays
        self.backhaul += num_bytes(below.state.params) + up
        for row in swept.rows:
            more: dict[str, Any] = {"edge": edge}
            if self.waiting is not None:
                more |= {"staleness": staleness(below.state.round, row.round, below.state.rounds)}
            notes.clients.append({**row.noted, **more})
        self.answered |= {client: round for client, round in swept.heard}
        notes.trained += trained
        notes.failures += [{**loss.model_dump(), "edge": edge} for loss in swept.failures]
        return measured(swept, below.rounds, told.seconds, took)

    def _of(self, seat: int) -> Periods:
        return self.periods.get(self.names[seat], Periods())

    def _waits(self, seat: int) -> Waits | None:
        if self.waiting is None:
            return None
        patience, banks = self.waiting
        return Waits(
            quorum=patience.quorum,
            wanted=patience.wanted,
            asked=patience.asked,
            banks=banks,
            late=sorted(self.late.get(seat, ())),
        )

    def _staying(self, asked: _Asked, swept: Swept) -> Overdue:
        """Who is at work below an edge after the round; MessageError if it cannot be."""
        before: Overdue = self.late.get(asked.seat, {})
        known: dict[int, Task] = {}
        if swept.late and self.waiting is None:
            raise MessageError(
                "an edge that was to wait for all its devices says that some are late"
            )
        if swept.late and not self._method.entrywise and asked.below.rounds == 1:
            known = {task.client.id: without_values(task) for task in asked.below.tasks()}
        return {c: known.get(c, before.get(c)) for c in swept.late}

    @property
    def _method(self) -> Method:
        return self.setup.experiment.method

    def _tasks(
        self, seat: int, together: Iterable[int], own: Iterable[int], each: Periods
    ) -> list[Task]:
        state, clients, asked = self.federation.state, [self.cohort[c] for c in together], set(own)
        training = training_of(self.setup, self.federation)
        tasks = self._method.configure(self.setup.model, state, clients, training)
        dealt = [task for task in numbered(tasks, state, each.steps, 1) if task.client.id in asked]
        late = [task for task in self.late.get(seat, {}).values() if task is not None]
        return [*dealt, *late]


def measured(swept: Swept, rounds: int, seconds: float, took: float) -> Report:
    """What an edge took, as measured; joules are not, and 0 says so.

    Args:
        swept: what it says of its devices.
        rounds: its averages.
        seconds: that it says they took.
        took: seconds until its answer was there; nothing in it can have taken longer.
    """
    latest = {row.client: row for row in swept.rows if row.steps}
    seconds = _within(seconds, took)
    return Report(
        rounds=rounds,
        seconds=seconds,
        link_seconds=max(0.0, took - seconds),
        joules=0.0,
        devices=tuple(
            Seen(
                client=client,
                steps=row.steps,
                compute_seconds=_within(row.seconds, took),
                link_seconds=_within(row.link_seconds, took),
                joules=0.0,
                change=_within(row.change, MAX_METRIC),
                sketch=tuple(row.sketch),
            )
            for client, row in sorted(latest.items())
        ),
        sketch=tuple(swept.sketch),
    )


def _within(value: float, most: float) -> float:
    """A measure as schedules can divide by it: 0, or neither tiny nor more than can be."""
    return min(value, most) if value >= _LEAST else 0.0
