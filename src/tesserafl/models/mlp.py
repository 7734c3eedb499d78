"""A multilayer perceptron: every hidden layer is an axis of its own."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from tesserafl.core.axes import probe
from tesserafl.core.errors import ModelError
from tesserafl.core.model import Model, Output, Sizes

if TYPE_CHECKING:
    from tesserafl.data.examples import Spec

# Shapes: inputs [batch, ...] -> flat [batch, inputs] -> [batch, hidden_i] -> [batch, classes]


@dataclass(frozen=True, kw_only=True)
class MLP:
    """Fully connected layers with ReLU."""

    hidden: tuple[int, ...] = (256, 256)
    """units of each hidden layer of the global model"""
    norm: Literal["none", "layer"] = "none"
    """normalisation in front of each ReLU"""

    def build_model(self, spec: Spec) -> Model:
        """The model for a data set's inputs and classes."""
        if spec.kind == "tokens":
            raise ModelError(
                "model 'mlp' reads images or vectors, the data are texts; use model 'huggingface'"
            )
        num_inputs = int(torch.tensor(spec.shape).prod())
        sizes = {f"hidden{i + 1}": size for i, size in enumerate(self.hidden)}
        return probe(
            lambda s: _Net(num_inputs, s, self.norm),
            {**sizes, "classes": spec.num_classes},
            lambda: torch.randn(3, num_inputs),
            outputs=("classes",),
        )


class _Net(nn.Module):
    def __init__(self, num_inputs: int, sizes: Sizes, norm: str) -> None:
        super().__init__()
        widths = [num_inputs, *(size for axis, size in sizes.items() if axis != "classes")]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))
        self.norms = nn.ModuleList(
            nn.LayerNorm(b) if norm == "layer" else nn.Identity() for b in widths[1:]
        )
        self.head = nn.Linear(widths[-1], sizes["classes"])

    def forward(self, inputs: Tensor) -> Output:
        hidden = inputs.flatten(1)
        for layer, norm in zip(self.layers, self.norms, strict=True):
            hidden = torch.relu(norm(layer(hidden)))
        return Output(self.head(hidden), hidden)
