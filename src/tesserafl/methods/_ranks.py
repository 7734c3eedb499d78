"""The last ranks of a client's adapters: kept small in training, and given up when they shrank."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tesserafl.core.fit import CrossEntropy, Forward
from tesserafl.core.messages import Update
from tesserafl.core.model import Model
from tesserafl.core.params import Params


def kept_ranks(rank: int, decay: float) -> int:
    """floor(decay x rank), but one less than all and at least one."""
    return max(1, min(rank - 1, int(round(decay * rank, 9))))


@dataclass(frozen=True)
class TailPenalty:
    """Cross-entropy + penalty x sum over adapters of ||B[:, k:]|| ||A[k:]||."""

    penalty: float
    decay: float
    pairs: tuple[tuple[str, str], ...]
    """Names of the factors: down [rank, in] and up [out, rank]."""

    def __call__(
        self,
        forward: Forward,
        params: Params,
        inputs: Tensor,
        labels: Tensor,
        extra: Mapping[str, Tensor],
    ) -> Tensor:
        """The mean loss of a batch, a scalar."""
        loss = CrossEntropy()(forward, params, inputs, labels, extra)
        return loss + self.penalty * _tails(params, self.pairs, self.decay)


def tail_norm(model: Model, params: Params, decay: float) -> float:
    """Sum over adapters of the product of the norms of the last ranks."""
    pairs = tuple((pair.down, pair.up) for pair in model.low_rank)
    return float(_tails(params, pairs, decay))


def without_tail(model: Model, update: Update, decay: float) -> Update:
    """The update of the first ranks alone."""
    rows, delta = {}, dict(update.delta)
    for pair in model.low_rank:
        if pair.down not in delta or len(delta[pair.down]) == 1:
            continue
        kept = slice(0, kept_ranks(len(delta[pair.down]), decay))
        rows[pair.down], rows[pair.up] = {0: kept}, {1: kept}
        delta[pair.down] = delta[pair.down][kept]
        delta[pair.up] = delta[pair.up][:, kept]
    return replace(update, submodel=update.submodel.restrict(rows), delta=delta)


def _tails(params: Params, pairs: tuple[tuple[str, str], ...], decay: float) -> Tensor:
    total = torch.zeros(())
    for down, up in pairs:
        if len(params[down]) > 1:
            kept = kept_ranks(len(params[down]), decay)
            # The root of zero has no gradient, and B begins at zero.
            tails = (params[up][:, kept:].square().sum(), params[down][kept:].square().sum())
            total = total.to(tails[0]) + (tails[0] * tails[1] + 1e-12).sqrt()
    return total
