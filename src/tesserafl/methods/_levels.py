"""What methods for unequal devices share: who trains which part, and the mean of a tree's node."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Protocol

from tesserafl.core.fit import Training
from tesserafl.core.messages import Client, Task, Update, Wanted
from tesserafl.core.method import State, Weighting, average_trained
from tesserafl.core.model import Model
from tesserafl.methods._activation import most_blocks
from tesserafl.methods._depth import depth_of
from tesserafl.methods._normalised import NORM, normalised
from tesserafl.methods._wanted import wanting
from tesserafl.methods._width import prefix_tasks, ratio_of


class _Cut(Protocol):
    @property
    def ratio(self) -> tuple[float, ...]: ...


class _Adapted(_Cut, Protocol):
    @property
    def depth(self) -> tuple[int, ...]: ...


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


def counted_blocks(
    self: _Adapted, model: Model, state: State, clients: Sequence[Client], training: Training
) -> Iterator[Task]:
    """`counted_units`; of the adapters a client trains those of its blocks, and holds all."""
    for task in counted_units(self, model, state, clients, training):
        own = _own_blocks(self, model, task) if self.depth else None
        yield replace(task, trainable=own)


def _own_blocks(self: _Adapted, model: Model, task: Task) -> frozenset[str]:
    """The adapters of the client's blocks, and what is in no block."""
    return model.adapted(depth_of(self.depth, task.client)).intersection(task.params)


def size_of(self: _Adapted, model: Model, client: Client) -> tuple[float, float]:
    """b_j and a_j: the share of the width, and of the adapted blocks, that the client trains."""
    ratio = ratio_of(self.ratio, client)
    if not self.depth:
        return ratio, 1.0
    return ratio, min(1.0, depth_of(self.depth, client) / most_blocks(model))


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
