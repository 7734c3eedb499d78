"""What a model's blocks give on the way, and how well it does, for a few examples at hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import Tensor, nn

from tesserafl.core import seeds
from tesserafl.core.fit import Forward
from tesserafl.core.metrics import Metrics, measure
from tesserafl.core.model import Model
from tesserafl.core.params import Params
from tesserafl.models.scaling import forward_of

_BATCH = 250


@dataclass(kw_only=True)
class Inside:
    """One model, built once, run on one set of examples."""

    model: Model
    inputs: Tensor
    """[examples, ...], as the model takes them"""
    labels: Tensor
    """[examples], or [examples, time]"""

    @cached_property
    def module(self) -> nn.Module:
        """The built module, as it predicts."""
        with seeds.seeded(0, "module"):  # its own weights are never used
            return self.model.module().eval()

    @cached_property
    def forward(self) -> Forward:
        """The model as a function of its parameters."""
        return forward_of(self.model, self.model.whole(), self.module, "none")

    def metrics(self, params: Params, rows: Tensor | None = None) -> Metrics:
        """Accuracy and loss with these parameters, over all examples or those at `rows`."""
        total = Metrics()
        for inputs, labels in self._batches(rows):
            with torch.no_grad():
                total += measure(self.forward(params, inputs).logits, labels)
        return total

    def outputs(self, params: Params, axis: str) -> list[Tensor]:
        """What every block of a depth axis gives, each [examples, ...]."""
        found: list[list[Tensor]] = [[] for _ in range(self.model.units(axis))]
        hooks = [
            block.register_forward_hook(partial(_keep, found[number]))
            for number, block in enumerate(self._blocks(axis))
        ]
        try:
            for inputs, _ in self._batches(None):
                with torch.no_grad():
                    self.forward(params, inputs)
        finally:
            for hook in hooks:
                hook.remove()
        return [torch.cat(outputs) for outputs in found]

    def loss(
        self, params: Params, rows: Tensor, loss: Callable[[Tensor, Tensor], Tensor]
    ) -> Tensor:
        """Mean loss over the examples at `rows`, with its graph."""
        return loss(self.forward(params, self.inputs[rows]).logits, self.labels[rows])

    def _blocks(self, axis: str) -> list[nn.Module]:
        prefix = self.model.depths[axis].prefixes[0]
        return [
            self.module.get_submodule(f"{prefix}{number}")
            for number in range(self.model.units(axis))
        ]

    def _batches(self, rows: Tensor | None) -> list[tuple[Tensor, Tensor]]:
        chosen = torch.arange(len(self.labels)) if rows is None else rows
        return [(self.inputs[part], self.labels[part]) for part in torch.split(chosen, _BATCH)]


def _keep(found: list[Tensor], block: nn.Module, args: object, output: object) -> None:
    hidden = output[0] if isinstance(output, tuple) else output
    assert isinstance(hidden, Tensor)
    found.append(hidden.detach())
