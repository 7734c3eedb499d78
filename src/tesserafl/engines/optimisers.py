"""A client's optimiser: as an object for one client, as a function for `torch.func.vmap`.

Clients come and go with every task. SGD is written out here, with the bits of `torch.optim.SGD`,
since making one of torch's optimisers takes as long as ten steps of a small network.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tesserafl.core.errors import ConfigError
from tesserafl.core.fit import Fit, Training, check_alike

_BETAS, _EPSILON = (0.9, 0.999), 1e-8
"""torch.optim.AdamW's."""


class Optimiser:
    """The steps of one client.

    Args:
        training: which optimiser.
        momenta: SGD's momentum buffers to start with, one per weight; None: empty.
        own: whether the weights of the first step may be written to; else it makes new ones.
    """

    def __init__(
        self, training: Training, momenta: Sequence[Tensor] | None = None, own: bool = False
    ) -> None:
        self._training = training
        self._momenta = None if momenta is None else [tensor.clone() for tensor in momenta]
        self._adamw: torch.optim.AdamW | None = None
        self._own = own

    @property
    def momenta(self) -> list[Tensor] | None:
        """SGD's momentum buffers after the last step; the next one writes to them."""
        return self._momenta

    def step(self, weights: Sequence[Tensor], gradients: Sequence[Tensor]) -> list[Tensor]:
        """The weights after one more step, as leaves that want a gradient.

        After the first step `weights` must be what the step before returned; they are changed. They
        are leaves from the first step on where it may write to them.
        """
        with torch.no_grad():  # not as a decorator, which costs as much as the step of a small net
            return self._step(weights, gradients)

    def _step(self, weights: Sequence[Tensor], gradients: Sequence[Tensor]) -> list[Tensor]:
        if self._training.clip_norm is not None:
            gradients = _clipped(gradients, self._training.clip_norm)
        if self._training.optimiser == "adamw":
            return self._step_adamw(weights, gradients)
        lr, decay, momentum = (
            self._training.lr,
            self._training.weight_decay,
            self._training.momentum,
        )
        if decay:
            gradients = [g.add(w, alpha=decay) for w, g in zip(weights, gradients, strict=True)]
        if momentum and self._momenta is None:
            self._momenta = [gradient.clone() for gradient in gradients]
            gradients = self._momenta
        elif self._momenta is not None:
            for kept, gradient in zip(self._momenta, gradients, strict=True):
                kept.mul_(momentum).add_(gradient)
            gradients = self._momenta
        if self._own:
            for weight, gradient in zip(weights, gradients, strict=True):
                weight.add_(gradient, alpha=-lr)
            return list(weights)
        self._own = True
        return [
            torch.add(weight, gradient, alpha=-lr).requires_grad_()
            for weight, gradient in zip(weights, gradients, strict=True)
        ]

    def _step_adamw(self, weights: Sequence[Tensor], gradients: Sequence[Tensor]) -> list[Tensor]:
        if self._adamw is None:
            if not self._own:
                weights = [weight.clone().requires_grad_() for weight in weights]
            self._adamw = torch.optim.AdamW(
                weights, lr=self._training.lr, weight_decay=self._training.weight_decay
            )
        for weight, gradient in zip(weights, gradients, strict=True):
            weight.grad = gradient
        self._adamw.step()
        self._adamw.zero_grad()  # else they lie beside the next ones
        return list(weights)


def check_momentum(fit: Fit) -> None:
    """Raise if the fit starts with momentum buffers, or asks for them, that cannot be.

    Raises:
        ConfigError: the optimiser has none, or they are not those of the trained parameters.
    """
    if fit.momentum is None and not fit.keep_momentum:
        return
    training = fit.training
    if training.optimiser != "sgd" or not training.momentum:
        raise ConfigError(
            f"momentum can be carried on between rounds only by SGD with momentum; got "
            f"training.optimiser={training.optimiser!r} and training.momentum="
            f"{training.momentum!r}; set training.optimiser=sgd and training.momentum to more "
            f"than 0, or choose a method that carries none"
        )
    if fit.momentum is not None:
        check_alike("Fit.momentum", fit.momentum, {n: fit.params[n] for n in trained_names(fit)})


def trained_names(fit: Fit) -> list[str]:
    """Names of the parameters that are trained, in the order of `fit.params`."""
    return [name for name in fit.params if fit.trainable is None or name in fit.trainable]


def _clipped(gradients: Sequence[Tensor], most: float) -> list[Tensor]:
    """Scaled so that their norm is at most `most`: `torch.nn.utils.clip_grad_norm_`."""
    norms = torch.stack([torch.linalg.vector_norm(gradient) for gradient in gradients])
    factor = (most / (torch.linalg.vector_norm(norms) + 1e-6)).clamp(max=1.0)
    return [gradient * factor for gradient in gradients]


def num_slots(training: Training) -> int:
    """Tensors that the optimiser keeps for each parameter; they begin at zero,
    unless momentum is carried on."""
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
        gradients = _clipped(gradients, training.clip_norm)
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
