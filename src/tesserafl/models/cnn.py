"""A plain convolutional network: every layer's channels are an axis of its own."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from tesserafl.core.axes import probe
from tesserafl.core.errors import ModelError
from tesserafl.core.model import Model, Output, Sizes
from tesserafl.models.normalisation import Norm, norm_layer

if TYPE_CHECKING:
    from tesserafl.data.examples import Spec

# Shapes: images [batch, C, H, W]; after layer i: [batch, channels_i, H / 2^i, W / 2^i];
# pooled [batch, channels_last]; logits [batch, classes]


@dataclass(frozen=True, kw_only=True)
class CNN:
    """3x3 convolution, 2x2 pooling, normalisation and ReLU, repeated; then a linear head."""

    channels: tuple[int, ...] = (64, 128, 256)
    """channels of each layer of the global model"""
    norm: Norm = "group"
    """group: GroupNorm inside channel groups; batch: static BatchNorm; none"""
    group_size: int = 4
    """channels that GroupNorm normalises together; also the unit in which width is cut"""

    def build_model(self, spec: Spec) -> Model:
        """The model for a data set's images and classes."""
        if spec.kind != "image":
            raise ModelError(f"model 'cnn' reads images; the data are {spec.kind}")
        in_channels, height, width = spec.shape
        if min(height, width) < 2 ** (len(self.channels) - 1):
            raise ModelError(
                f"images of {height} x {width} are too small for {len(self.channels)} layers that "
                f"each halve them; give fewer model.channels"
            )
        sizes = {f"channels{i + 1}": size for i, size in enumerate(self.channels)}
        return probe(
            lambda s: _Net(in_channels, s, self.norm, self.group_size),
            {**sizes, "classes": spec.num_classes},
            lambda: torch.randn(2, in_channels, height, width),
            outputs=("classes",),
        )


class _Net(nn.Module):
    def __init__(self, in_channels: int, sizes: Sizes, norm: Norm, group_size: int) -> None:
        super().__init__()
        widths = [in_channels, *(size for axis, size in sizes.items() if axis != "classes")]
        pairs = list(pairwise(widths))
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in pairs)
        self.norms = nn.ModuleList(norm_layer(norm, b, group_size) for _, b in pairs)
        self.head = nn.Linear(widths[-1], sizes["classes"])

    def forward(self, images: Tensor) -> Output:
        maps = images
        for position, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            maps = conv(maps)
            if position < len(self.convs) - 1:
                maps = nn.functional.max_pool2d(maps, 2)  # before the norm: a quarter of its work
            maps = torch.relu(norm(maps))
        features = maps.mean(dim=(2, 3))
        return Output(self.head(features), features)
