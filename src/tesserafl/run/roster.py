"""Whom a server can ask in virtual time: who is free and can be reached, in the round's order."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field

from tesserafl.core.errors import TesseraError
from tesserafl.core.messages import Client
from tesserafl.engines.fleet import Fleet
from tesserafl.run.setup import Setup


@dataclass(kw_only=True)
class Roster:
    """The clients of a run, and which of them are not free.

    A server asks far more often than all clients come and go: what a question costs goes by those
    that are looked at, not by their number.
    """

    setup: Setup
    fleet: Fleet
    working: set[int] = field(default_factory=set)
    """Whose work is under way."""
    asked: set[int] = field(default_factory=set)
    """Who was sent the present model and is not sent it again."""
    _order: tuple[int, list[int]] = (-1, [])
    """A round, and the order in which it asks."""

    def online(self, round: int, now: float, most: int) -> list[Client]:
        """The first that are free and can be reached now, in the round's order."""
        devices = self.fleet.devices
        here = (c for c in self._free(round) if devices[c.id].online_from(now) == now)
        return list(itertools.islice(here, most))

    def next_comer(self, round: int, now: float) -> float:
        """When the next free device can be reached; infinite: never."""
        devices = self.fleet.devices
        comes = (devices[client.id].online_from(now) for client in self._free(round))
        return min(comes, default=math.inf)

    def _free(self, round: int) -> Iterator[Client]:
        if self._order[0] != round:
            self._order = (round, self.setup.order(round))
        clients, working, asked = self.setup.clients, self.working, self.asked
        return (clients[c] for c in self._order[1] if c not in working and c not in asked)


def deserted(now: float) -> TesseraError:
    """The end of a run whose devices have all left for good."""
    return TesseraError(
        f"after {now:.0f} virtual seconds no device can be reached any more; let devices leave "
        f"later, or play fewer rounds"
    )
