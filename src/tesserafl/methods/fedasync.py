"""FedAsync: every answer is mixed into the model at once, the less the older it is.

Xie, Koyejo and Gupta, "Asynchronous Federated Optimization", OPT 2020, Algorithm 1.
https://arxiv.org/abs/1903.03934

    w_t = (1 - alpha_t) w_{t-1} + alpha_t w_new,     alpha_t = alpha s(t - tau)

Run it with `clock.mode asynchronous` and `clock.buffer 1`.

Departures from the paper: clients minimise their loss alone, without the proximal term (rho = 0);
of several answers in one buffer the mean is mixed in, each with its own alpha_t.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from tesserafl.core.errors import ConfigError
from tesserafl.core.fit import Fitted, Training
from tesserafl.core.messages import Client, Memory, Task, Update
from tesserafl.core.method import (
    Report,
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
from tesserafl.core.params import subtract
from tesserafl.core.submodel import cut, merge
from tesserafl.methods._levels import first_units
from tesserafl.methods._staleness import Decay, check_decay, decayed, times
from tesserafl.methods._wanted import values, wanting


@dataclass(frozen=True, kw_only=True)
class FedAsync:
    """A mixture of the model and each answer."""

    ratio: tuple[float, ...] = (1.0,)
    """share of every axis that each client class trains, dealt to the clients in turn"""
    weighting: Weighting = "uniform"
    """weight of an answer where a buffer has several: one each, or its client's examples"""
    alpha: float = 0.6
    """how much of a fresh answer goes into the model"""
    staleness: Decay = "polynomial"
    """s(t - tau): constant, polynomial (1 + t - tau)^-a, or hinge"""
    a: float = 0.5
    """how fast s falls"""
    b: float = 4.0
    """hinge: versions up to which s is 1"""

    topology: ClassVar[Topology] = "star"
    entrywise: ClassVar[bool] = False
    sends_changes: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_decay(self.staleness, self.a, self.b, "FedAsync")
        if not 0.0 < self.alpha <= 1.0:
            raise ConfigError(f"FedAsync: alpha must be in (0, 1]; got {self.alpha}")

    init = init_whole

    def configure(
        self, model: Model, state: State, clients: Sequence[Client], training: Training
    ) -> Iterator[Task]:
        """Everybody gets everything, or the first units of every axis; answers hold values."""
        tasks = first_units(self, model, state, clients, training)
        return wanting(tasks, values)

    local = train_everything

    def report(self, model: Model, task: Task, fitted: Fitted, memory: Memory) -> Report:
        """The trained values: the server no longer has what the client began with."""
        # As what they are more than nothing, so that only owners of a class report its rows.
        nothing = {name: torch.zeros_like(tensor) for name, tensor in task.params.items()}
        update, memory = report_deltas(self, model, replace(task, params=nothing), fitted, memory)
        return replace(update, delta={}, extra=dict(update.delta)), memory

    def aggregate(
        self, model: Model, state: State, clients: Sequence[Client], updates: Iterable[Update]
    ) -> State:
        """(1 - alpha_t) w + alpha_t w_new (Alg. 1, server)."""

        def mixed() -> Iterator[Update]:
            for update in updates:
                fresh = decayed(state.round - update.round, self.staleness, self.a, self.b)
                mine = cut(state.params, update.submodel)
                change = subtract(update.extra, mine)
                yield times(replace(update, delta=change), self.alpha * fresh)

        total = sum_of(state.params, clients, mixed(), self.weighting)
        return next_round(state, merge(state.params, total))

    predictor = predict_whole
