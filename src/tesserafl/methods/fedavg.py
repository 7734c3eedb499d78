"""FedAvg: every client trains the whole model, the server averages.

McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data",
AISTATS 2017, Algorithm 1. https://arxiv.org/abs/1602.05629

At `ratio` 1 it is the ceiling of every sub-model method. Below 1 it is the bar: the global model
itself is only as wide as the smallest client can hold.

Departures from the paper: deltas are averaged instead of weights, which is the same mean.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from tesserafl.core.fit import Training
from tesserafl.core.messages import Client, Task
from tesserafl.core.method import (
    Predictor,
    State,
    Topology,
    Weighting,
    average_trained,
    report_deltas,
    train_everything,
)
from tesserafl.core.model import Model
from tesserafl.methods._width import smallest_part


@dataclass(frozen=True, kw_only=True)
class FedAvg:
    """One model for all clients, at full width or at the width of the smallest client."""

    ratio: tuple[float, ...] = (1.0,)
    """width of the model that is trained: the smallest of these, 1 = the global model's width"""
    weighting: Weighting = "examples"
    """weight of a client in the mean: its number of examples (as in the paper), or one each"""

    topology: ClassVar[Topology] = "star"
    entrywise: ClassVar[bool] = True

    def init(self, model: Model, seed: int, rounds: int) -> State:
        """The model at the clients' width, freshly initialised at that width."""
        return State(params=smallest_part(model, self.ratio).init(seed), seed=seed, rounds=rounds)

    def configure(
        self, model: Model, state: State, clients: Sequence[Client], training: Training
    ) -> Iterator[Task]:
        """Everybody gets everything (Alg. 1, server, line 6)."""
        everything = smallest_part(model, self.ratio).whole()
        for client in clients:  # nobody writes to a task's parameters: all may hold the same
            yield Task(
                round=state.round,
                client=client,
                submodel=everything,
                params=state.params,
                training=training,
            )

    local = train_everything
    report = report_deltas
    aggregate = average_trained

    def predictor(self, model: Model, state: State) -> Predictor:
        """The averaged model."""
        return Predictor(model=smallest_part(model, self.ratio), params=state.params)
