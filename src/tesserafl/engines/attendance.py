"""Which devices are there, and which client each of them is."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from tesserafl.core.errors import MessageError
from tesserafl.engines.edge_orders import EdgeProfile
from tesserafl.engines.orders import Bye, Envelope, Hello, Profile, Refusal, reply_of, sealed
from tesserafl.engines.seam import Reason

_LOOK_EVERY = 1.0
"""Seconds between two looks at who is there."""
_PAUSE = 0.05
"""Seconds between two looks for answers to a goodbye."""
_MOST_PROFILE_BYTES = 1 << 17
"""Of what a device answers to a Hello."""


class Undelivered(Exception):
    """A message could not be sent or had no reply, and why."""

    def __init__(self, reason: Reason, text: str) -> None:
        super().__init__(text)
        self.reason: Reason = reason


class Disowned(Exception):
    """The post carries nothing for this process any more."""


class Post(Protocol):
    """Carries envelopes to nodes and their replies back."""

    def nodes(self) -> Mapping[int, str]:
        """Those that are connected now, and the names that vouch for them, if any do."""
        ...

    def push(self, node: int, envelope: Envelope, seconds: float) -> str:
        """Send; the reply to the message of this name may come for so many seconds.

        Raises:
            Undelivered: the node has gone.
        """
        ...

    def pull(self, names: Collection[str]) -> list[tuple[str, Envelope | Undelivered]]:
        """The replies to these messages that have come by now."""
        ...


@dataclass(kw_only=True)
class Attendance:
    """Greets devices that appear; a device that answers takes a seat, the number of a client."""

    hello: Hello
    seat: Callable[[str, Any], int | str]
    """Name that vouches for a node, its profile -> the client that the node is from now on, or why
    it is none."""
    expects: type[Profile] | type[EdgeProfile] = Profile
    """Who may come: devices or edges."""
    present: Mapping[int, str] = field(default_factory=dict)
    known: set[int] = field(default_factory=set)
    """Nodes that were greeted since they came."""
    refused: dict[int, str] = field(default_factory=dict)
    """Node -> why it has no seat."""
    greetings: dict[str, int] = field(default_factory=dict)
    """Name of a Hello's message -> its node."""
    nodes: dict[int, int] = field(default_factory=dict)
    """Client -> its node, there or not."""
    turned_away: set[str] = field(default_factory=set)
    """Names of messages that say so; to what is answered nobody listens."""
    _looked: float = float("-inf")

    @property
    def seated(self) -> set[int]:
        """The clients whose devices are there."""
        return {client for client, node in self.nodes.items() if node in self.present}

    def look(self, post: Post, now: float, seconds: float) -> None:
        """Greet who has come; their answers may come for so many seconds."""
        if now - self._looked < _LOOK_EVERY:
            return
        self._looked = now
        self.present = post.nodes()
        # Who comes back is greeted again: it may be another process.
        self.known &= self.present.keys()
        for node in sorted(self.present.keys() - self.known):
            self.greet(post, node, seconds)

    def greet(self, post: Post, node: int, seconds: float) -> int:
        """Send a Hello; returns its bytes."""
        envelope = sealed(self.hello)
        try:
            self.greetings[post.push(node, envelope, seconds)] = node
        except Undelivered:  # gone since; greeted when it is there again
            return 0
        self.known.add(node)
        return envelope.num_bytes

    def turn_away(self, post: Post, node: int, seconds: float) -> None:
        """Tell a device why it has no seat."""
        bye = sealed(Bye(run=self.hello.run, text=self.refused[node][:10_000]))
        with contextlib.suppress(Undelivered):
            self.turned_away.add(post.push(node, bye, seconds))

    def dismiss(
        self,
        post: Post,
        seconds: float,
        clock: Callable[[], float] = time.monotonic,
        pause: Callable[[float], None] = time.sleep,
    ) -> None:
        """Tell the devices that the run is over, if the post works; they have so long to hear."""
        bye, names = sealed(Bye(run=self.hello.run)), set[str]()
        nodes, self.known = self.known & self.present.keys(), set()
        with contextlib.suppress(Exception):  # a post's own: the devices find out by themselves
            names |= {post.push(node, bye, seconds) for node in sorted(nodes)}
        until = clock() + seconds

        def hear() -> None:
            with contextlib.suppress(Exception):
                while names and clock() < until:
                    names.difference_update({name for name, _ in post.pull(names)})
                    pause(_PAUSE)

        # In a thread: of an answer that breaks off Flower awaits the rest for minutes.
        thread = threading.Thread(target=hear, daemon=True)
        thread.start()
        thread.join(seconds)

    def answered(self, name: str, reply: Envelope | Undelivered) -> tuple[int | None, set[int]]:
        """The client that took its seat by the answer to a Hello, and those that lost theirs."""
        node = self.greetings.pop(name)
        if isinstance(reply, Undelivered):
            self.known.discard(node)  # greeted again when it is there
            return None, set()
        client = self._client_of(node, reply)
        lost = {other for other, at in self.nodes.items() if at == node and other != client}
        for other in lost:  # a node is one client, or none
            del self.nodes[other]
        if isinstance(client, str):
            self.refused[node] = client
            return None, lost
        self.refused.pop(node, None)
        self.nodes[client] = node
        return client, lost

    def renumber(self, numbers: Mapping[int, int | str]) -> list[int]:
        """Give the devices other clients' numbers: old -> new, or why it has none any more.

        Returns the nodes that have none.
        """
        before, self.nodes = self.nodes, {}
        gone = []
        for old, node in before.items():
            new = numbers[old]
            if isinstance(new, str):
                self.refused[node] = new
                gone.append(node)
            else:
                self.nodes[new] = node
        return gone

    def _client_of(self, node: int, reply: Envelope) -> int | str:
        try:
            profile = reply_of(reply, _MOST_PROFILE_BYTES)
        except MessageError as error:
            return str(error)
        if isinstance(profile, self.expects):
            return self.seat(self.present.get(node, ""), profile)
        if isinstance(profile, EdgeProfile):
            return f"{profile.name!r} is an edge, and this server is for devices"
        if isinstance(profile, Profile):
            return f"{profile.name!r} is a device; in a run with edges it joins one of them"
        return profile.text if isinstance(profile, Refusal) else f"it answered {profile.kind!r}"
