"""What many clients' objectives read beside inputs and labels, for a cohort's batches.

The outputs of references are computed once for all examples of all clients, by vmap over the
clients, or step by step where their table would be too large.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import accumulate

import torch
from torch import Tensor
from torch.func import vmap

from tesserafl.core.fit import HELD_OUT, Fit, Forward, logits_of
from tesserafl.core.params import Params
from tesserafl.data.examples import Examples
from tesserafl.engines.batches import num_seen
from tesserafl.engines.gather import gathered
from tesserafl.engines.references import outputs_of, too_large
from tesserafl.engines.stacking import Given

Outputs = Callable[[Params, Tensor], Params]
"""Parameters, each [clients, ...] or shared, and inputs [clients, width, ...] -> outputs."""


class Reads:
    """The tensors of every batch that come from the clients' examples, in a fixed order.

    Args:
        fit: of any member.
        forward: the sub-model as a function of its parameters.
        references: of all members; each stacked over the clients (0), or shared by all (None).
        pool: the clients' examples one after another, and one of padding.
        counts: examples of each client; best the largest first.
        held_out: which of the pool's are held out, bool [len(pool)]; None: nobody asks.
        device: where the references are.

    Raises:
        ModelError: there are references, and the model returns no features.
    """

    def __init__(
        self,
        fit: Fit,
        forward: Forward,
        references: Mapping[str, Mapping[str, Given]],
        pool: Examples,
        counts: Sequence[int],
        held_out: Tensor | None,
        device: str,
    ) -> None:
        self._pool, self._device = pool, device
        self._late: list[tuple[Params, Outputs]] = []
        self.num_passes = [0] * len(counts)
        """Forward passes with references, of each client, counted in examples: those that it makes
        where it trains alone, so that the number does not depend on who trains with it."""
        tables: list[Tensor] = []
        names, late_names = [], []
        if held_out is not None:
            names, tables = [HELD_OUT], [held_out.to(device)]
        for name, params in references.items():
            with_logits = name in fit.reference_logits
            own = [name, logits_of(name)] if with_logits else [name]
            dims = {key: dim for key, (_, dim) in params.items()}
            given = {key: tensor for key, (tensor, _) in params.items()}
            outputs = vmap(partial(outputs_of, forward, with_logits), in_dims=(dims, 0))
            size = fit.training.batch_size
            found, alone = _tables(outputs, given, dims, pool, counts, size, device)
            if found is None:
                late_names += own
                self._late.append((given, outputs))
            else:
                names += own
                tables += found.values()
            self.num_passes = [
                n + (count if once else num_seen(count, fit.training))
                for n, count, once in zip(self.num_passes, counts, alone, strict=True)
            ]
        self._tables = tables
        self.names = [*names, *late_names]
        """Under which the objective reads them."""

    def batches(self, table: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """Inputs, labels, then what `names` says, of every step: each [rows, width, ...].

        Args:
            table: rows of the pool, int64 [steps, rows, width].
        """
        steps = gathered(table, self._pool, self._tables, self._device)
        if not self._late:
            yield from steps
            return
        for rows, batch in zip(table, steps, strict=True):
            padding = (rows == len(self._pool) - 1).to(self._device)
            yield (*batch, *self._computed(batch[0], padding))

    @torch.no_grad()
    def _computed(self, inputs: Tensor, padding: Tensor) -> list[Tensor]:
        found = []
        for params, outputs in self._late:
            for kind, values in outputs(params, inputs).items():
                where = padding.reshape(*padding.shape, *[1] * (values.dim() - 2))
                found.append(values.masked_fill(where, _FILL[kind]))
        return found


_FILL = {"features": 1.0, "logits": 0.0}
"""What stands for padding: features that have a direction, like real ones."""


@torch.no_grad()
def _tables(
    outputs: Outputs,
    params: Params,
    dims: Mapping[str, int | None],
    pool: Examples,
    counts: Sequence[int],
    size: int,
    device: str,
) -> tuple[Params | None, list[bool]]:
    """One reference's outputs for the pool, each [len(pool), ...]; None: they are too large.

    Beside it, of each client, whether its own alone are not. The modules of cohorts have neither
    dropout nor BatchNorm, so their mode does not matter.
    """
    total, most = sum(counts), max(counts)
    firsts = [0, *accumulate(counts)]
    tables: Params = {}
    for start in range(0, most, size):
        lasting = max(rank for rank, count in enumerate(counts) if count > start) + 1
        rows = torch.full((lasting, min(size, most - start)), total)
        for rank, first in enumerate(firsts[:lasting]):
            own = range(start, min(counts[rank], start + size))
            rows[rank, : len(own)] = torch.arange(len(own)) + first + start
        given = {name: t if dims[name] is None else t[:lasting] for name, t in params.items()}
        found = outputs(given, pool.batch(rows)[0].to(device))
        flat = {kind: values.flatten(0, 1) for kind, values in found.items()}
        if start == 0:
            alone = [not too_large(flat, rows.numel(), count) for count in counts]
            if too_large(flat, rows.numel(), total + 1):
                return None, alone
        for kind, values in flat.items():
            if kind not in tables:
                tables[kind] = values.new_empty(total + 1, *values.shape[1:])
            tables[kind][rows.reshape(-1).to(device)] = values
    assert tables, "a client has no examples"
    for kind, table in tables.items():
        table[total] = _FILL[kind]  # where the rows that fill up were written to
    return tables, alone
