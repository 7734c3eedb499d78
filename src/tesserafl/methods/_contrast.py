"""The contrastive loss across sub-models that hold different channels.

Li, He and Song, "Model-Contrastive Federated Learning" (MOON), CVPR 2021, Equations 3 and 4; here
with representations of different windows of the global model's features, compared on the channels
that both have.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from tesserafl.core.errors import ConfigError
from tesserafl.core.fit import IGNORED, CrossEntropy, Forward
from tesserafl.core.params import Params

POSITIVE = "fused"
"""Reference: the part as it was received, the average of those who held it."""
ENTRIES = "entries"
"""Tensor of `extra`: which of the global model's features the own ones are, int64 [features]."""
_EPSILON = 1e-8


def entries_of(reference: str) -> str:
    """Tensor of `extra`: which of the global model's features a reference's are."""
    return f"{reference} {ENTRIES}"


@dataclass(frozen=True)
class Contrast:
    """Cross-entropy + strength x contrast; near to the fused model, far from the negatives.

    contrast = -log(e^(sim(z, z+) / tau) / (e^(sim(z, z+) / tau) + sum over m of e^(sim(z, z_m) /
    tau))), with sim the cosine over the channels that both representations have. A mean over the
    examples that count. For text z is the mean over the tokens.
    """

    strength: float
    """lambda"""
    temperature: float
    negatives: tuple[str, ...]
    """Names of the references to keep away from."""

    def __call__(
        self,
        forward: Forward,
        params: Params,
        inputs: Tensor,
        labels: Tensor,
        extra: Mapping[str, Tensor],
    ) -> Tensor:
        """The mean loss of a batch, a scalar."""
        output = forward(params, inputs)
        assert output.features is not None  # an engine refuses references where there are none
        task = CrossEntropy()(lambda *_: output, params, inputs, labels, extra)
        own, entries = output.features, extra[ENTRIES]
        similar = [_cosine(own, extra[POSITIVE])]
        for name in self.negatives:
            # [own features, the other's features]: 1 where both are the same channel.
            same = (entries[:, None] == extra[entries_of(name)][None, :]).to(own.dtype)
            similar.append(_cosine(own * same.sum(dim=1), extra[name] @ same.T))
        scores = torch.stack(similar, dim=-1) / self.temperature
        counts = (labels.reshape(len(labels), -1) != IGNORED).any(dim=1).to(own.dtype)
        each = torch.logsumexp(scores, dim=-1) - scores[..., 0]
        return task + self.strength * (each * counts).sum() / counts.sum().clamp(min=1.0)


def _cosine(one: Tensor, other: Tensor) -> Tensor:
    """[batch]; 0 where a representation is zero, with a gradient that is finite there."""
    squares = one.square().sum(dim=-1) * other.square().sum(dim=-1)
    return (one * other).sum(dim=-1) / (squares + _EPSILON).sqrt()


def check_contrast(strength: float, temperature: float, peers: int) -> None:
    """Raise ConfigError unless the loss is one to keep away from negatives."""
    if strength < 0:
        raise ConfigError(f"method.contrast must be 0 or more; got {strength}")
    if not temperature > 0:
        raise ConfigError(f"method.temperature must be positive; got {temperature}")
    if peers < 1:
        raise ConfigError(
            f"method.peer_negatives must be at least 1; got {peers}. For none set "
            f"method.negatives own"
        )
