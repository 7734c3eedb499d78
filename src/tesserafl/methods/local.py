"""Local: every client trains for itself, and nothing is shared. The bar of personalised methods.

A client that holds less than the whole model (`ratio`) keeps the first units of every axis. The
global model stays as it began; what counts is `accuracy_personal`.
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
    init_whole,
    predict_whole,
    report_deltas,
)
from tesserafl.core.model import Model
from tesserafl.methods._own import own_of, personal_of, remember
from tesserafl.methods._wanted import NOTHING, wanting
from tesserafl.methods._width import prefix_tasks


@dataclass(frozen=True, kw_only=True)
class Local:
    """No communication."""

    ratio: tuple[float, ...] = (1.0,)
    """width ratios of the client classes, dealt to the clients in turn"""
    weighting: Weighting = "examples"
    """nothing is averaged: without meaning here"""

    topology: ClassVar[Topology] = "star"
    entrywise: ClassVar[bool] = True
    sends_changes: ClassVar[bool] = False
    init = init_whole

    def configure(
        self, model: Model, state: State, clients: Sequence[Client], training: Training
    ) -> Iterator[Task]:
        """The initial model; used in a client's first round only."""
        return wanting(prefix_tasks(model, state, clients, training, self.ratio), NOTHING)

    def local(self, model: Model, task: Task, memory: Memory) -> Fit:
        """Go on where the client stopped."""
        return Fit(params={**task.params, **own_of(memory)}, training=task.training)

    def report(self, model: Model, task: Task, fitted: Fitted, memory: Memory) -> Report:
        """Nothing; everything is kept."""
        update, _ = report_deltas(self, model, task, fitted, memory)
        return replace(update, delta={}), remember(fitted.params)

    aggregate = average_trained
    predictor = predict_whole

    def personal(self, model: Model, state: State, memory: Memory) -> Predictor:
        """The client's own model."""
        return personal_of(model, state, memory)
