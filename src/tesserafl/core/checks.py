"""What an update must be before it may be summed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy.typing as npt
import torch
from torch import Tensor

from tesserafl.core.buffers import shown
from tesserafl.core.errors import UpdateError
from tesserafl.core.params import Packed, Packing, Params, flat_of, packable

if TYPE_CHECKING:
    from tesserafl.core.submodel import SubModel

MAX_ENTRY = 256.0
"""Largest |delta| of one entry in one round. A weight that moved further has diverged."""


_REAL = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def check_deltas(deltas: Sequence[tuple[SubModel, Params]], params: Params) -> None:
    """`check_delta` of several; where one lies is looked up once if the one before lay there."""
    last: tuple[SubModel, Packing] | None = None
    for submodel, delta in deltas:
        packing = delta.packing if isinstance(delta, Packed) else None
        if last is None or last[0] is not submodel or last[1] is not packing:
            check_places(submodel, delta, params)
            last = None if packing is None else (submodel, packing)
        check_entries(delta, MAX_ENTRY)


def check_delta(
    submodel: SubModel, delta: Params, params: Params, max_entry: float = MAX_ENTRY
) -> None:
    """Raise UpdateError unless a delta fits its sub-model, that fits the model, and all is small.

    Small: finite and at most `max_entry`. `params` is the large model's.
    """
    check_places(submodel, delta, params)
    check_entries(delta, max_entry)


def check_places(submodel: SubModel, delta: Params, params: Params) -> None:
    """Raise UpdateError unless a delta fits its sub-model and that fits the model."""
    for name, tensor in delta.items():
        view = submodel.views.get(name)
        if view is None:
            raise UpdateError(f"the update holds {name!r}, which its sub-model does not")
        large = params.get(view.name)
        if large is None or not view.fits(large.shape):
            raise UpdateError(f"update entry {name!r} lies outside the model's {view.name!r}")
        if tensor.shape != view.shape:
            raise UpdateError(
                f"update entry {name!r} has shape {shown(tuple(tensor.shape))}; "
                f"expected is {view.shape}"
            )


def check_entries(delta: Params, max_entry: float) -> None:
    """Raise UpdateError unless every entry is finite and at most `max_entry`."""
    if not delta:
        return
    for name, tensor in delta.items():
        if tensor.dtype not in _REAL:  # others have no magnitude that torch could find
            raise UpdateError(f"update entry {name!r} is {tensor.dtype}; allowed are real numbers")
    if packable(delta):
        if largest(flat_of(delta)) <= max_entry:  # never true for NaN
            return
    elif all(largest(tensor) <= max_entry for tensor in delta.values() if tensor.numel()):
        return
    for name, tensor in delta.items():
        if tensor.numel() and not (reach := largest(tensor)) <= max_entry:
            raise UpdateError(
                f"update entry {name!r} reaches {reach:g}; allowed is a finite value up to "
                f"{max_entry:g}. Training diverged: lower training.lr or set training.clip_norm"
            )


def largest(entries: Tensor | npt.NDArray[Any]) -> float:
    """The largest magnitude; not a number if there is one among them."""
    if isinstance(entries, Tensor):
        least, greatest = map(float, torch.aminmax(entries.detach()))
    else:
        least, greatest = float(entries.min()), float(entries.max())
    return -least if -least > greatest else greatest
