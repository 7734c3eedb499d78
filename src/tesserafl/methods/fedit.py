"""FedIT: every client trains both factors of the adapters, the server averages each by itself.

Zhang et al., "Towards Building the Federated GPT: Federated Instruction Tuning" (FedIT), ICASSP
2024. https://arxiv.org/abs/2305.05644

Averaging the factors is biased: mean(B) mean(A) is not mean(B A). Runs record by how much.

Departures from the paper: clients of a smaller `ratio` train the first rows of the rank, and an
entry is averaged over those that trained it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tesserafl.core.method import (
    Topology,
    Weighting,
    average_trained,
    predict_whole,
    report_deltas,
    train_everything,
)
from tesserafl.methods._adapters import first_ranks, init_adapters


@dataclass(frozen=True, kw_only=True)
class FedIT:
    """FedAvg of low-rank factors."""

    ratio: tuple[float, ...] = (1.0,)
    """share of the rank that each client class trains, dealt to the clients in turn"""
    weighting: Weighting = "examples"
    """weight of a client in the mean: its number of examples, or one each"""

    topology: ClassVar[Topology] = "star"
    entrywise: ClassVar[bool] = True

    init = init_adapters
    configure = first_ranks

    local = train_everything
    report = report_deltas
    aggregate = average_trained
    predictor = predict_whole
