"""Rounds of a tree whose edges are machines elsewhere, at the cloud.

The same as run/tree.py does in virtual time. What a node took is measured, so a schedule that goes
by it differs from run to run; the periods that it chose are in the round's event.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field

from tesserafl.core.coverage import Coverage
from tesserafl.core.errors import MessageError
from tesserafl.core.messages import Client
from tesserafl.core.method import State
from tesserafl.core.schedule import Periods, Report, Situation
from tesserafl.core.wire import Parts
from tesserafl.engines.federation import Federation, Folded, Held, Star, Traffic
from tesserafl.engines.orders import Judged
from tesserafl.engines.remote import Remote
from tesserafl.engines.seam import Failed
from tesserafl.engines.sums import relay_of, sums_of
from tesserafl.run.averages import Patience, Schedule, decided, report_of, rounded_up
from tesserafl.run.cloud_round import CloudRound
from tesserafl.run.edge_seats import EdgeSeats
from tesserafl.run.live import Waiting, check_answers
from tesserafl.run.overdue import Overdue, overdue_of, overdue_parts
from tesserafl.run.personal import state_parts
from tesserafl.run.player import accuracy_of
from tesserafl.run.rounds import Notes, check_answered, count, failure
from tesserafl.run.setup import Setup
from tesserafl.run.surveying import Surveying

_log = logging.getLogger(__name__)

_GRACE_SECONDS = 30.0
"""That an edge has beyond the round's time: each message takes seconds, and it ends in time by
itself unless something is wrong."""
_EDGES = "edges"
"""What a checkpoint calls what is known of the edges, beside the federation's."""


@dataclass(kw_only=True)
class Cloud:
    """A server whose clients are below edges."""

    setup: Setup
    engine: Remote
    """The way to the edges."""
    federation: Star
    seats: EdgeSeats
    schedule: Schedule | None
    """Decides on the periods; None: all train as `Training` says, and edges average once."""
    watches: bool
    """Whether the schedule looks at the model's accuracy."""
    waiting: Waiting | None
    """How long edges wait for their devices; None: for all."""
    task_seconds: float
    """That an edge has, where the round has no deadline."""
    seconds: float = 0.0
    """Of all rounds so far."""
    heard: dict[int, int] = field(default_factory=dict)
    """Client -> the round of the task that it answered last."""
    reports: dict[str, Report] = field(default_factory=dict)
    accuracy: float | None = None
    late: Overdue = field(default_factory=dict)
    """Clients that are at work on what they were asked in a round before."""

    @property
    def over(self) -> bool:
        """Whether all rounds are done."""
        return self.federation.round >= self.federation.rounds

    def play(self, coverage: Coverage) -> Notes:
        """The next round.

        Raises:
            ConfigError: the method's schedule asks for what the tree cannot do.
            UpdateError: the work of every client that answered was refused.
        """
        state, notes = self.federation.state, Notes()
        asked, waits = self._asked(state.round)
        late = [self.setup.clients[client] for client in sorted(self.late)]
        cohort = {client.id: client for client in (*asked, *late)}
        below, busy = self._below(asked), self._below(late)
        served = {seat: below.get(seat, []) for seat in sorted({*below, *busy})}
        if served:
            self.engine.gather_any(served)
        begun = time.perf_counter()
        deadline = math.inf if self.waiting is None else self.waiting.round_seconds or math.inf
        self.engine.seconds = min(self.task_seconds, deadline + _GRACE_SECONDS)
        periods = self._periods(state, below)
        sweep = CloudRound(
            setup=self.setup,
            federation=self.federation,
            cohort=cohort,
            below=served,
            names=self.seats.names,
            numbers={seat: self.seats.numbers(seat) for seat in served},
            periods=periods,
            heard=self.heard,
            seconds=min(self.task_seconds, deadline),
            waiting=waits,
            late={seat: {c.id: self.late[c.id] for c in each} for seat, each in busy.items()},
        )
        total = sums_of(self.setup.model, self.setup.experiment.method, cohort, state.params)()
        for answer in self.engine.ask(sweep.asks(), state_parts(state)):
            took = time.perf_counter() - begun
            report = sweep.take(answer, total, took, notes)
            if report is not None:
                self.reports[self.seats.names[answer.client]] = report
        reached = {client.id for clients in below.values() for client in clients}
        for client in sorted({client.id for client in asked} - reached):
            notes.failures.append(failure(client, "offline", "no edge serves it"))
        self.federation.state = total.finish(state)
        self.heard = {**self.heard, **sweep.answered}
        self.late = {client: task for each in sweep.stays.values() for client, task in each.items()}
        notes.backhaul = sweep.backhaul
        if periods:
            notes.periods = {edge: asdict(each) for edge, each in periods.items()}
        notes.folded = Folded(traffic=_traffic(notes))
        check_answered(state.round, notes)
        count(self.federation, coverage, notes)
        notes.seconds = time.perf_counter() - begun
        self.seconds += notes.seconds
        return notes

    def judge(self, parts: Parts) -> dict[int, Judged]:
        """What the clients' own models reach, as edges tell; see `Remote.judge`."""
        self.engine.seconds = self.task_seconds
        self.engine.gather(len(self.seats.taken), 0.0)  # who is there now
        surveys = {
            seat: Surveying(
                numbers=self.seats.numbers(seat), heard=self.heard, seconds=self.engine.seconds
            )
            for seat in sorted(self.engine.seated)
        }
        found: dict[int, Judged] = {}
        for answer in self.engine.ask(surveys, parts):
            edge = self.seats.names[answer.client]
            if isinstance(answer, Failed):
                _log.warning("edge %r measured nothing: %s", edge, answer.text)
                continue
            try:
                found |= surveys[answer.client].judged(answer)
            except MessageError as error:
                _log.warning("what edge %r measured does not count: %s", edge, error)
        return found

    def held(self) -> Held:
        """The federation's, and what is known of the edges."""
        states, values, tensors = self.federation.held()
        late, tasks = overdue_parts(self.late)
        known = {
            "seconds": self.seconds,
            "heard": {str(client): round for client, round in self.heard.items()},
            "reports": {edge: asdict(report) for edge, report in self.reports.items()},
            "accuracy": self.accuracy,
            "late": late,
        }
        return states, {**values, _EDGES: known}, {**tensors, **tasks}

    def restore(self, held: Held) -> None:
        """Go on from a checkpoint."""
        states, values, tensors = held
        known = values[_EDGES]
        rest = {name: value for name, value in values.items() if name != _EDGES}
        self.federation.restore((states, rest, tensors))
        self.seconds, self.accuracy = known["seconds"], known["accuracy"]
        self.heard = {int(client): round for client, round in known["heard"].items()}
        self.reports = {edge: report_of(report) for edge, report in known["reports"].items()}
        self.late = overdue_of(known["late"], tensors)

    def _asked(self, round: int) -> tuple[Sequence[Client], tuple[Patience, bool] | None]:
        """Who is asked in a round, in its order, and how long edges wait; None: for all."""
        if (settings := self.waiting) is None:
            return self.setup.cohort(round), None
        wanted = self.setup.experiment.clients_per_round
        most = rounded_up(wanted * (1 + settings.over_selection))
        there = self.engine.gather_any(self.seats.below)
        known = {client for seat in there for client in self.seats.below[seat]}
        order = [client for client in self.setup.order(round) if client in known]
        free = [client for client in order if client not in self.late][:most]
        patience = Patience(
            quorum=settings.quorum,
            wanted=wanted,
            asked=len(free),
        )
        return [self.setup.clients[client] for client in free], (patience, settings.late == "bank")

    def _below(self, clients: Sequence[Client]) -> dict[int, list[Client]]:
        """Seat -> those of these clients that are below its edge, if there are some."""
        found: dict[int, list[Client]] = {}
        homes = {client: seat for seat, below in self.seats.below.items() for client in below}
        for client in clients:
            if client.id in homes:
                found.setdefault(homes[client.id], []).append(client)
        return dict(sorted(found.items()))

    def _periods(
        self, state: State, below: Mapping[int, Sequence[Client]]
    ) -> Mapping[str, Periods]:
        if self.schedule is None:
            return {}
        if self.watches:
            self.accuracy = accuracy_of(self.setup)(state)
        situation = Situation(
            round=state.round,
            seconds=self.seconds,
            horizon=None,
            accuracy=self.accuracy,
            edges={self.seats.names[seat]: tuple(clients) for seat, clients in below.items()},
            reports=self.reports,
        )
        periods = decided(self.schedule, self.setup.model, state, situation)
        method = self.setup.experiment.method
        if not method.entrywise and any(each.rounds > 1 for each in periods.values()):
            relay_of(method)
        return periods


def cloud(
    setup: Setup, engine: Remote, federation: Federation, seats: EdgeSeats, waiting: Waiting
) -> Cloud:
    """Plays the rounds of an experiment whose clients are below edges.

    Raises:
        ConfigError: it simulates clients that do not answer, and edges do not wait for all.
    """
    assert isinstance(federation, Star), "a tree has a cloud"
    if not waiting.for_all:
        check_answers(setup)
    method = setup.experiment.method
    return Cloud(
        setup=setup,
        engine=engine,
        federation=federation,
        seats=seats,
        schedule=getattr(method, "periods", None),
        watches=getattr(method, "watches_accuracy", False),
        waiting=None if waiting.for_all else waiting,
        task_seconds=engine.seconds,
    )


def _traffic(notes: Notes) -> dict[int, Traffic]:
    traffic: dict[int, Traffic] = {}
    for row in notes.clients:
        sent, received = traffic.get(row["client"], Traffic(0, 0))
        traffic[row["client"]] = Traffic(sent + row["bytes_up"], received + row["bytes_down"])
    return traffic
