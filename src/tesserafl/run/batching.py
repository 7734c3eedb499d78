"""How the clients of a run are trained: one after another, or many in one program.

The rule was found with `tessera bench batching` and is explained in docs/decisions. It looks at the
model, the training and the length of the run, never at the number of workers; its answer is written
to config.json, so that a run that is resumed elsewhere is trained in the same way.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch

from tesserafl.core.errors import ConfigError, TesseraError
from tesserafl.core.messages import Client, Memory, Task
from tesserafl.core.model import Model
from tesserafl.data.examples import Examples, FederatedData
from tesserafl.engines.batches import num_steps, widest
from tesserafl.engines.client import ClientWorker
from tesserafl.engines.cohort import Cohorts, obstacle
from tesserafl.engines.graphs import trace
from tesserafl.engines.settings import Batching
from tesserafl.models.costs import costs_of
from tesserafl.run.classes import classes_of
from tesserafl.run.experiment import Experiment
from tesserafl.run.first import first_state

MOST_FLOPS = 1e7
"""Of one client's step. Above, a step is arithmetic, not dispatch, and batching gains nothing."""
STEPS_TO_TRACE = 30_000
"""Client steps of a whole run that pay for tracing: seconds to start / seconds saved in each."""
STEPS_TO_COMPILE = 200_000
"""Client steps of a whole run that pay for compiling."""


def choose(
    experiment: Experiment, model: Model, data: FederatedData, clients: Sequence[Client]
) -> Batching:
    """The experiment's own choice, or for "auto" the rule's.

    Raises:
        ConfigError: clients were to be trained together and cannot be.
    """
    asked = experiment.engine.batching
    steps = _steps(experiment, clients)
    if asked == "sequential" or (asked == "auto" and steps < STEPS_TO_TRACE):
        return "sequential"
    reason = _obstacle(experiment, model, data, clients, asked == "auto")
    if reason is not None:
        if asked == "auto":
            return "sequential"
        raise ConfigError(
            f"engine.batching is {asked!r}, but these clients cannot be trained together: "
            f"{reason}; use 'sequential' or 'auto'"
        )
    if asked != "auto":
        return asked
    if steps >= STEPS_TO_COMPILE and _compiles():
        return "compiled"
    return "vmapped"


def cohorts_of(experiment: Experiment, clients: Sequence[Client], device: str) -> Cohorts | None:
    """What trains clients together in this run; None: they are trained one after another."""
    if experiment.engine.batching == "sequential" or group_of(experiment) == 1:
        return None
    counts = [client.num_examples for client in clients]

    def width(batch_size: int) -> int:
        return max(widest(count, batch_size) for count in counts)

    compiled = experiment.engine.batching == "compiled"
    return Cohorts(most=group_of(experiment), width=width, compiled=compiled, device=device)


def group_of(experiment: Experiment) -> int:
    """Clients of one program: the cohort in equal parts of at most `engine.group`."""
    cohort = experiment.clients_per_round
    return math.ceil(cohort / math.ceil(cohort / experiment.engine.group))


def _steps(experiment: Experiment, clients: Sequence[Client]) -> float:
    """Optimiser steps of all clients in all rounds, expected."""
    training = experiment.training
    steps = sum(num_steps(client.num_examples, training) for client in clients) / len(clients)
    return experiment.rounds * experiment.clients_per_round * steps


def _obstacle(
    experiment: Experiment,
    model: Model,
    data: FederatedData,
    clients: Sequence[Client],
    worth: bool,
) -> str | None:
    """Why clients cannot be trained together or, with `worth`, why it would not pay."""
    training = experiment.training
    module = model.module(device="meta")
    if reason := obstacle(module, training):
        return reason
    if worth and group_of(experiment) == 1:
        return "a round has one client"
    # Multiply and add, forward and backward twice: a bound that needs no state and no sub-model.
    least = 6 * model.num_entries * min(experiment.method.ratio) ** 2
    if worth and least * training.batch_size > 10 * MOST_FLOPS:
        return "a step is long"
    if worth and training.mask_absent_classes:
        return "every number of own classes would take a program of its own"
    state = first_state(experiment, model, data)
    tasks = [kind.task for kind in classes_of(experiment, model, clients, state)]
    largest = max(tasks, key=lambda task: task.submodel.num_entries)
    train = data.clients[largest.client.id].train
    batch = train.batch(torch.arange(training.batch_size) % len(train))
    costs = costs_of(model, largest.submodel, training, *batch, largest.trainable)
    if worth and costs.flops_per_example * training.batch_size > MOST_FLOPS:
        return "a step is long"
    return _difference(experiment, model, largest, train)


def _difference(experiment: Experiment, model: Model, task: Task, train: Examples) -> str | None:
    """What two clients with too few examples for a batch get otherwise together than alone."""
    few = train.take(torch.arange(3) % len(train))
    alone = ClientWorker(model=model, method=experiment.method, examples=lambda client: few, seed=0)
    cohorts = Cohorts(most=2, width=lambda size: 4)
    asked: list[tuple[Task, Memory]] = [(task, {}), (task, {})]
    try:
        expected, _ = alone.work(task, {})
        answers = replace(alone, cohorts=cohorts).work_together(asked)
    except Exception as error:  # a foreign model's code may fail with anything
        return f"its code is not for many clients at once ({str(error).splitlines()[0]})"
    for answer in answers:
        if isinstance(answer, TesseraError):
            return str(answer)
        found = {**answer[0].extra, **answer[0].delta}
        for name, delta in {**expected.extra, **expected.delta}.items():
            scale = float(delta.abs().max())
            if not float((found[name] - delta).abs().max()) <= 0.01 * scale + 1e-6:
                return f"{name!r} is trained otherwise: examples of a batch influence each other"
    return None


def _compiles() -> bool:
    """Whether torch finds all that it needs to compile, tried on one addition."""
    one = torch.ones(8)
    try:
        (two,) = trace(lambda tensor: [tensor + tensor], [one], compiled=True)(one)
    except Exception:  # no compiler, no headers, no cache folder: each fails in its own way
        return False
    return bool((two == 2.0).all())
