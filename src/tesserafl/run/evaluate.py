"""Measure a predictor: the full model as it is, nothing scaled, nothing left out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from tesserafl.core.fit import IGNORED
from tesserafl.core.method import Predictor
from tesserafl.core.metrics import Metrics, measure
from tesserafl.core.params import Params, aligned
from tesserafl.data.examples import Examples, FederatedData
from tesserafl.models.normalisation import collect_statistics, has_statistics
from tesserafl.models.scaling import forward_of

_BATCH = 500
_TEXT_BATCH = 32


@dataclass(kw_only=True)
class Evaluator:
    """Evaluates on one device; keeps the built module."""

    data: FederatedData
    device: str = "cpu"
    _modules: dict[tuple[tuple[str, int], ...], nn.Module] = field(default_factory=dict)
    _filled: Params | None = None
    """The parameters that the module's statistics were collected for."""

    def evaluate(
        self, predictor: Predictor, examples: Examples, params: Params | None = None
    ) -> Metrics:
        """Metrics over the examples; `params` replaces the predictor's own."""
        model = predictor.model
        module = self._module(predictor)
        source = params or predictor.params
        values = {name: aligned(tensor.to(self.device)) for name, tensor in source.items()}
        if has_statistics(module) and source is not self._filled:
            self.fill_statistics(module, values)
            self._filled = source
        module.eval()
        forward = forward_of(model, model.whole(), module, "none")
        total = Metrics()
        with torch.no_grad():
            for inputs, labels in self._batches(examples):
                inputs = inputs.to(self.device)
                if predictor.rule is None:
                    out = forward(values, inputs)
                else:
                    out = predictor.rule(forward, values, inputs)
                total += measure(out.logits, labels.to(self.device))
        return total

    def share(self, predictor: Predictor, examples: Examples) -> float | None:
        """How much the second of two mixed models counts, on average; None: nothing is mixed."""
        shares = getattr(predictor.rule, "shares", None)
        if shares is None:
            return None
        module = self._module(predictor).eval()
        values = {n: aligned(tensor.to(self.device)) for n, tensor in predictor.params.items()}
        forward = forward_of(predictor.model, predictor.model.whole(), module, "none")
        total, count = 0.0, 0
        with torch.no_grad():
            for inputs, labels in self._batches(examples):
                second = shares(forward, values, inputs.to(self.device))[..., 1]
                counted = (labels != IGNORED).to(self.device)  # of a text, places
                total += float((second * counted).sum())
                count += int(counted.sum())
        return total / max(1, count)

    def fill_statistics(self, module: nn.Module, params: Params) -> None:
        """Static BatchNorm (HeteroFL): statistics over all clients' training data."""
        inputs = (
            inputs.to(self.device)
            for client in self.data.clients
            for inputs, _ in self._batches(client.train)
        )
        collect_statistics(module, params, inputs)

    def _module(self, predictor: Predictor) -> nn.Module:
        key = tuple(sorted(predictor.model.sizes.items()))
        if key not in self._modules:
            self._modules[key] = predictor.model.module().to(self.device)
        return self._modules[key]

    def _batches(self, examples: Examples) -> Iterator[tuple[Tensor, Tensor]]:
        size = _TEXT_BATCH if self.data.spec.kind == "tokens" else _BATCH
        for rows in torch.split(torch.arange(len(examples)), size):
            yield examples.batch(rows)
