"""What one order to one device leads to, and how its messages go: what all orders share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pydantic import BaseModel

from tesserafl.core.errors import MessageError
from tesserafl.core.wire import Parts
from tesserafl.engines.orders import Envelope, Fetch, Refusal, Reply, reply_of, sealed
from tesserafl.engines.seam import Done

_MOST_REPEATS = 5
"""Of an order's messages, after which the device is given up for the round."""


@dataclass(frozen=True, kw_only=True)
class Told:
    """What a device answered to an `Ask`; nothing of it was looked at."""

    client: int
    parts: Parts
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Step:
    """What a reply leads to."""

    send: Sequence[Envelope] = ()
    greet: bool = False
    """The device does not know the run: greet it, and begin again when it has answered."""
    result: Done | Told | BaseModel | None = None
    """The errand is over."""


@dataclass(kw_only=True)
class Course:
    """The messages of an order: those under way, and how often something had to be said again."""

    run: str
    client: int
    waiting: int = 0
    """Messages under way."""
    _repeats: int = 0

    def sending(self, *envelopes: Envelope) -> Step:
        """Send these."""
        self.waiting += len(envelopes)
        return Step(send=envelopes)

    def replied(self, envelope: Envelope, most_head_bytes: int) -> Reply:
        """The reply to one of them.

        Raises:
            MessageError: it is damaged, or the device refuses.
        """
        self.waiting -= 1
        reply = reply_of(envelope, most_head_bytes)
        if isinstance(reply, Refusal):
            raise MessageError(reply.text)
        return reply

    def forgotten(self) -> Step:
        """The device does not know the run, and says so to each of its messages."""
        if self.waiting:
            return Step()
        self._again(f"the device of client {self.client} forgets the run again and again")
        return Step(greet=True)

    def losing_parcels(self) -> None:
        """The device has not got what it was sent."""
        self._again(f"the device of client {self.client} keeps losing parcels")

    def fetching(self, parcels: Sequence[str]) -> Step:
        """Ask for parcels of the answer, unless some may be under way."""
        if self.waiting:
            return Step()
        self._again(f"parcels of client {self.client}'s answer do not come")
        return self.sending(*(sealed(Fetch(run=self.run, parcels=[name])) for name in parcels))

    def _again(self, text: str) -> None:
        self._repeats += 1
        if self._repeats > _MOST_REPEATS:
            raise MessageError(text)


def oldest(messages: Mapping[str, int], most: int = 8) -> list[str]:
    """The first messages of each client, of all (name -> client, in their order): a device answers
    one after another, and to ask for all of them takes calls."""
    seen: Counter[int] = Counter()
    found = []
    for name, client in messages.items():
        seen[client] += 1
        if seen[client] <= most:
            found.append(name)
    return found
