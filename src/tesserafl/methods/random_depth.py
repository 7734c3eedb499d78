"""Random depth: every client trains a random subset of the blocks, in their order.

Huang et al., "Deep Networks with Stochastic Depth", ECCV 2016, sections 3 and 4, equations 4 and 5.
https://arxiv.org/abs/1603.09382

Departures from the paper: it drops blocks anew in every mini-batch of one machine; here a client
lacks the others for a whole round and never holds them (as Federated Dropout does with channels).
So it draws exactly as many blocks as it can hold, with the paper's probabilities.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar, Literal

import torch

from tesserafl.core import seeds
from tesserafl.core.errors import ConfigError
from tesserafl.core.fit import Training
from tesserafl.core.messages import Client, Task
from tesserafl.core.method import (
    Predictor,
    State,
    Topology,
    Weighting,
    average_trained,
    init_whole,
    report_deltas,
    train_everything,
)
from tesserafl.core.model import Model
from tesserafl.core.submodel import Units
from tesserafl.methods._blockscale import scaled_blocks
from tesserafl.methods._depth import check_depths, depth_axes, depth_of
from tesserafl.methods._width import width_tasks


@dataclass(frozen=True, kw_only=True)
class RandomDepth:
    """A random increasing subset of the blocks, redrawn per client and round."""

    depth: tuple[int, ...] = (5,)
    """blocks (of every stage) that each client class trains, dealt to the clients in turn"""
    keep: Literal["uniform", "linear"] = "uniform"
    """how likely a block is among them: all equally, or falling linearly towards the output"""
    scaled: bool = True
    """whether the model answers with every block's addition times the probability that a client
    held the block"""
    weighting: Weighting = "uniform"
    """weight of a client in the mean: one each, or its examples"""

    topology: ClassVar[Topology] = "star"
    entrywise: ClassVar[bool] = True
    init = init_whole

    @property
    def ratio(self) -> tuple[float, ...]:
        """Widths are whole."""
        return (1.0,) * len(self.depth)

    def configure(
        self, model: Model, state: State, clients: Sequence[Client], training: Training
    ) -> Iterator[Task]:
        """A fresh draw per client, round and axis."""

        def keep(slot: int, client: Client) -> Mapping[str, Units]:
            depth = depth_of(self.depth, client)
            return {a: self._draw(model, state, client, a, depth) for a in depth_axes(model)}

        return width_tasks(model, state, clients, training, keep)

    local = train_everything
    report = report_deltas
    aggregate = average_trained

    def predictor(self, model: Model, state: State) -> Predictor:
        """All blocks; h <- h + p f(h) (equation 5), p over the client classes alike."""
        if not self.scaled:
            return Predictor(model=model, params=state.params)
        check_depths(self.depth)
        scales: dict[str, dict[int, float]] = {}
        for axis in depth_axes(model):
            each = [self._probabilities(model, axis, depth) for depth in self.depth]
            scales[axis] = {b: float(sum(p[b] for p in each) / len(each)) for b in each[0]}
        return Predictor(model=model, params=scaled_blocks(state.params, model, scales))

    def _probabilities(self, model: Model, axis: str, depth: int) -> dict[int, Fraction]:
        """Block -> p; their sum is the client's depth. Blocks that cannot move are always held."""
        blocks, movable = range(model.units(axis)), model.movable(axis)
        count = len(movable)
        free = min(depth, len(blocks)) - (len(blocks) - count)  # places left for the movable ones
        if free < 0:
            raise ConfigError(
                f"method.depth {depth}: axis {axis!r} has {len(blocks) - count} blocks that cannot "
                f"be left out; train at least as many"
            )
        kept = dict.fromkeys(blocks, Fraction(1))
        if self.keep == "uniform":
            return kept | dict.fromkeys(movable, Fraction(free, count))
        drop = Fraction(2 * (count - free), count + 1)  # 1 - p_L, so that p sums to `free`
        if drop >= 1:
            raise ConfigError(
                f"method.keep 'linear': with {free} of {count} blocks of axis {axis!r} the last "
                f"one would never be trained; train at least {(count + 1) // 2} of them, or use "
                f"'uniform'"
            )
        return kept | {b: 1 - Fraction(i, count) * drop for i, b in enumerate(movable, 1)}

    def _draw(self, model: Model, state: State, client: Client, axis: str, depth: int) -> Units:
        """Exactly so many blocks, each with its probability: systematic sampling.

        Blocks in random order lie on a line, each as long as its probability; those are held on
        which u, u + 1, u + 2, ... fall (Madow, Annals of Mathematical Statistics 20, 1949).
        """
        probabilities = self._probabilities(model, axis, depth)
        draw = seeds.generator(state.seed, state.round, client.id, "depth", axis)
        order = torch.randperm(len(probabilities), generator=draw).tolist()
        start = Fraction(torch.rand((), generator=draw, dtype=torch.float64).item())
        held, reached = [], -start
        for block in order:
            before, reached = reached, reached + probabilities[block]
            if reached // 1 > before // 1:  # the next of the points lies on this block
                held.append(block)
        return sorted(held)
