"""A run among peers on devices: the server carries letters, opens none and holds no model.

    a round   Turn: each peer trains its part and writes to the others; what it wrote lies in the
              mailbag (mailbag.py) when the round's letters are closed
              Fold: each peer ends the round with what others wrote to it
    who       with `all_gather` and `gossip` a peer that does not answer is left out of the round,
              and catches up with the letters when it is back; with `lean` all wait for it, since
              nobody else has what it keeps

Which clients take part follows from the seed; what is in a letter, from the method: see
engines/peer.py. The server trusts no peer with another's letters, and no peer trusts the server
with more than their delivery.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from pydantic import BaseModel

from tesserafl.core.coverage import Coverage
from tesserafl.core.errors import TesseraError
from tesserafl.core.params import Params
from tesserafl.engines.network import Exchange, Network
from tesserafl.engines.questions import Question, Said
from tesserafl.engines.remote import Remote
from tesserafl.engines.seam import Failed
from tesserafl.engines.turns import Examine, Examined, Fold, Place, Standing, Turn, Turned
from tesserafl.run.mailbag import Mailbag, Turns, parcels_of
from tesserafl.run.rounds import Notes, check_answered
from tesserafl.run.setup import Setup
from tesserafl.run.turned import judged, noted

_LETTER_BYTES, _TENSOR_BYTES, _ENTRY_BYTES = 1 << 16, 1 << 10, 16
"""Of a peer's letters: to each receiver, for every tensor, for every entry of the model."""
_INDEX_BYTES, _NOTE_BYTES = 22, 128
"""Of the heads of its letters: for every unit of every dimension, and for every parcel."""
_PAUSE = 1.0
"""Seconds before nobody is asked again."""
_log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Carrier:
    """Plays the rounds of peers behind a post."""

    setup: Setup
    """Whose clients are the peers."""
    remote: Remote
    bag: Mailbag
    exchange: Exchange
    network: Network
    shapes: Params
    """The model's parameters, on `meta`."""
    stands: dict[int, int] = field(default_factory=dict)
    """Peer -> rounds that it has ended, as far as it was heard."""

    def play(self, round: int, coverage: Coverage) -> Notes:
        """A round; again, if it was begun.

        Raises:
            UpdateError: the work of every peer that answered was refused.
            TesseraError: a peer of a lean run cannot go on, and nobody else has its part.
        """
        begun, closed = time.perf_counter(), self.bag.turns(round)
        turns = self._turns(round) if closed is None else closed
        notes = noted(turns, self.setup.clients, self.shapes)
        if closed is None:
            check_answered(round, notes)
            self.bag.close(round, turns)
        coverage.add(notes.trained)
        alone = Coverage({name: tuple(t.shape) for name, t in self.shapes.items()})
        alone.add(notes.trained)
        notes.union = alone.share
        self._bring(range(len(self.setup.clients)), round + 1)
        # The last round's letters stay until the next one's: this one may have to be told again.
        self.bag.drop(min(round, *(self.stands.get(c.id, 0) for c in self.setup.clients)))
        notes.seconds = time.perf_counter() - begun
        return notes

    def examine(self, rounds: int, *, all_of_them: bool, keep: bool) -> dict[int, Examined]:
        """What those peers hold and reach that have ended so many rounds; else the first of them.

        `keep`: they write it to their disks. Of a lean run all must: nobody else has their parts.
        """
        self._bring([c for c in self.remote.seated if c in self.stands], rounds)
        found: dict[int, Examined] = {}
        asked = {client.id for client in self.setup.clients}
        while left := asked - found.keys():
            waits = keep and self._waits
            there = self.remote.gather_any(left) if waits else self.remote.seated & left
            for client in sorted(there):
                order = Examine(run=self._run, client=client, roster=self._roster, keep=keep)
                reply = self._ask({client: self._question(client, order)})[client]
                where = Standing(round=reply.round) if isinstance(reply, Examined) else reply
                lost = self._heard(client, where, rounds)
                if lost is None and isinstance(reply, Examined) and reply.round == rounds:
                    found[client] = reply
                if found and not all_of_them:
                    return found
            if not waits:
                return found
            self._bring(there - found.keys(), rounds)
        return found

    @property
    def _waits(self) -> bool:
        """Whether a round waits for all peers."""
        return self.exchange == "lean"

    @property
    def _run(self) -> str:
        return self.remote.hello.run

    @property
    def _roster(self) -> list[Place]:
        return [
            Place(num_examples=client.num_examples, memory_bytes=client.memory_bytes)
            for client in self.setup.clients
        ]

    def _turns(self, round: int) -> Turns:
        """Everybody's letters of a round."""
        asked = {client.id for client in self.setup.cohort(round)}
        if self._waits:
            asked = {client.id for client in self.setup.clients}
        found: dict[int, Turned] = {}
        failed: dict[int, Failed] = {}
        brought: set[int] = set()
        while left := asked - found.keys() - failed.keys():
            there = self.remote.gather_any(left) if self._waits or not found else left
            questions = {client: self._turn(client, round) for client in sorted(there)}
            for client, reply in self._ask(questions).items():
                if isinstance(reply, Turned) and reply.round == round:
                    found[client] = self._judged(client, reply)
                    self.stands[client] = round
                    continue
                if isinstance(reply, Standing) and (client in brought or reply.round == round):
                    reply = _refused(client, f"does not take its turn in round {round}")
                if (lost := self._heard(client, reply, round)) is not None:
                    failed[client] = lost
            behind = [client for client in left if self.stands.get(client, round) < round]
            brought |= set(behind)
            failed |= self._bring(behind, round)
            if not found and all(f.reason != "error" for f in failed.values()):
                failed = {}  # nobody was there: wait for somebody
                self.remote.pause(_PAUSE)
        return Turns(found=found, failed=[failed[client] for client in sorted(failed)])

    def _bring(self, clients: Collection[int], target: int) -> dict[int, Failed]:
        """Let peers end rounds until they have ended so many; returns those that did not."""
        failed: dict[int, Failed] = {}
        while left := {
            c for c in clients if self.stands.get(c, target - 1) < target and c not in failed
        }:
            if self._waits:
                left = self.remote.gather_any(left)
            ends = {c: self.stands.get(c, target - 1) for c in sorted(left)}
            turns = {round: self.bag.turns(round) for round in set(ends.values())}
            questions = {c: self._fold(c, round, turns[round]) for c, round in ends.items()}
            for client, reply in self._ask(questions).items():
                known = self.stands.get(client, -1)
                if isinstance(reply, Standing) and reply.round <= known:
                    reply = _refused(client, f"does not end round {known}")
                if (lost := self._heard(client, reply, target)) is not None:
                    failed[client] = lost
        return failed

    def _heard(self, client: int, reply: BaseModel | Failed, most: int) -> Failed | None:
        """Note where a peer stands; returns why it is left out, if it is.

        Raises:
            TesseraError: it cannot be left out, and will not come back.
        """
        if isinstance(reply, Standing):
            reply = self._stood(client, reply.round, most)
        if isinstance(reply, Standing):
            self.stands[client] = reply.round
            return None
        if not isinstance(reply, Failed):
            reply = _refused(client, "answered something that was not asked")
        if not self._waits:
            return reply
        if reply.reason == "error":
            raise TesseraError(
                f"peer {client} cannot go on, and nobody else has what it keeps: {reply.text}"
            )
        return None

    def _stood(self, client: int, round: int, most: int) -> Standing | Failed:
        text = ""
        if round > most:
            text = f"has ended {round} rounds, and this server has carried {most}; its run folder "
            text += "is older than the run"
        elif round < most and self.bag.turns(round) is None:
            text = f"stands at round {round}, whose letters are gone: it has lost what it held"
        if text:
            return _refused(client, text)
        return Standing(round=round)

    def _turn(self, client: int, round: int) -> Question:
        order = Turn(
            run=self._run,
            client=client,
            roster=self._roster,
            round=round,
            most_bytes=self.remote.most_bytes,
        )
        entries = sum(tensor.numel() for tensor in self.shapes.values())
        once = _LETTER_BYTES + _TENSOR_BYTES * len(self.shapes) + _ENTRY_BYTES * entries
        letters = len(self.setup.clients) if self._waits else 1
        dims = sum(sum(tensor.shape) for tensor in self.shapes.values())
        head = _LETTER_BYTES + 2 * _TENSOR_BYTES * len(self.shapes) + _INDEX_BYTES * dims
        notes = _NOTE_BYTES * (letters * once // max(1, self.remote.most_bytes) + letters)
        return self._question(
            client,
            order,
            largest=letters * once,
            most_head_bytes=(letters + 1) * head + notes,
            kept=partial(self.bag.kept, round),
            keep=partial(self.bag.keep, round),
        )

    def _fold(self, client: int, round: int, turns: Turns | None) -> Question:
        assert turns is not None, "letters are kept until all have ended the round"
        letters = turns.letters_to(client)
        order = Fold(
            run=self._run,
            client=client,
            roster=self._roster,
            round=round,
            answered=turns.answered,
            letters=letters,
        )
        parcels, read = parcels_of(letters), partial(self.bag.read, round)
        return self._question(client, order, parcels=parcels, read=read)

    def _question(self, client: int, order: BaseModel, **given: Any) -> Question:
        most = self.remote.most_bytes
        return Question(run=self._run, client=client, order=order, most_bytes=most, **given)

    def _ask(self, questions: Mapping[int, Question]) -> dict[int, BaseModel | Failed]:
        """As many at once as may be under way."""
        found: dict[int, BaseModel | Failed] = {}
        waiting, size = list(questions), self.remote.capacity
        for begin in range(0, len(waiting), size):
            batch = waiting[begin : begin + size]
            said = self.remote.inquire([questions[client] for client in batch])
            found |= {c: each.reply if isinstance(each, Said) else each for c, each in said.items()}
        return found

    def _judged(self, client: int, turned: Turned) -> Turned:
        """The turn, if it can be believed.

        Raises:
            TesseraError: it cannot, and others need its letters.
        """
        receivers: list[int] | None = None
        if self.exchange == "gossip":
            receivers = self.network.neighbours(client)
        elif not self._waits:
            receivers = [c.id for c in self.setup.clients if c.id != client]
        return judged(self.setup.clients[client], turned, self.shapes, receivers)


def _refused(client: int, text: str) -> Failed:
    return Failed(client=client, reason="error", text=f"peer {client} {text}")
