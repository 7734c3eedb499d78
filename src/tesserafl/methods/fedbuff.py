"""FedBuff: asynchronous federated learning with a buffer of K updates.

Nguyen et al., "Federated Learning with Buffered Asynchronous Aggregation", AISTATS 2022, Algorithm
1. https://arxiv.org/abs/2106.06639

A device is sent the newest model as soon as it is free; K answers, of whatever age, make the next.
Run it with `clock.mode asynchronous` (`clock.buffer` is K, `clock.concurrency` the devices that
work at any time); in synchronous rounds nothing is stale, and it is FedAvg with a server's rate.

Departures from the paper: the mean runs over the weights of those that trained an entry, K of them
where all train everything; a device that returns before the model has changed waits for it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from tesserafl.core.errors import ConfigError
from tesserafl.core.messages import Client, Update
from tesserafl.core.method import (
    State,
    Topology,
    Weighting,
    init_whole,
    next_round,
    predict_whole,
    report_deltas,
    sum_of,
    train_everything,
)
from tesserafl.core.model import Model
from tesserafl.core.submodel import merge
from tesserafl.methods._levels import first_units
from tesserafl.methods._staleness import Decay, check_decay, decayed, times


@dataclass(frozen=True, kw_only=True)
class FedBuff:
    """A mean of changes, each the less the older the model is that it began with."""

    ratio: tuple[float, ...] = (1.0,)
    """share of every axis that each client class trains, dealt to the clients in turn"""
    weighting: Weighting = "uniform"
    """weight of an update in the mean: one each (as in the paper), or its client's examples"""
    server_lr: float = 1.0
    """eta_g, the rate of the server's step"""
    staleness: Decay = "polynomial"
    """s(tau): constant, polynomial (1 + tau)^-a, or hinge"""
    a: float = 0.5
    """how fast s falls"""
    b: float = 4.0
    """hinge: versions up to which s is 1"""

    topology: ClassVar[Topology] = "star"
    entrywise: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_decay(self.staleness, self.a, self.b, "FedBuff")
        if not self.server_lr > 0:
            raise ConfigError(f"FedBuff: server_lr must be positive; got {self.server_lr}")

    init = init_whole
    configure = first_units
    local = train_everything
    report = report_deltas

    def aggregate(
        self, model: Model, state: State, clients: Sequence[Client], updates: Iterable[Update]
    ) -> State:
        """w + eta_g x the mean of s(tau_i) Delta_i (Alg. 1, lines 8 to 11)."""

        def aged() -> Iterator[Update]:
            for update in updates:
                fresh = decayed(state.round - update.round, self.staleness, self.a, self.b)
                yield times(update, self.server_lr * fresh)

        total = sum_of(state.params, clients, aged(), self.weighting)
        return next_round(state, merge(state.params, total))

    predictor = predict_whole
