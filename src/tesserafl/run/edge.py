"""The part of an edge that stays: a device to the cloud, a server to devices of its own.

It answers the cloud's orders as a device does (run/resident.py), and keeps its answers in the same
way: an order can be given again, after any end of either side. Between rounds it holds nothing.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError

from tesserafl.core.errors import MessageError, TesseraError
from tesserafl.core.method import State
from tesserafl.core.schedule import Sketch
from tesserafl.data import ClientData, Examples, FederatedData, Spec
from tesserafl.engines.attendance import Post
from tesserafl.engines.edge_orders import EdgeDevice, EdgeProfile, Sweep
from tesserafl.engines.orders import (
    Bye,
    Envelope,
    Fetch,
    Hello,
    Missing,
    Profile,
    Refusal,
    Store,
    Stranger,
    order_of,
    sealed,
)
from tesserafl.engines.parcels import MOST_BYTES, Outgoing, letter_of
from tesserafl.engines.process import threads
from tesserafl.engines.remote import Remote
from tesserafl.run.costs import CostTable
from tesserafl.run.experiment import from_json
from tesserafl.run.files import read_json, write_json
from tesserafl.run.holding import Local, here
from tesserafl.run.resident import answer_kept, fetched, read_kept
from tesserafl.run.seats import Seats
from tesserafl.run.setup import Setup
from tesserafl.run.spool import Spool, digest_of
from tesserafl.run.sweep import Sweeping

_log = logging.getLogger(__name__)

_AGAIN_SECONDS = 90.0
"""That an edge which starts anew waits for the devices it knows, before the first round."""
_SHARE = 0.9
"""Of the cloud's patience, after which an edge gives up devices: it must answer itself."""


@dataclass(frozen=True, kw_only=True)
class Hosting:
    """How an edge serves its devices."""

    devices: int = 2
    """devices that the edge waits for before it tells the cloud who is below it"""
    wait_seconds: float = 600.0
    """seconds that it waits for them; then it begins with those that are there"""
    task_seconds: float = 3600.0
    """seconds that a device has for a task, with its transfers; less, if the cloud has less
    patience with the edge"""
    under_way: int = 8
    """tasks that are under way at once: their sub-models are in the edge's memory"""
    message_bytes: int = MOST_BYTES
    """of tensors in one message to a device"""


@dataclass(kw_only=True)
class _Below:
    """What an edge holds of a run: who is below it, and how to reach them."""

    setup: Setup
    remote: Remote
    seats: Seats
    costs: CostTable
    sketch: Sketch | None
    numbers: dict[str, int]
    """Device -> the client that the cloud calls it."""

    def renumber(self, numbers: Mapping[str, int]) -> None:
        """Take the cloud's numbers."""
        if numbers.keys() != {profile.name for profile in self.seats.taken.values()}:
            raise TesseraError("the cloud asks other devices than it was told of")
        old = {profile.name: client for client, profile in self.seats.taken.items()}
        old |= self.numbers
        self.remote.renumber({old[name]: client for name, client in numbers.items()})
        self.numbers.update(numbers)


@dataclass(kw_only=True)
class EdgeResident:
    """Answers the orders of one cloud; one after another."""

    name: str
    folder: Path
    """what it keeps between restarts"""
    post: Post
    """the way to its devices"""
    hosting: Hosting = field(default_factory=Hosting)
    local: Local = field(default_factory=Local)
    """where a pre-trained model lies on this machine; the rest is for devices"""
    over: bool = False
    """Whether the cloud has said goodbye."""
    watch: Callable[[Remote], None] = lambda _: None
    _run: str | None = None
    _below: _Below | None = None

    def answer(self, envelope: Envelope) -> Envelope:
        """Do what an envelope orders; an order that cannot be done is answered by a Refusal."""
        try:
            order = order_of(envelope)
            if isinstance(order, Hello):
                return self._hello(order)
            if isinstance(order, Bye):
                return self._bye(order)
            if self._known(order.run) is None:
                return sealed(Stranger())
            spool = Spool(folder=self.folder / order.run)
            spool.store(envelope.parcels)
            if isinstance(order, Store):
                return sealed(Missing(parcels=[]))
            if isinstance(order, Fetch):
                return fetched(order, spool)
            if isinstance(order, Sweep):
                return self._sweep(order, spool)
            raise TesseraError(f"this is an edge; it knows no order {order.kind!r}")
        except TesseraError as error:
            _log.warning("refused: %s", error)
            return sealed(Refusal(text=str(error)[:10_000]))

    def _hello(self, order: Hello) -> Envelope:
        folder, values = self.folder / order.run, order.model_dump()
        path = folder / "hello.json"
        self.over = False
        if not path.exists() or read_json(path) != values:
            self._run = self._below = None
            held = self._hold(order)
            write_json(path, values)
            self._run, self._below = order.run, held
        below = self._known(order.run)
        assert below is not None, "it was written"
        if not below.seats.settled:
            below.remote.gather(self.hosting.devices, self.hosting.wait_seconds)
            below.remote.gather_any(range(below.seats.number))
            below.remote.renumber(below.seats.settle())
        devices = [
            EdgeDevice(
                name=profile.name,
                client=profile.client,
                num_examples=profile.num_examples,
                memory_mib=profile.memory_mib,
            )
            for _, profile in sorted(below.seats.taken.items())
        ]
        _log.info("run %s: %d devices", order.run, len(devices))
        return sealed(EdgeProfile(name=self.name, devices=devices))

    def _known(self, run: str) -> _Below | None:
        """What is held of a run; after a restart by what lies on the disk."""
        if self._run != run or self._below is None:
            path = self.folder / run / "hello.json"
            if not path.exists():
                return None
            below = self._hold(Hello.model_validate(read_json(path)))
            self._run, self._below = run, below
            below.remote.gather(len(below.seats.taken), _AGAIN_SECONDS)
        return self._below

    def _hold(self, hello: Hello) -> _Below:
        folder = self.folder / hello.run
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        setup = setup_without_data(self.local, hello)
        number = setup.experiment.data.num_clients if hello.parts else self.hosting.devices
        seats = Seats(path=folder / "devices.json", number=number, parts=hello.parts)
        numbers: dict[str, int] = {}

        def seat(voucher: str, profile: Profile) -> int | str:
            known = {sitting.name for sitting in seats.taken.values()}
            if seats.settled and profile.name not in known:
                return (
                    f"edge {self.name!r} has told the cloud who is below it; {profile.name!r} may "
                    f"join its next run"
                )
            client = seats.seat(voucher, profile)
            return client if isinstance(client, str) else numbers.get(profile.name, client)

        remote = Remote(
            post=self.post,
            hello=hello,
            seat=seat,
            seconds=self.hosting.task_seconds,
            most_bytes=self.hosting.message_bytes,
            capacity=self.hosting.under_way,
        )
        self.watch(remote)
        sketch = getattr(setup.experiment.method, "sketch", None)
        return _Below(
            setup=setup,
            remote=remote,
            seats=seats,
            costs=setup.costs(),
            sketch=sketch and sketch(setup.model),
            numbers=numbers,
        )

    def _sweep(self, order: Sweep, spool: Spool) -> Envelope:
        letter = letter_of(order.letter)
        asked = digest_of(order.model_dump(exclude={"most_bytes", "seconds"}))
        if (kept := spool.answer(asked)) is None:
            names = [note.sha256 for note in letter.parcels]
            if missing := spool.missing(names):
                return sealed(Missing(parcels=missing))
            spool.keep_only(names)
            self._play(order, asked, spool)
            kept = spool.answer(asked)
            assert kept is not None
        return answer_kept(kept, spool, order.most_bytes)

    def _play(self, order: Sweep, asked: str, spool: Spool) -> None:
        below = self._known(order.run)
        assert below is not None, "asked before"
        below.renumber(order.numbers)
        if not set(order.own) <= set(order.numbers.values()):
            raise TesseraError(f"clients {order.own} are not all below edge {self.name!r}")
        header, groups = read_kept(letter_of(order.letter), spool)
        try:
            state = State(params=groups["params"], extra=groups["extra"], **header)
        except (KeyError, TypeError) as error:
            raise MessageError(f"a global state lacks {error}, or has it in excess") from error
        remote = below.remote
        heard = {client: round for client, round in order.heard}
        remote.heard, remote.keeps = dict(heard), heard
        # Every average may wait for a device that does not come, and the cloud must hear in time.
        patience = _SHARE * order.seconds / order.rounds
        remote.seconds = self.hosting.task_seconds

        def begins() -> None:  # also for devices that wait until others are done
            remote.until = remote.clock() + patience

        begun = time.perf_counter()
        sweeping = Sweeping(
            setup=below.setup,
            engine=remote,
            costs=below.costs,
            order=order,
            sketch=below.sketch,
            begins=begins,
        )
        with threads(below.setup.experiment.engine.threads):
            parts = sweeping.play(state)
        seconds = time.perf_counter() - begun
        spool.write_answer(asked, Outgoing(parts=parts, most_bytes=order.most_bytes), seconds)
        _log.info("round %d: %d averages in %.2f s", state.round, order.rounds, seconds)

    def _bye(self, order: Bye) -> Envelope:
        if order.text:  # its devices keep what they have: it may be heard again
            _log.warning("the cloud has no seat for this edge: %s", order.text)
            return sealed(Missing(parcels=[]))
        if (below := self._known(order.run)) is not None:
            below.remote.goodbye()
        self.over = True
        if self._run == order.run:
            self._run = self._below = None
        shutil.rmtree(self.folder / order.run, ignore_errors=True)
        return sealed(Missing(parcels=[]))


def setup_without_data(local: Local, hello: Hello) -> Setup:
    """An experiment's model and method, for who has none of its data.

    Raises:
        TesseraError: it is no experiment, or its model is not on this machine.
    """
    experiment = here(from_json(hello.experiment), local, data=False)
    try:
        spec: Spec = TypeAdapter(Spec).validate_python(hello.spec)
    except ValidationError as error:
        raise MessageError(f"what a model must know of the data is wrong: {error}") from error
    # Of examples the shape alone is needed, to count costs with.
    types: dict[str, Any] = {"image": torch.uint8, "vector": torch.float32, "tokens": torch.int32}
    inputs = torch.zeros(1, *spec.shape, dtype=types[spec.kind])
    places = spec.shape if spec.task == "causal-lm" else ()
    one = Examples(inputs=inputs, labels=torch.zeros(1, *places, dtype=torch.int64))
    none = one.take(torch.zeros(0, dtype=torch.int64))
    shape = ClientData(train=one, validation=none, test=none)
    data = FederatedData(spec=spec, clients=(shape,), test=none, elsewhere=True)
    model = experiment.model.build_model(spec)
    return Setup(experiment=experiment, data=data, model=model, clients=())
