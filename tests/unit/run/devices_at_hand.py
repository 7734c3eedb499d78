"""Devices in this process, behind a post that loses what a test says."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path

from tesserafl.engines.orders import Envelope, Order, order_of
from tesserafl.engines.remote import Undelivered
from tesserafl.run.holding import Local
from tesserafl.run.resident import Resident

Loss = Callable[[int, Order], Undelivered | None]
"""Node, order -> how it fails; None: it is delivered."""


@dataclass(kw_only=True)
class PostAtHand:
    """Delivers to residents in this process when it is pulled."""

    residents: dict[int, Resident]
    loss: Loss = lambda node, order: None
    away: set[int] = field(default_factory=set)
    log: list[tuple[int, str, int]] = field(default_factory=list)
    """Node, kind of the order, bytes of its envelope."""
    largest: int = 0
    """Bytes of tensors in an envelope, at most, either way."""
    _names: itertools.count[int] = field(default_factory=itertools.count)
    _waiting: dict[str, tuple[int, Envelope]] = field(default_factory=dict)

    def nodes(self) -> dict[int, str]:
        return {node: r.name for node, r in self.residents.items() if node not in self.away}

    def push(self, node: int, envelope: Envelope, seconds: float) -> str:
        assert seconds > 0
        name = f"message-{next(self._names)}"
        self._waiting[name] = node, envelope
        self._measure(envelope)
        self.log.append((node, order_of(envelope).kind, envelope.num_bytes))
        return name

    def pull(self, names: Collection[str]) -> list[tuple[str, Envelope | Undelivered]]:
        return [(name, self._deliver(*self._waiting.pop(name))) for name in list(names)[:3]]

    def _deliver(self, node: int, envelope: Envelope) -> Envelope | Undelivered:
        if node in self.away:
            return Undelivered("offline", f"node {node} is away")
        if (lost := self.loss(node, order_of(envelope))) is not None:
            return lost
        reply = self.residents[node].answer(envelope)
        self._measure(reply)
        return reply

    def _measure(self, envelope: Envelope) -> None:
        self.largest = max(self.largest, sum(map(len, envelope.parcels.values())))


def parts(folder: Path, clients: Collection[int]) -> dict[int, Resident]:
    """Devices that take parts of the experiment's data; node 100 + client."""
    return {
        100 + client: Resident(
            name=f"device-{client}",
            folder=folder / f"device-{client}",
            local=Local(client=client, device="cpu"),
        )
        for client in clients
    }
