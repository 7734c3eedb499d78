"""One round of a tree's cloud while it is played, and what its edges report of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from tesserafl.core.messages import Client, Update
from tesserafl.core.params import norm
from tesserafl.core.schedule import Periods, Report, Seen, Sketch
from tesserafl.engines.fleet import Edge, Fleet
from tesserafl.engines.sums import Sums
from tesserafl.run.averages import Patience
from tesserafl.run.flights import Flight


@dataclass(kw_only=True)
class Job:
    """One round of the cloud."""

    cohort: Mapping[int, Client]
    """Who is asked, and after them whose late answers may come."""
    asked: frozenset[int]
    """Who of them is asked in the round, unless its node's last average ended without it."""
    patience: Patience | None
    """None: nodes wait for all of their devices."""
    periods: Mapping[str, Periods]
    steps: Mapping[int, int]
    """client -> its steps"""
    empty: Callable[[], Sums]
    """A sum that nothing was added to."""
    flights: list[Flight] = field(default_factory=list)
    changes: dict[int, tuple[float, tuple[float, ...]]] = field(default_factory=dict)
    """client -> L2 norm of its last change, and its sketch"""
    models: dict[str, tuple[float, ...]] = field(default_factory=dict)
    """edge -> sketch of its model"""
    taken: dict[str, tuple[float, float]] = field(default_factory=dict)
    """edge -> seconds of its averages, and of its link"""
    backhaul: int = 0
    """Bytes on the links of the edges."""

    def rounds(self, edge: Edge) -> int:
        """How often the edge averages."""
        return self.periods.get(edge.name, Periods()).rounds

    def changed(self, update: Update, sketch: Sketch | None) -> None:
        """Note what a device changed."""
        coordinates = () if sketch is None else sketch.change(update.delta, update.submodel)
        self.changes[update.client] = (norm(update.delta), coordinates)

    def report(self, edge: str, fleet: Fleet) -> Report:
        """What an edge took in the round, whose flights wait until its end."""
        below = set(fleet.below(edge))
        own = [flight for flight in self.flights if flight.client in below]
        latest = {flight.client: flight for flight in own if flight.answered}
        seconds, link = self.taken[edge]
        return Report(
            rounds=self.periods.get(edge, Periods()).rounds,
            seconds=seconds,
            link_seconds=link,
            joules=sum(f.joules(fleet.devices[f.client].device) for f in own),
            devices=tuple(
                Seen(
                    client=client,
                    steps=flight.row["steps"],
                    compute_seconds=flight.seconds("compute"),
                    link_seconds=flight.seconds("download", "upload"),
                    joules=flight.joules(fleet.devices[client].device),
                    change=self.changes[client][0],
                    sketch=self.changes[client][1],
                )
                for client, flight in sorted(latest.items())
            ),
            sketch=self.models.get(edge, ()),
        )
