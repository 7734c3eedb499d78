"""D-PSGD: peers train and average with their neighbours; nobody sees everybody.

Lian et al., "Can Decentralized Algorithms Outperform Centralized Algorithms?", NeurIPS 2017,
Algorithm 1. https://arxiv.org/abs/1705.09056

The mixing weights are the network's: equal where everybody has equally many neighbours, else
Metropolis weights.

Departures from the paper: peers train for whole epochs between two averagings, not for one step,
and train before they average (the paper allows either order). Below `ratio` 1 it is the partial
variant: a peer always trains the same window of channels, the windows spread evenly, and an entry
is averaged over those neighbours that train it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
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
from tesserafl.core.submodel import Units
from tesserafl.methods._width import kept_units, ranks_of, ratio_of, width_tasks, window


@dataclass(frozen=True, kw_only=True)
class DPSGD:
    """Gossip averaging over a graph, of the whole model or of a fixed window of it."""

    ratio: tuple[float, ...] = (1.0,)
    """width ratios of the peers, dealt in turn; 1 = every peer trains the whole model"""
    weighting: Weighting = "uniform"
    """weight of a peer in its neighbours' means, times the network's: one each, or its examples"""
    width_scaling: WidthScaling = "output"
    """how a cut layer makes up for the inputs it lacks: none, output (HeteroFL's scaler) or
    parameters (as output, at the learning pace of a small network)"""

    topology: ClassVar[Topology] = "peers"
    exchange: ClassVar[str] = "gossip"
    entrywise: ClassVar[bool] = True
    init = init_whole

    def configure(
        self, model: Model, state: State, clients: Sequence[Client], training: Training
    ) -> Iterator[Task]:
        """Peer n of N begins at n/N of every axis."""
        ranks = ranks_of(clients)

        def keep(slot: int, client: Client) -> Mapping[str, Units]:
            ratio = ratio_of(self.ratio, client)
            return {
                axis: window(
                    ranks[client.id] * model.units(axis) // len(clients),
                    kept_units(model, axis, ratio),
                    model.units(axis),
                )
                for axis in model.cuttable
            }

        return width_tasks(model, state, clients, training, keep)

    local = train_scaled
    report = report_deltas
    aggregate = average_trained
    predictor = predict_whole
