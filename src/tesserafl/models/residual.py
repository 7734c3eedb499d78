"""A deep residual network of equal blocks, for vectors or images: its depth is an axis.

Every block adds to one stream of constant width, so any of them can be left out, put elsewhere or
put in. With `exits` a classifier stands behind every block (DepthFL, Kim et al., ICLR 2023).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from tesserafl.core.axes import probe
from tesserafl.core.errors import ModelError
from tesserafl.core.model import Model, Output, Sizes
from tesserafl.models.normalisation import norm_layer

if TYPE_CHECKING:
    from tesserafl.data.examples import Spec

# Shapes: vectors [batch, inputs] -> stream [batch, stream];
# images [batch, C, H, W] -> stream [batch, stream, H / patch, W / patch]; pooled [batch, stream];
# logits [batch, classes]; exits [blocks, batch, classes]


@dataclass(frozen=True, kw_only=True)
class Residual:
    """A stem, equal residual blocks (normalised in front), a head."""

    stream: int = 32
    """width (channels) of the stream that the blocks add to"""
    inner: int = 32
    """width (channels) inside a block"""
    blocks: int = 7
    """blocks of the global model"""
    patch: int = 2
    """of images: the stem reads squares of this side, so a block sees 1 / patch^2 of the places"""
    group_size: int = 4
    """of images: channels that GroupNorm normalises together; also the unit in which width is
    cut"""
    exits: bool = False
    """a classifier behind every block; the model answers with their mean"""

    def build_model(self, spec: Spec) -> Model:
        """The model for a data set's inputs and classes."""
        if spec.kind == "tokens":
            raise ModelError(
                "model 'residual' reads images or vectors, the data are texts; use model "
                "'huggingface'"
            )
        for name in ("stream", "inner", "blocks", "patch", "group_size"):
            if getattr(self, name) < 1:
                raise ModelError(f"model.{name} must be at least 1; got {getattr(self, name)}")
        if spec.kind == "image" and min(spec.shape[1:]) < self.patch:
            raise ModelError(
                f"model.patch {self.patch} is larger than the images, {spec.shape[1]} x "
                f"{spec.shape[2]}; lower it"
            )
        sizes = {"stream": self.stream, "inner": self.inner, "blocks": self.blocks}
        return probe(
            lambda s: _Net(spec, self, s),
            {**sizes, "classes": spec.num_classes},
            lambda: torch.randn(3, *spec.shape),
            outputs=("classes",),
        )


class _Dense(nn.Module):
    def __init__(self, stream: int, inner: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(stream)
        self.widen = nn.Linear(stream, inner)
        self.narrow = nn.Linear(inner, stream)

    def forward(self, stream: Tensor) -> Tensor:
        added: Tensor = stream + self.narrow(torch.relu(self.widen(self.norm(stream))))
        return added


class _Conv(nn.Module):
    def __init__(self, stream: int, inner: int, group_size: int) -> None:
        super().__init__()
        self.norm1 = norm_layer("group", stream, group_size)
        self.conv1 = nn.Conv2d(stream, inner, 3, padding=1, bias=False)
        self.norm2 = norm_layer("group", inner, group_size)
        self.conv2 = nn.Conv2d(inner, stream, 3, padding=1, bias=False)

    def forward(self, stream: Tensor) -> Tensor:
        inner = self.conv1(torch.relu(self.norm1(stream)))
        added: Tensor = stream + self.conv2(torch.relu(self.norm2(inner)))
        return added


class _Exit(nn.Module):
    """Normalisation, pooling, classifier."""

    def __init__(self, stream: int, classes: int, is_image: bool, group_size: int) -> None:
        super().__init__()
        self.norm = norm_layer("group", stream, group_size) if is_image else nn.LayerNorm(stream)
        self.head = nn.Linear(stream, classes)

    def forward(self, stream: Tensor) -> tuple[Tensor, Tensor]:
        hidden = torch.relu(self.norm(stream))
        features = hidden.mean(dim=(2, 3)) if hidden.dim() > 2 else hidden
        return self.head(features), features


class _Net(nn.Module):
    def __init__(self, spec: Spec, settings: Residual, sizes: Sizes) -> None:
        super().__init__()
        stream, inner, is_image = sizes["stream"], sizes["inner"], spec.kind == "image"
        group = settings.group_size
        self.stem: nn.Module
        if is_image:
            self.stem = nn.Conv2d(spec.shape[0], stream, settings.patch, settings.patch)
        else:
            self.stem = nn.Linear(spec.shape[0], stream)
        self.blocks = nn.ModuleList(
            _Conv(stream, inner, group) if is_image else _Dense(stream, inner)
            for _ in range(sizes["blocks"])
        )
        exits = sizes["blocks"] if settings.exits else 1
        self.exits = nn.ModuleList(
            _Exit(stream, sizes["classes"], is_image, group) for _ in range(exits)
        )

    def forward(self, inputs: Tensor) -> Output:
        stream, answers = self.stem(inputs), []
        for number, block in enumerate(self.blocks):
            stream = block(stream)
            if len(self.exits) > 1:
                answers.append(self.exits[number](stream))
        if not answers:
            return Output(*self.exits[0](stream))
        exits = torch.stack([logits for logits, _ in answers])  # [exits, batch, classes]
        return Output(exits.mean(dim=0), answers[-1][1], exits)
