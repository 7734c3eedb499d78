"""Weighted sums of deltas that do not depend on order, workers or hierarchy: fixed point in int64.

    delta  --round to a grid of 2^-scale-->  integer  --times an integer weight-->  int64 sum

Integers add without error, so any order and any split into sub-sums gives the same bits; it is also
the form that secure aggregation needs. The grid follows from a bound known before the round, the
same on every machine: sum of weights x largest entry < 2^62.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from tesserafl.core import kernels
from tesserafl.core.checks import MAX_ENTRY, check_delta, check_entries, check_places, largest
from tesserafl.core.errors import UpdateError
from tesserafl.core.layout import Shape, weights_of
from tesserafl.core.params import Packed, Params, flat_of, packable, packing_like

if TYPE_CHECKING:
    from tesserafl.core.submodel import SubModel, View
    from tesserafl.core.subsum import SubSum

Weights = list[tuple["View", int]]
"""Distinct views of one parameter, each with the sum of the weights of those who reported it."""

_BITS = 62


class _Alike:
    """The sum of small deltas of one sub-model, one parameter after another as they are packed.

    A small model costs calls, not arithmetic: clients of one sub-model share those per parameter.
    """

    def __init__(self, submodel: SubModel, delta: Params, params: Params) -> None:
        self.submodel, self.params, self.packing = submodel, params, packing_like(delta)
        self.places = _places(submodel, delta)
        self.sums = np.zeros(self.packing.total, np.int64)
        self.weight = 0

    def serves(self, submodel: SubModel, delta: Params, params: Params) -> bool:
        """Whether the delta lies in the same places."""
        if self.params is not params or self.packing is not packing_like(delta):
            return False
        return self.submodel is submodel or self.places == _places(submodel, delta)


def _places(submodel: SubModel, names: Iterable[str]) -> tuple[object, ...]:
    """Keys of the views of these names; None for one that is not there."""
    views = (submodel.views.get(name) for name in names)
    return tuple([None if view is None else view.key for view in views])


class ExactSum:
    """Sum of weight x delta per entry of the large model, and of the weights.

    `max_weight` bounds the sum of all weights that will ever be folded (for instance the examples
    of every client that was asked); `max_entry` bounds |delta|.
    """

    def __init__(self, max_weight: int, max_entry: float = MAX_ENTRY) -> None:
        if max_weight < 1 or not max_entry > 0:
            raise UpdateError(
                f"an exact sum needs a positive bound; got max_weight={max_weight}, "
                f"max_entry={max_entry}"
            )
        self.max_weight = int(max_weight)
        self.max_entry = float(max_entry)
        self.scale = _BITS - self.max_weight.bit_length() - math.ceil(math.log2(self.max_entry))
        if self.scale < 0:
            raise UpdateError(
                f"max_weight={max_weight} and max_entry={max_entry:g} leave no bits for fractions; "
                f"their product must stay below 2^{_BITS}"
            )
        self.weight = 0
        self._sums: Params = {}
        self._alike: _Alike | None = None
        self._views: dict[tuple[object, ...], tuple[View, int]] = {}

    @property
    def sums(self) -> Params:
        """The sums so far, int64, of the large parameters that somebody reported."""
        self._add_alike()
        return self._sums

    @property
    def reported(self) -> Weights:
        """Distinct places that somebody reported, each with the sum of their weights."""
        self._add_alike()
        return list(self._views.values())

    def fold(
        self, submodel: SubModel, delta: Params, weight: int, params: Params, *, rest: bool = False
    ) -> None:
        """Add one client's delta.

        Args:
            submodel: where each small parameter lies; names are those of `delta`.
            delta: what the client changed, any floating type.
            weight: a positive integer (examples, or 1).
            params: the large model's parameters, read for shape and device only.
            rest: whether the client's weight was counted before, with another part of its delta.

        Raises:
            UpdateError: a name, shape or weight does not fit, an entry is not finite or beyond
                `max_entry`. Nothing is added then.
        """
        self._check_weight(weight, rest)
        if kernels.compiled_for(params):
            self._add_compiled(submodel, delta, weight, params)
            self._count(submodel, delta, weight)
        elif packable(delta):
            self._fold_small(submodel, delta, weight, params)
        else:
            check_delta(submodel, delta, params, self.max_entry)
            for name, tensor in delta.items():
                self._add_eagerly(submodel.views[name], tensor, weight, params)
            self._count(submodel, delta, weight)
        self.weight += 0 if rest else weight

    def merge(self, other: ExactSum | SubSum) -> None:
        """Add another machine's sub-sum; both must have been made with the same bounds."""
        ours, theirs = (self.max_weight, self.max_entry), (other.max_weight, other.max_entry)
        if ours != theirs:
            raise UpdateError(f"sums are merged with equal bounds alone; got {ours} and {theirs}")
        if self.weight + other.weight > self.max_weight:
            raise UpdateError(
                f"weights {self.weight} + {other.weight} exceed the declared {self.max_weight}"
            )
        for name, tensor in other.sums.items():
            self.sums[name] = self.sums[name] + tensor if name in self.sums else tensor.clone()
        self._add_alike()
        for view, weight in other.reported:
            self._views[view.key] = (view, self._views.get(view.key, (view, 0))[1] + weight)
        self.weight += other.weight

    def means(self, params: Params) -> Iterator[tuple[str, Tensor, Tensor]]:
        """For each touched large parameter: name, mean delta (float64) and weights (int64).

        The mean is 0 where the weight is 0. One parameter's temporaries live at a time.
        """
        for name, views in self._touched(params):
            total = self.sums[name]
            weights = kernels.empty(total.shape, total)
            for low, high, weight in _weights(views, total.shape):
                weights.view(-1)[low:high] = torch.from_numpy(weight).to(total.device)
            mean = total.double().mul_(2.0**-self.scale).div_(weights.clamp(min=1))
            yield name, mean, weights

    def finished(self, params: Params) -> Iterator[tuple[str, Tensor]]:
        """For each touched large parameter: name, and the parameter plus its mean delta.

        Added in double precision; of the parameter's type. Makes no other full-size tensor.
        """
        compiled = kernels.compiled_for(params)
        for name, views in self._touched(params):
            old, sums = params[name], self.sums[name]
            if compiled and kernels.takes(old):
                cells = weights_of([(view.index, weight) for view, weight in views], old.shape)
                yield name, kernels.finish(old, sums, self.scale, cells)
            else:
                weights = _weights(views, old.shape)
                yield name, kernels.finish_eagerly(old, sums, self.scale, weights)

    def _touched(self, params: Params) -> Iterator[tuple[str, Weights]]:
        self._add_alike()
        by_name: dict[str, Weights] = {}
        for view, weight in self._views.values():
            by_name.setdefault(view.name, []).append((view, weight))
        for name in params:
            if name in by_name:
                yield name, by_name[name]

    def _add_compiled(self, submodel: SubModel, delta: Params, weight: int, params: Params) -> None:
        """One pass checks and adds; what was added before a bad entry was met is taken back."""
        check_places(submodel, delta, params)
        check_entries({n: t for n, t in delta.items() if not kernels.takes(t)}, self.max_entry)
        before, added = set(self.sums), []
        for name, tensor in delta.items():
            added.append(name)
            if self._add(submodel.views[name], tensor, weight, params):
                continue
            for each in added:
                self._add(submodel.views[each], delta[each], -weight, params)
            for each in set(self.sums) - before:
                del self.sums[each]
            check_entries({name: tensor}, self.max_entry)

    def _add(self, view: View, small: Tensor, weight: int, params: Params) -> bool:
        """False if an entry was beyond the bound. It added nothing; the others did."""
        if not kernels.takes(small):
            self._add_eagerly(view, small, weight, params)
            return True
        sums = self._sum(view, params)
        layout = view.layout(sums.shape)
        return kernels.add_fixed(sums, layout, small, self.scale, weight, self.max_entry)

    def _fold_small(self, submodel: SubModel, delta: Params, weight: int, params: Params) -> None:
        alike = self._alike
        known = alike is not None and alike.serves(submodel, delta, params)
        if not known:
            check_places(submodel, delta, params)
        flat = flat_of(delta)
        if not largest(flat) <= self.max_entry:
            check_entries(delta, self.max_entry)
        if alike is None or not known:
            self._add_alike()
            alike = self._alike = _Alike(submodel, delta, params)
        alike.sums += kernels.fixed(flat, self.scale, weight)
        alike.weight += weight

    def _add_alike(self) -> None:
        if self._alike is None:
            return
        alike, self._alike = self._alike, None
        for (name, shape), start in zip(alike.packing.shapes, alike.packing.starts, strict=True):
            view = alike.submodel.views[name]
            sums = self._sum(view, alike.params)
            small = alike.sums[start : start + math.prod(shape)].reshape(shape)
            if view.blocks is None or not sums.is_cpu:
                view.add(sums, torch.from_numpy(small).to(sums.device))
                continue
            array = sums.numpy()
            for there, here in view.blocks:
                array[there] += small[here]
        self._count(alike.submodel, dict(alike.packing.shapes), alike.weight)

    def _count(self, submodel: SubModel, names: Iterable[str], weight: int) -> None:
        for name in names:
            view = submodel.views[name]
            self._views[view.key] = (view, self._views.get(view.key, (view, 0))[1] + weight)

    def whole(self, params: Params) -> Packed | None:
        """`finished` of all parameters as one; None: not all deltas were small and of the whole."""
        alike = self._alike
        if alike is None or self._views or alike.params is not params or not packable(params):
            return None
        views = alike.submodel.views
        if alike.packing is not packing_like(params) or any(
            views[name].name != name or not views[name].is_all(shape)
            for name, shape in alike.packing.shapes
        ):
            return None
        new = torch.zeros(alike.packing.total)
        new.numpy()[:] = kernels.mean_added(flat_of(params), alike.sums, self.scale, alike.weight)
        return Packed(new, alike.packing)

    def _add_eagerly(self, view: View, small: Tensor, weight: int, params: Params) -> None:
        sums = self._sum(view, params)
        if small.numel() <= kernels.BLOCK:
            view.add(sums, kernels.to_fixed(small, self.scale, weight))
            return
        step = max(1, kernels.BLOCK * len(small) // small.numel())
        for low in range(0, len(small), step):
            rows = kernels.to_fixed(small[low : low + step], self.scale, weight)
            view.rows(low, low + step).add(sums, rows)

    def _sum(self, view: View, params: Params) -> Tensor:
        if view.name not in self._sums:
            large = params[view.name]
            self._sums[view.name] = kernels.zeros(large.shape, large, torch.int64)
        return self._sums[view.name]

    def _check_weight(self, weight: int, rest: bool) -> None:
        if not isinstance(weight, int) or weight < 1:
            raise UpdateError(f"a weight is a positive integer; got {weight!r}")
        if self.weight + (0 if rest else weight) > self.max_weight:
            raise UpdateError(
                f"the weights folded so far ({self.weight}) and this one ({weight}) exceed the "
                f"declared {self.max_weight}; an update was folded twice or the bound is wrong"
            )


def _weights(views: Weights, shape: Shape) -> Iterator[kernels.Piece]:
    """The weights of all entries of a parameter, in pieces."""
    count = math.prod(shape)
    if count > kernels.BLOCK:
        cells = weights_of([(view.index, weight) for view, weight in views], shape)
        yield from kernels.expanded(cells)
        return
    (view, weight), *others = views
    if not others and view.shape == shape and view.blocks is not None and len(view.blocks) == 1:
        yield 0, count, np.array([weight])
        return
    weights = np.zeros(shape, np.int64)
    for view, weight in views:
        if view.blocks is None:
            view.add(torch.from_numpy(weights), weight)
        else:
            for there, _ in view.blocks:
                weights[there] += weight
    yield 0, count, weights.reshape(-1)
