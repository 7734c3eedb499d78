"""Measure a predictor: the full model as it is, nothing scaled, nothing left out.

What frozen blocks give for the examples of a test is computed once and kept, in the same store as
that of the clients' training and in parts of the same size as without: the same bits.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, nn

from tesserafl.core.fit import IGNORED, Forward
from tesserafl.core.method import Predictor
from tesserafl.core.metrics import Metrics, measure
from tesserafl.core.modules import parameters_of
from tesserafl.core.params import Params, aligned
from tesserafl.data.examples import Examples, FederatedData
from tesserafl.engines.frozen import Frozen, kept_below
from tesserafl.engines.kept import Kept, Shelf, digests_of, nothing_kept
from tesserafl.models.normalisation import collect_statistics, has_statistics
from tesserafl.models.scaling import forward_of

_BATCH = 500
_TEXT_BATCH = 32


@dataclass(kw_only=True)
class Evaluator:
    """Evaluates on one device; keeps the built module."""

    data: FederatedData
    device: str = "cpu"
    kept: Kept = field(default_factory=nothing_kept)
    """What frozen blocks gave; if it keeps nothing, no block is left out."""
    _modules: dict[Hashable, nn.Module] = field(default_factory=dict)
    _filled: Params | None = None
    """The parameters that the module's statistics were collected for."""
    _seen: dict[Hashable, tuple[dict[str, str], frozenset[str]]] = field(default_factory=dict)
    """Digests of the parameters that were measured last, and what has changed between tests."""

    def evaluate(
        self, predictor: Predictor, examples: Examples, params: Params | None = None
    ) -> Metrics:
        """Metrics over the examples; `params` replaces the predictor's own."""
        module = self._module(predictor)
        source = params or predictor.params
        values = {name: aligned(tensor.to(self.device)) for name, tensor in source.items()}
        if has_statistics(module) and source is not self._filled:
            self.fill_statistics(module, values)
            self._filled = source
        changing = None
        if params is None and predictor.rule is None and self._keeps(predictor):
            changing = self._changing(predictor)
        total = Metrics()
        with torch.no_grad():
            for forward, inputs, labels in self._calls(predictor, examples, values, changing):
                if predictor.rule is None:
                    out = forward(values, inputs)
                else:
                    out = predictor.rule(forward, values, inputs)
                total += measure(out.logits, labels)
        return total

    def share(self, predictor: Predictor, examples: Examples) -> float | None:
        """How much the second of two mixed models counts, on average; None: nothing is mixed."""
        shares = getattr(predictor.rule, "shares", None)
        if shares is None:
            return None
        values = {n: aligned(tensor.to(self.device)) for n, tensor in predictor.params.items()}
        total, count = 0.0, 0
        with torch.no_grad():
            for forward, inputs, labels in self._calls(predictor, examples, values):
                second = shares(forward, values, inputs)[..., 1]
                counted = labels != IGNORED  # of a text, places
                total += float((second * counted).sum())
                count += int(counted.sum())
        return total / max(1, count)

    def fill_statistics(self, module: nn.Module, params: Params) -> None:
        """Static BatchNorm (HeteroFL): statistics over all clients' training data."""
        inputs = (
            inputs.to(self.device)
            for client in self.data.clients
            for _, inputs, _ in self._batches(client.train)
        )
        collect_statistics(module, params, inputs)

    def _module(self, predictor: Predictor) -> nn.Module:
        key = _key(predictor)
        if key not in self._modules:
            self._modules[key] = predictor.model.module().to(self.device)
        return self._modules[key]

    def _calls(
        self,
        predictor: Predictor,
        examples: Examples,
        values: Params,
        changing: frozenset[str] | None = None,
    ) -> Iterator[tuple[Forward, Tensor, Tensor]]:
        """The model as a function, inputs and labels of every batch.

        Args:
            predictor: whose model.
            examples: what it is measured on.
            values: its parameters, on the device.
            changing: below what; None: below all that the model has.
        """
        model, module = predictor.model, self._module(predictor).eval()
        forward = forward_of(model, model.whole(), module, "none")
        frozen = self._frozen(predictor, examples, forward, values, changing)
        # What lies below all parameters is the same for any.
        own = {} if changing is None else values
        for rows, inputs, labels in self._batches(examples):
            inputs, labels = inputs.to(self.device), labels.to(self.device)
            yield forward if frozen is None else frozen.at(rows, inputs, own), inputs, labels

    def _keeps(self, predictor: Predictor) -> bool:
        return bool(
            self.kept.most_bytes
            and predictor.model.frozen_blocks
            and not has_statistics(self._module(predictor))  # no parameters, and yet they change
        )

    def _changing(self, predictor: Predictor) -> frozenset[str] | None:
        """What has changed between the tests so far; None: nothing has, or this is the first."""
        digests = digests_of(predictor.params)
        before, moved = self._seen.get(_key(predictor), (digests, frozenset[str]()))
        moved |= {name for name, digest in digests.items() if digest != before.get(name)}
        self._seen[_key(predictor)] = digests, moved
        return moved or None

    def _frozen(
        self,
        predictor: Predictor,
        examples: Examples,
        forward: Forward,
        values: Params,
        changing: frozenset[str] | None,
    ) -> Frozen | None:
        """What the blocks below `changing` give for the examples; None: nothing is kept."""
        name = self._names.get(id(examples))
        if name is None or not self._keeps(predictor):
            return None
        module, model = self._module(predictor), predictor.model
        shelf = Shelf(
            kept=self.kept,
            client=name[0],
            forward=("measured", _key(predictor)),
            prefixes=model.frozen_blocks,
        )
        # A mixture has more sets of parameters than one: then any set will do.
        own, source = (values, predictor.params) if changing else (parameters_of(module),) * 2
        changed = frozenset(model.shapes) if changing is None else changing
        size = self._batch_size
        return kept_below(shelf, forward, module, examples, own, source, changed, size, name[1])

    @cached_property
    def _names(self) -> dict[int, tuple[int | None, str]]:
        """Whose the data's examples are, and what they are for: what is kept goes by that."""
        names: dict[int, tuple[int | None, str]] = {id(self.data.test): (None, "test")}
        for number, client in enumerate(self.data.clients):
            names[id(client.validation)] = number, "measured validation"
            names[id(client.test)] = number, "test"
        return names

    @property
    def _batch_size(self) -> int:
        return _TEXT_BATCH if self.data.spec.kind == "tokens" else _BATCH

    def _batches(self, examples: Examples) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Rows, inputs and labels."""
        for rows in torch.split(torch.arange(len(examples)), self._batch_size):
            yield rows, *examples.batch(rows)


def _key(predictor: Predictor) -> Hashable:
    return tuple(sorted(predictor.model.sizes.items()))
