"""FlexLoRA: the server averages products, and hands out their best factors at every client's rank.

Bai et al., "Federated Fine-tuning of Large Language Models under Heterogeneous Tasks and Client
Resources", NeurIPS 2024. https://arxiv.org/abs/2402.11505

W = sum of p_k B_k A_k; W = U S V^T; a client of rank r gets B = (U S)[:, :r], A = V^T[:r]. Exact
until truncation.

Departures from the paper: the decomposition goes by way of the QR decompositions of the stacked
factors, so that W is never made.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tesserafl.core.method import (
    Topology,
    Weighting,
    predict_whole,
    report_deltas,
    train_everything,
)
from tesserafl.methods._adapters import first_ranks, init_adapters
from tesserafl.methods._products import average_products


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

    aggregate = average_products
    predictor = predict_whole
