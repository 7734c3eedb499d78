"""The clients by what they can hold, and the part of the model that each class trains."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tesserafl.core.messages import Client, Task
from tesserafl.core.method import State
from tesserafl.core.model import Model
from tesserafl.core.submodel import SubModel
from tesserafl.run.experiment import Experiment


@dataclass(frozen=True, kw_only=True)
class ClientClass:
    """Clients of one ratio, one depth and one memory size."""

    ratio: float
    depth: int | None
    """Blocks that they train, of methods that leave out blocks; None: of any other."""
    memory_bytes: int | None
    """What the clients have; None: no limit."""
    members: tuple[Client, ...]
    task: Task
    """What the first of them trains first; for the others its place may differ, its size not."""

    @property
    def submodel(self) -> SubModel:
        """The part that they train."""
        return self.task.submodel


def classes_of(
    experiment: Experiment, model: Model, clients: Sequence[Client], state: State
) -> Iterator[ClientClass]:
    """Every class, in the order of its first member; one that trains nothing is left out.

    Parameters on `meta` make the cuts free, for methods that do not look at values.
    """
    ratios = experiment.method.ratio
    depths: tuple[int | None, ...] = getattr(experiment.method, "depth", ()) or (None,)
    groups: dict[tuple[float, int | None, int | None, int | None], list[Client]] = {}
    for client in clients:
        dealt = (ratios[client.id % len(ratios)], depths[client.id % len(depths)])
        groups.setdefault((*dealt, client.memory_bytes, client.depth), []).append(client)
    for (ratio, depth, memory, _), members in groups.items():
        tasks = experiment.method.configure(model, state, members[:1], experiment.training)
        task = next(iter(tasks), None)
        if task is not None:
            yield ClientClass(
                ratio=ratio, depth=depth, memory_bytes=memory, members=tuple(members), task=task
            )
