"""A model in strips: its entries in their order, a bounded number at a time.

What would be tables over all entries of a large model is made for one strip, and let go again.

    strip    rows of one parameter, or of several that follow each other
    places   where a sub-model's tensors lie; of a strip they are what a view finds in its rows
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import EllipsisType
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tesserafl.core.layout import Index, Shape
from tesserafl.core.params import Params
from tesserafl.core.submodel import View
from tesserafl.core.windows import shared

Places = Mapping[str, list[tuple[str, View]]]
"""Parameter of the model -> small tensors of which entries lie in it, and where."""


def places_of(views: Mapping[str, View]) -> Places:
    """The places of small tensors by the views that they have of the model."""
    places: dict[str, list[tuple[str, View]]] = {}
    for small, view in views.items():
        places.setdefault(view.name, []).append((small, view))
    return places


class Piece(NamedTuple):
    """Rows of one parameter."""

    name: str
    """The parameter."""
    rows: slice
    """Of its first dimension; one without dimensions has the row 0."""
    shape: Shape
    """Of these rows."""
    first: int
    """Their first entry in the strip."""

    @property
    def end(self) -> int:
        """The entry after their last."""
        return self.first + math.prod(self.shape)


@dataclass(frozen=True, kw_only=True)
class Strip:
    """Entries of a model that follow each other."""

    first: int
    """The first of them in the model."""
    pieces: tuple[Piece, ...]

    @property
    def size(self) -> int:
        """How many there are."""
        return self.pieces[-1].end

    def mask(self, places: Places) -> Tensor:
        """Which of the entries lie at these places: bool [size]."""
        found = torch.zeros(self.size, dtype=torch.uint8)
        for _, view, _, rows in self._found(places, found):
            view.add(rows, 1)
        return found.bool()

    def spread(self, places: Places, tensors: Params, dtype: torch.dtype) -> Tensor:
        """What small tensors hold of the strip, 0 elsewhere: [size]."""
        found = torch.zeros(self.size, dtype=dtype)
        for small, view, part, rows in self._found(places, found):
            view.add(rows, tensors[small][part].to(dtype))
        return found

    def gather(self, places: Places, values: Tensor, tensors: Params) -> None:
        """Set what small tensors hold of the strip, from its values [size]."""
        for small, view, part, rows in self._found(places, values):
            tensors[small][part] = view.read(rows)

    def of(self, params: Params) -> Tensor:
        """The strip's entries of all parameters of the model: [size]."""
        parts = [
            (params[piece.name][piece.rows] if piece.shape else params[piece.name]).reshape(-1)
            for piece in self.pieces
        ]
        return torch.cat(parts)

    def _found(
        self, places: Places, flat: Tensor
    ) -> Iterator[tuple[str, View, Index | EllipsisType, Tensor]]:
        """Small tensor, its view of a piece, its own rows there, and the piece within `flat`."""
        for piece in self.pieces:
            rows = flat[piece.first : piece.end].view(piece.shape)
            for small, view in places.get(piece.name, ()):
                if not piece.shape:
                    yield small, view, ..., rows
                    continue
                there, part = shared(piece.rows, view.index[0])
                local = View(piece.name, (there, *view.index[1:]))
                if 0 not in local.shape:
                    yield small, local, part, rows


def strips_of(shapes: Mapping[str, Shape], most: int) -> tuple[Strip, ...]:
    """A model's strips, of so many entries or, where a row has more, of one row."""
    strips: list[Strip] = []
    pieces: list[Piece] = []
    first = size = 0
    for name, shape in shapes.items():
        rows, length = (shape[0] if shape else 1), math.prod(shape[1:])
        low = 0
        while low < rows:
            room = (most - size) // max(1, length)
            if room < 1 and pieces:
                strips.append(Strip(first=first, pieces=tuple(pieces)))
                pieces, first, size = [], first + size, 0
                continue
            high = min(rows, low + max(1, room))
            part = (high - low, *shape[1:]) if shape else ()
            pieces.append(Piece(name, slice(low, high), part, size))
            size += (high - low) * length
            low = high
    if pieces:
        strips.append(Strip(first=first, pieces=tuple(pieces)))
    return tuple(strips)


def packed(masks: Iterable[Tensor]) -> npt.NDArray[np.uint8]:
    """Masks one after another, 8 entries in a byte; the last byte ends with zeros."""
    rest, found = np.zeros(0, dtype=bool), [np.zeros(0, dtype=np.uint8)]
    for mask in masks:
        bits = np.concatenate([rest, mask.numpy()])
        whole = len(bits) // 8 * 8
        found.append(np.packbits(bits[:whole]))
        rest = bits[whole:]
    return np.concatenate([*found, np.packbits(rest)])
