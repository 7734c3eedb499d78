"""FedEcover: clients draw channels from a shared pool without replacement, so coverage is balanced.

Yang et al., "FedEcover: Fast and Stable Converging Model-Heterogeneous Federated Learning with
Efficient-Coverage Submodel Extraction", ICDE 2025; rules read in the authors' code.

Departures from the paper: the pool of an axis is a stream of random permutations drawn from the
seed, read on by every client in turn, so that any process can compute any client's part. A client
whose part crosses two permutations takes each unit once. The order in which clients of a round read
is the order in which the server asked them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

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
    init = init_whole

    def configure(
        self, model: Model, state: State, clients: Sequence[Client], training: Training
    ) -> Iterator[Task]:
        """Every client reads on in each axis's stream."""
        drawn = dict(state.notes.get("drawn", {}))
        keeps: list[dict[str, Units]] = []
        for client in clients:
            keeps.append(
                {
                    axis: self._read(model, state, axis, drawn.get(axis, 0), count)
                    for axis, count in self._counts(model, client).items()
                }
            )
            drawn = self._advance(model, drawn, client)

        def keep(slot: int, client: Client) -> Mapping[str, Units]:
            return keeps[slot]

        return width_tasks(model, state, clients, training, keep)

    local = train_scaled
    report = report_deltas

    def aggregate(
        self, model: Model, state: State, clients: Sequence[Client], updates: Iterable[Update]
    ) -> State:
        """W += eta_g x mean delta; the pool has been read by all that were asked."""
        if not 0.0 < self.step_decay <= 1.0 or not self.step > 0.0:
            raise ConfigError(
                f"method.step must be positive and method.step_decay in (0, 1]; "
                f"got {self.step} and {self.step_decay}"
            )
        merged = merge(state.params, sum_of(state.params, clients, updates, self.weighting))
        step = self.step * self.step_decay ** (4 * state.round // max(1, state.rounds))
        if step != 1.0:
            merged = {
                name: old if merged[name] is old else old + step * (merged[name] - old)
                for name, old in state.params.items()
            }
        drawn = dict(state.notes.get("drawn", {}))
        for client in clients:
            drawn = self._advance(model, drawn, client)
        return next_round(state, merged, drawn=drawn)

    predictor = predict_whole

    def _counts(self, model: Model, client: Client) -> dict[str, int]:
        ratio = ratio_of(self.ratio, client)
        return {axis: kept_units(model, axis, ratio) for axis in model.cuttable}

    def _advance(self, model: Model, drawn: dict[str, int], client: Client) -> dict[str, int]:
        counts = self._counts(model, client)
        return {axis: drawn.get(axis, 0) + count for axis, count in counts.items()}

    def _read(self, model: Model, state: State, axis: str, position: int, count: int) -> Units:
        total = model.units(axis)
        units: list[int] = []
        while len(units) < count:
            refill, offset = divmod(position, total)
            draw = seeds.generator(state.seed, "pool", axis, refill)
            rest = torch.randperm(total, generator=draw)[offset:].tolist()
            fresh = [unit for unit in rest if unit not in units][: count - len(units)]
            units += fresh
            position = (refill + 1) * total
        return sorted(units)
