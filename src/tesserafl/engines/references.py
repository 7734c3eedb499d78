"""What a client's frozen parameter sets give for its examples, for its objective: `Fit.references`.

One client's are computed once for all its examples, or for every batch where an example has none of
its own. Those that come back in a later round are kept from then on.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tesserafl.core.errors import ModelError
from tesserafl.core.fit import Fit, Forward, logits_of
from tesserafl.core.params import Params, aligned
from tesserafl.data.examples import Examples
from tesserafl.engines.batches import augments
from tesserafl.engines.frozen import Frozen
from tesserafl.engines.kept import Shelf, digests_of, joined, rows_of
from tesserafl.models.modes import batch_norms, predicting

MOST_BYTES = 256 << 20
"""Of a table of one reference's features, or of its logits. More are computed for every batch: a
language model gives a number for every word of the vocabulary at every place."""


class References:
    """The references of one client, where it trains.

    Frozen parameters give an example the same outputs in every epoch, so these are computed once,
    before the first step. Not if batches are augmented, nor with BatchNorm, for which an example's
    features depend on its batch, nor if their table is too large: then for every batch.
    """

    def __init__(
        self,
        fit: Fit,
        forward: Forward,
        examples: Examples,
        device: str,
        module: nn.Module | None,
        shelf: Shelf | None = None,
        frozen: Frozen | None = None,
    ) -> None:
        self.num_examples = 0
        """Examples of all forward passes so far, over all references: as if nothing were left from
        earlier rounds, so that it is equal in every process."""
        self._forward, self._module, self._device = forward, module, device
        self._examples, self._size = examples, fit.training.batch_size
        self._tables: dict[str, Params] = {}
        self._late: list[_Reference] = []
        alone = augments(fit.training, examples) or bool(batch_norms(module))
        keeping = None if shelf is None or not shelf.kept.most_bytes else shelf
        for name, params in fit.references.items():
            kept_or_asked = frozen is not None or (keeping is not None and not alone)
            digests = digests_of(params) if kept_or_asked else {}
            shared = frozen if frozen is not None and frozen.serves(digests) else None
            with_logits, key = name in fit.reference_logits, None
            if keeping is not None and not alone:
                kind = (joined(digests, digests), shared is not None, with_logits)
                key = keeping.key("reference", *kind, self._size)
                if (entry := keeping.kept.get(key)) is not None:
                    self._tables[name] = entry
                    self.num_examples += len(examples)
                    continue
            reference = _Reference(
                name=name,
                params={n: aligned(tensor.detach().to(device)) for n, tensor in params.items()},
                with_logits=with_logits,
                frozen=shared,
            )
            table = None if alone else self._table(reference)
            if table is None:
                self._late.append(reference)
                continue
            self._tables[name] = table
            self.num_examples += len(examples)
            if keeping is not None and keeping.kept.again(key):
                keeping.kept.put(key, table)

    def read(self, rows: Tensor, inputs: Tensor) -> Params:
        """What the objective reads for a batch: features [batch, ...], logits if asked for.

        Args:
            rows: of the client's examples, int64 [batch].
            inputs: what the model is given for them [batch, ...], on the device.
        """
        found: Params = {}
        for name, table in self._tables.items():
            found |= {_named(name, kind): rows_of(each, rows) for kind, each in table.items()}
        for reference in self._late:
            self.num_examples += len(inputs)
            outputs = self._compute(reference, rows, inputs)
            found |= {_named(reference.name, kind): each for kind, each in outputs.items()}
        return found

    def _table(self, reference: _Reference) -> Params | None:
        """Outputs for all examples, each [n, ...]; None: they are too large."""
        parts: list[Params] = []
        for rows in torch.split(torch.arange(len(self._examples)), self._size):
            inputs = self._examples.batch(rows)[0].to(self._device)
            parts.append(self._compute(reference, rows, inputs))
            if too_large(parts[0], len(rows), len(self._examples)) and len(parts) == 1:
                return None
        return {kind: torch.cat([part[kind] for part in parts]) for kind in parts[0]}

    @torch.no_grad()
    def _compute(self, reference: _Reference, rows: Tensor, inputs: Tensor) -> Params:
        forward = self._forward
        if reference.frozen is not None:
            forward = reference.frozen.at(rows, inputs, reference.params)
        with predicting(self._module):
            return outputs_of(forward, reference.with_logits, reference.params, inputs)


@dataclass(frozen=True, kw_only=True)
class _Reference:
    name: str
    params: Params
    with_logits: bool
    frozen: Frozen | None
    """What lies below, if it is what the trained parameters have there."""


def outputs_of(forward: Forward, with_logits: bool, params: Params, inputs: Tensor) -> Params:
    """`features` [batch, ...] of inputs [batch, ...] and, if asked for, `logits`.

    Raises:
        ModelError: the model returns no features.
    """
    out = forward(params, inputs)
    if out.features is None:
        raise ModelError(
            "the method compares features, and the model returns logits alone; let the module "
            "return tesserafl.core.model.Output(logits, features), with what goes into its head "
            "as features [batch, features], or choose a model or a method of another kind"
        )
    found = {"features": out.features}
    return found | {"logits": out.logits} if with_logits else found


def too_large(outputs: Params, count: int, total: int) -> bool:
    """Whether the outputs of `total` examples are, by those of `count`."""
    return any(each.nbytes // count * total > MOST_BYTES for each in outputs.values())


def _named(reference: str, kind: str) -> str:
    return logits_of(reference) if kind == "logits" else reference
