"""HeteroFL: every client trains the first channels of each layer.

Diao, Ding and Tarokh, "HeteroFL: Computation and Communication Efficient Federated Learning for
Heterogeneous Clients", ICLR 2021, Algorithm 1. https://arxiv.org/abs/2010.01264

The masked loss of the paper is `training.mask_absent_classes`, so that every method can be compared
with and without it.

Departures from the paper: GroupNorm by default (static BatchNorm is `model.norm batch`); attention
is cut by whole heads, where the paper keeps a part of every head.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from tesserafl.core.fit import Training, WidthScaling
from tesserafl.core.messages import Client, Task
from tesserafl.core.method import (
    State,
    Topology,
    Weighting,
    average_trained,
    init_whole,
    predict_whole,
    report_deltas,
    train_scaled,
)
from tesserafl.core.model import Model
from tesserafl.methods._width import prefix_tasks


@dataclass(frozen=True, kw_only=True)
class HeteroFL:
    """Nested sub-models: a client of ratio r keeps the first ceil(r K) units of an axis."""

    ratio: tuple[float, ...] = (0.25,)
    """width ratios of the client classes, dealt to the clients in turn"""
    weighting: Weighting = "uniform"
    """weight of a client in the mean: one each (as in the papers' code), or its examples"""
    width_scaling: WidthScaling = "output"
    """how a cut layer makes up for the inputs it lacks: none, output (HeteroFL's scaler) or
    parameters (as output, at the learning pace of a small network)"""

    topology: ClassVar[Topology] = "star"
    entrywise: ClassVar[bool] = True
    init = init_whole

    def configure(
        self, model: Model, state: State, clients: Sequence[Client], training: Training
    ) -> Iterator[Task]:
        """The same prefix in every round (Alg. 1, line 5)."""
        return prefix_tasks(model, state, clients, training, self.ratio)

    local = train_scaled
    report = report_deltas
    aggregate = average_trained
    predictor = predict_whole
