"""The mean of the products of clients' low-rank factors, as factors again (FlexLoRA's server)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Protocol

from tesserafl.core.lowrank import Collected, stacked, truncated
from tesserafl.core.messages import Client, Update
from tesserafl.core.method import State, Weighting, average_trained, weights_of
from tesserafl.core.model import Model


class _Weighted(Protocol):
    @property
    def weighting(self) -> Weighting: ...


def average_products(
    self: _Weighted,
    model: Model,
    state: State,
    clients: Sequence[Client],
    updates: Iterable[Update],
) -> State:
    """Stack the factors, decompose, keep the largest; what is no factor is averaged.

    The mean of a product is over the clients that trained it; one that nobody trained stays.
    """
    kept = Collected(model, weights_of(clients, self.weighting))
    after = average_trained(self, model, state, clients, kept.apart(state.params, updates))
    if not kept.values:
        return after
    params = dict(after.params)
    for pair in model.low_rank:
        if shares := kept.shares_of(pair):
            old = state.params[pair.down]
            up, down = truncated(*stacked(pair, shares), old)
            params[pair.up], params[pair.down] = up.to(old.dtype), down.to(old.dtype)
    return replace(after, params=params)
