"""A device that is a peer: its part of every round, all of which lies on its disk.

    ends/    what it holds after the rounds that it has ended (checkpoints)
    turn/    what it trained in the round at hand, and remembers from then on
    answer/  its letters of that round, in parcels

A round has two steps, and each can be asked for again: a turn is read from the disk then.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from tesserafl.core.answers import check_update
from tesserafl.core.errors import ConfigError, MessageError, TesseraError
from tesserafl.core.messages import Client, Memory, Task, Update
from tesserafl.core.metrics import Metrics
from tesserafl.core.params import num_entries, sha256
from tesserafl.core.places import part_to_json
from tesserafl.core.wire import Parts, decode_update, encode_update
from tesserafl.engines.incoming import read_letter
from tesserafl.engines.lean import Lean, store_of
from tesserafl.engines.lean_peer import LeanPeer
from tesserafl.engines.parcels import Outgoing, letter_of
from tesserafl.engines.peer import Asked, CopyPeer, Heard
from tesserafl.engines.process import threads
from tesserafl.engines.replicas import Replicas
from tesserafl.engines.seam import Done
from tesserafl.engines.shares import Shares
from tesserafl.engines.turns import Addressed, Examined, Fold, Lapse, Passed, Place, Turned
from tesserafl.run import checkpoint as checkpoints
from tesserafl.run.begin import first_peers, shapes_of
from tesserafl.run.checkpoint import Checkpoint
from tesserafl.run.children import give_back_memory
from tesserafl.run.costs import CostTable
from tesserafl.run.export import export_model
from tesserafl.run.files import write_atomic
from tesserafl.run.first import first_state
from tesserafl.run.holding import Holding
from tesserafl.run.parts import write_part
from tesserafl.run.rounds import Notes, note_answer
from tesserafl.run.setup import Setup, evaluator_of, with_depths
from tesserafl.run.spool import Spool


@dataclass(kw_only=True)
class PeerDevice:
    """One peer of a run, and its disk."""

    client: int
    setup: Setup
    """Whose clients are all peers."""
    holding: Holding
    spool: Spool
    peer: CopyPeer | LeanPeer
    memory: Memory
    """What its method remembers, after the rounds that it has ended."""
    costs: CostTable
    whole_test: bool
    """Whether it has the test examples of the whole run; else its own."""

    @property
    def round(self) -> int:
        """Rounds that it has ended."""
        return self.peer.round

    def turn(self, round: int, most_bytes: int) -> Turned:
        """Its part of the round that comes next."""
        kept = self.spool.answer(_digest(round))
        if kept is None:
            self._turn(round, most_bytes)
            kept = self.spool.answer(_digest(round))
            assert kept is not None, "it was written"
        return Turned.model_validate(kept["turned"])

    def fold(self, order: Fold) -> None:
        """End a round with what the others wrote.

        Raises:
            TesseraError: what they wrote cannot be true, and nobody else can write it.
        """
        own, memory = self._own(order.round)
        if self.client not in order.answered:
            own = None
        elif own is None:
            raise TesseraError(
                f"this peer has lost what it trained in round {order.round}, which others count; "
                f"put its folder back"
            )
        letters = {passed.origin: partial(self._read, passed) for passed in order.letters}
        if self.client in letters or max(letters, default=0) >= len(self.setup.clients):
            raise MessageError(f"letters of the peers {sorted(letters)} came to peer {self.client}")
        heard = Heard(own, set(order.answered), letters)
        with threads(self.setup.experiment.engine.threads):
            self.peer.fold(heard, self._asked(order.round))
        self.memory = memory
        self._save()
        self.spool.keep_only(())

    def examine(self, keep: Path | None) -> Examined:
        """What it holds and reaches; `keep`: write it there."""
        peer, metrics = self.peer, Metrics()
        if isinstance(peer, CopyPeer):
            state = peer.copy.states[0]
            predictor = self.setup.experiment.method.predictor(self.setup.model, state)
            test = self.setup.data.test if self.whole_test else self.holding.data.test
            with threads(self.setup.experiment.engine.threads):
                metrics = evaluator_of(self.holding.setup).evaluate(predictor, test)
                if keep is not None:
                    export_model(predictor, keep, self.holding.setup.data)
        elif keep is not None:
            write_part(keep, self.setup, peer)
        return Examined(
            round=peer.round,
            entries=num_entries(peer.stored),
            sha256=sha256(peer.stored),
            whole=isinstance(peer, CopyPeer),
            examples=metrics.count,
            accuracy=metrics.accuracy,
            loss=metrics.loss,
        )

    def _turn(self, round: int, most_bytes: int) -> None:
        asked = self._asked(round)
        update, row, lapse = None, None, None
        path = self.spool.folder / "turn" / f"{round}.safetensors"
        path.parent.mkdir(exist_ok=True, mode=0o700)
        for old in path.parent.iterdir():
            old.unlink()
        task = self.peer.task(asked)
        if task is not None and not self.setup.answers(round, task.client):
            lapse = Lapse(reason="offline", text="did not answer")
        elif task is not None:
            try:
                update, row = self._train(task, path)
            except TesseraError as error:
                lapse = Lapse(reason="error", text=str(error)[:10_000])
        give_back_memory()  # what training took need not be there beside the letters
        letters = self.peer.letters(update, asked)
        outgoing = [Outgoing(parts=parts, most_bytes=most_bytes) for _, parts in letters]
        turned = Turned(
            round=round,
            row=row,
            lapse=lapse,
            part=None if update is None else part_to_json(update.submodel),
            letters=[
                Addressed(receivers=receivers, letter=out.letter.model_dump())
                for (receivers, _), out in zip(letters, outgoing, strict=True)
            ],
        )
        self.spool.write_letters(_digest(round), outgoing, {"turned": turned.model_dump()})

    def _train(self, task: Task, path: Path) -> tuple[Update, dict[str, float]]:
        """What it trained, if others can believe it, and what is noted of it.

        Written to `path` first, since letters say that it is there; what it remembers too.
        """
        begun = time.perf_counter()
        with threads(self.setup.experiment.engine.threads):
            update, memory = self.holding.worker.work(task, dict(self.memory))
        write_atomic(path, encode_update(update, memory))
        # Others look at it as well: what they leave out it must leave out too.
        check_update(task, update, shapes_of(self.setup.model), self.setup.model)
        done = Done(client=self.client, update=update, seconds=time.perf_counter() - begun)
        notes = Notes()
        note_answer(task, done, self.costs, notes)
        return update, {name: float(value) for name, value in notes.clients[0].items()}

    def _own(self, round: int) -> tuple[Update | None, Memory]:
        path = self.spool.folder / "turn" / f"{round}.safetensors"
        return decode_update(path.read_bytes()) if path.exists() else (None, self.memory)

    def _asked(self, round: int) -> Asked:
        """Who takes part in the round, and how they train."""
        rounds = self.setup.experiment.rounds
        return Asked(self.setup.cohort(round), self.setup.training_at(round, rounds))

    def _read(self, passed: Passed) -> Parts:
        return read_letter(letter_of(passed.letter), self.spool.fetch)

    def _save(self) -> None:
        states, values, tensors = self.peer.held()
        checkpoint = Checkpoint(
            states=states,
            federation=values,
            tensors=tensors,
            coverage={},
            memories={self.client: self.memory},
            totals={},
            events_bytes=0,
        )
        checkpoints.save(self.spool.folder / "ends", checkpoint)


def peer_device(
    holding: Holding, client: int, roster: Sequence[Place], spool: Spool, parts: bool
) -> PeerDevice:
    """The peer as it was when its disk was written last, or as it begins.

    `parts`: peers take parts of one data set, which each of them has.

    Raises:
        TesseraError: the run is not one among peers, or does not know this one.
    """
    setup = with_roster(holding.setup, roster)
    if client >= len(roster):
        raise ConfigError(f"peer {client} does not exist: the run has {len(roster)}")
    federation, found = first_peers(setup), checkpoints.latest(spool.folder / "ends")
    peer: CopyPeer | LeanPeer
    if isinstance(federation, Lean):
        # The whole is made once, and only for the part that is taken from it.
        store = (
            torch.empty(0) if found is not None else _first_part(federation.shares, client, setup)
        )
        peer = LeanPeer(client=client, shares=federation.shares, store=store)
    else:
        assert isinstance(federation, Replicas), "peers keep copies or parts"
        # What all began with is for a mean of all copies, which is nobody's here.
        peer = CopyPeer(client=client, copy=replace(federation, begin={}))
    device = PeerDevice(
        client=client,
        setup=setup,
        holding=holding,
        spool=spool,
        peer=peer,
        memory={},
        costs=setup.costs(),
        whole_test=parts,
    )
    if found is not None:
        peer.restore((found.states, dict(found.federation), dict(found.tensors)))
        device.memory = dict(found.memories.get(client, {}))
    return device


def _first_part(shares: Shares, client: int, setup: Setup) -> Tensor:
    state = first_state(setup.experiment, setup.model, setup.data)
    return store_of(shares, client, state)


def inlined(turned: Turned, spool: Spool, most_bytes: int) -> dict[str, bytes]:
    """The parcels that go with a turn; the others must be fetched."""
    notes = {n.sha256: n for each in turned.letters for n in letter_of(each.letter).parcels}
    return spool.answered_in(list(notes.values()), most_bytes)


def with_roster(setup: Setup, roster: Sequence[Place]) -> Setup:
    """The setup of a run with these peers."""
    clients = tuple(
        Client(id=number, num_examples=place.num_examples, memory_bytes=place.memory_bytes)
        for number, place in enumerate(roster)
    )
    asked = min(setup.experiment.clients_per_round, len(clients))
    data = setup.data
    if len(data.clients) != len(clients):  # of others it has the number of examples alone
        data = replace(data, clients=data.clients[:1] * len(clients), elsewhere=True)
    experiment = replace(setup.experiment, clients_per_round=asked)
    return with_depths(replace(setup, experiment=experiment, data=data, clients=clients))


def _digest(round: int) -> str:
    return f"turn {round}"
