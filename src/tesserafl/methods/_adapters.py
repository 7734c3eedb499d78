"""Hooks that the methods of low-rank adapters share; a method takes one by assignment."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

from tesserafl.core.fit import Training
from tesserafl.core.lowrank import check_adapted
from tesserafl.core.messages import Client, Task
from tesserafl.core.method import State, init_whole
from tesserafl.core.model import Model
from tesserafl.methods._width import prefix_tasks


class _Ranked(Protocol):
    @property
    def ratio(self) -> tuple[float, ...]: ...


def init_adapters(self: object, model: Model, seed: int, rounds: int) -> State:
    """The adapters as they are drawn: their product is zero."""
    check_adapted(model, type(self).__name__)
    return init_whole(self, model, seed, rounds)


def first_ranks(
    self: _Ranked, model: Model, state: State, clients: Sequence[Client], training: Training
) -> Iterator[Task]:
    """The first ranks of every adapter, as many as the client holds."""
    return prefix_tasks(model, state, clients, training, self.ratio)
