"""Which entries of a model were ever trained, and how often."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from tesserafl.core import kernels
from tesserafl.core.params import Params
from tesserafl.core.submodel import SubModel, View, cut

_FEW = 16
"""Distinct views of a parameter that are counted as such."""


class Coverage:
    """How many times each entry of the large model was trained.

    A parameter of which few distinct views were trained (FedAvg: one) is counted by view, another
    by entry, int32.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._shapes = dict(shapes)
        self._views: dict[str, dict[object, tuple[View, int]]] = {name: {} for name in shapes}
        self._entries: Params = {}
        self._trained: dict[str, int] = {}

    @property
    def counts(self) -> Params:
        """The counts of every entry, int32; made when asked for."""
        return {name: self._counts_of(name) for name in self._shapes}

    @counts.setter
    def counts(self, counts: Params) -> None:
        self._views, self._entries, self._trained = {name: {} for name in self._shapes}, {}, {}
        for name, count in counts.items():
            least, most = map(int, torch.aminmax(count)) if count.numel() else (0, 0)
            if least != most:
                self._entries[name] = count
            elif most:
                view = View(name, tuple(slice(0, size) for size in count.shape))
                self._views[name][view.key] = (view, most)

    def add(self, submodels: Iterable[SubModel]) -> None:
        """Count one training of every viewed entry; equal views are added in one go."""
        counted: dict[tuple[object, ...], tuple[View, int]] = {}
        for submodel, times in Counter(submodels).items():
            for view in submodel.views.values():
                counted[view.key] = (view, counted.get(view.key, (view, 0))[1] + times)
        for key, (view, times) in counted.items():
            if view.name in self._entries:
                self._add(self._entries[view.name], view, times)
                self._trained.pop(view.name, None)
                continue
            views = self._views[view.name]
            if key not in views:
                self._trained.pop(view.name, None)
            views[key] = (view, views.get(key, (view, 0))[1] + times)
            if len(views) > _FEW:
                self._entries[view.name] = self._counts_of(view.name)
                views.clear()

    @property
    def share(self) -> float:
        """Share of the model's entries that were trained at least once, 0 to 1."""
        for name in self._shapes:
            if name not in self._trained:
                self._trained[name] = self._trained_of(name)
        return sum(self._trained.values()) / sum(map(math.prod, self._shapes.values()))

    def zero_untrained(self, params: Params, part: SubModel | None = None) -> Params:
        """`params`, of the large model or of a part of it, with untrained entries set to zero."""
        if part is None:
            counts = {name: self._counts_of(name) for name in params}
        else:
            counts = cut(self.counts, part)
        return {n: tensor * (counts[n] > 0).to(tensor) for n, tensor in params.items()}

    def _counts_of(self, name: str) -> Tensor:
        if name in self._entries:
            return self._entries[name]
        count = torch.zeros(self._shapes[name], dtype=torch.int32)
        for view, times in self._views[name].values():
            self._add(count, view, times)
        return count

    def _add(self, count: Tensor, view: View, times: int) -> None:
        entries = sum(map(math.prod, self._shapes.values()))
        if kernels.compiled_for_entries(entries):
            kernels.add_number(count, view.layout(count.shape), times)
        else:
            view.add(count, times)

    def _trained_of(self, name: str) -> int:
        shape, views = self._shapes[name], [view for view, _ in self._views[name].values()]
        if any(view.is_all(shape) for view in views):
            return math.prod(shape)
        if name not in self._entries and not views:
            return 0
        return int((self._counts_of(name) > 0).sum())
