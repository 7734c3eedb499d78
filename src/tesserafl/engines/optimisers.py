"""The optimisers of `torch.optim` as functions of one client's tensors, for `torch.func.vmap`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tesserafl.core.fit import Training

_BETAS, _EPSILON = (0.9, 0.999), 1e-8
"""torch.optim.AdamW's."""


def num_slots(training: Training) -> int:
    """Tensors that the optimiser keeps for each parameter; they begin at zero."""
    if training.optimiser == "adamw":
        return 2
    return 1 if training.momentum else 0


def scalars_of(training: Training, step: int, device: str) -> list[Tensor]:
    """What changes from step to step: tensors, so that one program serves all steps."""
    numbers = [training.lr]
    if training.optimiser == "adamw":
        numbers += [1.0 - beta ** (step + 1) for beta in _BETAS]
    return list(torch.tensor(numbers, device=device).unbind())


def optimise(
    training: Training,
    weights: Sequence[Tensor],
    slots: Sequence[Tensor],
    gradients: Sequence[Tensor],
    scalars: Sequence[Tensor],
) -> list[Tensor]:
    """One step: the new weights, then the new slots.

    Args:
        training: which optimiser, and what does not change from step to step.
        weights: parameters of one client.
        slots: what the step before left, `num_slots` for all weights in turn.
        gradients: of the mean loss, one per weight.
        scalars: `scalars_of` this step.
    """
    if training.clip_norm is not None:
        squares = torch.stack([gradient.square().sum() for gradient in gradients])
        factor = (training.clip_norm / (squares.sum().sqrt() + 1e-6)).clamp(max=1.0)
        gradients = [gradient * factor for gradient in gradients]
    lr, decay = scalars[0], training.weight_decay
    if training.optimiser == "adamw":
        return _adamw(decay, weights, slots, gradients, scalars)
    if decay:
        gradients = [g + decay * w for w, g in zip(weights, gradients, strict=True)]
    if training.momentum:
        gradients = [training.momentum * s + g for s, g in zip(slots, gradients, strict=True)]
    moved = [w - lr * g for w, g in zip(weights, gradients, strict=True)]
    return [*moved, *gradients] if training.momentum else moved


def _adamw(
    decay: float,
    weights: Sequence[Tensor],
    slots: Sequence[Tensor],
    gradients: Sequence[Tensor],
    scalars: Sequence[Tensor],
) -> list[Tensor]:
    (lr, first, second), (beta1, beta2) = scalars, _BETAS
    count = len(weights)
    means = [s + (1 - beta1) * (g - s) for s, g in zip(slots[:count], gradients, strict=True)]
    squares = [
        beta2 * s + (1 - beta2) * g * g for s, g in zip(slots[count:], gradients, strict=True)
    ]
    moved = [
        w * (1 - lr * decay) - (lr / first) * m / ((v / second).sqrt() + _EPSILON)
        for w, m, v in zip(weights, means, squares, strict=True)
    ]
    return [*moved, *means, *squares]
