"""A sub-sum that another machine made: integers, and who reported what."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from tesserafl.core.buffers import shown
from tesserafl.core.errors import UpdateError
from tesserafl.core.layout import Index
from tesserafl.core.params import Params

if TYPE_CHECKING:
    from tesserafl.core.submodel import View


@dataclass(frozen=True, kw_only=True)
class SubSum:
    """What `ExactSum.merge` takes from elsewhere."""

    max_weight: int
    max_entry: float
    weight: int
    """Of all who reported something."""
    sums: Params
    """int64, of the large parameters that somebody reported."""
    reported: list[tuple[View, int]]
    """Distinct places, each with the weight of those who reported it."""

    def check(self, params: Params, scale: int) -> None:
        """Raise UpdateError unless it can be the sum of deltas of so much weight.

        Args:
            params: the large model's, read for shapes.
            scale: the sums' grid is 2^-scale.
        """
        weights = checked_weights(self.reported, params, self.weight)
        if weights.keys() != self.sums.keys():
            raise UpdateError("a sub-sum has other parameters than were reported to it")
        for name, sums in self.sums.items():
            if sums.shape != params[name].shape or sums.dtype != torch.int64:
                raise UpdateError(
                    f"a sub-sum of {name!r} is {sums.dtype} {shown(list(sums.shape))}; expected is "
                    f"int64 {list(params[name].shape)}"
                )
            reach = weights[name].mul_(int(self.max_entry * 2.0**scale))
            if bool(((sums > reach) | (sums < -reach)).any()):
                raise UpdateError(
                    f"a sub-sum of {name!r} is larger than what its devices can have changed"
                )


def checked_weights(reported: Iterable[tuple[View, int]], params: Params, most: int) -> Params:
    """The weight of every entry of the large parameters that were reported, int64.

    Raises:
        UpdateError: a place is not in the model, or an entry has more weight than `most`.
    """
    weights: Params = {}
    for view, weight in reported:
        large = params.get(view.name)
        if large is None or not view.fits(large.shape) or not all(map(_distinct, view.index)):
            raise UpdateError(
                f"places were reported that the model has not got, in {shown(repr(view.name))}"
            )
        if not 0 < weight <= most:
            raise UpdateError(
                f"places of {view.name!r} count {weight}; it may be from 1 to {most}, the weight "
                f"of the devices that were heard"
            )
        if view.name not in weights:
            weights[view.name] = torch.zeros(large.shape, dtype=torch.int64)
        view.add(weights[view.name], weight)
    for name, tensor in weights.items():
        if tensor.numel() and int(tensor.max()) > most:
            raise UpdateError(
                f"entries of {name!r} count more than {most}, the weight of the devices that were "
                f"heard"
            )
    return weights


def _distinct(index: Index) -> bool:
    if isinstance(index, slice):
        return True
    return bool((index.sort().values.diff() > 0).all())
