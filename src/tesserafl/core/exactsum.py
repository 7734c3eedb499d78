"""Weighted sums of deltas that do not depend on order, workers or hierarchy: fixed point in int64.

    delta  --round to a grid of 2^-scale-->  integer  --times an integer weight-->  int64 sum

Integers add without error, so any order and any split into sub-sums gives the same bits; it is also
the form that secure aggregation needs. The grid follows from a bound known before the round, the
same on every machine: sum of weights x largest entry < 2^62.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tesserafl.core.errors import UpdateError
from tesserafl.core.params import Params

if TYPE_CHECKING:
    from tesserafl.core.submodel import SubModel, View

MAX_ENTRY = 256.0
"""Largest |delta| of one entry in one round. A weight that moved further has diverged."""

_BITS = 62
_CHUNK = 1 << 18
"""Entries converted at once: the double and int64 temporaries stay in the processor's cache."""


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
        self.sums: Params = {}
        self._views: dict[tuple[object, ...], tuple[View, int]] = {}

    def fold(self, submodel: SubModel, delta: Params, weight: int, params: Params) -> None:
        """Add one client's delta.

        Args:
            submodel: where each small parameter lies; names are those of `delta`.
            delta: what the client changed, any floating type.
            weight: a positive integer (examples, or 1).
            params: the large model's parameters, read for shape and device only.

        Raises:
            UpdateError: a name, shape or weight does not fit, an entry is not finite or beyond
                `max_entry`. Nothing is added then.
        """
        self._check_weight(weight)
        check_delta(submodel, delta, params, self.max_entry)
        for name, tensor in delta.items():
            view = submodel.views[name]
            if view.name not in self.sums:
                large = params[view.name]
                self.sums[view.name] = torch.zeros(
                    large.shape, dtype=torch.int64, device=large.device
                )
            view.add(self.sums[view.name], self._fixed(tensor, weight))
            self._views[view.key] = (view, self._views.get(view.key, (view, 0))[1] + weight)
        self.weight += weight

    def merge(self, other: ExactSum) -> None:
        """Add another machine's sub-sum; both must have been made with the same bounds."""
        if (self.max_weight, self.max_entry) != (other.max_weight, other.max_entry):
            raise UpdateError(
                "two exact sums can be merged only with equal bounds; got "
                f"({self.max_weight}, {self.max_entry}) and ({other.max_weight}, {other.max_entry})"
            )
        if self.weight + other.weight > self.max_weight:
            raise UpdateError(
                f"weights {self.weight} + {other.weight} exceed the declared {self.max_weight}"
            )
        for name, tensor in other.sums.items():
            self.sums[name] = self.sums[name] + tensor if name in self.sums else tensor.clone()
        for key, (view, weight) in other._views.items():
            self._views[key] = (view, self._views.get(key, (view, 0))[1] + weight)
        self.weight += other.weight

    def means(self, params: Params) -> Iterator[tuple[str, Tensor, Tensor]]:
        """For each touched large parameter: name, mean delta (float64) and weights (int64).

        The mean is 0 where the weight is 0. One parameter's temporaries live at a time.
        """
        by_name: dict[str, list[tuple[View, int]]] = {}
        for view, weight in self._views.values():
            by_name.setdefault(view.name, []).append((view, weight))
        for name in params:
            if name not in by_name:
                continue
            total = self.sums[name]
            weights = torch.zeros_like(total)
            for view, weight in by_name[name]:
                view.add(weights, weight)
            mean = total.double().mul_(2.0**-self.scale).div_(weights.clamp(min=1))
            yield name, mean, weights

    def _fixed(self, tensor: Tensor, weight: int) -> Tensor:
        flat = tensor.detach().reshape(-1)
        fixed = torch.empty(flat.shape, dtype=torch.int64, device=flat.device)
        for start in range(0, flat.numel(), _CHUNK):
            chunk = flat[start : start + _CHUNK].to(torch.float64, copy=True)
            fixed[start : start + _CHUNK] = chunk.mul_(2.0**self.scale).round_()
        return fixed.mul_(weight).reshape(tensor.shape)

    def _check_weight(self, weight: int) -> None:
        if not isinstance(weight, int) or weight < 1:
            raise UpdateError(f"a weight is a positive integer; got {weight!r}")
        if self.weight + weight > self.max_weight:
            raise UpdateError(
                f"the weights folded so far ({self.weight}) and this one ({weight}) exceed the "
                f"declared {self.max_weight}; an update was folded twice or the bound is wrong"
            )


def check_delta(
    submodel: SubModel, delta: Params, params: Params, max_entry: float = MAX_ENTRY
) -> None:
    """Raise UpdateError unless a delta fits its sub-model, that fits the model, and all is small.

    Small: finite and at most `max_entry`. `params` is the large model's.
    """
    for name, tensor in delta.items():
        if name not in submodel.views:
            raise UpdateError(f"the update holds {name!r}, which its sub-model does not")
        view = submodel.views[name]
        shape = view.shape
        if view.name not in params or not view.fits(tuple(params[view.name].shape)):
            raise UpdateError(f"update entry {name!r} lies outside the model's {view.name!r}")
        if tuple(tensor.shape) != shape:
            raise UpdateError(
                f"update entry {name!r} has shape {tuple(tensor.shape)}; expected is {shape}"
            )
        if not tensor.numel():
            continue
        low, high = torch.aminmax(tensor.detach())
        largest = float(torch.maximum(-low, high))
        if not largest <= max_entry:  # also true for NaN
            raise UpdateError(
                f"update entry {name!r} reaches {largest:g}; allowed is a finite value up to "
                f"{max_entry:g}. Training diverged: lower training.lr or set training.clip_norm"
            )
