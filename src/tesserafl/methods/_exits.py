"""Classifiers inside a model that learn from the labels and from each other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from tesserafl.core.errors import ConfigError
from tesserafl.core.fit import IGNORED, Forward, cross_entropy, masked
from tesserafl.core.model import CLASSES, Model
from tesserafl.core.params import Params

WEIGHT = "distill"
"""Name of the scalar that weighs the distillation: a tensor, so that it may change every round."""


def check_exits(model: Model) -> None:
    """Raise ConfigError unless every block of some axis has a classifier of its own."""
    blocks = [depth for depth in model.depths.values() if depth.last is None]
    rows = [n for n, ties in model.ties.items() if any(t and t.axis == CLASSES for t in ties)]
    if not any(depth.locate(name) for depth in blocks for name in rows):
        raise ConfigError(
            "the method needs a model with a classifier behind every block, and this one has "
            "none there; choose --model residual --model.exits"
        )


@dataclass(frozen=True, kw_only=True)
class MutualDistillation:
    """Every exit's cross-entropy, and its Kullback-Leibler divergence from every other exit.

        L = sum_i CE_i + w / (d - 1) sum_i sum_{j != i} T^2 KL(p_j || p_i)

    over the d exits that the client has, p_i softened by T. An exit that teaches is constant. The
    model answers with one exit alone if it has no more; then the loss is the cross-entropy.
    """

    temperature: float
    """T."""

    def __call__(
        self,
        forward: Forward,
        params: Params,
        inputs: Tensor,
        labels: Tensor,
        extra: Mapping[str, Tensor],
    ) -> Tensor:
        """The mean loss of a batch, a scalar; `extra["distill"]` is w."""
        out = forward(params, inputs)
        exits = out.logits[None] if out.exits is None else out.exits  # [exits, batch, classes]
        exits = masked(exits, extra)
        depth = len(exits)
        entropies = cross_entropy(exits, labels.repeat(depth))  # mean over exits and examples
        if depth == 1:
            return entropies
        learnt = torch.log_softmax(exits / self.temperature, dim=-1)
        taught = learnt.detach()
        # [learning exit, teaching exit, batch]
        divergences = (taught.exp() * (taught - learnt[:, None])).sum(-1)
        others = 1.0 - torch.eye(depth, dtype=exits.dtype, device=exits.device)
        counted = labels != IGNORED
        each = (divergences * counted).sum(-1) / counted.sum().clamp(min=1)
        weight = extra[WEIGHT] * self.temperature**2 / (depth - 1)
        return depth * entropies + weight * (each * others).sum()
