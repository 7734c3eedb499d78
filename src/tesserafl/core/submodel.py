"""A sub-model is a dictionary of views: small parameter -> (large parameter, index per dimension).

    large   h.3.mlp.weight [3072, 768]          small   h.1.mlp.weight [768, 192]
            rows 768..1535, columns 0..191  --cut-->            fresh tensor
                                            <-merge-            weighted mean of deltas

Width windows, blocks, depth prefixes and rows of a class are all this one object, so `cut`, `merge`
and `coverage.py` are written once, for every method and every model.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from tesserafl.core import kernels
from tesserafl.core.errors import ModelError
from tesserafl.core.exactsum import ExactSum
from tesserafl.core.layout import Index as Index
from tesserafl.core.layout import Layout, Shape, is_whole, layout_of, runs_of
from tesserafl.core.params import Params

Units = Sequence[int] | range | slice | Tensor


def as_index(entries: Units) -> Index:
    """A slice where the entries are one ascending run (a view, no gather), else a tensor."""
    if isinstance(entries, slice):
        entries = range(entries.start or 0, entries.stop, entries.step or 1)
    tensor = torch.as_tensor(
        list(entries) if isinstance(entries, range) else entries, dtype=torch.int64
    )
    if tensor.numel() == 0:
        raise ModelError("a sub-model keeps at least one unit of every axis; none were given")
    start, stop = int(tensor[0]), int(tensor[-1]) + 1
    if stop - start == tensor.numel() and bool((tensor.diff() == 1).all()):
        return slice(start, stop)
    return tensor


def index_length(index: Index) -> int:
    """How many entries the index selects."""
    return index.stop - index.start if isinstance(index, slice) else int(index.numel())


def index_tensor(index: Index) -> Tensor:
    """The entries as a 1-d int64 tensor."""
    return torch.arange(index.start, index.stop) if isinstance(index, slice) else index


def slices(index: Index) -> list[tuple[slice, slice]]:
    """The index's ascending runs: their entries, and their places within the index."""
    if isinstance(index, slice):
        return [(index, slice(0, index.stop - index.start))]
    starts, lengths = runs_of(index)
    ends = lengths.cumsum()
    return [
        (slice(start, start + length), slice(end - length, end))
        for start, length, end in zip(starts.tolist(), lengths.tolist(), ends.tolist(), strict=True)
    ]


def _within(index: Index, size: int) -> bool:
    if isinstance(index, slice):
        return bool(0 <= index.start <= index.stop <= size)
    return not index.numel() or (int(index.min()) >= 0 and int(index.max()) < size)


_FEW = 16
"""Blocks of slices that a view is taken apart into rather than gathered."""


@dataclass(frozen=True, eq=False)
class View:
    """One small parameter as a place in a large one."""

    name: str
    """The large parameter."""
    index: tuple[Index, ...]
    """One index per dimension."""

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """Shape of the small parameter."""
        return tuple([index_length(index) for index in self.index])

    @cached_property
    def key(self) -> tuple[object, ...]:
        """Equal for views of the same entries in the same order."""
        parts: list[object] = [self.name]
        for index in self.index:
            if isinstance(index, slice):
                parts.append((index.start, index.stop))
            else:
                parts.append(index.numpy().tobytes())
        return tuple(parts)

    def fits(self, shape: Shape) -> bool:
        """Whether every entry lies within a large parameter of this shape."""
        fits = self._fits.get(shape)
        if fits is None:
            fits = self._fits[shape] = len(shape) == len(self.index) and all(
                map(_within, self.index, shape)
            )
        return fits

    def is_all(self, shape: Shape) -> bool:
        """Whether these are all entries of a large parameter of this shape, in their order."""
        return len(shape) == len(self.index) and all(map(is_whole, self.index, shape))

    def layout(self, shape: Shape) -> Layout:
        """Where the entries lie in a contiguous large parameter of this shape, which they fit."""
        layout = self._layouts.get(shape)
        if layout is None:
            layout = self._layouts[shape] = layout_of(self.index, shape)
        return layout

    def read(self, large: Tensor, compiled: bool = False) -> Tensor:
        """A fresh contiguous tensor with the viewed entries of `large`."""
        gathers = self._gathers
        if not gathers:
            # A slice shares storage with the large tensor: a client must own its bytes.
            part = self._narrow(large)
            if compiled:
                return kernels.empty(part.shape, part).copy_(part)
            return part.clone(memory_format=torch.contiguous_format)
        if compiled and kernels.takes(large):
            return kernels.read(large, self.layout(large.shape), self.shape)
        part = self._narrow(large)
        for dim, index in gathers:
            part = part.index_select(dim, index.to(large.device))
        return part.contiguous()

    def add(self, large: Tensor, small: Tensor | int) -> None:
        """Add `small` to the viewed entries of `large`, in place."""
        if not self._gathers:
            self._narrow(large).add_(small)
        elif self.blocks is not None:
            for there, here in self.blocks:
                large[there].add_(small[here] if isinstance(small, Tensor) else small)
        elif len(self._gathers) == 1 and isinstance(small, Tensor):
            dim, index = self._gathers[0]
            self._narrow(large).index_add_(dim, index.to(large.device), small)
        else:
            part = self._narrow(large)
            mesh = [torch.arange(size, device=large.device) for size in part.shape]
            for dim, index in self._gathers:
                mesh[dim] = index.to(large.device)
            part[torch.meshgrid(*mesh, indexing="ij")] += small

    def rows(self, low: int, high: int) -> View:
        """The part of this view with entries `low` to `high` (excluded) of dimension 0."""
        first = self.index[0]
        if isinstance(first, slice):
            first = slice(first.start + low, min(first.start + high, first.stop))
        else:
            first = first[low:high]
        return View(self.name, (first, *self.index[1:]))

    def _narrow(self, large: Tensor) -> Tensor:
        shape = large.shape
        narrowings = self._narrowings.get(shape)
        if narrowings is None:
            narrowings = self._narrowings[shape] = [
                (dim, index.start, index.stop - index.start)
                for dim, index in enumerate(self.index)
                if isinstance(index, slice) and not is_whole(index, shape[dim])
            ]
        for dim, start, length in narrowings:
            large = large.narrow(dim, start, length)
        return large

    @cached_property
    def _narrowings(self) -> dict[Shape, list[tuple[int, int, int]]]:
        return {}

    @cached_property
    def _gathers(self) -> list[tuple[int, Tensor]]:
        return [(d, index) for d, index in enumerate(self.index) if not isinstance(index, slice)]

    @cached_property
    def blocks(self) -> list[tuple[tuple[slice, ...], tuple[slice, ...]]] | None:
        """The view as few blocks of slices, in the large and in the small tensor, if it is that.

        A window that wraps in two dimensions is four blocks.
        """
        dims, blocks = [], 1
        for index in self.index:
            dims.append(slices(index))
            blocks *= len(dims[-1])
            if blocks > _FEW:
                return None
        pairs = itertools.product(*dims)
        return [(tuple(p[0] for p in pair), tuple(p[1] for p in pair)) for pair in pairs]

    @cached_property
    def _fits(self) -> dict[Shape, bool]:
        return {}

    @cached_property
    def _layouts(self) -> dict[Shape, Layout]:
        return {}


@dataclass(frozen=True, eq=False)
class SubModel:
    """What one client trains: the sizes to build it from and where its parameters lie."""

    sizes: Mapping[str, int]
    """Sizes from which `Model.build` makes the small module."""
    views: Mapping[str, View]
    """Small parameter -> its place in the large model."""

    @cached_property
    def shape(self) -> tuple[tuple[str, int], ...]:
        """Equal for sub-models that the same module serves."""
        return tuple(sorted(self.sizes.items()))

    @property
    def num_entries(self) -> int:
        """Parameters that the client holds."""
        return sum(_prod(view.shape) for view in self.views.values())

    def restrict(self, rows: Mapping[str, Mapping[int, Index]]) -> SubModel:
        """The same sub-model with only some entries of some small dimensions reported.

        `rows` maps small parameter -> {dimension: entries within the small parameter}.
        """
        views = dict(self.views)
        for name, dims in rows.items():
            index = list(views[name].index)
            for dim, kept in dims.items():
                index[dim] = as_index(index_tensor(index[dim])[index_tensor(kept)])
            views[name] = View(views[name].name, tuple(index))
        return SubModel(self.sizes, views)


def cut(params: Params, submodel: SubModel) -> Params:
    """The client's parameters, each a fresh tensor."""
    compiled = kernels.compiled_for(params)
    return {name: view.read(params[view.name], compiled) for name, view in submodel.views.items()}


def merge(params: Params, total: ExactSum) -> Params:
    """`params` plus the weighted mean delta where somebody reported; the same tensors elsewhere.

    Selective averaging of HeteroFL (Diao et al., ICLR 2021, Alg. 1), on deltas. The mean is taken
    in double precision from integer sums, so it does not depend on the order of the updates.
    """
    whole = total.whole(params)
    return {**params, **dict(total.finished(params))} if whole is None else whole


def whole(sizes: Mapping[str, int], shapes: Mapping[str, tuple[int, ...]]) -> SubModel:
    """The large model as a sub-model of itself."""
    return SubModel(
        dict(sizes),
        {name: View(name, tuple(slice(0, n) for n in shape)) for name, shape in shapes.items()},
    )


def _prod(shape: tuple[int, ...]) -> int:
    product = 1
    for size in shape:
        product *= size
    return product
