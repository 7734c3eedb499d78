"""A message from its letter and its parcels, whoever may have written them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from tesserafl.core.errors import MessageError
from tesserafl.core.params import Params
from tesserafl.core.stored import Place, Stored
from tesserafl.core.wire import Parts
from tesserafl.engines.parcels import DTYPES, Entry, Letter, ParcelNote, check_parcel, piece_key


@dataclass(frozen=True, kw_only=True)
class Later:
    """What of a message stays where its parcels lie, and is read when it is asked for."""

    groups: frozenset[str]
    read: Callable[[str, str], Tensor]
    """Digest of a parcel, key of a piece in it -> the piece."""


def read_letter(letter: Letter, fetch: Callable[[str], bytes], later: Later | None = None) -> Parts:
    """The message, from a letter that `letter_of` accepted.

    Args:
        letter: what the message consists of.
        fetch: gives a parcel by its digest; each is looked at once.
        later: groups that become `core.params.Stored`; None: all are read.

    Raises:
        MessageError: a parcel is not what the letter says.
    """
    whole: dict[int, Tensor] = {}
    found: dict[str, str] = {}
    for note in letter.parcels:
        pieces = _checked(fetch(note.sha256), note)
        while pieces:  # one parcel at a time, and of it only what was not placed yet
            key, tensor = pieces.popitem()
            if key in found:
                raise MessageError(f"piece {key} lies in two parcels of a letter")
            number, begin = _placed(letter, key, tensor)
            if later is None or letter.entries[number].group not in later.groups:
                _put(letter.entries[number], number, begin, tensor, whole)
            found[key] = note.sha256
            del tensor
    if len(found) != (expected := sum(entry.pieces for entry in letter.entries)):
        raise MessageError(
            f"the parcels of a letter hold {len(found)} pieces; expected are {expected}"
        )
    groups: dict[str, Params] = {group: {} for group in letter.groups}
    places: dict[str, dict[str, Place]] = {}
    for number, entry in enumerate(letter.entries):
        if number in whole:
            groups[entry.group][entry.name] = whole[number].reshape(entry.shape)
        elif later is not None:
            places.setdefault(entry.group, {})[entry.name] = _place(number, entry, found, later)
    if later is not None:
        groups |= {g: Stored(places.get(g, {})) for g in later.groups & groups.keys()}
    return letter.header, groups


def _checked(data: bytes, note: ParcelNote) -> dict[str, Tensor]:
    """The pieces in the parcel of a note."""
    check_parcel(data, note)
    try:
        return load(data)
    except (SafetensorError, ValueError, KeyError, TypeError, OverflowError) as error:
        raise MessageError(f"a parcel of {len(data)} bytes is no safetensors: {error}") from error


def _placed(letter: Letter, key: str, tensor: Tensor) -> tuple[int, int]:
    """Number of the tensor that a piece belongs to, and the first of its flat entries in it."""
    number, piece = _numbers(letter, key)
    entry = letter.entries[number]
    if str(tensor.dtype).removeprefix("torch.") != entry.dtype:
        raise MessageError(f"{entry.name!r} is {tensor.dtype}; its letter says {entry.dtype}")
    numel = math.prod(entry.shape)
    length = math.ceil(numel / entry.pieces)
    begin, end = piece * length, min((piece + 1) * length, numel)
    if tensor.numel() != end - begin:
        raise MessageError(
            f"piece {piece} of {entry.name!r} has {tensor.numel()} entries; expected are "
            f"{end - begin}"
        )
    return number, begin


def _put(entry: Entry, number: int, begin: int, tensor: Tensor, whole: dict[int, Tensor]) -> None:
    """Put a piece where it belongs."""
    if entry.pieces == 1:
        whole[number] = tensor
        return
    if number not in whole:
        whole[number] = torch.empty(math.prod(entry.shape), dtype=tensor.dtype)
    whole[number][begin : begin + tensor.numel()] = tensor.reshape(-1)


def _place(number: int, entry: Entry, found: Mapping[str, str], later: Later) -> Place:
    """Where a tensor lies whose pieces were found in these parcels."""
    keys = [piece_key(number, piece) for piece in range(entry.pieces)]
    return Place(
        shape=tuple(entry.shape),
        dtype=DTYPES[entry.dtype],
        pieces=[partial(later.read, found[key], key) for key in keys],
    )


def _numbers(letter: Letter, key: str) -> tuple[int, int]:
    first, _, second = key.partition(".")
    if not (first.isascii() and first.isdigit() and second.isascii() and second.isdigit()):
        raise MessageError(f"a parcel holds {key[:40]!r}, which is no piece of a tensor")
    number, piece = int(first[:9]), int(second[:9])
    if (
        piece_key(number, piece) != key
        or number >= len(letter.entries)
        or piece >= letter.entries[number].pieces
    ):
        raise MessageError(f"a parcel holds piece {key[:40]!r}, of which its letter knows nothing")
    return number, piece
