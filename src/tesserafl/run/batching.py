"""How the clients of a run are trained: one after another, or many in one program.

The rule was found with `tessera bench batching` and is explained in docs/decisions. It looks at the
model, the training and the length of the run, never at the number of workers; its answer is written
to config.json, so that a run that is resumed elsewhere is trained in the same way.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence

import torch

from tesserafl.core import seeds
from tesserafl.core.errors import ConfigError
from tesserafl.core.fit import Fit
from tesserafl.core.messages import Client
from tesserafl.core.model import Model
from tesserafl.core.params import Params
from tesserafl.core.submodel import SubModel, cut
from tesserafl.data.examples import Examples, FederatedData
from tesserafl.engines.batches import widest
from tesserafl.engines.cohort import Cohorts, Member, obstacle
from tesserafl.models.costs import costs_of
from tesserafl.models.scaling import forward_of
from tesserafl.run.classes import classes_of
from tesserafl.run.experiment import Batching, Experiment

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
    return "compiled" if steps >= STEPS_TO_COMPILE and _can_compile(experiment) else "vmapped"


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
    size = experiment.training.batch_size
    batches = sum(math.ceil(client.num_examples / size) for client in clients) / len(clients)
    rounds = experiment.rounds * experiment.clients_per_round
    return rounds * experiment.training.epochs * batches


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
    state = experiment.method.init(model, experiment.seed, experiment.rounds)
    submodels = [c.submodel for c in classes_of(experiment, model, clients, state)]
    largest = max(submodels, key=lambda submodel: submodel.num_entries)
    train = data.clients[0].train
    batch = train.batch(torch.arange(training.batch_size) % len(train))
    flops = costs_of(model, largest, training, *batch).flops_per_example * training.batch_size
    if worth and flops > MOST_FLOPS:
        return "a step is long"
    return _failure(experiment, model, largest, train, state.params)


def _failure(
    experiment: Experiment, model: Model, submodel: SubModel, train: Examples, params: Params
) -> str | None:
    """What a trial with two clients fails with."""
    forward = forward_of(model, submodel, model.module(submodel.sizes).train(), "none")
    fit = Fit(params=cut(params, submodel), training=experiment.training)
    few = train.take(torch.arange(1))
    members = [Member(fit=fit, examples=few, draw=seeds.generator(0, "trial")) for _ in range(2)]
    try:
        Cohorts(most=2, width=lambda size: 1).train(members, forward, "trial")
    except RuntimeError as error:
        return f"its code is not for many clients at once ({str(error).splitlines()[0]})"
    return None


def _can_compile(experiment: Experiment) -> bool:
    on_gpu = experiment.engine.device != "cpu" and torch.cuda.is_available()
    return on_gpu or any(shutil.which(name) for name in ("c++", "g++", "clang++"))
