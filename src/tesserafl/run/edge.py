"""The part of an edge that stays: a device to the cloud, a server to devices of its own.

It answers the cloud's orders as a device does (run/resident.py), and keeps its answers in the same
way: an order can be given again, after any end of either side. Between rounds it holds nothing but
what late devices were asked.
"""

from __future__ import annotations

import logging
import math
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tesserafl.core.errors import TesseraError
from tesserafl.engines.attendance import Disowned, Post
from tesserafl.engines.edge_orders import EdgeProfile, JudgedBelow, Survey, Surveyed, Sweep
from tesserafl.engines.orders import (
    Bye,
    Envelope,
    Fetch,
    Hello,
    Missing,
    Refusal,
    Store,
    Stranger,
    order_of,
    sealed,
)
from tesserafl.engines.parcels import Letter, Outgoing, letter_of
from tesserafl.engines.process import threads
from tesserafl.engines.remote import Remote
from tesserafl.run.answering import answered_once, fetched, lacking, read_kept, told
from tesserafl.run.averages import share_of
from tesserafl.run.files import read_json, write_json
from tesserafl.run.holding import Local
from tesserafl.run.hosting import Hosted, Hosting, hosted
from tesserafl.run.personal import state_of
from tesserafl.run.spool import Spool, digest_of
from tesserafl.run.sweep import Sweeping

_log = logging.getLogger(__name__)

_AGAIN_SECONDS = 90.0
"""That an edge which starts anew waits for the devices it knows, before the first round."""


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
    _hosted: Hosted | None = None
    _recalled: bool = False
    """Whether it was looked for a run that was under way before this process."""
    _again: bool = False
    """Whether the devices of a run that goes on have not been waited for yet."""

    def answer(self, envelope: Envelope) -> Envelope:
        """Do what an envelope orders; an order that cannot be done is answered by a Refusal."""
        try:
            order = order_of(envelope)
            if isinstance(order, Hello):
                return self._hello(order)
            if isinstance(order, Bye):
                return self._bye(order)
            if (below := self._known(order.run)) is None:
                return sealed(Stranger())
            spool = Spool(folder=self.folder / order.run)
            spool.store(envelope.parcels)
            if isinstance(order, Store):
                return sealed(Missing(parcels=[]))
            if isinstance(order, Fetch):
                return fetched(order, spool)
            if isinstance(order, Sweep):
                return self._sweep(order, below, spool)
            if isinstance(order, Survey):
                return self._survey(order, below, spool)
            raise TesseraError(f"this is an edge; it knows no order {order.kind!r}")
        except TesseraError as error:
            _log.warning("refused: %s", error)
            return sealed(Refusal(text=str(error)[:10_000]))

    def idle(self) -> None:
        """Between orders: devices that come are greeted, and who is late is heard."""
        try:
            if not self._recalled:
                self._recalled = True
                self._recall()
            if self._hosted is not None:
                self._hosted.remote.gather(0, 0.0)  # who has come, and what
        except Disowned:
            raise
        except Exception:  # a post's own, or of a damaged file: the next order meets it again
            _log.exception("the devices could not be looked after")

    def _recall(self) -> None:
        """After a restart: the run that was the last, if one was under way."""
        paths = list(self.folder.glob("*/hello.json"))
        if self._hosted is None and paths:
            newest = max(paths, key=lambda path: path.stat().st_mtime)
            self._known(newest.parent.name, wait=False)

    def _hello(self, order: Hello) -> Envelope:
        folder, values = self.folder / order.run, order.model_dump()
        path = folder / "hello.json"
        self.over = False
        if not path.exists() or read_json(path) != values:
            self._run = self._hosted = None
            held = self._host(order)
            write_json(path, values)
            self._run, self._hosted, self._again = order.run, held, False
        below = self._known(order.run)
        assert below is not None, "it was written"
        devices = below.settle(self.hosting)
        _log.info("run %s: %d devices", order.run, len(devices))
        return sealed(EdgeProfile(name=self.name, devices=devices))

    def _known(self, run: str, wait: bool = True) -> Hosted | None:
        """What is held of a run; after a restart by what lies on the disk."""
        if self._run != run or self._hosted is None:
            path = self.folder / run / "hello.json"
            if not path.exists():
                return None
            below = self._host(Hello.model_validate(read_json(path)))
            self._run, self._hosted, self._again = run, below, True
        if wait and self._again:
            self._again = False
            self._hosted.remote.gather(len(self._hosted.seats.taken), _AGAIN_SECONDS)
        return self._hosted

    def _host(self, hello: Hello) -> Hosted:
        folder = self.folder / hello.run
        held = hosted(hello, self.name, folder, self.post, self.hosting, self.local)
        self.watch(held.remote)
        return held

    def _sweep(self, order: Sweep, below: Hosted, spool: Spool) -> Envelope:
        asked = digest_of(order.model_dump(exclude={"most_bytes", "seconds"}))
        letter = letter_of(order.letter)

        def work() -> None:
            self._play(order, below, letter, asked, spool)

        return answered_once(letter, asked, spool, order.most_bytes, work)

    def _play(self, order: Sweep, below: Hosted, letter: Letter, asked: str, spool: Spool) -> None:
        below.begin(order.numbers, order.heard)
        late = [] if order.waits is None else order.waits.late
        if not {*order.own, *late} <= set(order.numbers.values()):
            raise TesseraError(f"clients {order.own} are not all below edge {self.name!r}")
        state = state_of(read_kept(letter, spool))
        # Every average may wait for a device that does not come, and the cloud must hear in time.
        patience = share_of(order.seconds, order.rounds)
        begun = time.perf_counter()
        sweeping = Sweeping(
            setup=below.setup,
            engine=below.remote,
            costs=below.costs,
            order=order,
            sketch=below.sketch,
            heard=below.remote.heard,
            # Also for devices that wait until others are done; who may be late has its own time.
            begins=lambda: below.give(patience if order.waits is None else math.inf),
            working=below.working(order.waits),
            seconds=patience,
        )
        with threads(below.setup.experiment.engine.threads):
            parts = sweeping.play(state)
        seconds = time.perf_counter() - begun
        if order.waits is not None:
            below.overtime.write(below.late)  # before the answer, which says that they are late
        spool.write_answer(asked, Outgoing(parts=parts, most_bytes=order.most_bytes), seconds)
        _log.info("round %d: %d averages in %.2f s", state.round, order.rounds, seconds)

    def _survey(self, order: Survey, below: Hosted, spool: Spool) -> Envelope:
        letter = letter_of(order.letter)
        if (lacks := lacking(letter, spool)) is not None:
            return lacks
        below.begin(order.numbers, order.heard)
        below.give(share_of(order.seconds, 1))
        begun = time.perf_counter()
        judged = [
            JudgedBelow(client=client, accuracy=each.accuracy, share=each.share)
            for client, each in below.remote.judge(read_kept(letter, spool)).items()
        ]
        seconds = time.perf_counter() - begun
        _log.info("%d devices measured their own models in %.2f s", len(judged), seconds)
        return told(Surveyed(judged=judged).model_dump(), seconds)

    def _bye(self, order: Bye) -> Envelope:
        if order.text:  # its devices keep what they have: it may be heard again
            _log.warning("the cloud has no seat for this edge: %s", order.text)
            return sealed(Missing(parcels=[]))
        if (below := self._known(order.run)) is not None:
            below.remote.goodbye()
        self.over = True
        if self._run == order.run:
            self._run = self._hosted = None
        shutil.rmtree(self.folder / order.run, ignore_errors=True)
        return sealed(Missing(parcels=[]))
