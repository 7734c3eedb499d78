"""Rounds in virtual time: the server asks devices, waits as the clock's settings say, and folds.

    synchronous        until the last has answered or failed; updates are folded as they are made
    semi-synchronous   until a quorum or a deadline; who is late counts later, or not at all
    asynchronous       always so many devices at work, a new model for every full buffer

What is late or under way is held as updates, not as models: a checkpoint holds it too.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from tesserafl.core.coverage import Coverage
from tesserafl.core.errors import TesseraError
from tesserafl.core.messages import Client, Update
from tesserafl.core.params import Params
from tesserafl.engines.clock import EventQueue
from tesserafl.engines.federation import Federation
from tesserafl.engines.fleet import Fleet
from tesserafl.engines.seam import Engine
from tesserafl.run.averages import rounded_up
from tesserafl.run.costs import CostTable
from tesserafl.run.flights import Flight, flights_of, flights_parts, fly
from tesserafl.run.roster import Roster, deserted
from tesserafl.run.rounds import Notes, check_answered, count, fold, training_of
from tesserafl.run.setup import Setup

_FAILURES = 100
"""Works that fail in a row, for each device, before nothing more is hoped for."""


@dataclass(kw_only=True)
class Timed:
    """A server and its devices in virtual time."""

    setup: Setup
    engine: Engine
    federation: Federation
    fleet: Fleet
    costs: CostTable
    queue: EventQueue[Flight] = field(default_factory=EventQueue)
    """Flights, by when they end."""
    sent: int = 0
    """Flights so far; their keys."""
    ended: list[Flight] = field(default_factory=list)
    """Flights that ended and are not part of a model yet."""
    _roster: Roster = field(init=False)

    def __post_init__(self) -> None:
        self._roster = Roster(setup=self.setup, fleet=self.fleet)

    @property
    def now(self) -> float:
        """Virtual seconds since the start."""
        return self.queue.now

    @property
    def over(self) -> bool:
        """Whether no further round begins."""
        horizon = self.setup.experiment.clock.horizon_seconds
        done = self.federation.round >= self.federation.rounds
        return done or (horizon is not None and self.now >= horizon)

    def play(self, coverage: Coverage) -> Notes:
        """The next round, or what makes the next model.

        Raises:
            TesseraError: no device can be reached any more.
            UpdateError: the work of every client that answered was refused.
        """
        begun, begin = time.perf_counter(), self.now
        notes = {
            "synchronous": self._synchronous,
            "semi-synchronous": self._semi_synchronous,
            "asynchronous": self._asynchronous,
        }[self.setup.experiment.clock.mode]()
        check_answered(self.federation.round - 1, notes)
        count(self.federation, coverage, notes)
        notes.virtual_seconds = self.now - begin
        notes.seconds = time.perf_counter() - begun
        return notes

    def held(self) -> tuple[dict[str, Any], dict[str, Params]]:
        """All that a checkpoint needs beside the federation."""
        waiting = self.queue.waiting()
        flights, tensors = flights_parts([*(f for _, _, f in waiting), *self.ended])
        values: dict[str, Any] = {
            "now": self.now,
            "taken": self.queue.taken,
            "sent": self.sent,
            "asked": sorted(self._roster.asked),
            "keys": [key for _, key, _ in waiting],
            "flights": flights,
        }
        return values, tensors

    def restore(self, values: Mapping[str, Any], tensors: Mapping[str, Params]) -> None:
        """Go on from a checkpoint."""
        flights = flights_of(values["flights"], tensors)
        self.queue = EventQueue(now=values["now"], taken=values["taken"])
        for key, flight in zip(values["keys"], flights, strict=False):
            self.queue.put(flight.ends, key, flight)
        self.ended = flights[len(values["keys"]) :]
        self.sent, self._roster.asked = values["sent"], set(values["asked"])
        self._roster.working = {flight.client for _, _, flight in self.queue.waiting()}

    # One way to wait each.

    def _synchronous(self) -> Notes:
        notes, flights = Notes(), list[Flight]()
        cohort = self._pick(self.setup.experiment.clients_per_round)

        def updates() -> Iterator[Update]:
            for flight in self._fly(cohort):
                flights.append(flight.without_update())
                if flight.update is not None:
                    yield flight.update
                del flight  # its update's memory serves the next client

        fold(self.setup, self.federation, cohort, updates(), notes)
        self.queue.wait_until(max(flight.ends for flight in flights))
        self._note(flights, notes, self.federation.round - 1, waited=True)
        return notes

    def _semi_synchronous(self) -> Notes:
        settings, wanted = self.setup.experiment.clock, self.setup.experiment.clients_per_round
        cohort = self._pick(rounded_up(wanted * (1 + settings.over_selection)))
        begin, version = self.now, self.federation.round
        self._send(cohort)
        needed = min(rounded_up(settings.quorum * wanted), len(cohort))
        until = begin + (settings.deadline_seconds or math.inf)
        under_way, answered = len(cohort), 0
        while under_way and answered < needed and self.queue.next_time() <= until:
            flight = self._take()
            self.ended.append(flight)
            own = flight.round == version
            under_way -= own
            answered += own and flight.answered
        if under_way and answered < needed:
            self.queue.wait_until(until)
        if settings.late == "refuse":
            self._refuse()
        buffer, failed, more = self._sorted(self.ended)
        self.ended = more
        return self._folded([*failed, *buffer.values()], waited=True)

    def _asynchronous(self) -> Notes:
        size = self.setup.experiment.clock.buffer or self.setup.experiment.clients_per_round
        buffer, failed, more = self._sorted(self.ended)
        while len(buffer) < size:
            # All that ends at one moment is looked at before anybody is asked.
            if self.queue.next_time() > self.now and not self._fill():
                if not buffer and not self._roster.asked:
                    self.ended = [*failed, *more]
                    raise deserted(self.now)
                break
            if not buffer and len(failed) > _FAILURES * len(self.setup.clients):
                self.ended = [*failed, *more]
                raise TesseraError(
                    f"{len(failed)} works in a row failed, the last at {self.now:.0f} virtual "
                    f"seconds; do devices stay online for as long as their work takes? Raise "
                    f"fleet.online_minutes, or give them less to do"
                )
            flight = self._take()
            self._sort(flight, buffer, failed, more)
            if not flight.answered and flight.row["reason"] == "offline" and flight.took_time:
                # Who did not take the model would not take it now: the draw is the model's.
                self._roster.asked.discard(flight.client)
        self.ended, self._roster.asked = more, set()
        return self._folded([*failed, *buffer.values()], waited=False)

    def _sorted(
        self, flights: Iterable[Flight]
    ) -> tuple[dict[int, Flight], list[Flight], list[Flight]]:
        """Answers that make the next model, failures, and what waits for the model after it."""
        buffer: dict[int, Flight] = {}
        failed: list[Flight] = []
        more: list[Flight] = []
        for flight in flights:
            self._sort(flight, buffer, failed, more)
        return buffer, failed, more

    @staticmethod
    def _sort(
        flight: Flight, buffer: dict[int, Flight], failed: list[Flight], more: list[Flight]
    ) -> None:
        if not flight.answered:
            failed.append(flight)
        elif flight.client in buffer:  # of one client one answer makes a model
            more.append(flight)
        else:
            buffer[flight.client] = flight

    def _fill(self) -> bool:
        """Ask devices until as many work as should; False: nobody works, and none can be asked.

        A device trains one model once: the same work again would give the same answer.
        """
        experiment = self.setup.experiment
        slots = (experiment.clock.concurrency or experiment.clients_per_round) - len(self.queue)
        if slots <= 0:
            return True
        if picked := self._online(slots):
            self._roster.asked |= {client.id for client in picked}
            self._send(picked)
            return True
        comes = self._next_comer()
        if comes < self.queue.next_time():
            self.queue.wait_until(comes)
            return self._fill()
        return len(self.queue) > 0

    # Who is asked.

    def _online(self, most: int) -> list[Client]:
        return self._roster.online(self.federation.round, self.now, most)

    def _next_comer(self) -> float:
        return self._roster.next_comer(self.federation.round, self.now)

    def _pick(self, most: int) -> list[Client]:
        """Who is asked in a round; waits for the first that can be reached."""
        while not (picked := self._online(most)):
            comes = self._next_comer()
            if self.queue.next_time() <= comes:
                if not len(self.queue):
                    raise deserted(self.now)
                self.ended.append(self._take())
            else:
                self.queue.wait_until(comes)
        return picked

    # Flights.

    def _fly(self, cohort: Sequence[Client]) -> Iterator[Flight]:
        tasks = self.federation.tasks(cohort, training_of(self.setup, self.federation))
        starts = {client.id: self.now for client in cohort}
        large = self.federation.shapes
        return fly(self.setup, self.engine, self.fleet, tasks, starts, large, self.costs)

    def _send(self, cohort: Sequence[Client]) -> None:
        flights = [flight.lasting() for flight in self._fly(cohort)]
        # Not in the order of the training, which depends on the number of workers.
        for flight in sorted(flights, key=lambda flight: flight.client):
            self.queue.put(flight.ends, self.sent, flight)
            self._roster.working.add(flight.client)
            self.sent += 1

    def _take(self) -> Flight:
        flight = self.queue.take()
        self._roster.working.remove(flight.client)
        return flight

    def _refuse(self) -> None:
        """Whoever is still at work works on for nothing."""
        waiting = self.queue.waiting()
        self.queue = EventQueue(now=self.now, taken=self.queue.taken)
        for ends, key, flight in waiting:
            self.queue.put(ends, key, flight.refused())

    def _folded(self, ended: Sequence[Flight], *, waited: bool) -> Notes:
        """The next model, from the answers among what ended."""
        notes, version = Notes(), self.federation.round
        updates = [flight.update for flight in ended if flight.update is not None]
        # All that were asked, as in a synchronous round: the grid of exact sums goes by them.
        clients = [self.setup.clients[c] for c in sorted({flight.client for flight in ended})]
        fold(self.setup, self.federation, clients, updates, notes)
        self._note(ended, notes, version, waited=waited)
        return notes

    def _note(self, flights: Sequence[Flight], notes: Notes, version: int, *, waited: bool) -> None:
        # Not in the order of the training: a sum of joules depends on its order.
        for flight in sorted(flights, key=lambda flight: flight.client):
            if waited and flight.round == version:
                flight = flight.waiting_until(self.now)
            device = self.fleet.devices[flight.client].device
            flight.note_in(notes, device, staleness=version - flight.round)
        notes.folded = replace(notes.folded, traffic=notes.traffic)
