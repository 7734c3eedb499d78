"""One synchronous round: configure, submit, poll, fold; and what is noted on the way."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from tesserafl.core.answers import check_update
from tesserafl.core.checks import check_deltas
from tesserafl.core.coverage import Coverage
from tesserafl.core.errors import CapacityError, UpdateError
from tesserafl.core.fit import Training
from tesserafl.core.lowrank import Collected, aggregation_error
from tesserafl.core.messages import Client, Task, Update
from tesserafl.core.method import State, weights_of
from tesserafl.core.params import Params
from tesserafl.core.submodel import SubModel
from tesserafl.engines.batches import num_seen
from tesserafl.engines.federation import Federation, Folded, Star, Traffic
from tesserafl.engines.seam import Done, Engine, Failed
from tesserafl.run.classes import classes_of
from tesserafl.run.costs import CostTable
from tesserafl.run.setup import Setup

_MIB = 1 << 20
_LOOKED_AT = ("reference", "validation")
"""Of these a client counts the examples of forward passes without a backward pass."""


@dataclass(kw_only=True)
class Notes:
    """What is noted while a round's updates pass by."""

    clients: list[dict[str, Any]] = field(default_factory=list)
    failures: list[dict[str, Any]] = field(default_factory=list)
    trained: list[SubModel] = field(default_factory=list)
    folded: Folded = field(default_factory=lambda: Folded(traffic={}))
    union: float | None = None
    """Share of the model that somebody trained in this round; of peers alone."""
    error: float | None = None
    """Of low-rank adapters: how far their new product is from the mean product, relatively."""
    structure: dict[str, Any] | None = None
    """Of methods whose model grows: what it is built of, and who was matched to what."""
    seconds: float = 0.0
    virtual_seconds: float | None = None
    """Of runs with a fleet."""
    joules: float = 0.0
    """What the devices of a fleet took."""
    traffic: dict[int, Traffic] = field(default_factory=dict)
    """Bytes of the devices of a fleet."""
    backhaul: int | None = None
    """Bytes on the links of edges."""
    periods: dict[str, Any] | None = None
    """Edge -> how often it averaged, and the steps of its devices."""

    @property
    def amounts(self) -> dict[str, float]:
        """What the round adds to the run's totals."""
        amounts = {
            "bytes_down": sum(each.received for each in self.folded.traffic.values()),
            "bytes_up": sum(each.sent for each in self.folded.traffic.values()),
            "flops": sum(sorted(row["flops"] for row in self.clients)),
            "seconds": self.seconds,
        }
        if self.virtual_seconds is not None:
            amounts |= {"virtual_seconds": self.virtual_seconds, "joules": self.joules}
        if self.backhaul is not None:
            amounts["bytes_backhaul"] = self.backhaul
        return amounts

    @property
    def exchange(self) -> dict[str, Any]:
        """What some runs alone have: peers (see `Folded`), low-rank adapters, trees."""
        known = {
            "aggregation_error": self.error,
            "consensus": self.folded.consensus,
            "params_stored": self.folded.stored,
            "round_coverage": self.union,
            "periods": self.periods,
        }
        return {name: value for name, value in known.items() if value is not None}

    @property
    def loss(self) -> float | None:
        """Mean training loss over the examples of those that answered."""
        heard = [row for row in self.clients if "loss" in row]
        rows = sorted(heard, key=lambda row: int(row["client"]))
        weight = sum(row["examples"] for row in rows)
        return sum(row["loss"] * row["examples"] for row in rows) / weight if weight else None


def play_round(
    setup: Setup, engine: Engine, federation: Federation, coverage: Coverage, costs: CostTable
) -> Notes:
    """Play the federation's next round; `coverage` counts what was trained.

    Raises:
        UpdateError: the work of every client that answered was refused.
    """
    begun = time.perf_counter()
    notes, round = Notes(), federation.round
    cohort = setup.cohort(round)
    tasks = federation.tasks(cohort, training_of(setup, federation))
    updates = answers(setup, engine, tasks, federation.shapes, costs, notes)
    fold(setup, federation, cohort, updates, notes)
    for row in notes.clients:
        row["bytes_up"], row["bytes_down"] = notes.folded.traffic[row["client"]]
    count(federation, coverage, notes)
    check_answered(round, notes)
    notes.seconds = time.perf_counter() - begun
    return notes


def check_answered(round: int, notes: Notes) -> None:
    """Raise UpdateError if clients answered and all that they did was refused."""
    refused = [note for note in notes.failures if note["reason"] == "error"]
    if refused and not notes.clients:
        raise UpdateError(
            f"round {round}: the work of every client failed; the first: {refused[0]['text']}"
        )


def training_of(setup: Setup, federation: Federation) -> Training:
    """How clients train in the next round."""
    return setup.training_at(federation.round, federation.rounds)


def fold(
    setup: Setup,
    federation: Federation,
    cohort: Sequence[Client],
    updates: Iterable[Update],
    notes: Notes,
) -> None:
    """End the federation's round with these updates, and note what they made of the model."""
    factors = _factors(setup, federation, cohort)
    if factors is not None:
        before = federation.shapes
        updates = factors.watching(before, updates)
    notes.folded = federation.fold(cohort, updates)
    if factors is not None and factors.values:
        after = federation.assembled().params
        notes.error = aggregation_error(setup.model, after, factors.shares, before)
    if isinstance(federation, Star):
        described = getattr(setup.experiment.method, "described", None)
        notes.structure = described and described(setup.model, federation.state)


def count(federation: Federation, coverage: Coverage, notes: Notes) -> None:
    """Count what the round trained."""
    coverage.add(notes.trained)
    if notes.folded.stored is not None:
        alone = Coverage({name: tuple(t.shape) for name, t in federation.shapes.items()})
        alone.add(notes.trained)
        notes.union = alone.share


def _factors(setup: Setup, federation: Federation, cohort: Sequence[Client]) -> Collected | None:
    """Watches low-rank factors on their way to a server that averages them; None elsewhere."""
    if not setup.model.low_rank or not isinstance(federation, Star):
        return None
    method = setup.experiment.method
    in_groups = getattr(method, "in_groups", None)  # each with parameters and a mean of its own
    if in_groups is not None and in_groups(federation.state):
        return None
    rebuild = getattr(method, "factors", None)  # of methods whose clients send no factors
    rebuilt = None if rebuild is None else partial(rebuild, setup.model, federation.state)
    return Collected(setup.model, weights_of(cohort, method.weighting), rebuilt=rebuilt)


def check_memory(setup: Setup, state: State, costs: CostTable) -> None:
    """Raise CapacityError if a client's part exceeds its memory, or what the method raises."""
    for kind in classes_of(setup.experiment, setup.model, setup.clients, state):
        limit = kind.memory_bytes
        if limit is not None and (peak := costs.of(kind.task).peak_bytes) > limit:
            raise CapacityError(
                f"client {kind.members[0].id} has {limit / _MIB:.2f} MiB, training its part takes "
                f"about {peak / _MIB:.2f} MiB; lower method.ratio or training.batch_size "
                f"(tessera plan shows what fits)"
            )


def answers(
    setup: Setup,
    engine: Engine,
    tasks: Iterator[Task],
    large: Params,
    costs: CostTable,
    notes: Notes,
) -> Iterator[Update]:
    """The updates of those that answer, each noted, in the order of the answers.

    As many groups are submitted as the engine takes at once. An update's tensors hold until the
    next one is asked for; its row is then the last of `notes.clients`.
    """
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
            if outcome.client not in pending:
                continue  # answered before: of one task one answer counts
            task, clients = pending.pop(outcome.client)
            clients.remove(task.client.id)
            under_way -= not clients
            if isinstance(outcome, Failed):
                notes.failures.append(failure(outcome.client, outcome.reason, outcome.text))
                continue
            try:
                # Here, not where it is summed: one bad update must not cost the round.
                check_update(task, outcome.update, large, setup.model, summable=good)
            except UpdateError as error:
                notes.failures.append(failure(task.client.id, "error", str(error)))
                continue
            note_answer(task, outcome, costs, notes)
            yield outcome.update
            del task
        del outcome


def _asked(setup: Setup, tasks: Iterable[Task], notes: Notes) -> Iterator[Task]:
    """The tasks of the clients that will answer."""
    for task in tasks:
        if setup.answers(task.round, task.client):
            yield task
        else:
            notes.failures.append(failure(task.client.id, "offline", "did not answer"))


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


def note_answer(task: Task, done: Done, costs: CostTable, notes: Notes) -> None:
    """Note who answered, what was trained and what it cost."""
    update, cost = done.update, costs.of(task)
    seen = num_seen(update.num_examples, task.training)
    trained = cost.flops_per_example * seen
    forward = sum(update.metrics.get(f"{kind}_examples", 0.0) for kind in _LOOKED_AT)
    looked_at = cost.forward_flops_per_example * forward
    trained_part = update.submodel
    if task.trainable is not None:  # the rest of what it holds is frozen there
        views = {name: view for name, view in trained_part.views.items() if name in update.delta}
        trained_part = SubModel(trained_part.sizes, views)
    notes.trained.append(trained_part)
    notes.clients.append(
        {
            "client": update.client,
            "examples": update.num_examples,
            "steps": update.num_steps,
            **update.metrics,
            "trained_entries": int(update.metrics.get("trained_entries", cost.num_trained)),
            "entries": cost.num_entries,
            "flops": trained + looked_at,
            "seconds": done.seconds,
        }
    )


def failure(client: int, reason: str, text: str) -> dict[str, Any]:
    """What is noted of a client that did not answer."""
    return {"client": client, "reason": reason, "text": text}
