"""One client's part in a cohort."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tesserafl.core.fit import Fit
from tesserafl.core.params import Packed
from tesserafl.data.examples import Examples
from tesserafl.engines.batches import held_out_of


@dataclass(frozen=True, kw_only=True)
class Member:
    """One client's work in a cohort."""

    fit: Fit
    examples: Examples
    draw: torch.Generator
    """The order of the examples comes from it."""
    held_out: Tensor | None = None
    """Which examples are held out, bool [n], if the fit asks; None: as `held_out_of` draws."""

    @property
    def held(self) -> Tensor:
        """Which examples are held out, bool [n]."""
        if self.held_out is None:
            return held_out_of(len(self.examples), self.fit.held_out)
        return self.held_out

    @property
    def shape(self) -> tuple[object, ...]:
        """Members are trained together only if this is equal for them.

        Momentum buffers are no part of it: those that a member lacks are zeros, to the same bits.
        """
        fit, training = self.fit, self.fit.training
        if training.steps is not None:  # members may take unequal numbers of steps
            training = replace(training, steps=1)
        return (
            training,
            fit.objective,
            fit.trainable,
            fit.beside,
            fit.reference_logits,
            fit.held_out > 0,
            fit.width_scaling,
            _signature(fit.params),
            _signature(fit.extra),
            tuple((name, _signature(params)) for name, params in fit.references.items()),
            len(self.examples.classes) if fit.training.mask_absent_classes else None,
        )


def _signature(tensors: Mapping[str, Tensor]) -> tuple[object, ...]:
    if isinstance(tensors, Packed):
        return tensors.packing.signature
    return tuple((name, tuple(t.shape), t.dtype) for name, t in tensors.items())
