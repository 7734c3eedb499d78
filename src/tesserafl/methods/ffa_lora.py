"""FFA-LoRA: one factor is frozen at its initialisation, so that averages of products are exact.

Sun et al., "Improving LoRA in Privacy-preserving Federated Learning", ICLR 2024.
https://arxiv.org/abs/2403.12313

A = A_0 for everybody; B is trained and averaged: mean(B) A_0 = mean(B A_0). Half the uplink.

Departures from the paper: clients of a smaller `ratio` train the first columns of B; then the mean
is that of those that trained an entry, and no longer exact.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from tesserafl.core.fit import Fit, Training
from tesserafl.core.messages import Client, Memory, Task
from tesserafl.core.method import (
    State,
    Topology,
    Weighting,
    average_trained,
    predict_whole,
    report_deltas,
)
from tesserafl.core.model import Model
from tesserafl.methods._adapters import first_ranks, init_adapters
from tesserafl.methods._wanted import changes_but, wanting


@dataclass(frozen=True, kw_only=True)
class FFALoRA:
    """FedAvg of the factor that begins at zero; the other is frozen."""

    ratio: tuple[float, ...] = (1.0,)
    """share of the rank that each client class trains, dealt to the clients in turn"""
    weighting: Weighting = "examples"
    """weight of a client in the mean: its number of examples, or one each"""

    topology: ClassVar[Topology] = "star"
    entrywise: ClassVar[bool] = True

    init = init_adapters

    def configure(
        self, model: Model, state: State, clients: Sequence[Client], training: Training
    ) -> Iterator[Task]:
        """The first ranks of every adapter; answers hold the factors that are trained."""
        tasks = first_ranks(self, model, state, clients, training)
        return wanting(tasks, changes_but(pair.down for pair in model.low_rank))

    def local(self, model: Model, task: Task, memory: Memory) -> Fit:
        """Everything but the frozen factors."""
        frozen = {pair.down for pair in model.low_rank}
        trainable = frozenset(name for name in task.params if name not in frozen)
        return Fit(params=task.params, training=task.training, trainable=trainable)

    report = report_deltas
    aggregate = average_trained
    predictor = predict_whole
