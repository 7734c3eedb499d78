"""FedSA-LoRA: clients share one factor of their adapters and keep the other, and the head.

Guo et al., "Selective Aggregation for Low-Rank Adaptation in Federated Learning", ICLR 2025.
https://arxiv.org/abs/2410.01463

A learns what is common, B what is the client's own; both are trained, A alone is averaged.

Departures from the paper: clients of a smaller `ratio` train the first ranks. The global model has
the mean A and the initial B, whose product is zero: what counts is `accuracy_personal`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from tesserafl.core.fit import Fit, Fitted, Training
from tesserafl.core.messages import Client, Memory, Task
from tesserafl.core.method import (
    Predictor,
    Report,
    State,
    Topology,
    Weighting,
    average_trained,
    predict_whole,
    report_deltas,
)
from tesserafl.core.model import Model
from tesserafl.methods._adapters import first_ranks, init_adapters
from tesserafl.methods._own import own_of, personal_of, remember
from tesserafl.methods._wanted import changes_of, wanting


@dataclass(frozen=True, kw_only=True)
class FedSALoRA:
    """FedAvg of one factor; the other never leaves its client."""

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
        """The first ranks of every adapter; answers hold the shared factors."""
        tasks = first_ranks(self, model, state, clients, training)
        return wanting(tasks, changes_of(pair.down for pair in model.low_rank))

    def local(self, model: Model, task: Task, memory: Memory) -> Fit:
        """The mean A with the client's own B and head."""
        return Fit(params={**task.params, **own_of(memory)}, training=task.training)

    def report(self, model: Model, task: Task, fitted: Fitted, memory: Memory) -> Report:
        """The change of A; the rest is kept."""
        update, _ = report_deltas(self, model, task, fitted, memory)
        shared = {pair.down for pair in model.low_rank}
        kept = {name: value for name, value in fitted.params.items() if name not in shared}
        delta = {name: change for name, change in update.delta.items() if name in shared}
        return replace(update, delta=delta), remember(kept)

    aggregate = average_trained
    predictor = predict_whole

    def personal(self, model: Model, state: State, memory: Memory) -> Predictor:
        """The mean A with the client's own B and head."""
        return personal_of(model, state, memory)
