"""The engine whose clients are devices elsewhere, behind a post that carries messages.

A task goes down as a letter and its parcels, an update comes back the same way (errands.py). What
is lost on the way is asked for again, until the task's deadline. Devices keep their own memory; the
server only knows of which round.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from tesserafl.core.errors import TesseraError
from tesserafl.core.messages import Memory, Task
from tesserafl.core.wire import Parts, task_parts
from tesserafl.engines.attendance import Attendance, Post, Undelivered
from tesserafl.engines.edge_orders import EdgeProfile
from tesserafl.engines.errands import Ask, Errand, Step, Told
from tesserafl.engines.orders import Bye, Envelope, Hello, Judged, Profile, sealed
from tesserafl.engines.parcels import Outgoing
from tesserafl.engines.seam import Done, Failed, Outcome, Reason

_log = logging.getLogger(__name__)

_PAUSE = 0.05
"""Seconds between two looks into the post."""
_GOODBYE = 15.0
"""Seconds that devices have to hear that a run is over."""
_ROUND = "round"
"""Under this name a checkpoint holds of which round a client's memory is."""


@dataclass(kw_only=True)
class Remote:
    """Devices behind a post.

    A device is sent a Hello when it appears, and takes a seat: the number of a client. Who is not
    there when a task is submitted has failed as `offline`.
    """

    post: Post
    hello: Hello
    seat: Callable[[str, Any], int | str]
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
    keeps: Mapping[int, int] = field(default_factory=dict)
    """Client -> a further round whose memory it must keep."""
    expects: type[Profile] | type[EdgeProfile] = Profile
    """Who may come: devices or edges."""
    bytes_down: int = 0
    """On the wire, with heads and letters."""
    bytes_up: int = 0
    _errands: dict[int, Errand] = field(default_factory=dict)
    _until: dict[int, float] = field(default_factory=dict)
    """Client -> when its errand expires."""
    _messages: dict[str, int] = field(default_factory=dict)
    """Name of an errand's message -> its client."""
    _judged: dict[int, Judged] = field(default_factory=dict)
    _ended: deque[Outcome | Told] = field(default_factory=deque)

    def __post_init__(self) -> None:
        self._attendance = Attendance(hello=self.hello, seat=self.seat, expects=self.expects)

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
        return self._attendance.seated

    @property
    def refused(self) -> Mapping[int, str]:
        """Node -> why it has no seat."""
        return self._attendance.refused

    def gather(self, most: int, seconds: float) -> None:
        """Wait until so many devices have a seat, at most so long."""
        self._wait(lambda: len(self.seated) >= most, seconds)

    def gather_any(self, clients: Collection[int]) -> set[int]:
        """Wait until the device of one of these clients is there; returns all that are."""
        wanted = set(clients)
        self._wait(lambda: bool(self.seated & wanted))
        return self.seated & wanted

    def renumber(self, numbers: Mapping[int, int]) -> None:
        """Give the devices other clients' numbers: old -> new; before the first task."""
        self._attendance.renumber(numbers)

    def submit(self, tasks: Sequence[Task]) -> None:
        """Send tasks to their devices."""
        for task in tasks:
            self._look()
            client = task.client.id
            if client in self.seated:
                self._begin(client, task, self._outgoing(task_parts(task, {})))
            else:
                self._fail(client, "offline", f"no device of client {client} is connected")

    def poll(self, seconds: float = math.inf) -> list[Outcome]:
        """At least one outcome; blocks until there is one, at most so long."""
        self._wait(lambda: bool(self._ended), seconds)
        outcomes = [each for each in self._ended if not isinstance(each, Told)]
        self._ended.clear()
        return outcomes

    def ask(self, asks: Mapping[int, Ask], parts: Parts) -> Iterator[Told | Failed]:
        """Ask devices something that is no task; what each tells, as it comes.

        `parts` are what they are sent with it, all the same.
        """
        self._look()
        outgoing = self._outgoing(parts)
        for client, ask in asks.items():
            if client in self.seated:
                self._begin(client, None, outgoing, ask)
            else:
                self._fail(client, "offline", "it is not connected")
        left = set(asks)
        while left:
            self._wait(lambda: bool(self._ended))
            ended = list(self._ended)
            self._ended.clear()
            for each in ended:
                if each.client in left and not isinstance(each, Done):
                    left.remove(each.client)
                    yield each

    def judge(self, parts: Parts) -> dict[int, Judged]:
        """What the clients' own models reach on their own test examples, where they have some.

        `parts` are the global state's. Who is not there or cannot do it is left out.
        """
        self._look()
        self._judged = {}
        for client in sorted(self.seated):
            self._begin(client, None, self._outgoing(parts))
        self._wait(lambda: not self._errands)
        self._ended.clear()
        return {client: self._judged[client] for client in sorted(self._judged)}

    def close(self) -> None:
        """Nothing to release: devices wait for a server that goes on, or for `goodbye`."""

    def goodbye(self) -> None:
        """Tell the devices that the run is over, if the post works."""
        bye = sealed(Bye(run=self.hello.run))
        there = self._attendance
        nodes, there.known = there.known & there.present.keys(), set()
        until = self.clock() + _GOODBYE
        with contextlib.suppress(Exception):  # a post's own: the devices find out by themselves
            names = {self.post.push(node, bye, _GOODBYE) for node in nodes}
            while names and self.clock() < until:
                names -= {name for name, _ in self.post.pull(names)}
                self.pause(_PAUSE)

    # Who is there.

    def _wait(self, enough: Callable[[], bool], seconds: float = math.inf) -> None:
        """Work on until it is enough, at most so long."""
        until = self.clock() + seconds
        while True:
            self._look()
            self._deliver()
            self._expire()
            if enough() or self.clock() >= until:
                return
            self.pause(_PAUSE)

    def _look(self) -> None:
        """Greet who has come."""
        self._attendance.look(self.post, self.clock(), self.seconds)

    def _welcome(self, name: str, reply: Envelope | Undelivered) -> None:
        client, lost = self._attendance.answered(name, reply)
        for other in lost & self._errands.keys():
            self._give_up(other, "offline", f"the device of client {other} has no seat any more")
        errand = None if client is None else self._errands.get(client)
        if client is not None and errand is not None and not errand.waiting:
            self._go_on(client, errand.begin())  # it did not know the run

    # The errands.

    def _outgoing(self, parts: Parts) -> Outgoing:
        return Outgoing(parts=parts, most_bytes=self.most_bytes)

    def _begin(
        self, client: int, task: Task | None, outgoing: Outgoing, ask: Ask | None = None
    ) -> None:
        errand = Errand(
            run=self.hello.run,
            client=client,
            task=task,
            outgoing=outgoing,
            remembers=self.heard.get(client),
            keeps=self.keeps.get(client),
            ask=ask,
        )
        self._forget(client)
        self._errands[client], self._until[client] = errand, self.clock() + self.seconds
        self._go_on(client, errand.begin())

    def _go_on(self, client: int, step: Step) -> None:
        node = self._attendance.nodes[client]
        try:
            for envelope in step.send:
                seconds = max(1.0, self._until[client] - self.clock())
                self._messages[self.post.push(node, envelope, seconds)] = client
                self.bytes_down += envelope.num_bytes
        except Undelivered as error:
            self._give_up(client, error.reason, str(error))
            return
        if step.greet:
            self.bytes_down += self._attendance.greet(self.post, node, self.seconds)
        if step.result is not None:
            errand = self._errands.pop(client)
            self._forget(client)
            if isinstance(step.result, Judged):
                self._judged[client] = step.result
            else:
                if errand.task is not None:
                    self.heard[client] = errand.task.round
                self._ended.append(step.result)

    def _deliver(self) -> None:
        """Look into the post."""
        names = [*self._attendance.greetings, *self._messages]
        for name, reply in self.post.pull(names) if names else ():
            if isinstance(reply, Envelope):
                self.bytes_up += reply.num_bytes
            if name in self._attendance.greetings:
                self._welcome(name, reply)
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
        except Exception as error:  # nothing that a device sends may end a run
            _log.exception("an answer of client %d could not be read", client)
            self._give_up(client, "error", f"its answer could not be read: {error!r:.500}")

    def _expire(self) -> None:
        now = self.clock()
        for client in [c for c in self._errands if self._until[c] <= now]:
            self._give_up(client, "expired", f"no answer within {self.seconds:g} s")

    def _give_up(self, client: int, reason: Reason, text: str) -> None:
        self._errands.pop(client, None)
        self._forget(client)
        self._fail(client, reason, text)

    def _forget(self, client: int) -> None:
        """What a client answers to earlier messages is not waited for any more."""
        self._messages = {name: c for name, c in self._messages.items() if c != client}

    def _fail(self, client: int, reason: Reason, text: str) -> None:
        self._ended.append(Failed(client=client, reason=reason, text=text))
