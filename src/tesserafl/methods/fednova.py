"""FedNova: clients take unequal numbers of local steps, and none pulls the model its own way.

Wang et al., "Tackling the Objective Inconsistency Problem in Heterogeneous Federated Optimization",
NeurIPS 2020, Equations 6 and 7. https://arxiv.org/abs/2007.07481

Plain averaging of changes made in tau_i steps converges to the minimum of sum p_i tau_i F_i, not of
sum p_i F_i. Here a change counts per step, and the mean is made tau_eff steps long.

Departures from the paper: none for SGD, with or without momentum, on whole models. AdamW's steps
count one each, and an entry of a cut model is averaged over those that trained it: the paper treats
neither.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from tesserafl.core.messages import Client, Update
from tesserafl.core.method import (
    State,
    Topology,
    Weighting,
    init_whole,
    predict_whole,
    train_everything,
)
from tesserafl.core.model import Model
from tesserafl.methods._levels import counted_units
from tesserafl.methods._normalised import normalised, relayed_normed, report_normed


@dataclass(frozen=True, kw_only=True)
class FedNova:
    """Averaging of changes per local step."""

    ratio: tuple[float, ...] = (1.0,)
    """share of every axis that each client class trains, dealt to the clients in turn"""
    weighting: Weighting = "examples"
    """p_i: a client's number of examples (as in the paper), or one each"""

    topology: ClassVar[Topology] = "star"
    entrywise: ClassVar[bool] = False

    init = init_whole
    configure = counted_units
    local = train_everything
    report = report_normed

    def aggregate(
        self, model: Model, state: State, clients: Sequence[Client], updates: Iterable[Update]
    ) -> State:
        """w + tau_eff x the mean change per step (Eq. 6)."""
        return normalised(state, clients, updates, self.weighting)

    relayed = relayed_normed
    predictor = predict_whole
