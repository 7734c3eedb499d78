"""FedIT: every client trains both factors of the adapters, the server averages each by itself.

Zhang et al., "Towards Building the Federated GPT: Federated Instruction Tuning" (FedIT), ICASSP
2024. https://arxiv.org/abs/2305.05644

Averaging the factors is biased: mean(B) mean(A) is not mean(B A). Runs record by how much.

Departures from the paper: clients of a smaller `ratio` train the first rows of the rank, and an
entry is averaged over those that trained it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from tesserafl.core.fit import Training
from tesserafl.core.lowrank import check_adapted
from tesserafl.core.messages import Client, Task
from tesserafl.core.method import (
    State,
    Topology,
    Weighting,
    average_trained,
    init_whole,
    predict_whole,
    report_deltas,
    train_everything,
)
from tesserafl.core.model import Model
from tesserafl.methods._width import prefix_tasks


@dataclass(frozen=True, kw_only=True)
class FedIT:
    """FedAvg of low-rank factors."""

    ratio: tuple[float, ...] = (1.0,)
    """share of the rank that each client class trains, dealt to the clients in turn"""
    weighting: Weighting = "examples"
    """weight of a client in the mean: its number of examples, or one each"""

    topology: ClassVar[Topology] = "star"
    entrywise: ClassVar[bool] = True

    def init(self, model: Model, seed: int, rounds: int) -> State:
        """The adapters as they are drawn: their product is zero."""
        check_adapted(model, "fedit")
        return init_whole(self, model, seed, rounds)

    def configure(
        self, model: Model, state: State, clients: Sequence[Client], training: Training
    ) -> Iterator[Task]:
        """The first ranks of every adapter, as many as the client holds."""
        return prefix_tasks(model, state, clients, training, self.ratio)

    local = train_everything
    report = report_deltas
    aggregate = average_trained
    predictor = predict_whole
