"""The same tensor of many clients, stacked along a new first dimension."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tesserafl.core.params import aligned

Given = tuple[Tensor, int | None]
"""A tensor, and 0 if it is stacked or None if all clients share it."""


def stacked(tensors: Sequence[Tensor], rows: int, device: str) -> Tensor:
    """One tensor of each client, and copies of the first one up to so many rows."""
    more = rows - len(tensors)
    return torch.stack([*tensors, *[tensors[0]] * more]).detach().to(device)


def shared_or_stacked(tensors: Sequence[Tensor], rows: int, device: str) -> Given:
    """A tensor that is equal for all clients is not copied."""
    # By value: in a worker process equal tensors are not the same object, and which program runs
    # must not depend on that.
    if all(t is tensors[0] or torch.equal(t, tensors[0]) for t in tensors):
        return aligned(tensors[0].detach().to(device)), None
    return stacked(tensors, rows, device), 0


def top(tensors: Sequence[Given], rows: int) -> list[Given]:
    """The first so many clients' tensors."""
    return [(t if d is None or len(t) == rows else t[:rows], d) for t, d in tensors]
