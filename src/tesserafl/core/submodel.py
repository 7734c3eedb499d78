"""A sub-model is a dictionary of views: small parameter -> (large parameter, index per dimension).

    large   h.3.mlp.weight [3072, 768]          small   h.1.mlp.weight [768, 192]
            rows 768..1535, columns 0..191  --cut-->            fresh tensor
                                            <-merge-            weighted mean of deltas

Width windows, blocks, depth prefixes and rows of a class are all this one object, so `cut`, `merge`
and `Coverage` are written once, for every method and every model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from tesserafl.core.errors import ModelError
from tesserafl.core.exactsum import ExactSum
from tesserafl.core.params import Params

Index = slice | Tensor
"""Entries along one dimension: a slice with plain start and stop, or a 1-d int64 tensor."""

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


@dataclass(frozen=True, eq=False)
class View:
    """One small parameter as a place in a large one."""

    name: str
    """The large parameter."""
    index: tuple[Index, ...]
    """One index per dimension."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the small parameter."""
        return tuple(index_length(index) for index in self.index)

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

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether every entry lies within a large parameter of this shape."""
        return len(shape) == len(self.index) and all(
            0 <= index.start <= index.stop <= size
            if isinstance(index, slice)
            else bool((index >= 0).all() and (index < size).all())
            for index, size in zip(self.index, shape, strict=True)
        )

    def read(self, large: Tensor) -> Tensor:
        """A fresh contiguous tensor with the viewed entries of `large`."""
        part = self._narrow(large)
        for dim, index in self._gathers(large.device):
            part = part.index_select(dim, index)
        # A slice alone still shares storage with the large tensor: a client must own its bytes.
        return part.clone(memory_format=torch.contiguous_format)

    def add(self, large: Tensor, small: Tensor | int) -> None:
        """Add `small` to the viewed entries of `large`, in place."""
        part = self._narrow(large)
        gathers = self._gathers(large.device)
        if not gathers:
            part.add_(small)
        elif len(gathers) == 1 and isinstance(small, Tensor):
            dim, index = gathers[0]
            part.index_add_(dim, index, small)
        else:
            mesh = [torch.arange(size, device=large.device) for size in part.shape]
            for dim, index in gathers:
                mesh[dim] = index
            part[torch.meshgrid(*mesh, indexing="ij")] += small

    def _narrow(self, large: Tensor) -> Tensor:
        return large[tuple(i if isinstance(i, slice) else slice(None) for i in self.index)]

    def _gathers(self, device: torch.device) -> list[tuple[int, Tensor]]:
        return [(d, i.to(device)) for d, i in enumerate(self.index) if not isinstance(i, slice)]


@dataclass(frozen=True, eq=False)
class SubModel:
    """What one client trains: the sizes to build it from and where its parameters lie."""

    sizes: Mapping[str, int]
    """Sizes from which `Model.build` makes the small module."""
    views: Mapping[str, View]
    """Small parameter -> its place in the large model."""

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
    return {name: view.read(params[view.name]) for name, view in submodel.views.items()}


def merge(params: Params, total: ExactSum) -> Params:
    """`params` plus the weighted mean delta where somebody reported; the same tensors elsewhere.

    Selective averaging of HeteroFL (Diao et al., ICLR 2021, Alg. 1), on deltas. The mean is taken
    in double precision from integer sums, so it does not depend on the order of the updates.
    """
    merged = dict(params)
    for name, mean, _ in total.means(params):
        merged[name] = (params[name].double() + mean).to(params[name].dtype)
    return merged


class Coverage:
    """How many times each entry of the large model was trained, int32 per entry."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.counts: Params = {n: torch.zeros(s, dtype=torch.int32) for n, s in shapes.items()}

    def add(self, submodels: Iterable[SubModel]) -> None:
        """Count one training of every viewed entry; equal views are added in one go."""
        counted: dict[tuple[object, ...], tuple[View, int]] = {}
        for submodel in submodels:
            for view in submodel.views.values():
                counted[view.key] = (view, counted.get(view.key, (view, 0))[1] + 1)
        for view, times in counted.values():
            view.add(self.counts[view.name], times)

    @property
    def share(self) -> float:
        """Share of the model's entries that were trained at least once, 0 to 1."""
        trained = sum(int((count > 0).sum()) for count in self.counts.values())
        return trained / sum(count.numel() for count in self.counts.values())

    def zero_untrained(self, params: Params) -> Params:
        """`params` with every entry that nobody trained set to zero."""
        return {n: tensor * (self.counts[n] > 0).to(tensor) for n, tensor in params.items()}


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
