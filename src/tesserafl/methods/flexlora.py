"""FlexLoRA: the server averages products, and hands out their best factors at every client's rank.

Bai et al., "Federated Fine-tuning of Large Language Models under Heterogeneous Tasks and Client
Resources", NeurIPS 2024. https://arxiv.org/abs/2402.11505

W = sum of p_k B_k A_k; W = U S V^T; a client of rank r gets B = (U S)[:, :r], A = V^T[:r]. Exact
until truncation.

Departures from the paper: the decomposition goes by way of the QR decompositions of the stacked
factors, so that W is never made.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from tesserafl.core.lowrank import Collected, stacked, truncated
from tesserafl.core.messages import Client, Update
from tesserafl.core.method import (
    State,
    Topology,
    Weighting,
    average_trained,
    predict_whole,
    report_deltas,
    train_everything,
    weights_of,
)
from tesserafl.core.model import Model
from tesserafl.methods._adapters import first_ranks, init_adapters


@dataclass(frozen=True, kw_only=True)
class FlexLoRA:
    """Mean of products, decomposed again in every round; made for unequal ranks."""

    ratio: tuple[float, ...] = (1.0,)
    """share of the rank that each client class trains, dealt to the clients in turn"""
    weighting: Weighting = "examples"
    """weight of a client in the mean: its number of examples, or one each"""

    topology: ClassVar[Topology] = "star"
    entrywise: ClassVar[bool] = False
    rewrites: ClassVar[bool] = True

    init = init_adapters
    configure = first_ranks

    local = train_everything
    report = report_deltas

    def aggregate(
        self, model: Model, state: State, clients: Sequence[Client], updates: Iterable[Update]
    ) -> State:
        """Stack the factors, decompose, keep the largest; what is no factor is averaged."""
        kept = Collected(model, weights_of(clients, self.weighting))
        after = average_trained(self, model, state, clients, kept.apart(state.params, updates))
        if not kept.values:
            return after
        params, shares = dict(after.params), kept.shares
        for pair in model.low_rank:
            old = state.params[pair.down]
            up, down = truncated(*stacked(pair, shares), old)
            params[pair.up], params[pair.down] = up.to(old.dtype), down.to(old.dtype)
        return replace(after, params=params)

    predictor = predict_whole
