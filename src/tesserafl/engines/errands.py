"""One device's task on its way: what to send next, until its answer is whole.

    small   Work with its parcels                  -> Answer with its parcels
    large   Work with the first -> Missing,
            Store..., Work with the last           -> Answer with the first, Fetch... -> Parcels
    ahead   Store..., Work with the last, Rest...  -> Missing..., Answer with the first, Parcels...

Flower's node looks for a message three seconds after it found none, so the third way is the fastest
for what is large. It sends what a device may have already, after a cut: who has not heard of the
device yet takes the second.

An errand sends nothing itself, and knows neither post nor clock.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

from pydantic import BaseModel

from tesserafl.core.answers import most_header_bytes
from tesserafl.core.errors import MessageError
from tesserafl.core.messages import Task
from tesserafl.core.wire import update_of
from tesserafl.engines.incoming import read_letter
from tesserafl.engines.orders import (
    Answer,
    Envelope,
    Judge,
    Judged,
    Missing,
    Parcels,
    Rest,
    Store,
    Stranger,
    Work,
    sealed,
)
from tesserafl.engines.parcels import Letter, Outgoing, check_parcel, in_messages, letter_of
from tesserafl.engines.seam import Done
from tesserafl.engines.steps import Course, Step, Told

_MOST_ORDERS = 10
"""Of one task to one device."""
_MOST_ANSWER_BYTES, _MOST_TENSOR_BYTES, _MOST_ENTRY_BYTES = 1 << 16, 1 << 10, 16
"""Of an answer: in all, for every tensor and for every entry; an entry has 8 bytes, or 4 with its
place, and the rest is for the heads of parcels."""
_MOST_WORDS_BYTES, _MOST_NOTE_BYTES = 1 << 17, 128
"""Of a reply's head: without a letter, and for every parcel that it names."""
_MOST_TOLD_BYTES = 16 << 20
"""Of the head of an answer to what is no task: it tells of many devices."""


class Ask(Protocol):
    """What a device is asked that is no task."""

    @property
    def most_bytes(self) -> int:
        """Of the parcels of an honest answer."""
        ...

    def order(self, run: str, letter: Letter, most_bytes: int) -> BaseModel:
        """The order; an Answer answers it."""
        ...


@dataclass(kw_only=True)
class Errand:
    """The way of one task, or of a global state that a client's own model is measured with."""

    run: str
    client: int
    task: Task | None
    """None: the client's own model is to be measured."""
    outgoing: Outgoing
    remembers: int | None
    """The round whose memory the client begins with."""
    keeps: int | None = None
    """A further round whose memory must stay."""
    ask: Ask | None = None
    """Something else than a task or a measurement."""
    ahead: int | None = None
    """Messages that the answer will take, as far as anybody can tell: everything is sent at once.
    None: first it is asked what the device has."""
    has: frozenset[str] = frozenset()
    """Parcels that the device should have: those of its last task."""
    course: Course = field(init=False)
    _orders: int = 0
    """How often the order was given again because nothing was said to be missing."""
    _lacks: Sequence[str] = ()
    """Parcels that the device said it lacks, while other messages were under way."""
    _last: Sequence[int] = ()
    """Parcels that go with the order, when the others have arrived."""
    _answer: Answer | None = None
    _letter: Letter | None = None
    """Of the answer."""
    _parcels: dict[str, bytes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.course = Course(run=self.run, client=self.client)

    def begin(self) -> Step:
        """The first messages."""
        notes = self.outgoing.letter.parcels
        numbers = [n for n, note in enumerate(notes) if note.sha256 not in self.has]
        groups = self._groups(numbers) or [[]]
        if self.ahead is None:
            return self.course.sending(self._work(groups[0]))
        stores = [sealed(Store(run=self.run), self._of_task(group)) for group in groups[:-1]]
        return self.course.sending(*stores, self._work(groups[-1]), *self._rests(self.ahead))

    def learnt(self, before: Mapping[str, Any]) -> Mapping[str, Any]:
        """`ahead` and `has` for the next one to the same device, by what was known `before`."""
        has = frozenset(note.sha256 for note in self.outgoing.letter.parcels)
        if self._letter is not None and self.task is not None:
            messages = len(in_messages(self._letter.parcels, self.outgoing.most_bytes))
            return {"ahead": messages, "has": has}
        return {**before, "has": before["has"] | has} if before else before

    def replied(self, envelope: Envelope) -> Step:
        """What a reply leads to.

        Raises:
            MessageError: it is damaged, answers nothing that was asked, or the device refuses.
        """
        reply = self.course.replied(envelope, self._most_head_bytes)
        if envelope.parcels and not isinstance(reply, Answer | Parcels):
            raise MessageError(f"a device sent parcels with its {reply.kind!r}")
        if isinstance(reply, Stranger):
            # It begins anew, and nothing is known of what it has.
            self.has, self.ahead, self._lacks = frozenset(), None, ()
            self._answer = self._letter = None
            self._parcels = {}
            return self.course.forgotten()
        if isinstance(reply, Missing):
            return self._missed(reply.parcels)
        if isinstance(reply, Judged) and self.task is None and self.ask is None:
            return Step(result=reply)
        if isinstance(reply, Answer) and (self.task or self.ask) is not None:
            self._answer, self._letter = reply, self._bounded(letter_of(reply.letter))
            names = {note.sha256 for note in self._letter.parcels}  # nothing of a letter before
            self._parcels = {name: data for name, data in self._parcels.items() if name in names}
        elif isinstance(reply, Parcels) and self._letter is None and self.ahead is not None:
            return self._missed(())  # of an earlier answer
        elif not (isinstance(reply, Parcels) and self._letter is not None):
            raise MessageError(f"a device answered {reply.kind!r} where that answers nothing")
        return self._collected(self._letter, envelope.parcels)

    @cached_property
    def _most_head_bytes(self) -> int:
        """Of any reply: names of parcels that it lacks, or the letter of an answer."""
        most = _MOST_WORDS_BYTES + _MOST_NOTE_BYTES * len(self.outgoing.letter.parcels)
        if self.ask is not None:
            return _MOST_TOLD_BYTES
        if self.task is not None:  # a letter has its header, and names every tensor once more
            pieces = self._most_answer_bytes // max(1, self.outgoing.most_bytes)
            most += 2 * most_header_bytes(self.task) + _MOST_NOTE_BYTES * pieces
        return most

    @cached_property
    def _most_answer_bytes(self) -> int:
        if self.ask is not None:
            return self.ask.most_bytes
        assert self.task is not None
        task, most = self.task, _MOST_ANSWER_BYTES
        shapes = [*(v.shape for v in task.submodel.views.values()), *task.wanted.extra.values()]
        return most + sum(_MOST_TENSOR_BYTES + _MOST_ENTRY_BYTES * math.prod(s) for s in shapes)

    def _bounded(self, letter: Letter) -> Letter:
        """The letter, if an answer to the task can be as large: its parcels are kept in memory."""
        if letter.num_bytes > self._most_answer_bytes:
            raise MessageError(
                f"the device of client {self.client} wants to send {letter.num_bytes} bytes; an "
                f"answer to its task has {self._most_answer_bytes} at most"
            )
        return letter

    def _missed(self, parcels: Sequence[str]) -> Step:
        if self._letter is not None:
            if parcels or self.ahead is None:
                raise MessageError(f"the device of client {self.client} has lost its answer")
            return self._collected(self._letter, {})
        self._lacks = parcels or self._lacks
        if self.course.waiting:
            return Step()
        parcels, self._lacks = self._lacks, ()
        if not parcels:
            self._orders += 1
            if self._orders > _MOST_ORDERS:
                raise MessageError(f"the device of client {self.client} does not do its task")
            return self.course.sending(self._work(self._last))
        self.course.losing_parcels()
        letter, wanted = self.outgoing.letter, set(parcels)
        numbers = [n for n, note in enumerate(letter.parcels) if note.sha256 in wanted]
        if not numbers:
            raise MessageError(f"the device of client {self.client} wants parcels of another task")
        self._last = self._groups(numbers[::-1])[0]
        stores = [
            sealed(Store(run=self.run), self._of_task([number]))
            for number in numbers
            if number not in self._last
        ]
        return self.course.sending(*(stores or [self._work(self._last)]))

    def _groups(self, numbers: Sequence[int]) -> list[list[int]]:
        """These parcels, as many together as one message may hold."""
        notes = [self.outgoing.letter.parcels[number] for number in numbers]
        groups = in_messages(notes, self.outgoing.most_bytes)
        return [[numbers[place] for place in group] for group in groups]

    def _rests(self, messages: int) -> list[Envelope]:
        """Orders for what an answer to the task has beyond its first message."""
        if self.task is None:
            return []
        most_bytes, round = self.outgoing.most_bytes, self.task.round
        return [
            sealed(Rest(run=self.run, round=round, number=number, most_bytes=most_bytes))
            for number in range(1, messages)
        ]

    def _collected(self, letter: Letter | None, parcels: Mapping[str, bytes]) -> Step:
        """Take what came of an answer, and ask for the rest of it."""
        assert letter is not None
        notes = {note.sha256: note for note in letter.parcels}
        if self.ahead is not None:  # what was asked for ahead may be of an answer before this one
            parcels = {name: data for name, data in parcels.items() if name in notes}
        if not parcels.keys() <= notes.keys():
            raise MessageError(f"the device of client {self.client} sent parcels of no answer")
        for name, data in parcels.items():
            check_parcel(data, notes[name])
            self._parcels[name] = data
        missing = [name for name in notes if name not in self._parcels]
        if not missing:
            return Step(result=self._done(letter))
        return self.course.fetching(missing)

    def _done(self, letter: Letter) -> Done | Told:
        assert self._answer is not None
        if self.ask is not None:
            parts = read_letter(letter, self._taken)
            return Told(client=self.client, parts=parts, seconds=self._answer.seconds)
        assert self.task is not None
        update, memory = update_of(*read_letter(letter, self._taken), self.task)
        if (update.client, update.round) != (self.client, self.task.round) or memory:
            raise MessageError(
                f"a device answered for client {update.client} in round {update.round} with "
                f"{len(memory)} memories; asked was client {self.client} in round "
                f"{self.task.round}, and memories stay on devices"
            )
        return Done(client=self.client, update=update, seconds=self._answer.seconds)

    def _taken(self, name: str) -> bytes:
        """A parcel of the answer, which is read once and then gone."""
        data = self._parcels.pop(name, None)
        if data is None:
            raise MessageError(f"an answer of client {self.client} names a parcel twice")
        return data

    def _work(self, inline: Iterable[int]) -> Envelope:
        letter, most_bytes = self.outgoing.letter, self.outgoing.most_bytes
        if self.ask is not None:
            return sealed(self.ask.order(self.run, letter, most_bytes), self._of_task(inline))
        values: dict[str, Any] = {"run": self.run, "client": self.client}
        values |= {"remembers": self.remembers, "letter": letter.model_dump()}
        if self.task is None:
            return sealed(Judge(**values), self._of_task(inline))
        order = Work(**values, most_bytes=most_bytes, keeps=self.keeps)
        return sealed(order, self._of_task(inline))

    def _of_task(self, numbers: Iterable[int]) -> dict[str, bytes]:
        letter = self.outgoing.letter
        return {letter.parcels[n].sha256: self.outgoing.parcel(n) for n in numbers}
