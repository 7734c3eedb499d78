"""Federated Dropout: every client trains a random subset of each layer's channels.

Caldas et al., "Expanding the Reach of Federated Learning by Reducing Client Resource Requirements",
2018, section 3.2. https://arxiv.org/abs/1812.07210

Departures from the paper: the subset is drawn per client and round (the paper draws one per round;
per client is what later work compares with, FedRolex, NeurIPS 2022); channels that are added
together share one draw; entries that nobody trained in a round keep their value.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from tesserafl.core import seeds
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
from tesserafl.core.submodel import Units
from tesserafl.methods._width import kept_units, ratio_of, width_tasks


@dataclass(frozen=True, kw_only=True)
class FederatedDropout:
    """A uniform random subset of ceil(r K) units per axis, redrawn per client and round."""

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
        """A fresh draw per client, round and axis."""

        def keep(slot: int, client: Client) -> Mapping[str, Units]:
            ratio = ratio_of(self.ratio, client)
            return {
                axis: self._draw(model, state, client, axis, kept_units(model, axis, ratio))
                for axis in model.cuttable
            }

        return width_tasks(model, state, clients, training, keep)

    local = train_scaled
    report = report_deltas
    aggregate = average_trained
    predictor = predict_whole

    def _draw(self, model: Model, state: State, client: Client, axis: str, count: int) -> Units:
        draw = seeds.generator(state.seed, state.round, client.id, "dropout", axis)
        return torch.randperm(model.units(axis), generator=draw)[:count].sort().values
