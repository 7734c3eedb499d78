"""Normalised averaging: a client's change counts per local step (FedNova, Wang et al. 2020)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from fractions import Fraction

from tesserafl.core.exactsum import ExactSum
from tesserafl.core.fit import Fitted, Training
from tesserafl.core.messages import Client, Memory, Task, Update
from tesserafl.core.method import Report, State, Weighting, next_round, report_deltas, weights_of
from tesserafl.core.model import Model
from tesserafl.core.params import Params, subtract
from tesserafl.core.submodel import whole

NORM = "accumulated_steps"
"""Metric of an update: ||a_i||_1, what its local steps weigh together."""


def step_norm(steps: int, training: Training) -> float:
    """||a_i||_1 of so many local steps (Section 3): of SGD their number, with momentum more."""
    rho = training.momentum if training.optimiser == "sgd" else 0.0
    if rho == 0.0:
        return float(steps)
    return float((steps - rho * (1 - rho**steps) / (1 - rho)) / (1 - rho))


def report_normed(self: object, model: Model, task: Task, fitted: Fitted, memory: Memory) -> Report:
    """The change of every parameter, and ||a_i||_1."""
    update, memory = report_deltas(self, model, task, fitted, memory)
    metrics = {**update.metrics, NORM: step_norm(update.num_steps, task.training)}
    return replace(update, metrics=metrics), memory


def normalised(
    state: State, clients: Sequence[Client], updates: Iterable[Update], weighting: Weighting
) -> State:
    """w + tau_eff x sum of p_i Delta_i / ||a_i||_1, tau_eff = sum of p_i ||a_i||_1 (Eq. 6, 7).

    `notes["steps"]` counts the tau_eff of all rounds: what an edge reports as its own norm.
    """
    weights = weights_of(clients, weighting)
    total = ExactSum(max_weight=max(1, sum(weights.values())))
    steps, heard = Fraction(0), 0

    def divided() -> Iterator[Update]:
        nonlocal steps, heard
        for update in updates:
            norm, weight = update.metrics[NORM], weights[update.client]
            steps += weight * Fraction(norm)
            heard += weight
            yield replace(update, delta={n: t / norm for n, t in update.delta.items()})

    for update in divided():
        total.fold(update.submodel, update.delta, weights[update.client], state.params)
    if not heard:
        return next_round(state, state.params)
    effective = float(steps / heard)
    moved: Params = {
        name: (state.params[name].double() + effective * mean).to(state.params[name].dtype)
        for name, mean, _ in total.means(state.params)
    }
    before = float(state.notes.get("steps", 0.0))
    return next_round(state, {**state.params, **moved}, steps=before + effective)


def relayed_normed(self: object, model: Model, before: State, after: State, edge: Client) -> Update:
    """What an edge reports that averaged several times: its change, and the steps behind it."""
    steps = float(after.notes["steps"]) - float(before.notes.get("steps", 0.0))
    shapes = {name: tuple(tensor.shape) for name, tensor in after.params.items()}
    return Update(
        round=before.round,
        client=edge.id,
        submodel=whole(model.sizes, shapes),
        delta=subtract(after.params, before.params),
        num_examples=edge.num_examples,
        num_steps=round(steps),
        metrics={NORM: steps},
    )
