"""The clients by what they can hold, and the part of the model that each class trains."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from tesserafl.core.messages import Client
from tesserafl.core.method import State
from tesserafl.core.model import Model
from tesserafl.core.submodel import SubModel
from tesserafl.run.experiment import Experiment


@dataclass(frozen=True, kw_only=True)
class ClientClass:
    """Clients of one ratio and one memory size."""

    ratio: float
    memory_bytes: int | None
    """What the clients have; None: no limit."""
    members: tuple[Client, ...]
    submodel: SubModel
    """What the first of them trains first; for the others its place may differ, its size not."""


def classes_of(
    experiment: Experiment, model: Model, clients: Sequence[Client], state: State
) -> Iterator[ClientClass]:
    """Every class, in the order of its first member."""
    # On `meta` a cut costs nothing: only who gets which part is wanted.
    state = replace(state, params={n: t.to("meta") for n, t in state.params.items()})
    ratios = experiment.method.ratio
    groups: dict[tuple[float, int | None], list[Client]] = {}
    for client in clients:
        key = (ratios[client.id % len(ratios)], client.memory_bytes)
        groups.setdefault(key, []).append(client)
    for (ratio, memory), members in groups.items():
        (task,) = experiment.method.configure(model, state, members[:1], experiment.training)
        yield ClientClass(
            ratio=ratio, memory_bytes=memory, members=tuple(members), submodel=task.submodel
        )
