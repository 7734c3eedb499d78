"""Rounds of a tree in virtual time: devices report to edges, edges to the cloud.

    a round of the cloud   every edge takes the model, averages over those below as often as its
                           period says, each device training its own number of steps, and reports
    what goes up           a sub-sum, where the edge averages once: integers, so that the tree's
                           bits are the star's; else the change of its model, each entry weighted
                           by those who trained it

An edge is a server to those below and a client to the node above; the method's hooks are the same.
Semi-synchronous nodes wait for their devices as `averages.Patience` says, and the node above waits
for them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from tesserafl.core.coverage import Coverage
from tesserafl.core.messages import Client
from tesserafl.core.method import State
from tesserafl.core.params import Params, num_bytes
from tesserafl.core.schedule import Periods, Report, Situation, Sketch
from tesserafl.engines.compression import as_sent
from tesserafl.engines.federation import Folded, Star
from tesserafl.engines.fleet import CLOUD, Edge, Fleet
from tesserafl.engines.seam import Engine
from tesserafl.engines.sums import Sums, sums_of
from tesserafl.run.averages import (
    Schedule,
    Several,
    decided,
    fits,
    numbered,
    report_of,
    share_of,
    staleness,
    turns,
)
from tesserafl.run.costs import CostTable
from tesserafl.run.flights import Flight, flights_of, flights_parts, fly
from tesserafl.run.job import Job
from tesserafl.run.lateness import Lateness
from tesserafl.run.roster import deserted
from tesserafl.run.rounds import Notes, check_answered, count, training_of
from tesserafl.run.setup import Setup


@dataclass(kw_only=True)
class Tree:
    """A cloud, edges and devices in virtual time."""

    setup: Setup
    engine: Engine
    federation: Star
    """The cloud's model."""
    fleet: Fleet
    costs: CostTable
    measure: Callable[[State], float] | None = None
    """Accuracy of the cloud's model, for methods that decide by it."""
    sketch: Sketch | None = None
    """Coordinates of the nodes' models and changes, for methods that decide by them."""
    schedule: Schedule | None = None
    """Decides on the periods; None: all train as `Training` says, and nodes average once."""
    now: float = 0.0
    """Virtual seconds since the start."""
    reports: dict[str, Report] = field(default_factory=dict)
    """edge -> of its last round"""
    accuracy: float | None = None
    late: Lateness = field(init=False)

    def __post_init__(self) -> None:
        self.late = Lateness(setup=self.setup, fleet=self.fleet)

    @property
    def over(self) -> bool:
        """Whether no further round begins."""
        horizon = self.setup.experiment.clock.horizon_seconds
        done = self.federation.round >= self.federation.rounds
        return done or (horizon is not None and self.now >= horizon)

    def play(self, coverage: Coverage) -> Notes:
        """The next round of the cloud.

        Raises:
            ConfigError: the method's schedule asks for what the tree cannot do.
            TesseraError: no device can be reached any more.
            UpdateError: the work of every client that answered was refused.
        """
        begun, begin, notes, state = time.perf_counter(), self.now, Notes(), self.federation.state
        if all(placed.online_from(begin) == math.inf for placed in self.fleet.devices):
            raise deserted(begin)
        method = self.setup.experiment.method
        asked, patience = self.late.asked(state.round)
        periods = self._periods(state, {client.id: client for client in asked})
        cohort = {client.id: client for client in (*asked, *self.late.clients)}
        job = Job(
            cohort=cohort,
            asked=frozenset(client.id for client in asked),
            patience=patience,
            periods=periods,
            steps={c: n for each in periods.values() for c, n in each.steps.items()},
            empty=sums_of(self.setup.model, method, cohort, state.params),
        )
        seconds = self.setup.experiment.clock.deadline_seconds or math.inf
        total, self.now = self._average(CLOUD, state, begin, seconds, 1, job)
        self.federation.state = total.finish(state)
        self._note(job, begin, state.round, notes)
        check_answered(state.round, notes)
        count(self.federation, coverage, notes)
        reported = {edge: job.report(edge, self.fleet) for edge in job.taken}
        self.reports = {**self.reports, **reported}
        notes.seconds = time.perf_counter() - begun
        return notes

    def held(self) -> tuple[dict[str, Any], dict[str, Params]]:
        """All that a checkpoint needs beside the federation."""
        reports = {edge: asdict(report) for edge, report in self.reports.items()}
        late, tensors = flights_parts(flight for _, flight in sorted(self.late.flights.items()))
        known = {"now": self.now, "reports": reports, "accuracy": self.accuracy, "late": late}
        return known, tensors

    def restore(self, values: Mapping[str, Any], tensors: Mapping[str, Params]) -> None:
        """Go on from a checkpoint."""
        self.now, self.accuracy = values["now"], values["accuracy"]
        self.reports = {edge: report_of(report) for edge, report in values["reports"].items()}
        self.late.flights = {f.client: f for f in flights_of(values["late"], tensors)}

    def _periods(self, state: State, cohort: Mapping[int, Client]) -> Mapping[str, Periods]:
        if self.schedule is None:
            return {}
        if self.measure is not None:
            self.accuracy = self.measure(state)
        below = {
            edge.name: tuple(cohort[c] for c in self.fleet.below(edge.name) if c in cohort)
            for edge in self.fleet.edges
        }
        situation = Situation(
            round=state.round,
            seconds=self.now,
            horizon=self.setup.experiment.clock.horizon_seconds,
            accuracy=self.accuracy,
            edges={edge: clients for edge, clients in below.items() if clients},
            reports=self.reports,
        )
        return decided(self.schedule, self.setup.model, state, situation)

    def _average(
        self, node: str, state: State, start: float, seconds: float, number: int, job: Job
    ) -> tuple[Sums, float]:
        """What those below a node report in one of its averages, and when the last one has.

        Edges that average once hand on what they get: for the method those below them are the
        node's own clients. The node waits so many seconds for its devices. `number` tells this
        average from all others of the round.
        """
        starts, sums, waits = {node: start}, {node: job.empty()}, {node: seconds}
        passing: list[Edge] = []
        deeper: list[Edge] = []
        self._reach(node, state, job, starts, passing, deeper)
        ends = dict(starts)
        sums |= {edge.name: job.empty() for edge in passing}
        for edge in passing:
            waits[edge.name] = share_of(waits[edge.parent], 1)
        here = [c for c in job.cohort.values() if self.fleet.homes[c.id] in starts]
        free = job.asked - self.late.flights.keys()
        clients = [client for client in here if client.id in free]
        flights = self._fly(clients, state, starts, number, job)
        for flight in self.late.landing(flights, starts, ends, waits, job.patience):
            if not fits(self.setup.experiment.method, state, flight.round, number):
                flight = flight.refused()
            if flight.update is not None:
                sums[self.fleet.homes[flight.client]].add(flight.update)
                job.changed(flight.update, self.sketch)
            job.flights.append(flight.without_update())
            del flight  # its update's memory serves the next client
        for edge in deeper:
            parent = edge.parent
            below = share_of(waits[parent], job.rounds(edge))
            arrives = self._several(edge, state, starts[parent], below, number, job, sums[parent])
            ends[parent] = max(ends[parent], arrives)
        for edge in reversed(passing):
            if self.sketch is not None:
                own = sums[edge.name].finish(state)
                job.models[edge.name] = self.sketch.model(own.params)
            size = sums[edge.name].num_bytes
            sums[edge.parent].merge(sums.pop(edge.name))
            arrives = ends[edge.name] + edge.link.seconds_up(size)
            ends[edge.parent] = max(ends[edge.parent], arrives)
            self._took(edge, job, state, starts[edge.name], ends[edge.name], size)
        return sums[node], ends[node]

    def _reach(
        self,
        node: str,
        state: State,
        job: Job,
        starts: dict[str, float],
        passing: list[Edge],
        deeper: list[Edge],
    ) -> None:
        """When the model reaches the edges below that hand on; those that average more often."""
        for edge in self.fleet.edges_of(node):
            if not any(client in job.cohort for client in self.fleet.below(edge.name)):
                continue
            if job.rounds(edge) > 1:
                deeper.append(edge)
                continue
            starts[edge.name] = starts[node] + edge.link.seconds_down(num_bytes(state.params))
            passing.append(edge)
            self._reach(edge.name, state, job, starts, passing, deeper)

    def _several(
        self,
        edge: Edge,
        state: State,
        start: float,
        seconds: float,
        number: int,
        job: Job,
        above: Sums,
    ) -> float:
        """An edge averages several times, each within so many seconds; its change is added to the
        sum above.

        Returns when it is there.
        """
        begin = now = start + edge.link.seconds_down(num_bytes(state.params))
        several, before = Several(model=state), len(job.flights)
        for turn in turns(job.rounds(edge), number):
            total, now = self._average(edge.name, several.model, now, seconds, turn, job)
            several.average(total)
        model = several.model
        if self.sketch is not None:
            job.models[edge.name] = self.sketch.model(model.params)
        heard = {flight.client for flight in job.flights[before:] if flight.answered}
        if heard:
            clients = [job.cohort[c] for c in sorted(heard)]
            above.add_change(state, model, several.covered, clients)
        size = num_bytes(model.params)
        self._took(edge, job, state, begin, now, size)
        return now + edge.link.seconds_up(size)

    def _took(
        self, edge: Edge, job: Job, state: State, begin: float, end: float, size: int
    ) -> None:
        down = num_bytes(state.params)
        link = edge.link.seconds_down(down) + edge.link.seconds_up(size)
        seconds, before = job.taken.get(edge.name, (0.0, 0.0))
        job.taken[edge.name] = seconds + end - begin, before + link
        job.backhaul += down + size

    def _fly(
        self,
        clients: Sequence[Client],
        state: State,
        starts: Mapping[str, float],
        number: int,
        job: Job,
    ) -> Iterator[Flight]:
        method, training = self.setup.experiment.method, training_of(self.setup, self.federation)
        tasks = method.configure(self.setup.model, state, clients, training)
        compression = self.setup.experiment.compression
        tasks = numbered(tasks, state, job.steps, number)
        tasks = (as_sent(task, compression) for task in tasks)
        begin = {client.id: starts[self.fleet.homes[client.id]] for client in clients}
        large = state.params
        return fly(self.setup, self.engine, self.fleet, tasks, begin, large, self.costs)

    def _note(self, job: Job, begin: float, round: int, notes: Notes) -> None:
        """The round's rows; between its works, and until the round ends, a device waits."""
        free = dict.fromkeys(job.cohort, begin)
        for position, flight in enumerate(job.flights):
            job.flights[position] = flight.waiting_since(free[flight.client])
            free[flight.client] = flight.ends
        last = {flight.client: position for position, flight in enumerate(job.flights)}
        for position in last.values():
            if job.flights[position].start >= begin:  # it was asked in this round
                job.flights[position] = job.flights[position].waiting_until(self.now)
        # Not in the order of the training: a sum of joules depends on its order.
        for flight in sorted(job.flights, key=lambda flight: flight.client):
            device, home = self.fleet.devices[flight.client].device, self.fleet.homes[flight.client]
            more = {"staleness": staleness(round, flight.round, self.federation.rounds)}
            flight.note_in(notes, device, edge=home, **(more if job.patience else {}))
        notes.virtual_seconds = self.now - begin
        notes.backhaul = job.backhaul
        if job.periods:
            notes.periods = {edge: asdict(each) for edge, each in job.periods.items()}
        notes.folded = Folded(traffic=notes.traffic)
