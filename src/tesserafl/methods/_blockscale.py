"""h <- h + s f(h): factors on what blocks add, folded into their weights."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from tesserafl.core.model import Model
from tesserafl.core.params import Params

Scales = Mapping[str, Mapping[int, float | Tensor]]
"""Depth axis -> block -> factor of what it adds."""


def scaled_blocks(params: Params, model: Model, scales: Scales) -> Params:
    """The parameters with which block i of an axis adds `scales[axis][i]` times as much.

    What a block adds is proportional to each branch's output projection (`Depth.outputs`), so these
    are multiplied; a factor of 0 makes the block the identity. Axes whose blocks do not add, or do
    so in a way that is not understood, are left as they are, and so are blocks without a factor.

    Args:
        params: of the model; those that are not scaled are the same tensors in the result.
        model: whose blocks they are.
        scales: axis -> block -> factor; a tensor's slope is passed on.
    """
    scaled = dict(params)
    for axis, factors in scales.items():
        depth = model.depths[axis]
        for name in params:
            place = depth.locate(name)
            if not place or place[2] not in depth.outputs:
                continue
            factor = factors.get(place[1], 1.0)
            if isinstance(factor, Tensor) or factor != 1.0:
                scaled[name] = params[name] * factor
    return scaled
