"""Which units of a width axis a client keeps: the choices that several methods share."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from tesserafl.core.errors import ConfigError
from tesserafl.core.fit import Training
from tesserafl.core.messages import Client, Task
from tesserafl.core.method import State
from tesserafl.core.model import Model
from tesserafl.core.params import Params, packable
from tesserafl.core.submodel import SubModel, Units, cut


def ratio_of(ratios: tuple[float, ...], client: Client) -> float:
    """The client's width ratio: classes are dealt to the clients in turn."""
    check_ratios(ratios)
    return ratios[client.id % len(ratios)]


def ranks_of(clients: Sequence[Client]) -> dict[int, int]:
    """Client -> its place among those that take part, by id: everybody can tell."""
    return {number: rank for rank, number in enumerate(sorted(c.id for c in clients))}


def check_ratios(ratios: tuple[float, ...]) -> None:
    """Raise ConfigError unless there is at least one ratio and all lie in (0, 1]."""
    if not ratios:
        raise ConfigError("method.ratio is empty; give at least one ratio in (0, 1]")
    for ratio in ratios:
        if not 0.0 < ratio <= 1.0:
            raise ConfigError(
                f"method.ratio has {ratio!r}; a ratio is the share of the width that a client "
                f"keeps, in (0, 1], for instance 0.25"
            )


def kept_units(model: Model, axis: str, ratio: float) -> int:
    """ceil(ratio x units): HeteroFL's and FedRolex's rounding (their code)."""
    return math.ceil(round(ratio * model.units(axis), 9))


def prefix(model: Model, ratio: float) -> SubModel:
    """The first units of every axis."""
    return model.slice({a: range(kept_units(model, a, ratio)) for a in model.cuttable})


def smallest_part(model: Model, ratios: tuple[float, ...]) -> Model:
    """The model that every client class can hold: the first units, as many as the smallest has."""
    check_ratios(ratios)
    smallest = min(ratios)
    return model if smallest == 1.0 else model.resized(prefix(model, smallest))


def window(start: int, count: int, total: int) -> Tensor:
    """Units start, start + 1, ..., cyclic; ascending, so that a whole window is the whole axis."""
    return ((torch.arange(count) + start) % total).sort().values


def width_tasks(
    model: Model,
    state: State,
    clients: Sequence[Client],
    training: Training,
    keep: Callable[[int, Client], Mapping[str, Units]],
) -> Iterator[Task]:
    """One task per client, with the units that `keep(slot, client)` names per axis.

    A part that an earlier client had too is not cut again, if it is small or was the last one:
    nobody writes to a task's parameters.
    """
    parts: dict[SubModel, Params] = {}
    for slot, client in enumerate(clients):
        submodel = model.slice(keep(slot, client))
        params = parts.get(submodel)
        if params is None:
            # Of large parts one at a time: together they could take more than the model.
            parts = {s: p for s, p in parts.items() if packable(p)}
            params = parts[submodel] = cut(state.params, submodel)
        yield Task(
            round=state.round, client=client, submodel=submodel, params=params, training=training
        )


def prefix_tasks(
    model: Model,
    state: State,
    clients: Sequence[Client],
    training: Training,
    ratios: tuple[float, ...],
) -> Iterator[Task]:
    """One task per client, with the first units of every axis."""

    def keep(slot: int, client: Client) -> Mapping[str, Units]:
        ratio = ratio_of(ratios, client)
        return {axis: range(kept_units(model, axis, ratio)) for axis in model.cuttable}

    return width_tasks(model, state, clients, training, keep)
