"""What methods for unequal devices share: who trains which part, and the mean of a tree's node."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

from tesserafl.core.fit import Training
from tesserafl.core.messages import Client, Task, Update, Wanted
from tesserafl.core.method import State, Weighting, average_trained
from tesserafl.core.model import Model
from tesserafl.methods._normalised import NORM, normalised
from tesserafl.methods._wanted import wanting
from tesserafl.methods._width import prefix_tasks


class _Cut(Protocol):
    @property
    def ratio(self) -> tuple[float, ...]: ...


class _Levelled(Protocol):
    @property
    def weighting(self) -> Weighting: ...
    @property
    def normalised(self) -> bool: ...


def first_units(
    self: _Cut, model: Model, state: State, clients: Sequence[Client], training: Training
) -> Iterator[Task]:
    """Everybody gets everything, or the first units of every axis."""
    return prefix_tasks(model, state, clients, training, self.ratio)


def counted_units(
    self: _Cut, model: Model, state: State, clients: Sequence[Client], training: Training
) -> Iterator[Task]:
    """`first_units` of methods that divide a change by its local steps."""
    tasks = first_units(self, model, state, clients, training)
    return wanting(tasks, Wanted(divisors=frozenset({NORM})))


def mean_of_level(
    self: _Levelled,
    model: Model,
    state: State,
    clients: Sequence[Client],
    updates: Iterable[Update],
) -> State:
    """The mean of those below a node; with `normalised` per local step (FedNova)."""
    if self.normalised:
        return normalised(state, clients, updates, self.weighting)
    return average_trained(self, model, state, clients, updates)
