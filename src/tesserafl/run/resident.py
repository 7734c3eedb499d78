"""The part of a device that stays: it keeps model, data and memories, and answers orders.

It knows no transport. What it holds of a run lies on its disk before it answers, so a device that
is killed goes on where it was.
"""

from __future__ import annotations

import logging
import shutil
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

from tesserafl.core.errors import TesseraError
from tesserafl.core.messages import Memory
from tesserafl.core.wire import task_of, update_parts
from tesserafl.engines.incoming import Later
from tesserafl.engines.orders import (
    Bye,
    Envelope,
    Fetch,
    Hello,
    Judge,
    Judged,
    Missing,
    Profile,
    Refusal,
    Rest,
    Store,
    Stranger,
    Work,
    order_of,
    sealed,
)
from tesserafl.engines.parcels import Letter, Outgoing, letter_of
from tesserafl.engines.process import threads
from tesserafl.engines.turns import Examine, Fold, Standing, Turn
from tesserafl.run.answering import answered_once, fetched, lacking, read_kept, rest_of
from tesserafl.run.children import give_back_memory
from tesserafl.run.files import read_json, write_json
from tesserafl.run.holding import Holding, Local, hold
from tesserafl.run.peer_device import PeerDevice, inlined, peer_device
from tesserafl.run.personal import personal_accuracy
from tesserafl.run.spool import Spool, digest_of

_log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Resident:
    """Answers the orders of one server; one after another."""

    name: str
    folder: Path
    """what it keeps between restarts"""
    local: Local
    memory_mib: float | None = None
    """what its owner lets it use; told to the server"""
    over: bool = False
    """Whether the server has said goodbye."""
    _run: str | None = None
    _holding: Holding | None = field(default=None)
    _peer: PeerDevice | None = field(default=None)
    """Of a run among peers."""

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
            spool = self._spool(order.run)
            spool.store(envelope.parcels)
            del envelope  # its parcels are on the disk
            if isinstance(order, Store):
                return sealed(Missing(parcels=[]))
            if isinstance(order, Work):
                return self._work(order, spool)
            if isinstance(order, Judge):
                return self._judge(order, spool)
            if isinstance(order, Fetch):
                return fetched(order, spool)
            if isinstance(order, Rest):
                return rest_of(order, spool)
            if isinstance(order, Turn | Fold | Examine):
                reply = self._among_peers(order, spool)
                give_back_memory()  # the next order may come in an hour
                return reply
            raise TesseraError(f"this is a device; it knows no order {order.kind!r}")
        except TesseraError as error:
            _log.warning("refused: %s", error)
            return sealed(Refusal(text=str(error)[:10_000]))

    def _hello(self, order: Hello) -> Envelope:
        folder, values = self.folder / order.run, order.model_dump()
        path = folder / "hello.json"
        self.over = False
        if not path.exists() or read_json(path) != values:
            self._run, self._holding = None, None
            holding = hold(self.local, order.experiment, order.spec)
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            write_json(path, values)
            self._run, self._holding = order.run, holding
        known = self._known(order.run)
        assert known is not None, "it was written"
        _log.info("run %s: %d examples", order.run, len(known.data.train))
        return sealed(
            Profile(
                name=self.name,
                client=self.local.client,
                num_examples=len(known.data.train),
                memory_mib=self.memory_mib,
            )
        )

    def _known(self, run: str) -> Holding | None:
        """What is held of a run; after a restart by what lies on the disk."""
        if self._run != run or self._holding is None:
            path = self.folder / run / "hello.json"
            if not path.exists():
                return None
            hello = Hello.model_validate(read_json(path))
            self._run, self._holding = run, hold(self.local, hello.experiment, hello.spec)
        return self._holding

    def _spool(self, run: str) -> Spool:
        return Spool(folder=self.folder / run)

    def _work(self, order: Work, spool: Spool) -> Envelope:
        asked = digest_of(order.model_dump(exclude={"most_bytes"}))
        letter = letter_of(order.letter)

        def work() -> None:
            self._train(order, letter, asked, spool)

        return answered_once(letter, asked, spool, order.most_bytes, work)

    def _train(self, order: Work, letter: Letter, asked: str, spool: Spool) -> None:
        holding = self._known(order.run)
        assert holding is not None, "asked before"
        # Its parameters stay on the disk: what is trained is the one copy in memory.
        later = Later(groups=frozenset({"params"}), read=spool.piece)
        task, _ = task_of(*read_kept(letter, spool, later))
        if task.client.id != order.client:
            raise TesseraError(f"the task is client {task.client.id}'s, the order {order.client}'s")
        if self.local.client not in (None, order.client):
            raise TesseraError(f"this device is client {self.local.client}, not {order.client}")
        memory = _recalled(order, spool)
        give_back_memory()  # what reading the parcels took
        begun = time.perf_counter()
        with threads(holding.experiment.engine.threads):
            update, memory = holding.worker.work(task, memory)
        seconds = time.perf_counter() - begun
        task = replace(task, params={}, extra={})  # nobody needs them while the answer is written
        outgoing = Outgoing(parts=update_parts(update, {}), most_bytes=order.most_bytes)
        # The memory first: an answer says that it is there.
        every = holding.experiment.checkpoint_every
        spool.remember(order.remembers, task.round, memory, every, order.keeps)
        spool.write_answer(asked, outgoing, seconds)
        _log.info("round %d: %d steps in %.2f s", task.round, update.num_steps, seconds)
        del outgoing, update, memory
        give_back_memory()  # the next task may come in an hour

    def _judge(self, order: Judge, spool: Spool) -> Envelope:
        holding = self._known(order.run)
        assert holding is not None, "asked before"
        letter = letter_of(order.letter)
        if (lacks := lacking(letter, spool)) is not None:
            return lacks
        if not len(holding.data.test):
            raise TesseraError("this device keeps no test examples of its own")
        parts = read_kept(letter, spool)
        with threads(holding.experiment.engine.threads):
            accuracy, share = personal_accuracy(
                holding.setup, parts, _recalled(order, spool), holding.data.test
            )
        return sealed(Judged(accuracy=accuracy, share=share))

    def _among_peers(self, order: Turn | Fold | Examine, spool: Spool) -> Envelope:
        peer = self._peer_of(order, spool)
        if isinstance(order, Examine):
            kept = self.folder / f"model-{order.run[:8]}" if order.keep else None
            return sealed(peer.examine(kept))
        if order.round != peer.round:
            return sealed(Standing(round=peer.round))
        if isinstance(order, Turn):
            turned = peer.turn(order.round, order.most_bytes)
            return sealed(turned, inlined(turned, spool, order.most_bytes))
        letters = [letter_of(passed.letter) for passed in order.letters]
        names = [note.sha256 for letter in letters for note in letter.parcels]
        spool.drop_damaged(names)
        if missing := spool.missing(names):
            return sealed(Missing(parcels=missing))
        self._peer = None  # until the end of the round lies on the disk
        peer.fold(order)
        self._peer = peer
        return sealed(Standing(round=peer.round))

    def _peer_of(self, order: Turn | Fold | Examine, spool: Spool) -> PeerDevice:
        holding, parts = self._known(order.run), self.local.client is not None
        assert holding is not None, "asked before"
        if self.local.client not in (None, order.client):
            raise TesseraError(f"this device is client {self.local.client}, not {order.client}")
        known = self._peer
        if known is None or known.holding is not holding or known.client != order.client:
            self._peer = peer_device(holding, order.client, order.roster, spool, parts)
        assert self._peer is not None, "made above"
        return self._peer

    def _bye(self, order: Bye) -> Envelope:
        if order.text:
            _log.warning("the server has no seat for this device: %s", order.text)
        self.over = not order.text
        if self._run == order.run:
            self._run, self._holding, self._peer = None, None, None
        shutil.rmtree(self.folder / order.run, ignore_errors=True)
        return sealed(Missing(parcels=[]))


def _recalled(order: Work | Judge, spool: Spool) -> Memory:
    memory = spool.recall(order.remembers)
    if memory is None:
        _log.warning("what was kept after round %s is lost; begins anew", order.remembers)
        return {}
    return memory
