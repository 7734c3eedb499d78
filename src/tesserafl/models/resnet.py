"""A pre-activation ResNet-18 for small images (He et al., ECCV 2016), as HeteroFL trains it.

Each stage has three axes: `stage`, the residual stream that its blocks add to, `inner`, the
channels inside its blocks, and `blocks`, its depth. They are cut independently; only additions
force equal channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from tesserafl.core.axes import probe
from tesserafl.core.errors import ModelError
from tesserafl.core.model import Model, Output, Sizes
from tesserafl.models.normalisation import Norm, norm_layer

if TYPE_CHECKING:
    from tesserafl.data.examples import Spec

# Shapes: images [batch, C, H, W]; stage i: [batch, stage_i, H / 2^(i-1), W / 2^(i-1)];
# pooled [batch, stage_last]; logits [batch, classes]


@dataclass(frozen=True, kw_only=True)
class ResNet:
    """Residual stages, each at half the resolution of the one before."""

    channels: tuple[int, ...] = (64, 128, 256, 512)
    """channels of each stage of the global model"""
    blocks: tuple[int, ...] = (2, 2, 2, 2)
    """blocks of each stage; (2, 2, 2, 2) is ResNet-18"""
    norm: Norm = "group"
    """group: GroupNorm inside channel groups; batch: static BatchNorm; none"""
    group_size: int = 4
    """channels that GroupNorm normalises together; also the unit in which width is cut"""

    def build_model(self, spec: Spec) -> Model:
        """The model for a data set's images and classes."""
        if spec.kind != "image":
            raise ModelError(f"model 'resnet' reads images; the data are {spec.kind}")
        if len(self.blocks) != len(self.channels):
            raise ModelError(
                f"model.blocks {self.blocks} and model.channels {self.channels} must have one "
                f"entry a stage each"
            )
        sizes: dict[str, int] = {}
        for i, size in enumerate(self.channels, 1):
            sizes |= {f"stage{i}": size, f"inner{i}": size, f"blocks{i}": self.blocks[i - 1]}
        in_channels, height, width = spec.shape
        return probe(
            lambda s: _Net(in_channels, s, len(self.channels), self.norm, self.group_size),
            {**sizes, "classes": spec.num_classes},
            lambda: torch.randn(2, in_channels, height, width),
            outputs=("classes",),
        )


class _Block(nn.Module):
    def __init__(
        self, inputs: int, inner: int, outputs: int, stride: int, norm: Norm, group_size: int
    ) -> None:
        super().__init__()
        self.norm1 = norm_layer(norm, inputs, group_size)
        self.conv1 = nn.Conv2d(inputs, inner, 3, stride, padding=1, bias=False)
        self.norm2 = norm_layer(norm, inner, group_size)
        self.conv2 = nn.Conv2d(inner, outputs, 3, padding=1, bias=False)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if stride > 1 else None

    def forward(self, stream: Tensor) -> Tensor:
        normed = torch.relu(self.norm1(stream))
        skipped = stream if self.shortcut is None else self.shortcut(normed)
        inner = torch.relu(self.norm2(self.conv1(normed)))
        added: Tensor = skipped + self.conv2(inner)
        return added


class _Net(nn.Module):
    def __init__(
        self, in_channels: int, sizes: Sizes, stages: int, norm: Norm, group_size: int
    ) -> None:
        super().__init__()
        self.stem = nn.Conv2d(in_channels, sizes["stage1"], 3, padding=1, bias=False)
        self.stages = nn.ModuleList()
        inputs = sizes["stage1"]
        for stage in range(1, stages + 1):
            outputs, inner = sizes[f"stage{stage}"], sizes[f"inner{stage}"]
            self.stages.append(
                nn.Sequential(
                    *(
                        _Block(
                            inputs if position == 0 else outputs,
                            inner,
                            outputs,
                            2 if stage > 1 and position == 0 else 1,
                            norm,
                            group_size,
                        )
                        for position in range(sizes[f"blocks{stage}"])
                    )
                )
            )
            inputs = outputs
        self.norm = norm_layer(norm, inputs, group_size)
        self.head = nn.Linear(inputs, sizes["classes"])

    def forward(self, images: Tensor) -> Output:
        stream = self.stem(images)
        for stage in self.stages:
            stream = stage(stream)
        features = torch.relu(self.norm(stream)).mean(dim=(2, 3))
        return Output(self.head(features), features)
