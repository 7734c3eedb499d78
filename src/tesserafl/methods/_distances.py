"""How far a client's blocks are from the server's, and how far is too far."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from tesserafl.core.messages import Update
from tesserafl.core.method import State
from tesserafl.core.model import Model
from tesserafl.core.params import Params
from tesserafl.methods._depth import blocks_in_order, client_blocks
from tesserafl.methods._match import parameter_distance, threshold
from tesserafl.methods._ordered import turned
from tesserafl.methods._stack import Stack

Distances = Callable[[str, Update, Sequence[int]], list[list[float]]]
"""(axis, update, its slots) -> distances [server's blocks in order][client's blocks]."""


def parameters_apart(
    model: Model, state: State, stacks: Mapping[str, Stack], align: bool = False
) -> Distances:
    """M1, by the parameters; with `align` of every pair at its best permutation of inner units.

    Blocks that are built otherwise are at an infinite distance.
    """

    def apart(axis: str, one: Params, other: Params) -> float:
        if {n: t.shape for n, t in one.items()} != {n: t.shape for n, t in other.items()}:
            return math.inf
        return parameter_distance(one, turned(model, axis, one, other) if align else other)

    def distances(axis: str, update: Update, slots: Sequence[int]) -> list[list[float]]:
        server = blocks_in_order(model, axis, state.params, stacks[axis].order)
        client = client_blocks(model, state, axis, update)
        return [[apart(axis, one, own) for own in client] for one in server]

    return distances


def new_delta(stacks: Mapping[str, Stack], cutoff: float, deviations: float) -> dict[str, float]:
    """Axis -> the distance beyond which a block is like none; fixed, or by what was seen lately."""
    return {axis: cutoff or threshold(stack.spread, deviations) for axis, stack in stacks.items()}
