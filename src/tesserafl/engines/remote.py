"""The engine whose clients are devices elsewhere, behind a post that carries messages.

A task goes down as a letter and its parcels, an update comes back the same way (errands.py). What
is lost on the way is asked for again, until the task's deadline. Devices keep their own memory; the
server only knows of which round.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from tesserafl.core.errors import MessageError, TesseraError
from tesserafl.core.messages import Memory, Task
from tesserafl.core.wire import Parts, task_parts
from tesserafl.engines.errands import Errand, Step
from tesserafl.engines.orders import (
    Bye,
    Envelope,
    Hello,
    Judged,
    Profile,
    Refusal,
    reply_of,
    sealed,
)
from tesserafl.engines.parcels import Outgoing
from tesserafl.engines.seam import Failed, Outcome, Reason

_PAUSE = 0.05
"""Seconds between two looks into the post."""
_LOOK_EVERY = 1.0
"""Seconds between two looks at who is there."""
_GOODBYE = 15.0
"""Seconds that devices have to hear that a run is over."""
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
    refused: dict[int, str] = field(default_factory=dict)
    """Node -> why it has no seat."""
    bytes_down: int = 0
    """On the wire, with heads and letters."""
    bytes_up: int = 0
    _nodes: dict[int, int] = field(default_factory=dict)
    """Client -> its node."""
    _present: Mapping[int, str] = field(default_factory=dict)
    _known: set[int] = field(default_factory=set)
    """Nodes that were sent a Hello."""
    _greetings: dict[str, int] = field(default_factory=dict)
    """Name of a Hello's message -> its node."""
    _errands: dict[int, Errand] = field(default_factory=dict)
    _until: dict[int, float] = field(default_factory=dict)
    """Client -> when its errand expires."""
    _messages: dict[str, int] = field(default_factory=dict)
    """Name of an errand's message -> its client."""
    _judged: dict[int, Judged] = field(default_factory=dict)
    _ended: deque[Outcome] = field(default_factory=deque)
    _looked: float = float("-inf")

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

    @property
    def seated(self) -> set[int]:
        """The clients whose devices are there."""
        return {client for client, node in self._nodes.items() if node in self._present}

    def gather(self, most: int, seconds: float) -> None:
        """Wait until so many devices have a seat, at most so long."""
        until = self.clock() + seconds
        while len(self.seated) < most and self.clock() < until:
            self._work_on()
            self.pause(_PAUSE)

    def renumber(self, numbers: Mapping[int, int]) -> None:
        """Give the devices other clients' numbers: old -> new; before the first task."""
        self._nodes = {numbers[old]: node for old, node in self._nodes.items()}

    def submit(self, tasks: Sequence[Task]) -> None:
        """Send tasks to their devices."""
        for task in tasks:
            self._look()
            client = task.client.id
            if client in self.seated:
                self._begin(client, task, task_parts(task, {}))
            else:
                self._fail(client, "offline", f"no device of client {client} is connected")

    def poll(self) -> list[Outcome]:
        """At least one outcome; blocks until there is one."""
        self._work_on()
        while not self._ended:
            self.pause(_PAUSE)
            self._work_on()
        outcomes = list(self._ended)
        self._ended.clear()
        return outcomes

    def judge(self, parts: Parts) -> dict[int, Judged]:
        """What the clients' own models reach on their own test examples, where they have some.

        `parts` are the global state's. Who is not there or cannot do it is left out.
        """
        self._look()
        self._judged = {}
        for client in sorted(self.seated):
            self._begin(client, None, parts)
        while self._errands:
            self._work_on()
            self.pause(_PAUSE)
        self._ended.clear()
        return {client: self._judged[client] for client in sorted(self._judged)}

    def close(self) -> None:
        """Nothing to release: devices wait for a server that goes on, or for `goodbye`."""

    def goodbye(self) -> None:
        """Tell the devices that the run is over, if the post works."""
        bye = sealed(Bye(run=self.hello.run))
        nodes, self._known = self._known & self._present.keys(), set()
        until = self.clock() + _GOODBYE
        with contextlib.suppress(Exception):  # a post's own: the devices find out by themselves
            names = {self.post.push(node, bye, _GOODBYE) for node in nodes}
            while names and self.clock() < until:
                names -= {name for name, _ in self.post.pull(names)}
                self.pause(_PAUSE)

    # Who is there.

    def _work_on(self) -> None:
        self._look()
        self._deliver()
        self._expire()

    def _look(self) -> None:
        """Greet who has come."""
        if self.clock() - self._looked < _LOOK_EVERY:
            return
        self._looked = self.clock()
        self._present = self.post.nodes()
        # Who comes back is greeted again: it may be another process.
        self._known &= self._present.keys()
        for node in sorted(self._present.keys() - self._known):
            self._greet(node)

    def _greet(self, node: int) -> None:
        self._known.add(node)
        self._greetings[self._push(node, sealed(self.hello), self.seconds)] = node

    def _welcome(self, node: int, reply: Envelope | Undelivered) -> None:
        if isinstance(reply, Undelivered):
            self._known.discard(node)  # greeted again when it is there
            return
        client = self._client_of(node, reply)
        if isinstance(client, str):
            self.refused[node] = client
            return
        self.refused.pop(node, None)
        self._nodes[client] = node
        errand = self._errands.get(client)
        if errand is not None and not errand.waiting:  # it did not know the run
            self._go_on(client, errand.begin())

    def _client_of(self, node: int, reply: Envelope) -> int | str:
        try:
            profile = reply_of(reply)
        except MessageError as error:
            return str(error)
        if isinstance(profile, Profile):
            return self.seat(self._present.get(node, ""), profile)
        return profile.text if isinstance(profile, Refusal) else f"it answered {profile.kind!r}"

    # The errands.

    def _begin(self, client: int, task: Task | None, parts: Parts) -> None:
        errand = Errand(
            run=self.hello.run,
            client=client,
            task=task,
            outgoing=Outgoing(parts=parts, most_bytes=self.most_bytes),
            remembers=self.heard.get(client),
        )
        self._errands[client], self._until[client] = errand, self.clock() + self.seconds
        self._go_on(client, errand.begin())

    def _go_on(self, client: int, step: Step) -> None:
        for envelope in step.send:
            seconds = max(1.0, self._until[client] - self.clock())
            self._messages[self._push(self._nodes[client], envelope, seconds)] = client
        if step.greet:
            self._greet(self._nodes[client])
        if step.result is not None:
            errand = self._errands.pop(client)
            if isinstance(step.result, Judged):
                self._judged[client] = step.result
            elif errand.task is not None:
                self.heard[client] = errand.task.round
                self._ended.append(step.result)

    def _push(self, node: int, envelope: Envelope, seconds: float) -> str:
        self.bytes_down += envelope.num_bytes
        return self.post.push(node, envelope, seconds)

    def _deliver(self) -> None:
        """Look into the post."""
        names = [*self._greetings, *self._messages]
        for name, reply in self.post.pull(names) if names else ():
            if isinstance(reply, Envelope):
                self.bytes_up += reply.num_bytes
            if name in self._greetings:
                self._welcome(self._greetings.pop(name), reply)
                continue
            client = self._messages.pop(name, None)
            if client is not None:  # else: of an errand that was given up in this look
                self._replied(client, reply)

    def _replied(self, client: int, reply: Envelope | Undelivered) -> None:
        if isinstance(reply, Undelivered):
            self._give_up(client, reply.reason, str(reply))
            return
        try:
            self._go_on(client, self._errands[client].replied(reply))
        except TesseraError as error:
            self._give_up(client, "error", str(error))

    def _expire(self) -> None:
        now = self.clock()
        for client in [c for c in self._errands if self._until[c] <= now]:
            self._give_up(client, "expired", f"no answer within {self.seconds:g} s")

    def _give_up(self, client: int, reason: Reason, text: str) -> None:
        self._errands.pop(client, None)
        self._messages = {name: c for name, c in self._messages.items() if c != client}
        self._fail(client, reason, text)

    def _fail(self, client: int, reason: Reason, text: str) -> None:
        self._ended.append(Failed(client=client, reason=reason, text=text))
