"""Where a view's entries lie in memory: rows, planes and runs, so that a loop can walk them.

    large [6, 5, 4], view (rows 4, 5, 0; all 5; columns 3, 0)   in memory, entries counted from 0

      rows    80, 100, 0        one offset per kept entry of dimension 0
      planes  0, 4, 8, 12, 16   one per kept entry of the dimensions between
      runs    (3, 1), (0, 1)    start and length within the innermost dimension

An entry of the small tensor [rows, planes, runs] lies at row + plane + start + its place in a run.
Trailing dimensions that are kept whole belong to the innermost one: a cut convolution [out, in, 3,
3] has runs of 9 times as many entries. A window that wraps is two runs, not a gather.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from torch import Tensor

Index = slice | Tensor
"""Entries along one dimension: a slice with plain start and stop, or a 1-d int64 tensor."""

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
Shape = tuple[int, ...]

_TABLE = 1 << 18
"""Entries of a table of weights: 2 MiB of int64."""


class Layout(NamedTuple):
    """A view of one contiguous large tensor; all counts are entries, all arrays int64."""

    rows: Ints
    """Offsets along dimension 0; a 1-d tensor has the one row 0."""
    planes: Ints
    """Offsets along the dimensions between, in raster order; 0 alone where there are none."""
    starts: Ints
    """Where each run begins within the innermost dimension."""
    lengths: Ints
    """How long each run is."""

    @property
    def entries(self) -> int:
        """How many entries the view has."""
        return len(self.rows) * len(self.planes) * int(self.lengths.sum())


def layout_of(index: Sequence[Index], shape: Shape) -> Layout:
    """The layout of the view `index` of a contiguous tensor of this shape, which it must fit."""
    strides = strides_of(shape)
    inner = inner_dim([index], shape)
    starts, lengths = runs_of(index[inner], strides[inner]) if shape else (_ZERO, _ONE)
    if inner <= 0:
        return Layout(_ZERO, _ZERO, starts, lengths)
    planes = _ZERO
    for dim in range(1, inner):
        offsets = entries(index[dim]) * strides[dim]
        planes = (planes[:, None] + offsets).reshape(-1)
    return Layout(entries(index[0]) * strides[0], planes, starts, lengths)


class Weighted(NamedTuple):
    """Some rows of a large tensor with the weight of each entry: constant on cells, by class.

    Two entries of a dimension are of one class if the same views hold them, so the weight of an
    entry depends on the classes of its places alone: `table[row, plane, run]`.
    """

    first: int
    """First entry of the rows, in the large tensor."""
    rows: Ints
    """Class of each row."""
    planes: Ints
    """Class of each plane."""
    starts: Ints
    """Where each run of one class begins within the innermost dimension."""
    lengths: Ints
    """How long each run is."""
    runs: Ints
    """Class of each run."""
    table: Ints
    """Weights, [classes of rows, classes of planes, classes of runs]."""

    @property
    def row_length(self) -> int:
        """Entries of a row."""
        return len(self.planes) * int(self.lengths.sum())


def weights_of(views: Sequence[tuple[Sequence[Index], int]], shape: Shape) -> Iterator[Weighted]:
    """The weights of all entries of a contiguous tensor, from views of it with a weight each.

    In one block, or in several of fewer rows where so many classes meet that one table would be
    large.
    """
    if all(is_whole(i, size) for index, _ in views for i, size in zip(index, shape, strict=True)):
        rows = np.zeros(shape[0] if shape else 1, np.int64)
        length = np.array([math.prod(shape[1:])])
        table = np.array([[[sum(weight for _, weight in views)]]])
        yield Weighted(0, rows, _ZERO, _ZERO, length, _ZERO, table)
        return
    inner = inner_dim([index for index, _ in views], shape)
    unit = math.prod(shape[inner + 1 :])
    anywhere = np.ones((len(views), 1), bool)  # a dimension that is not there cuts nothing
    row_of, row_held = _ZERO, anywhere
    plane_of, plane_held = _ZERO, anywhere
    run_of, run_held = _ZERO, anywhere
    for dim in range(inner + 1):
        of, held = _classes([index[dim] for index, _ in views], shape[dim])
        if dim == inner:
            run_of, run_held = of, held
        elif dim == 0:
            row_of, row_held = of, held
        else:
            plane_of = (plane_of[:, None] * held.shape[1] + of).reshape(-1)
            plane_held = (plane_held[:, :, None] & held[:, None]).reshape(len(views), -1)
    begins = np.flatnonzero(np.diff(run_of, prepend=-1))
    lengths = np.diff(begins, append=len(run_of))
    runs = (begins * unit, lengths * unit, run_of[begins])
    row_length, in_row = len(plane_of) * len(run_of) * unit, plane_held.shape[1] * run_held.shape[1]

    def block(first: int, rows: Ints, held: Bools) -> Weighted:
        table = np.zeros((held.shape[1], plane_held.shape[1], run_held.shape[1]), np.int64)
        for (_, weight), *holds in zip(views, held, plane_held, run_held, strict=True):
            table[np.ix_(*holds)] += weight
        return Weighted(first * row_length, rows, plane_of, *runs, table)

    if row_held.shape[1] * in_row <= _TABLE:
        yield block(0, row_of, row_held)
        return
    step = max(1, _TABLE // in_row)
    for first in range(0, len(row_of), step):
        held = row_held[:, row_of[first : first + step]]
        yield block(first, np.arange(held.shape[1]), held)


def entries(index: Index) -> Ints:
    """The entries of an index as an int64 array."""
    if isinstance(index, slice):
        return np.arange(index.start, index.stop, dtype=np.int64)
    return np.asarray(index.numpy(force=True), dtype=np.int64)


def strides_of(shape: Shape) -> list[int]:
    """Entries from one place of a dimension to the next, in a contiguous tensor."""
    strides = [1] * len(shape)
    for dim in range(len(shape) - 1, 0, -1):
        strides[dim - 1] = strides[dim] * shape[dim]
    return strides


def inner_dim(views: Sequence[Sequence[Index]], shape: Shape) -> int:
    """The first dimension that runs lie in: all after it are whole in all views.

    Never dimension 0 of several: rows are what work is divided by. -1 for a tensor of no dimension.
    """
    inner = len(shape) - 1
    while inner > 1 and all(is_whole(index[inner], shape[inner]) for index in views):
        inner -= 1
    return inner


def is_whole(index: Index, size: int) -> bool:
    """Whether the index keeps all entries, in their order, by being the slice of all."""
    return isinstance(index, slice) and index.start == 0 and index.stop == size


def runs_of(index: Index, unit: int = 1) -> tuple[Ints, Ints]:
    """Starts and lengths of the ascending runs of an index, each of its entries `unit` long."""
    if isinstance(index, slice):
        start, stop = index.start, index.stop
        return np.array([start * unit]), np.array([(stop - start) * unit])
    places = entries(index)
    begins = np.flatnonzero(np.diff(places, prepend=-2) != 1)
    return places[begins] * unit, np.diff(begins, append=len(places)) * unit


def _classes(indices: Sequence[Index], size: int) -> tuple[Ints, Bools]:
    """Class of each of `size` entries, and which indices hold a class, [indices, classes]."""
    if all(is_whole(index, size) for index in indices):
        return np.zeros(size, np.int64), np.ones((len(indices), 1), bool)
    held = np.zeros((len(indices), size), bool)
    for row, index in zip(held, indices, strict=True):
        row[index if isinstance(index, slice) else entries(index)] = True
    packed = np.packbits(held, axis=0).T
    width = 8 if packed.shape[1] <= 8 else packed.shape[1]  # integers sort faster than bytes
    padded = np.zeros((size, width), np.uint8)
    padded[:, : packed.shape[1]] = packed
    words = padded.view(np.uint64 if width == 8 else f"V{width}").reshape(-1)
    _, first, of = np.unique(words, return_index=True, return_inverse=True)
    return of.astype(np.int64, copy=False), held[:, first]


_ZERO: Ints = np.zeros(1, np.int64)
_ONE: Ints = np.ones(1, np.int64)
