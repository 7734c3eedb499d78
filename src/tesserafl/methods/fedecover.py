"""FedEcover: clients draw channels from a shared pool without replacement, so coverage is balanced.

Yang et al., "FedEcover: Fast and Stable Converging Model-Heterogeneous Federated Learning with
Efficient-Coverage Submodel Extraction", ICDE 2025; rules read in the authors' code.

Departures from the paper: clients of a round draw in the order in which the server asked them. A
client whose part crosses a refill takes what is left and goes on with the new pool, in which the
units that it holds already come last.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from tesserafl.core import seeds
from tesserafl.core.errors import ConfigError
from tesserafl.core.fit import Training, WidthScaling
from tesserafl.core.messages import Client, Task, Update
from tesserafl.core.method import (
    State,
    Topology,
    Weighting,
    init_whole,
    next_round,
    predict_whole,
    report_deltas,
    sum_of,
    train_scaled,
)
from tesserafl.core.model import Model
from tesserafl.core.submodel import Units, merge
from tesserafl.methods._width import kept_units, ratio_of, width_tasks

Pools = dict[str, dict[str, Any]]
"""Per axis: `rest`, the units not drawn yet, in the order of drawing; `refills` so far."""


@dataclass(frozen=True, kw_only=True)
class FedEcover:
    """Sampling without replacement from a per-axis pool that is refilled when empty."""

    ratio: tuple[float, ...] = (0.25,)
    """width ratios of the client classes, dealt to the clients in turn"""
    weighting: Weighting = "uniform"
    """weight of a client in the mean: one each, or its examples"""
    step: float = 1.0
    """eta_g: share of the mean delta that the server takes in the first round"""
    step_decay: float = 1.0
    """gamma: factor on the step after each quarter of the rounds ("GSD"); 1 = no decay"""
    width_scaling: WidthScaling = "output"
    """how a cut layer makes up for the inputs it lacks: none, output (HeteroFL's scaler) or
    parameters (as output, at the learning pace of a small network)"""

    topology: ClassVar[Topology] = "star"
    entrywise: ClassVar[bool] = False

    def init(self, model: Model, seed: int, rounds: int) -> State:
        """The global model, which no client needs to hold."""
        if not 0.0 < self.step_decay <= 1.0 or not self.step > 0.0:
            raise ConfigError(
                f"method.step must be positive and method.step_decay in (0, 1]; "
                f"got {self.step} and {self.step_decay}"
            )
        return init_whole(self, model, seed, rounds)

    def configure(
        self, model: Model, state: State, clients: Sequence[Client], training: Training
    ) -> Iterator[Task]:
        """Every client reads on in each axis's stream."""
        pools, keeps = self._pools(state), []
        for client in clients:
            drawn, pools = self._draw(model, state, client, pools)
            keeps.append(drawn)

        def keep(slot: int, client: Client) -> Mapping[str, Units]:
            return keeps[slot]

        return width_tasks(model, state, clients, training, keep)

    local = train_scaled
    report = report_deltas

    def aggregate(
        self, model: Model, state: State, clients: Sequence[Client], updates: Iterable[Update]
    ) -> State:
        """W += eta_g x mean delta; the pool has been read by all that were asked."""
        merged = merge(state.params, sum_of(state.params, clients, updates, self.weighting))
        step = self.step * self.step_decay ** (4 * state.round // max(1, state.rounds))
        if step != 1.0:
            merged = {
                name: old if merged[name] is old else old + step * (merged[name] - old)
                for name, old in state.params.items()
            }
        pools = self._pools(state)
        for client in clients:
            _, pools = self._draw(model, state, client, pools)
        return next_round(state, merged, pools=pools)

    predictor = predict_whole

    def _pools(self, state: State) -> Pools:
        return {axis: dict(pool) for axis, pool in state.notes.get("pools", {}).items()}

    def _draw(
        self, model: Model, state: State, client: Client, pools: Pools
    ) -> tuple[Mapping[str, Units], Pools]:
        """The client's units per axis, and what is left in the pools."""
        ratio, keep, left = ratio_of(self.ratio, client), {}, dict(pools)
        for axis in model.cuttable:
            count = kept_units(model, axis, ratio)
            pool = left.get(axis, {"refills": 0, "rest": []})
            refills, taken, rest = pool["refills"], pool["rest"][:count], pool["rest"][count:]
            if len(taken) < count:
                draw = seeds.generator(state.seed, "pool", axis, refills)
                fresh = torch.randperm(model.units(axis), generator=draw).tolist()
                # What the client holds already goes to the end: nothing is drawn twice or lost.
                fresh = [u for u in fresh if u not in taken] + [u for u in fresh if u in taken]
                missing = count - len(taken)
                taken, rest, refills = taken + fresh[:missing], fresh[missing:], refills + 1
            keep[axis] = sorted(taken)
            left[axis] = {"refills": refills, "rest": rest}
        return keep, left
