"""Normalisation of images that survives a cut, and the statistics pass of static BatchNorm.

GroupNorm whose groups lie inside the units of an axis normalises a cut model over exactly the
channels that it normalises in the full one. BatchNorm does not: "static" BatchNorm (HeteroFL, Diao
et al., ICLR 2021) uses the batch's statistics in training, sends none, and before a test the server
has them collected once for the model as it is.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from tesserafl.core.errors import ModelError
from tesserafl.core.params import Params

Norm = Literal["group", "batch", "none"]

_BatchNorm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def norm_layer(norm: Norm, channels: int, group_size: int) -> nn.Module:
    """A normalisation of [batch, channels, height, width]."""
    if norm == "group":
        if channels % group_size:
            raise ModelError(
                f"{channels} channels do not divide into groups of {group_size}; choose a width "
                f"that is a multiple of {group_size} or set model.group_size"
            )
        return nn.GroupNorm(channels // group_size, channels)
    return nn.BatchNorm2d(channels) if norm == "batch" else nn.Identity()


def has_statistics(module: nn.Module) -> bool:
    """Whether the module needs a statistics pass before it predicts."""
    return any(isinstance(part, _BatchNorm) for part in module.modules())


def collect_statistics(module: nn.Module, params: Params, batches: Iterable[Tensor]) -> None:
    """Fill the module's running statistics with the mean over the batches, for `params`.

    Every batch [n, ...] weighs the same, as HeteroFL's code has it (momentum None).
    """
    layers = [part for part in module.modules() if isinstance(part, _BatchNorm)]
    was_training = module.training
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None
    module.train()
    with torch.no_grad():
        for inputs in batches:
            functional_call(module, params, (inputs,))
    module.train(was_training)
