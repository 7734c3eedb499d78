"""DepthFL: clients hold the first blocks and the exits up to there, which teach each other.

Kim, Yu, Kim, Moon, "DepthFL: Depthwise Federated Learning for Heterogeneous Clients", ICLR 2023.
https://openreview.net/forum?id=pf8RIZTMU58

Departures from the paper: clients average (its "DepthFL (FedAvg)"); the paper's main rows use
FedDyn's dynamic regularisation. The loss, its weights and the ensemble follow the first author's
code in Flower's baselines; the paper's text was not read line by line.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from tesserafl.core.errors import ConfigError
from tesserafl.core.fit import Fit, Training
from tesserafl.core.messages import Client, Memory, Task
from tesserafl.core.method import (
    State,
    Topology,
    Weighting,
    average_trained,
    init_whole,
    predict_whole,
    report_deltas,
)
from tesserafl.core.model import Model
from tesserafl.core.submodel import Units
from tesserafl.methods._depth import depth_of, first_blocks
from tesserafl.methods._exits import WEIGHT, MutualDistillation, check_exits
from tesserafl.methods._width import width_tasks


@dataclass(frozen=True, kw_only=True)
class DepthFL:
    """The first blocks of the model, a classifier behind each, mutual self-distillation."""

    depth: tuple[int, ...] = (5,)
    """blocks (of every stage) that each client class trains, dealt to the clients in turn"""
    distill: float = 1.0
    """weight of the distillation between exits once it has risen; 0: none"""
    ramp: float = 0.3
    """share of the rounds in which that weight rises"""
    temperature: float = 1.0
    """T: softens the exits' answers where they teach each other"""
    weighting: Weighting = "uniform"
    """weight of a client in the mean: one each, or its examples"""

    topology: ClassVar[Topology] = "star"
    entrywise: ClassVar[bool] = True

    @property
    def ratio(self) -> tuple[float, ...]:
        """Widths are whole."""
        return (1.0,) * len(self.depth)

    def init(self, model: Model, seed: int, rounds: int) -> State:
        """The global model, whose every block needs an exit."""
        check_exits(model)
        if self.distill < 0 or not 0 <= self.ramp <= 1 or not self.temperature > 0:
            raise ConfigError(
                f"method.distill must be 0 or more, method.ramp in [0, 1] and method.temperature "
                f"positive; got {self.distill}, {self.ramp} and {self.temperature}"
            )
        return init_whole(self, model, seed, rounds)

    def configure(
        self, model: Model, state: State, clients: Sequence[Client], training: Training
    ) -> Iterator[Task]:
        """Client k gets the first d_k blocks and their exits."""

        def keep(slot: int, client: Client) -> Mapping[str, Units]:
            return first_blocks(model, depth_of(self.depth, client))

        for task in width_tasks(model, state, clients, training, keep):
            yield replace(task, options={WEIGHT: self._weight(state)})

    def local(self, model: Model, task: Task, memory: Memory) -> Fit:
        """The cross-entropies of all exits, and what they learn from each other."""
        return Fit(
            params=task.params,
            training=task.training,
            objective=MutualDistillation(temperature=self.temperature),
            extra={WEIGHT: torch.tensor(float(task.options[WEIGHT]))},
        )

    report = report_deltas
    aggregate = average_trained
    predictor = predict_whole

    def _weight(self, state: State) -> float:
        """Of the distillation: rises as exp(-5 (1 - t / ramp)^2), the code's 300 of 1000 rounds."""
        end = self.ramp * state.rounds
        missing = 1.0 - min(state.round / end, 1.0) if end else 0.0
        return self.distill * math.exp(-5.0 * missing**2)
