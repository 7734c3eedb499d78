"""FedRolex: every client trains a window of channels that moves one step per round.

Alam et al., "FedRolex: Model-Heterogeneous Federated Learning with Rolling Sub-Model Extraction",
NeurIPS 2022, Algorithm 1 and Equation 3. https://arxiv.org/abs/2212.01548

Departures from the paper: the window moves by whole units (a normalisation group, an attention
head), because a window across half a head is no head; widths round up, as the authors' code does.
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
from tesserafl.methods._width import kept_units, ratio_of, width_tasks, window


@dataclass(frozen=True, kw_only=True)
class FedRolex:
    """A cyclic window that starts at the round number, the same for all clients of one ratio."""

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
        """Window {t, t + 1, ..., t + ceil(r K) - 1} modulo K on every axis (Eq. 3)."""

        def keep(slot: int, client: Client) -> Mapping[str, Units]:
            ratio = ratio_of(self.ratio, client)
            return {
                axis: window(state.round, kept_units(model, axis, ratio), model.units(axis))
                for axis in model.cuttable
            }

        return width_tasks(model, state, clients, training, keep)

    local = train_scaled
    report = report_deltas
    aggregate = average_trained
    predictor = predict_whole
