"""Residual scales, folded into the weights: h + s f(h) without a change of the module."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from tesserafl.core.model import Model
from tesserafl.core.params import Params

Scales = Mapping[str, Mapping[int, float | Tensor]]
"""Depth axis -> block -> factor of what it adds."""


def scaled_blocks(model: Model, params: Params, scales: Scales) -> Params:
    """The parameters, with every block's output projections times its scale.

    Blocks of an axis that does not know what its blocks' outputs are proportional to
    (`Depth.outputs`) stay as they are; so do blocks without a scale, or one of exactly 1.
    """
    changed = dict(params)
    for axis, of_blocks in scales.items():
        depth = model.depths[axis]
        for name in params:
            place = depth.locate(name)
            if place is None or place[2] not in depth.outputs:
                continue
            scale = of_blocks.get(place[1], 1.0)
            if isinstance(scale, Tensor) or scale != 1.0:
                changed[name] = params[name] * scale
    return changed
