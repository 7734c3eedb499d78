"""FedBRB: block-wise rolling and weighted broadcast, when every client is smaller than the model.

Xu et al., "FedBRB: An Effective Solution to the Small-to-Large Scenario in Device-Heterogeneity
Federated Learning", arXiv 2402.17202; Liao et al., IEEE TMC 25(3), 2025.

    smallest ratio 1/s:  every layer is an s x s grid of blocks B_pq; a client of ratio rho/s trains
    rho x rho neighbouring blocks; all blocks get their turn (rolling); what was trained is spread
    to the whole grid (broadcast):
        B~_pq = mean over the clients that trained B_pq
        B-    = weighted mean of the trained B~_pq
        trained block   B_pq <- (1 - beta) B~_pq + beta B-
        untrained block B_pq <- (1 - beta) B_pq  + beta B-

The text of the paper could not be had. Its own: blocks of the smallest client's size, rolling over
all blocks, weighted broadcast, no client holds the model. (reconstructed): the order in which
blocks roll, the broadcast's weights, initialisation and scaling. See docs/methods/fedbrb.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

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
from tesserafl.methods._blocks import glued_views, grid_of, lattice_slopes, refuse_holders
from tesserafl.methods._broadcast import broadcast_mean, tiled_init
from tesserafl.methods._width import ratio_of, width_tasks


@dataclass(frozen=True, kw_only=True)
class FedBRB:
    """Small clients train blocks of a large model; what they learn is broadcast to all blocks."""

    ratio: tuple[float, ...] = (0.25,)
    """width ratios of the client classes, multiples of the smallest, dealt in turn"""
    weighting: Weighting = "uniform"
    """a_i: weight of a client in a block's mean: one each, or its examples"""
    rolling: Literal["lattice", "diagonal", "independent"] = "lattice"
    """lattice: every block in s^2 rounds; diagonal: one group for all layers, covers s of s^2
    blocks; independent: every layer rolls by itself, the client's net is glued from its blocks"""
    broadcast: float = 0.5
    """beta: how far a block moves to the mean of all trained blocks in the first round"""
    broadcast_of: Literal["values", "updates"] = "values"
    """what is broadcast: the mean trained block, or the mean update of the trained blocks"""
    anneal: Literal["constant", "cosine"] = "constant"
    """how beta falls over the rounds; cosine ends at zero"""
    broadcast_weight: Literal["count", "similarity"] = "count"
    """weight of a trained block in the broadcast: its clients', or that times exp(-|change|)"""
    init_blocks: Literal["tiled", "independent"] = "tiled"
    """tiled: all blocks begin equal, the model as its smallest client; independent: the model's own
    initialisation, whose blocks the first broadcasts average away"""
    strict: bool = True
    """refuse a client that would hold the whole model"""
    width_scaling: WidthScaling = "output"
    """how a cut layer makes up for the inputs it lacks: none, output (HeteroFL's scaler) or
    parameters (as output, at the learning pace of a small network)"""

    topology: ClassVar[Topology] = "star"
    entrywise: ClassVar[bool] = False

    def init(self, model: Model, seed: int, rounds: int) -> State:
        """The global model, after the strict small-to-large check."""
        grid = grid_of(self.ratio, model)
        if not 0.0 <= self.broadcast <= 1.0:
            raise ConfigError(f"method.broadcast must be in [0, 1]; got {self.broadcast}")
        if self.rolling == "lattice":
            lattice_slopes(model)
        if self.strict:
            refuse_holders(self.ratio, model)
        if self.init_blocks == "tiled":
            return State(params=tiled_init(grid, seed), seed=seed, rounds=rounds)
        return init_whole(self, model, seed, rounds)

    def configure(
        self, model: Model, state: State, clients: Sequence[Client], training: Training
    ) -> Iterator[Task]:
        """Slot i of the cohort trains the blocks that are its turn in round t."""
        grid = grid_of(self.ratio, model)
        if self.rolling == "independent":
            for slot, client in enumerate(clients):
                turn = (state.round * len(clients) + slot) % grid.s**2
                p, q = divmod(turn, grid.s)
                rho = grid.blocks(ratio_of(self.ratio, client))
                yield glued_views(model, state, client, training, grid, (p, q), rho)
            return

        slopes = self._slopes(model)

        def keep(slot: int, client: Client) -> Mapping[str, Sequence[int]]:
            v, u = divmod(state.round * len(clients) + slot, grid.s)
            rho = grid.blocks(ratio_of(self.ratio, client))
            groups = {axis: (a * u + b * v) % grid.s for axis, (a, b) in slopes.items()}
            return {axis: grid.units(axis, first, rho) for axis, first in groups.items()}

        yield from width_tasks(model, state, clients, training, keep)

    local = train_scaled
    report = report_deltas

    def aggregate(
        self, model: Model, state: State, clients: Sequence[Client], updates: Iterable[Update]
    ) -> State:
        """In-place means, then the weighted broadcast, layer by layer."""
        total = sum_of(state.params, clients, updates, self.weighting)
        grid, params = grid_of(self.ratio, model), dict(state.params)
        for name, mean, weights in total.means(state.params):
            params[name] = broadcast_mean(
                state.params[name],
                mean,
                weights,
                grid.order(name),
                beta=self._beta(state),
                of_updates=self.broadcast_of == "updates",
                similarity=self.broadcast_weight == "similarity",
            )
        return next_round(state, params)

    predictor = predict_whole

    def _slopes(self, model: Model) -> dict[str, tuple[int, int]]:
        """(a, b) per axis; turn k = t m + i begins at group a (k mod s) + b (k div s)."""
        if self.rolling == "diagonal":
            return dict.fromkeys(model.cuttable, (1, 0))
        return lattice_slopes(model)

    def _beta(self, state: State) -> float:
        if self.anneal == "constant":
            return self.broadcast
        return self.broadcast * 0.5 * (1.0 + math.cos(math.pi * state.round / state.rounds))
