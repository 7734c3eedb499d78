"""The engine whose clients are devices elsewhere, behind a post that carries messages.

A task goes down as a letter and its parcels, an update comes back the same way. Whatever is lost on
the way is asked for again, until the task's deadline. Devices keep their own memory; the server only
knows of which round.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from tesserafl.core.errors import MessageError, TesseraError
from tesserafl.core.messages import Memory, Task
from tesserafl.core.wire import task_parts, update_of
from tesserafl.engines.orders import (
    Answer,
    Bye,
    Envelope,
    Fetch,
    Hello,
    Missing,
    Offer,
    Parcels,
    Profile,
    Refusal,
    Store,
    Stranger,
    Work,
    reply_of,
    sealed,
)
from tesserafl.engines.parcels import (
    Letter,
    Outgoing,
    check_parcel,
    letter_of,
    read_letter,
)
from tesserafl.engines.seam import Done, Failed, Outcome, Reason

_PAUSE = 0.05
"""Seconds between two looks into the post."""
_NODES_EVERY = 1.0
"""Seconds between two looks at who is there."""
_MOST_REPEATS = 5
"""Of one step of a task, after which the device is given up for the round."""
_ROUND = "round"
"""Under this name a checkpoint holds of which round a client's memory is."""


class Undelivered(Exception):
    """A message had no reply, and why."""

    def __init__(self, reason: Reason, text: str) -> None:
        super().__init__(text)
        self.reason: Reason = reason


class Post(Protocol):
    """Carries envelopes to nodes and their replies back."""

    def nodes(self) -> Mapping[int, str]:
        """Those that are connected now, and the names that vouch for them; "": nobody does."""
        ...

    def push(self, node: int, envelope: Envelope, seconds: float) -> str:
        """Send; the reply to the message of this name may come for so many seconds."""
        ...

    def pull(self, names: Collection[str]) -> list[tuple[str, Envelope | Undelivered]]:
        """The replies to these messages that have come by now."""
        ...


@dataclass(kw_only=True)
class _Errand:
    """One client's task under way."""

    task: Task
    outgoing: Outgoing
    until: float
    waiting: set[str] = field(default_factory=set)
    """Messages without a reply."""
    repeats: int = 0
    answer: Letter | None = None
    parcels: dict[str, bytes] = field(default_factory=dict)
    """Of the answer."""
    seconds: float = 0.0


@dataclass(kw_only=True)
class Remote:
    """Devices behind a post.

    A device is sent a Hello when it appears, and takes a seat: the number of a client. Who is not
    there when a task is submitted has failed as `offline`.
    """

    post: Post
    hello: Hello
    seat: Callable[[str, Profile], int | str]
    """Name that vouches for a node, its profile -> the client that the node is from now on, or why
    it is none."""
    seconds: float
    """that a device has for a task, with its transfers"""
    most_bytes: int
    """of tensors in one message"""
    capacity: int = 1
    """Tasks that are under way at once."""
    clock: Callable[[], float] = time.monotonic
    pause: Callable[[float], None] = time.sleep
    heard: dict[int, int] = field(default_factory=dict)
    """Client -> the round it answered last."""
    profiles: dict[int, Profile] = field(default_factory=dict)
    """Client -> who its device is."""
    bytes_down: int = 0
    """On the wire, with heads and letters."""
    bytes_up: int = 0
    _nodes: dict[int, int] = field(default_factory=dict)
    """Client -> its node."""
    _present: Mapping[int, str] = field(default_factory=dict)
    _greeted: dict[str, int] = field(default_factory=dict)
    """Name of a Hello's message -> its node."""
    _known: set[int] = field(default_factory=set)
    """Nodes that were sent a Hello."""
    _errands: dict[int, _Errand] = field(default_factory=dict)
    _failed: deque[Outcome] = field(default_factory=deque)
    _looked: float = float("-inf")
    refused: dict[int, str] = field(default_factory=dict)
    """Node -> why it has no seat."""

    @property
    def group(self) -> int:
        """One: a device does its own task."""
        return 1

    @property
    def memories(self) -> Mapping[int, Memory]:
        """Of which round every client's memory is; what it remembers stays on its device."""
        return {client: {_ROUND: torch.tensor(round)} for client, round in self.heard.items()}

    def restore(self, memories: Mapping[int, Memory]) -> None:
        """Go on from a checkpoint: clients begin with what they kept at its rounds."""
        self.heard = {client: int(memory[_ROUND]) for client, memory in memories.items()}

    def gather(self, most: int, seconds: float) -> None:
        """Wait until so many devices have a seat, at most so long."""
        until = self.clock() + seconds
        while len(self._seated()) < most and self.clock() < until:
            self._look()
            self._deliver()
            self.pause(_PAUSE)

    def renumber(self, numbers: Mapping[int, int]) -> None:
        """Give the devices other clients' numbers: old -> new; before the first task."""
        self._nodes = {numbers[old]: node for old, node in self._nodes.items()}
        self.profiles = {numbers[old]: profile for old, profile in self.profiles.items()}

    def submit(self, tasks: Sequence[Task]) -> None:
        """Send tasks to their devices."""
        for task in tasks:
            self._look()
            client = task.client.id
            if client not in self._seated():
                text = f"no device of client {client} is connected"
                self._fail(client, "offline", text)
                continue
            outgoing = Outgoing(parts=task_parts(task, {}), most_bytes=self.most_bytes)
            errand = _Errand(task=task, outgoing=outgoing, until=self.clock() + self.seconds)
            self._errands[client] = errand
            self._begin(client, errand)

    def poll(self) -> list[Outcome]:
        """At least one outcome; blocks until there is one."""
        while True:
            self._look()
            outcomes = self._deliver()
            self._expire()
            while self._failed:
                outcomes.append(self._failed.popleft())
            if outcomes:
                return outcomes
            self.pause(_PAUSE)

    def close(self) -> None:
        """Say goodbye to the devices, if the post still works."""
        bye = sealed(Bye(run=self.hello.run))
        for node in self._known & self._present.keys():
            try:
                self.post.push(node, bye, self.seconds)
            except Exception:  # what a post raises is its own; the devices find out by themselves
                break
        self._known = set()

    # Who is there.

    def _seated(self) -> set[int]:
        return {client for client, node in self._nodes.items() if node in self._present}

    def _look(self) -> None:
        """Greet who has come."""
        if self.clock() - self._looked < _NODES_EVERY:
            return
        self._looked = self.clock()
        self._present = self.post.nodes()
        # Who comes back is greeted again: it may be another process.
        self._known &= self._present.keys()
        for node in sorted(self._present.keys() - self._known):
            self._greet(node)

    def _greet(self, node: int) -> None:
        self._known.add(node)
        name = self._push(node, sealed(self.hello))
        self._greeted[name] = node

    def _welcome(self, node: int, reply: Envelope | Undelivered) -> None:
        if isinstance(reply, Undelivered):
            self._known.discard(node)  # greeted again when it is there
            return
        try:
            profile = reply_of(reply)
        except MessageError as error:
            self.refused[node] = str(error)
            return
        if not isinstance(profile, Profile):
            self.refused[node] = profile.text if isinstance(profile, Refusal) else profile.kind
            return
        client = self.seat(self._present.get(node, ""), profile)
        if isinstance(client, str):
            self.refused[node] = client
            return
        self.refused.pop(node, None)
        self._nodes[client], self.profiles[client] = node, profile
        if (errand := self._errands.get(client)) is not None and not errand.waiting:
            self._begin(client, errand)  # it did not know the run

    # The way of a task.

    def _begin(self, client: int, errand: _Errand) -> None:
        letter = errand.outgoing.letter
        if letter.num_bytes <= self.most_bytes:
            self._work(client, errand, range(len(letter.parcels)))
        else:
            parcels = [note.sha256 for note in letter.parcels]
            self._ask(client, errand, sealed(Offer(run=self.hello.run, parcels=parcels)))

    def _work(self, client: int, errand: _Errand, inline: Iterable[int]) -> None:
        letter, outgoing = errand.outgoing.letter, errand.outgoing
        order = Work(
            run=self.hello.run,
            client=client,
            remembers=self.heard.get(client),
            letter=letter.model_dump(),
            most_bytes=self.most_bytes,
        )
        parcels = {letter.parcels[n].sha256: outgoing.parcel(n) for n in inline}
        self._ask(client, errand, sealed(order, parcels))

    def _store(self, client: int, errand: _Errand, missing: Sequence[str]) -> None:
        errand.repeats += 1
        wanted = set(missing)
        numbers = [
            number
            for number, note in enumerate(errand.outgoing.letter.parcels)
            if note.sha256 in wanted
        ]
        if errand.repeats > _MOST_REPEATS or not numbers:
            self._give_up(client, "error", f"its device keeps losing parcels of client {client}")
            return
        for number in numbers:
            note = errand.outgoing.letter.parcels[number]
            parcels = {note.sha256: errand.outgoing.parcel(number)}
            self._ask(client, errand, sealed(Store(run=self.hello.run), parcels))

    def _ask(self, client: int, errand: _Errand, envelope: Envelope) -> None:
        name = self._push(self._nodes[client], envelope, errand.until - self.clock())
        errand.waiting.add(name)

    def _push(self, node: int, envelope: Envelope, seconds: float | None = None) -> str:
        self.bytes_down += envelope.num_bytes
        return self.post.push(node, envelope, max(1.0, seconds or self.seconds))

    def _deliver(self) -> list[Outcome]:
        """Look into the post; outcomes of tasks that came to their end."""
        owners = {name: client for client, e in self._errands.items() for name in e.waiting}
        names = [*owners, *self._greeted]
        outcomes: list[Outcome] = []
        for name, reply in self.post.pull(names) if names else ():
            if isinstance(reply, Envelope):
                self.bytes_up += reply.num_bytes
            if name in self._greeted:
                self._welcome(self._greeted.pop(name), reply)
            elif (client := owners[name]) in self._errands:  # else: given up in this look
                outcomes += self._step(client, self._errands[client], name, reply)
        return outcomes

    def _step(
        self, client: int, errand: _Errand, name: str, reply: Envelope | Undelivered
    ) -> list[Outcome]:
        errand.waiting.discard(name)
        if isinstance(reply, Undelivered):
            self._give_up(client, reply.reason, str(reply))
            return []
        try:
            return self._replied(client, errand, reply)
        except TesseraError as error:
            self._give_up(client, "error", str(error))
            return []

    def _replied(self, client: int, errand: _Errand, envelope: Envelope) -> list[Outcome]:
        reply = reply_of(envelope)
        if isinstance(reply, Refusal):
            self._give_up(client, "error", reply.text)
        elif isinstance(reply, Stranger):
            errand.repeats += 1
            if errand.repeats > _MOST_REPEATS:
                raise MessageError(f"the device of client {client} forgets the run again and again")
            self._greet(self._nodes[client])
        elif isinstance(reply, Missing):
            if reply.parcels and errand.answer is None:
                self._store(client, errand, reply.parcels)
            elif reply.parcels:
                raise MessageError(f"the device of client {client} has lost its answer")
            elif not errand.waiting:  # all is there
                self._work(client, errand, ())
        elif isinstance(reply, Answer):
            errand.answer, errand.seconds = letter_of(reply.letter), reply.seconds
            return self._collected(client, errand, envelope.parcels)
        elif isinstance(reply, Parcels) and errand.answer is not None:
            return self._collected(client, errand, envelope.parcels)
        else:
            raise MessageError(f"a device answered {reply.kind!r} where that answers nothing")
        return []

    def _collected(
        self, client: int, errand: _Errand, parcels: Mapping[str, bytes]
    ) -> list[Outcome]:
        """Take what came of an answer, and ask for the rest of it."""
        assert errand.answer is not None
        notes = {note.sha256: note for note in errand.answer.parcels}
        for name, data in parcels.items():
            if name in notes:
                check_parcel(data, notes[name])
                errand.parcels[name] = data
        missing = [name for name in notes if name not in errand.parcels]
        if not missing:
            return [self._done(client, errand)]
        if not errand.waiting:
            errand.repeats += 1
            if errand.repeats > _MOST_REPEATS:
                raise MessageError(f"parcels of client {client}'s answer do not come")
            for name in missing:
                self._ask(client, errand, sealed(Fetch(run=self.hello.run, parcels=[name])))
        return []

    def _done(self, client: int, errand: _Errand) -> Outcome:
        assert errand.answer is not None
        update, memory = update_of(*read_letter(errand.answer, errand.parcels.__getitem__))
        task = errand.task
        if (update.client, update.round) != (client, task.round) or memory:
            raise MessageError(
                f"a device answered for client {update.client} in round {update.round} with "
                f"{len(memory)} memories; asked was client {client} in round {task.round}, and "
                f"memories stay on devices"
            )
        del self._errands[client]
        self.heard[client] = task.round
        return Done(update=update, seconds=errand.seconds)

    def _expire(self) -> None:
        now = self.clock()
        late = [client for client, errand in self._errands.items() if errand.until <= now]
        for client in late:
            self._give_up(client, "expired", f"no answer within {self.seconds:g} s")

    def _give_up(self, client: int, reason: Reason, text: str) -> None:
        self._errands.pop(client, None)
        self._fail(client, reason, text)

    def _fail(self, client: int, reason: Reason, text: str) -> None:
        self._failed.append(Failed(client=client, reason=reason, text=text))


