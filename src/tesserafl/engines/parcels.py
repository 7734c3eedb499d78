"""A message in parcels: pieces of bounded size that travel, get lost and are sent again alone.

The letter is JSON: the message's own header, what tensors it has, and the digest of every parcel.
A parcel is one safetensors buffer of whole tensors, or of a piece of one that is larger than a
parcel. Equal parcels have equal digests, so what the other side has need not travel again.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors.torch import save
from torch import Tensor

from tesserafl.core.errors import MessageError
from tesserafl.core.wire import Parts

MOST_BYTES = 32 << 20
"""Of the tensors in one parcel. A transport that copies a message six times then takes 200 MB."""

_MOST_LETTER_BYTES = 1 << 38
"""Of all tensors that a letter may claim."""

DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
    )
}
"""Types of tensors that a letter may name."""

_Natural = Annotated[int, Field(ge=0, lt=1 << 48)]
_Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Entry(_Strict):
    """What a letter says of one tensor."""

    group: str
    name: str
    dtype: str
    shape: Annotated[list[_Natural], Field(max_length=64)]
    pieces: Annotated[int, Field(ge=1, lt=1 << 24)]
    """1: the tensor lies whole in a parcel; more: its flat entries are spread over so many."""


class ParcelNote(_Strict):
    """What a letter says of one parcel."""

    sha256: _Digest
    bytes: _Natural


class Letter(_Strict):
    """What a message consists of; its parcels come with it, before it or after it."""

    header: dict[str, Any]
    groups: list[str]
    """All of the message's groups, also the empty ones."""
    entries: list[Entry]
    parcels: list[ParcelNote]

    @property
    def num_bytes(self) -> int:
        """Of all parcels."""
        return sum(note.bytes for note in self.parcels)

    @property
    def digest(self) -> str:
        """SHA-256 of all that the letter says, so of all that its parcels hold."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()


def letter_of(value: object) -> Letter:
    """A letter from its JSON values.

    Raises:
        MessageError: they are not those of a letter, or claim more than a letter may hold.
    """
    try:
        letter = Letter.model_validate(value)
    except (ValidationError, RecursionError) as error:
        raise MessageError(f"a letter is wrong: {error}") from error
    if len(set(letter.groups)) < len(letter.groups):
        raise MessageError("a letter names a group twice")
    if len({(e.group, e.name) for e in letter.entries}) < len(letter.entries):
        raise MessageError("a letter names a tensor twice")
    claimed = 0
    for entry in letter.entries:
        if entry.dtype not in DTYPES:
            raise MessageError(
                f"a letter has a tensor of type {entry.dtype[:40]!r}; allowed: {', '.join(DTYPES)}"
            )
        if entry.group not in letter.groups:
            raise MessageError(f"a letter has a tensor of no group: {entry.group[:40]!r}")
        claimed += math.prod(entry.shape) * DTYPES[entry.dtype].itemsize
    # Before a byte is allocated: a tensor of a terabyte must be paid for by who claims it.
    if claimed > min(letter.num_bytes, _MOST_LETTER_BYTES):
        raise MessageError(
            f"a letter claims {claimed} bytes of tensors in parcels of {letter.num_bytes}; at most "
            f"{_MOST_LETTER_BYTES} may be sent"
        )
    return letter


def in_messages(notes: Sequence[ParcelNote], most_bytes: int) -> list[list[int]]:
    """Numbers of the parcels that go together, as many as one message may hold, at least one."""
    groups: list[list[int]] = []
    room = 0
    for number, note in enumerate(notes):
        if not groups or note.bytes > room:
            groups.append([])
            room = most_bytes
        groups[-1].append(number)
        room -= note.bytes
    return groups


@dataclass(frozen=True, kw_only=True)
class Outgoing:
    """A message on its way out; its parcels are made one at a time, when they are sent."""

    parts: Parts
    most_bytes: int = MOST_BYTES

    @cached_property
    def letter(self) -> Letter:
        """What the parcels hold; makes each once, for its digest."""
        header, groups = self.parts
        parcels = map(self.parcel, range(len(self._plan)))  # one at a time in memory
        return Letter(
            header=header,
            groups=list(groups),
            entries=self._entries,
            parcels=[ParcelNote(sha256=sha256(data), bytes=len(data)) for data in parcels],
        )

    def parcel(self, number: int) -> bytes:
        """The bytes of one parcel."""
        return save({key: self._piece(key, *where) for key, where in self._plan[number].items()})

    @cached_property
    def _tensors(self) -> list[tuple[str, str, Tensor]]:
        return [
            (group, name, tensor.detach())
            for group, params in self.parts[1].items()
            for name, tensor in params.items()
        ]

    @cached_property
    def _entries(self) -> list[Entry]:
        return [
            Entry(
                group=group,
                name=name,
                dtype=str(tensor.dtype).removeprefix("torch."),
                shape=list(tensor.shape),
                pieces=self._pieces(tensor),
            )
            for group, name, tensor in self._tensors
        ]

    def _pieces(self, tensor: Tensor) -> int:
        most = max(1, self.most_bytes // tensor.element_size())
        return max(1, math.ceil(tensor.numel() / most))

    @cached_property
    def _plan(self) -> list[dict[str, tuple[int, int, int]]]:
        """For each parcel: key -> number of the tensor, and which of its flat entries."""
        plan: list[dict[str, tuple[int, int, int]]] = []
        room = 0
        for number, (_, _, tensor) in enumerate(self._tensors):
            pieces = self._pieces(tensor)
            length = math.ceil(tensor.numel() / pieces)
            for piece in range(pieces):
                begin, end = piece * length, min((piece + 1) * length, tensor.numel())
                size = (end - begin) * tensor.element_size()
                if not plan or size > room:
                    plan.append({})
                    room = self.most_bytes
                plan[-1][piece_key(number, piece)] = (number, begin, end)
                room -= size
        return plan

    def _piece(self, key: str, number: int, begin: int, end: int) -> Tensor:
        tensor = self._tensors[number][2]
        if end - begin == tensor.numel():
            # A copy, since two names for one storage are refused.
            return tensor.contiguous().clone()
        return tensor.reshape(-1)[begin:end].clone()


def check_parcel(data: bytes, note: ParcelNote) -> None:
    """Raise MessageError unless a parcel is the one of the note."""
    if len(data) != note.bytes or sha256(data) != note.sha256:
        raise MessageError(
            f"a parcel of {len(data)} bytes is not the one of {note.bytes} bytes whose digest is "
            f"{note.sha256}; it was damaged on its way: send it again"
        )


def sha256(data: bytes) -> str:
    """The digest of a parcel."""
    return hashlib.sha256(data).hexdigest()


def piece_key(number: int, piece: int) -> str:
    """The name of a piece in its parcel: of the letter's tensor of that number."""
    return f"{number}.{piece}"
