"""Devices in this process, behind a post that loses what a test says."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from tesserafl.core.messages import Memory
from tesserafl.data import DataSettings
from tesserafl.engines.attendance import Undelivered
from tesserafl.engines.orders import Envelope, Hello, Order, order_of
from tesserafl.engines.remote import Remote
from tesserafl.methods import FedAvg
from tesserafl.models import MLP
from tesserafl.run import deployed, holding
from tesserafl.run.experiment import EngineSettings, Experiment, to_json
from tesserafl.run.holding import Local
from tesserafl.run.resident import Resident
from tesserafl.run.seats import Seats
from tesserafl.run.setup import Setup, prepare
from tesserafl.run.spool import Spool

RUN = "a" * 32
_PREPARED: dict[str, Setup] = {}

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
    at_once: int = 3
    """Replies that one look finds, at most."""
    largest: int = 0
    """Bytes of tensors in an envelope, at most, either way."""
    _names: itertools.count[int] = field(default_factory=itertools.count)
    waiting: dict[str, tuple[int, Envelope]] = field(default_factory=dict)
    """Name -> node and envelope of a message that was not pulled yet."""

    def nodes(self) -> dict[int, str]:
        return {node: r.name for node, r in self.residents.items() if node not in self.away}

    def push(self, node: int, envelope: Envelope, seconds: float) -> str:
        assert seconds > 0
        name = f"message-{next(self._names)}"
        self.waiting[name] = node, envelope
        self._measure(envelope)
        self.log.append((node, order_of(envelope).kind, envelope.num_bytes))
        return name

    def pull(self, names: Collection[str]) -> list[tuple[str, Envelope | Undelivered]]:
        return [
            (name, self.deliver(*self.waiting.pop(name))) for name in list(names)[: self.at_once]
        ]

    def deliver(self, node: int, envelope: Envelope) -> Envelope | Undelivered:
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


def experiment_for_four(**changes: Any) -> Experiment:
    """FedAvg on four devices, a moment long; with these settings in the place of its own."""
    settings: dict[str, Any] = {
        "data": DataSettings(num_clients=4, max_train=120, max_test=50),
        "model": MLP(hidden=(16, 16)),
        "method": FedAvg(),
        "engine": EngineSettings(batching="sequential"),
        "rounds": 3,
        "clients_per_round": 4,
        "checkpoint_every": 1,
    }
    return Experiment(**(settings | changes))


def prepare_once(patch: pytest.MonkeyPatch) -> None:
    """Servers and devices of all tests share what they load and probe of an experiment: it takes
    half a second, and there are many of them here."""

    def prepared(experiment: Experiment) -> Setup:
        values = to_json(replace(experiment, engine=replace(experiment.engine, device="cpu")))
        key = json.dumps(values, sort_keys=True)
        if key not in _PREPARED:
            _PREPARED[key] = prepare(experiment)
        return replace(_PREPARED[key], experiment=experiment)

    for module in (deployed, holding):
        patch.setattr(module, "prepare", prepared)


def remote_at_hand(setup: Setup, folder: Path) -> Remote:
    """The engine of an experiment whose devices, with their disks in `folder`, have joined."""
    engine = replace(setup.experiment.engine, workers=1, batching="sequential")
    experiment = replace(setup.experiment, engine=engine)
    clients = [client.id for client in setup.clients]
    seats = Seats(path=folder / "devices.json", number=len(clients), parts=True)
    remote = Remote(
        post=PostAtHand(residents=parts(folder, clients)),
        hello=Hello(run=RUN, experiment=to_json(experiment), spec=asdict(setup.data.spec)),
        seat=seats.seat,
        seconds=3600.0,
        most_bytes=20_000,
        capacity=2,
        pause=lambda _: None,
    )
    remote.gather(len(clients), 60.0)
    assert remote.seated == set(clients), remote.refused
    return remote


def remembered(remote: Remote, folder: Path) -> dict[int, Memory]:
    """What lies on the devices' disks, of the rounds that the server has heard of."""
    found = {}
    for client, round in remote.heard.items():
        memory = Spool(folder=folder / f"device-{client}" / remote.hello.run).recall(round)
        assert memory is not None, (client, round)
        if memory:
            found[client] = memory
    return found
