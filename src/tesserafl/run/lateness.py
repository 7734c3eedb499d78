"""Devices of a tree in virtual time whose work has not ended when their node's average does."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from tesserafl.core.messages import Client
from tesserafl.engines.fleet import Fleet
from tesserafl.run.averages import Patience, rounded_up
from tesserafl.run.flights import Flight
from tesserafl.run.setup import Setup


@dataclass(kw_only=True)
class Lateness:
    """Who is late, and when nodes have heard enough."""

    setup: Setup
    fleet: Fleet
    flights: dict[int, Flight] = field(default_factory=dict)
    """Client -> its work."""

    def asked(self, round: int) -> tuple[Sequence[Client], Patience | None]:
        """Who is asked in a round, in its order, and how long nodes wait; None: for all."""
        experiment = self.setup.experiment
        settings, wanted = experiment.clock, experiment.clients_per_round
        if settings.mode == "synchronous":
            return self.setup.cohort(round), None
        most = rounded_up(wanted * (1 + settings.over_selection))
        free = [client for client in self.setup.order(round) if client not in self.flights][:most]
        patience = Patience(
            quorum=settings.quorum,
            wanted=wanted,
            asked=len(free),
        )
        return [self.setup.clients[client] for client in free], patience

    @property
    def clients(self) -> list[Client]:
        """Who is late, in the order of their numbers."""
        return [self.setup.clients[client] for client in sorted(self.flights)]

    def landing(
        self,
        flights: Iterable[Flight],
        starts: Mapping[str, float],
        ends: dict[str, float],
        seconds: Mapping[str, float],
        patience: Patience | None,
    ) -> Iterator[Flight]:
        """The works that end in one average of some nodes, those of late devices among them.

        Args:
            flights: of the devices that are asked.
            starts: node -> when its average begins.
            ends: node -> when it has heard enough: this says it, from when the average begins.
            seconds: node -> after which its average ends with what there is.
            patience: how long nodes wait.
        """
        homes = self.fleet.homes
        if patience is None:
            for flight in flights:
                ends[homes[flight.client]] = max(ends[homes[flight.client]], flight.ends)
                yield flight
            return
        refuses = self.setup.experiment.clock.late == "refuse"
        late = [self.flights[client] for client in sorted(self.flights)]
        asked = [flight.lasting() for flight in flights]
        for node, start in starts.items():
            before = [flight for flight in late if homes[flight.client] == node]
            own = [flight for flight in asked if homes[flight.client] == node]
            told = [(flight.ends, flight.answered) for flight in own]
            ends[node] = patience.closes(
                start, seconds[node], told, [flight.ends for flight in before]
            )
            for flight in (*before, *own):
                if flight.ends > ends[node]:
                    self.flights[flight.client] = flight.refused() if refuses else flight
                    continue
                self.flights.pop(flight.client, None)
                yield flight
