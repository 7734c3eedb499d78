"""One synchronous round: configure, submit, poll, fold; and what is noted on the way."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from tesserafl.core.checks import check_delta, check_deltas
from tesserafl.core.errors import CapacityError, UpdateError
from tesserafl.core.messages import Task, Update
from tesserafl.core.method import State
from tesserafl.core.params import Params
from tesserafl.core.submodel import Coverage, SubModel
from tesserafl.engines.seam import Done, Engine, Failed
from tesserafl.models.costs import Costs, costs_of
from tesserafl.run.classes import classes_of
from tesserafl.run.setup import Setup

_MIB = 1 << 20


@dataclass(kw_only=True)
class CostTable:
    """Costs of sub-models, counted once per shape."""

    setup: Setup
    _known: dict[tuple[tuple[str, int], ...], Costs] = field(default_factory=dict)

    def of(self, submodel: SubModel) -> Costs:
        """Costs of one training step of this sub-model on a full batch."""
        key = submodel.shape
        if key not in self._known:
            training, train = self.setup.experiment.training, self.setup.data.clients[0].train
            rows = torch.arange(training.batch_size) % len(train)
            self._known[key] = costs_of(self.setup.model, submodel, training, *train.batch(rows))
        return self._known[key]

    @property
    def largest_client(self) -> int:
        """Parameters of the largest sub-model seen so far."""
        return max((costs.num_entries for costs in self._known.values()), default=0)


@dataclass(kw_only=True)
class Notes:
    """What is noted while a round's updates pass by."""

    clients: list[dict[str, Any]] = field(default_factory=list)
    failures: list[dict[str, Any]] = field(default_factory=list)
    trained: list[SubModel] = field(default_factory=list)
    bytes_down: int = 0
    seconds: float = 0.0

    @property
    def amounts(self) -> dict[str, float]:
        """What the round adds to the run's totals."""
        return {
            "bytes_down": self.bytes_down,
            "bytes_up": sum(row["bytes_up"] for row in self.clients),
            "flops": sum(sorted(row["flops"] for row in self.clients)),
            "seconds": self.seconds,
        }

    @property
    def loss(self) -> float | None:
        """Mean training loss over the examples of those that answered."""
        rows = sorted(self.clients, key=lambda row: int(row["client"]))
        weight = sum(row["examples"] for row in rows)
        return sum(row["loss"] * row["examples"] for row in rows) / weight if weight else None


def play_round(
    setup: Setup, engine: Engine, state: State, coverage: Coverage, costs: CostTable
) -> tuple[State, Notes]:
    """The state after the next round; `coverage` counts what was trained.

    Raises:
        UpdateError: the work of every client that answered was refused.
    """
    begun = time.perf_counter()
    experiment, notes = setup.experiment, Notes()
    cohort = setup.cohort(state.round)
    training = replace(experiment.training, lr=experiment.training.lr_at(state.round, state.rounds))
    tasks = experiment.method.configure(setup.model, state, cohort, training)
    updates = _updates(setup, engine, tasks, state.params, costs, notes)
    after = experiment.method.aggregate(setup.model, state, cohort, updates)
    coverage.add(notes.trained)
    refused = [note for note in notes.failures if note["reason"] != "offline"]
    if refused and not notes.clients:
        raise UpdateError(
            f"round {state.round}: the work of every client failed; the first: {refused[0]['text']}"
        )
    notes.seconds = time.perf_counter() - begun
    return after, notes


def check_memory(setup: Setup, state: State, costs: CostTable) -> None:
    """Raise CapacityError if a client's part does not fit its memory."""
    limited = [client for client in setup.clients if client.memory_bytes is not None]
    for kind in classes_of(setup.experiment, setup.model, limited, state):
        peak, limit = costs.of(kind.submodel).peak_bytes, kind.memory_bytes
        if limit is not None and peak > limit:
            raise CapacityError(
                f"client {kind.members[0].id} has {limit / _MIB:.2f} MiB, training its part takes "
                f"about {peak / _MIB:.2f} MiB; lower method.ratio or training.batch_size "
                f"(tessera plan shows what fits)"
            )


def _updates(
    setup: Setup,
    engine: Engine,
    tasks: Iterator[Task],
    large: Params,
    costs: CostTable,
    notes: Notes,
) -> Iterator[Update]:
    """Submit as many groups as the engine takes at once; pass each answer on, then forget it."""
    groups = _groups(_asked(setup, tasks, notes), engine.group)
    pending: dict[int, tuple[Task, list[int]]] = {}  # client -> its task, its group's clients
    under_way = 0
    while True:
        for group in itertools.islice(groups, engine.capacity - under_way):
            clients = [task.client.id for task in group]
            pending |= {task.client.id: (task, clients) for task in group}
            engine.submit(group)
            under_way += 1
            del group  # its tasks hold parameters
        if not pending:
            return
        outcomes = engine.poll()
        good = _all_good([o.update for o in outcomes if isinstance(o, Done)], large)
        while outcomes:  # what was passed on is let go before the next client trains
            outcome = outcomes.pop(0)
            task, clients = pending.pop(outcome.client)
            clients.remove(task.client.id)
            under_way -= not clients
            if isinstance(outcome, Failed):
                notes.failures.append(_failure(outcome.client, outcome.reason, outcome.text))
                continue
            try:
                # Here, not where it is summed: one bad update must not cost the round.
                if not good:
                    check_delta(outcome.update.submodel, outcome.update.delta, large)
            except UpdateError as error:
                notes.failures.append(_failure(task.client.id, "error", str(error)))
                continue
            _note(task, outcome, costs, notes)
            yield outcome.update
        del outcome, task


def _asked(setup: Setup, tasks: Iterable[Task], notes: Notes) -> Iterator[Task]:
    """The tasks of the clients that will answer."""
    for task in tasks:
        notes.bytes_down += task.num_bytes
        if setup.answers(task.round, task.client):
            yield task
        else:
            notes.failures.append(_failure(task.client.id, "offline", "did not answer"))


def _groups(tasks: Iterable[Task], size: int) -> Iterator[list[Task]]:
    """Tasks of one sub-model shape, `size` at a time; the groups that stay incomplete come last.

    A group is a matter of the cohort alone: its numbers may depend on who is in it.
    """
    waiting: dict[object, list[Task]] = {}
    for task in tasks:
        group = waiting.setdefault(task.submodel.shape, [])
        group.append(task)
        if len(group) == size:
            yield waiting.pop(task.submodel.shape)
    while waiting:
        yield waiting.pop(next(iter(waiting)))


def _all_good(updates: Sequence[Update], large: Params) -> bool:
    """Whether all may be summed, checked at once; if not, each is looked at alone."""
    try:
        check_deltas([(update.submodel, update.delta) for update in updates], large)
    except UpdateError:
        return False
    return True


def _note(task: Task, done: Done, costs: CostTable, notes: Notes) -> None:
    update, cost = done.update, costs.of(task.submodel)
    notes.trained.append(update.submodel)
    notes.clients.append(
        {
            "client": update.client,
            "examples": update.num_examples,
            "steps": update.num_steps,
            **update.metrics,
            "entries": cost.num_entries,
            "bytes_down": task.num_bytes,
            "bytes_up": update.num_bytes,
            "flops": cost.flops_per_example * update.num_examples * task.training.epochs,
            "seconds": done.seconds,
        }
    )


def _failure(client: int, reason: str, text: str) -> dict[str, Any]:
    return {"client": client, "reason": reason, "text": text}
