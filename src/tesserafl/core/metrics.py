"""What is measured of a model's predictions."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from tesserafl.core.fit import IGNORED


@dataclass(frozen=True, kw_only=True)
class Metrics:
    """Sums over labels that count, so that batches and clients add up exactly."""

    correct: int = 0
    """Labels whose logit is the largest."""
    loss_sum: float = 0.0
    """Cross-entropy, natural logarithm."""
    count: int = 0
    """Labels that count."""

    @property
    def accuracy(self) -> float:
        """Share of correct labels, 0 to 1; for language models of next tokens."""
        return self.correct / max(1, self.count)

    @property
    def loss(self) -> float:
        """Mean cross-entropy."""
        return self.loss_sum / max(1, self.count)

    def __add__(self, other: Metrics) -> Metrics:
        """Metrics of both together."""
        return Metrics(
            correct=self.correct + other.correct,
            loss_sum=self.loss_sum + other.loss_sum,
            count=self.count + other.count,
        )


def measure(logits: Tensor, labels: Tensor) -> Metrics:
    """Metrics of a batch: logits [..., classes], labels [...], ignored where -100."""
    logits, labels = logits.reshape(-1, logits.shape[-1]), labels.reshape(-1)
    counted = labels != IGNORED
    return Metrics(
        correct=int(((logits.argmax(dim=-1) == labels) & counted).sum()),
        loss_sum=float(F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")),
        count=int(counted.sum()),
    )
