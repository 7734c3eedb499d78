"""An order on its way to a device, until it is answered: parcels go along or when they are missed.

    small   the order with its parcels             -> the reply with its parcels
    large   the order with the first -> Missing,
            Store..., the order with the last      -> the reply with the first, Fetch... -> Parcels

Like an errand (errands.py) it sends nothing itself; but it opens nothing either: parcels come from
where they are kept, and go there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from pydantic import BaseModel

from tesserafl.core.errors import MessageError
from tesserafl.engines.orders import (
    Envelope,
    Missing,
    Parcels,
    Store,
    Stranger,
    sealed,
)
from tesserafl.engines.parcels import ParcelNote, check_parcel, letter_of
from tesserafl.engines.steps import Course, Step
from tesserafl.engines.turns import Turned

_MOST_HEAD_BYTES = 1 << 20


def nowhere(note: ParcelNote, data: bytes) -> None:
    """Keep nothing: for questions whose answers have no parcels."""


@dataclass(frozen=True, kw_only=True)
class Said:
    """What a client replied to something that was no task."""

    client: int
    reply: BaseModel


@dataclass(kw_only=True)
class Question:
    """One order to one device."""

    run: str
    client: int
    order: BaseModel
    parcels: Sequence[ParcelNote] = ()
    """What the device needs for it."""
    read: Callable[[str], bytes] = lambda name: b""
    """Gives one of these parcels."""
    most_bytes: int
    """of parcels in one message"""
    largest: int = 0
    """Bytes of the parcels of an answer, at most."""
    most_head_bytes: int = _MOST_HEAD_BYTES
    """Of a reply's head: JSON takes many times its size when it is read."""
    kept: Callable[[str], bool] = lambda name: False
    """Whether a parcel of the answer was kept."""
    keep: Callable[[ParcelNote, bytes], None] = nowhere
    """Keeps one."""
    course: Course = field(init=False)
    _turned: Turned | None = None
    _lacks: list[str] = field(default_factory=list)
    """Parcels that the device has not got, and was not sent yet."""

    def __post_init__(self) -> None:
        self.course = Course(run=self.run, client=self.client)

    def begin(self) -> Step:
        """The first message."""
        self._lacks = [note.sha256 for note in self.parcels]
        return self.course.sending(self._with_order())

    def replied(self, envelope: Envelope) -> Step:
        """What a reply leads to.

        Raises:
            MessageError: it is damaged, answers nothing that was asked, or the device refuses.
        """
        reply = self.course.replied(envelope, self.most_head_bytes)
        if isinstance(reply, Stranger):
            return self.course.forgotten()
        if isinstance(reply, Missing):
            return self._missed(reply.parcels)
        if isinstance(reply, Turned):
            self._turned = reply
        if self._turned is None:
            return Step(result=reply)
        if not isinstance(reply, Turned | Parcels):
            raise MessageError(f"a device answered {reply.kind!r} where that answers nothing")
        return self._collected(self._turned, envelope.parcels)

    def _missed(self, parcels: Sequence[str]) -> Step:
        if self._turned is not None:
            raise MessageError(f"the device of client {self.client} has lost its letters")
        if parcels:
            self.course.losing_parcels()
            self._lacks = sorted({note.sha256 for note in self.parcels} & set(parcels))
            if not self._lacks:
                raise MessageError(
                    f"the device of client {self.client} wants parcels of another round"
                )
        size = sum(note.bytes for note in self.parcels if note.sha256 in self._lacks)
        if size <= self.most_bytes or len(self._lacks) == 1:
            return self.course.sending(self._with_order())
        # One at a time: all letters to all peers would fill this memory.
        name = self._lacks.pop()
        return self.course.sending(sealed(Store(run=self.run), {name: self.read(name)}))

    def _with_order(self) -> Envelope:
        """The order, with as many of the parcels that the device lacks as a message may hold."""
        sizes, room = {note.sha256: note.bytes for note in self.parcels}, self.most_bytes
        found: list[str] = []
        while self._lacks and (not found or sizes[self._lacks[0]] <= room):
            room -= sizes[self._lacks[0]]
            found.append(self._lacks.pop(0))
        return sealed(self.order, {name: self.read(name) for name in found})

    def _collected(self, turned: Turned, parcels: Mapping[str, bytes]) -> Step:
        """Keep what came of letters, and ask for the rest of them."""
        letters = [letter_of(addressed.letter) for addressed in turned.letters]
        notes = {note.sha256: note for letter in letters for note in letter.parcels}
        if (size := sum(note.bytes for note in notes.values())) > self.largest:
            raise MessageError(
                f"the device of client {self.client} wants to send {size} bytes; its letters have "
                f"{self.largest} at most"
            )
        for name, data in parcels.items():
            if name in notes:
                check_parcel(data, notes[name])
                self.keep(notes[name], data)
        missing = [name for name in notes if not self.kept(name)]
        if not missing:
            return Step(result=turned)
        return self.course.fetching(missing)
