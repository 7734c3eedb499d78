"""Rounds on devices in real time that do not wait for all: until a quorum or a deadline.

Who is late goes on working, and its answer counts in the round in which it comes, or not at all. So
which updates make a model depends on the devices; what they make of it does not.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from tesserafl.core.coverage import Coverage
from tesserafl.core.errors import ConfigError
from tesserafl.core.messages import Client, Update
from tesserafl.engines.federation import Federation, Held, Star, Traffic
from tesserafl.engines.remote import Remote
from tesserafl.run.averages import rounded_up
from tesserafl.run.costs import CostTable
from tesserafl.run.enough import Counted, Working
from tesserafl.run.player import Player
from tesserafl.run.rounds import (
    Notes,
    check_answered,
    count,
    fold,
    training_of,
)
from tesserafl.run.setup import Setup

_ALONE = 5.0
"""Seconds between two looks, where no device can be asked."""


@dataclass(frozen=True, kw_only=True)
class Waiting:
    """How long a round on devices waits."""

    quorum: float = 1.0
    """share of clients_per_round whose answers end a round"""
    round_seconds: float | None = None
    """seconds after which a round ends; None: it has no deadline of its own"""
    over_selection: float = 0.0
    """share of clients_per_round that is asked beyond it"""
    late: Literal["bank", "refuse"] = "bank"
    """whether an answer that comes after its round counts in the round in which it comes"""

    def __post_init__(self) -> None:
        if not 0.0 < self.quorum <= 1.0:
            raise ConfigError(f"quorum is a share, in (0, 1]; got {self.quorum}")
        if self.round_seconds is not None and not self.round_seconds > 0:
            raise ConfigError(f"round_seconds must be positive; got {self.round_seconds}")
        if not 0.0 <= self.over_selection < math.inf:
            raise ConfigError(f"over_selection must be 0 or more; got {self.over_selection}")

    @property
    def for_all(self) -> bool:
        """Whether a round waits until all have answered or failed."""
        plain = self.quorum == 1.0 and self.round_seconds is None
        return plain and self.over_selection == 0.0


@dataclass(kw_only=True)
class Patient:
    """Plays synchronous rounds, each when a device is there that it asks.

    Else a run whose devices are away for a minute would be over: nobody answers, in no time.
    """

    player: Player
    setup: Setup
    engine: Remote
    federation: Federation

    @property
    def over(self) -> bool:
        """Whether all rounds are done."""
        return self.player.over

    def play(self, coverage: Coverage) -> Notes:
        """The next round."""
        cohort = {client.id for client in self.setup.cohort(self.federation.round)}
        self.engine.gather_any(cohort)
        return self.player.play(coverage)

    def held(self) -> Held:
        """The player's."""
        return self.player.held()

    def restore(self, held: Held) -> None:
        """Go on from a checkpoint."""
        self.player.restore(held)


@dataclass(kw_only=True)
class Live:
    """A server and its devices, in real time."""

    setup: Setup
    engine: Remote
    federation: Star
    waiting: Waiting
    working: Working

    @property
    def over(self) -> bool:
        """Whether all rounds are done; answers that are late then are not waited for."""
        return self.federation.round >= self.federation.rounds

    def play(self, coverage: Coverage) -> Notes:
        """The next round.

        Raises:
            UpdateError: the work of every client that answered was refused.
        """
        begun = time.perf_counter()
        notes, traffic, version = Notes(), dict[int, Traffic](), self.federation.round
        updates = list(self._until_enough(notes, traffic))
        ended = {update.client for update in updates} | {row["client"] for row in notes.failures}
        # All that came to an end, as in a synchronous round: the grid of exact sums goes by them.
        cohort = [self.setup.clients[client] for client in sorted(ended)]
        fold(self.setup, self.federation, cohort, updates, notes)
        notes.folded = replace(notes.folded, traffic=traffic)
        count(self.federation, coverage, notes)
        check_answered(version, notes)
        notes.seconds = time.perf_counter() - begun
        return notes

    def held(self) -> Held:
        """The federation's; tasks that are under way are not: who has one is asked anew."""
        return self.federation.held()

    def restore(self, held: Held) -> None:
        """Go on from a checkpoint."""
        self.federation.restore(held)

    def _until_enough(self, notes: Notes, traffic: dict[int, Traffic]) -> Iterator[Update]:
        """The updates that make the next model."""
        settings, wanted = self.waiting, self.setup.experiment.clients_per_round
        most, round = rounded_up(wanted * (1 + settings.over_selection)), self.federation.round
        late = False
        while not (cohort := self._idle(most)) and not late:
            # All that are there are late, so the round begins with the first that is not any more.
            for outcome in self.engine.poll(_ALONE):
                taken = self.working.take(outcome, round, self.federation.shapes, notes)
                if taken is not None and taken.counted is not None:
                    late = True
                    yield self._noted(taken.counted, notes, traffic)
        cohort = [client for client in cohort if client.id not in traffic]  # one answer of each
        needed = min(rounded_up(settings.quorum * wanted), len(cohort))
        tasks = self.federation.tasks(cohort, training_of(self.setup, self.federation))
        if not cohort:
            return
        for counted in self.working.until_enough(
            tasks,
            len(cohort),
            needed,
            settings.round_seconds,
            round,
            self.federation.shapes,
            notes,
        ):
            yield self._noted(counted, notes, traffic)

    def _noted(self, counted: Counted, notes: Notes, traffic: dict[int, Traffic]) -> Update:
        update, row = counted.update, notes.clients[-1]
        traffic[update.client] = Traffic(update.num_bytes, counted.down)
        row["bytes_up"], row["bytes_down"] = traffic[update.client]
        row["staleness"] = self.federation.round - counted.round
        return update

    def _idle(self, most: int) -> list[Client]:
        """Devices that are there and do nothing, in the round's order."""
        idle = self.engine.seated - self.working.tasks.keys()
        order = self.setup.order(self.federation.round)
        return [self.setup.clients[number] for number in order if number in idle][:most]


def live(
    setup: Setup, engine: Remote, federation: Federation, costs: CostTable, waiting: Waiting
) -> Live:
    """Plays the rounds of an experiment without waiting for all.

    Raises:
        ConfigError: it simulates clients that do not answer.
    """
    assert isinstance(federation, Star), "devices have a server"
    check_answers(setup)
    return Live(
        setup=setup,
        engine=engine,
        federation=federation,
        waiting=waiting,
        working=Working(setup=setup, engine=engine, costs=costs, banks=waiting.late == "bank"),
    )


def check_answers(setup: Setup) -> None:
    """Raise ConfigError if the experiment simulates clients that do not answer."""
    if setup.experiment.dropout:
        raise ConfigError(
            f"dropout {setup.experiment.dropout} simulates devices that do not answer; set it to 0 "
            f"where real ones do the work until a quorum or a deadline"
        )
