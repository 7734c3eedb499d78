"""The engine whose clients are devices elsewhere, behind a post that carries messages.

A task goes down as a letter and its parcels, an update comes back in the same way (errands.py),
until the task's deadline. Devices keep their own memory; the server only knows of which round.
"""

from __future__ import annotations

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
from tesserafl.engines.errands import Ask, Errand
from tesserafl.engines.orders import Envelope, Hello, Judged, Profile
from tesserafl.engines.parcels import Outgoing
from tesserafl.engines.questions import Question, Said
from tesserafl.engines.seam import Done, Failed, Outcome, Reason
from tesserafl.engines.steps import Step, Told, oldest

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
    until: float = math.inf
    """By the clock: what is asked now has no time beyond it."""
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
    _errands: dict[int, Errand | Question] = field(default_factory=dict)
    _ahead: dict[int, Mapping[str, Any]] = field(default_factory=dict)
    """Client -> what the next errand knows by its last; of this process alone."""
    _until: dict[int, float] = field(default_factory=dict)
    """Client -> when its errand expires."""
    _messages: dict[str, int] = field(default_factory=dict)
    """Name of an errand's message -> its client."""
    _ended: deque[Outcome | Told | Said] = field(default_factory=deque)

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

    def gather(self, most: int, seconds: float, without: Callable[[], int] = lambda: 0) -> None:
        """Wait until so many devices have a seat, or came in vain; at most so long."""
        self._wait(lambda: len(self.seated) + without() >= most, seconds)

    def gather_any(self, clients: Collection[int]) -> set[int]:
        """Wait until the device of one of these clients is there; returns all that are."""
        wanted = set(clients)
        self._wait(lambda: bool(self.seated & wanted))
        return self.seated & wanted

    def renumber(self, numbers: Mapping[int, int | str]) -> None:
        """Give the devices other clients' numbers: old -> new, or why it has none; before the first
        task."""
        for node in self._attendance.renumber(numbers):
            self._attendance.turn_away(self.post, node, self.seconds)

    def submit(self, tasks: Sequence[Task]) -> None:
        """Send tasks to their devices."""
        for task in tasks:
            self._look()
            outgoing = Outgoing(parts=task_parts(task, {}), most_bytes=self.most_bytes)
            self._start(self._errand(task.client.id, task, outgoing))

    def poll(self, seconds: float = math.inf) -> list[Outcome]:
        """At least one outcome; blocks until there is one, at most so long."""
        self._wait(lambda: bool(self._ended), seconds)
        outcomes = [each for each in self._ended if isinstance(each, Done | Failed)]
        self._ended.clear()
        return outcomes

    def ask(self, asks: Mapping[int, Ask], parts: Parts) -> Iterator[Told | Failed]:
        """Ask devices something that is no task, with these parts; what each tells, as it comes."""
        outgoing = Outgoing(parts=parts, most_bytes=self.most_bytes)
        errands = [self._errand(client, None, outgoing, ask) for client, ask in asks.items()]
        return (each for each in self._heard(errands) if not isinstance(each, Said))

    def judge(self, parts: Parts) -> dict[int, Judged]:
        """What the clients' own models reach on their own test examples, where they have some.

        `parts` are the global state's. Who is not there or cannot do it is left out.
        """
        self._look()
        outgoing = Outgoing(parts=parts, most_bytes=self.most_bytes)
        errands = [self._errand(client, None, outgoing) for client in sorted(self.seated)]
        found = sorted(self._heard(errands), key=lambda each: each.client)
        said = [each for each in found if isinstance(each, Said)]
        return {each.client: each.reply for each in said if isinstance(each.reply, Judged)}

    def inquire(self, questions: Sequence[Question]) -> dict[int, Said | Failed]:
        """Put questions to clients, all at once; what each says, when all have."""
        found = self._heard(questions)
        return {each.client: each for each in found if not isinstance(each, Told)}

    def close(self) -> None:
        """Nothing to release: devices wait for a server that goes on, or for `goodbye`."""

    def goodbye(self) -> None:
        """Tell the devices that the run is over, if the post works."""
        self._attendance.dismiss(self.post, _GOODBYE, self.clock, self.pause)

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
        self._attendance.look(self.post, self.clock(), self.seconds)

    def _welcome(self, name: str, reply: Envelope | Undelivered) -> None:
        node = self._attendance.greetings[name]
        client, lost = self._attendance.answered(name, reply)
        if node in self.refused:
            self._attendance.turn_away(self.post, node, self.seconds)
        for other in lost & self._errands.keys():
            self._give_up(other, "offline", f"the device of client {other} has no seat any more")
        errand = None if client is None else self._errands.get(client)
        if client is not None and errand is not None and not errand.course.waiting:
            self._go_on(client, errand.begin())  # it did not know the run

    def _errand(
        self, client: int, task: Task | None, outgoing: Outgoing, ask: Ask | None = None
    ) -> Errand:
        return Errand(
            run=self.hello.run,
            client=client,
            task=task,
            outgoing=outgoing,
            remembers=self.heard.get(client),
            keeps=self.keeps.get(client),
            **self._ahead.get(client, {}),
            ask=ask,
        )

    def _start(self, errand: Errand | Question) -> None:
        client = errand.client
        if client not in self.seated:
            self._fail(client, "offline", "it is not connected")
            return
        self._forget(client)
        self._errands[client] = errand
        self._until[client] = min(self.clock() + self.seconds, self.until)
        self._go_on(client, errand.begin())

    def _heard(self, errands: Sequence[Errand | Question]) -> Iterator[Told | Said | Failed]:
        """What comes of errands that are no tasks, as it comes."""
        self._look()
        for errand in errands:
            self._start(errand)
        left = {errand.client for errand in errands}
        while left:
            self._wait(lambda: bool(self._ended))
            while self._ended:
                each = self._ended.popleft()
                if each.client in left and not isinstance(each, Done):
                    left.remove(each.client)
                    yield each

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
            if isinstance(errand, Errand):
                self._ahead[client] = errand.learnt(self._ahead.get(client, {}))
            if isinstance(step.result, Done):
                self.heard[client] = step.result.update.round
            if isinstance(step.result, Done | Told):
                self._ended.append(step.result)
            else:
                self._ended.append(Said(client=client, reply=step.result))

    def _deliver(self) -> None:
        """Look into the post."""
        attendance = self._attendance
        names = [*attendance.greetings, *oldest(self._messages), *attendance.turned_away]
        for name, reply in self.post.pull(names) if names else ():
            if isinstance(reply, Envelope):
                self.bytes_up += reply.num_bytes
            if name in self._attendance.greetings:
                self._welcome(name, reply)
                continue
            self._attendance.turned_away.discard(name)
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
        for client in [c for c in self._errands if self._until[c] <= self.clock()]:
            self._give_up(client, "expired", f"no answer within {self.seconds:g} s")

    def _give_up(self, client: int, reason: Reason, text: str) -> None:
        self._errands.pop(client, None)
        self._forget(client)
        self._fail(client, reason, text)

    def _forget(self, client: int) -> None:
        """What a client answers to earlier messages is not waited for any more."""
        self._messages = {name: c for name, c in self._messages.items() if c != client}

    def _fail(self, client: int, reason: Reason, text: str) -> None:
        self._ended.append(Failed(client=client, reason=reason, text=text[:10_000]))
