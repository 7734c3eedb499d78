"""What a client receives next round: the policies of a model that grows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

import torch

from tesserafl.core import seeds
from tesserafl.core.messages import Client
from tesserafl.core.method import State
from tesserafl.core.model import Model
from tesserafl.core.params import Params
from tesserafl.methods._depth import blocks_in_order, drawn_blocks
from tesserafl.methods._stack import Stack, Stacks

Policy = Literal["persistent", "resampled", "importance", "slots"]
_YOUNG = 1.0
"""What the logarithm of a young block's weight is raised by."""


def handed_to(
    policy: Policy,
    model: Model,
    state: State,
    stacks: Mapping[str, Stack],
    client: Client,
    depth: int,
    young: int,
) -> dict[str, list[int]]:
    """The client's slots on every depth axis, from input to output.

    Args:
        policy: persistent: as before; resampled: at random; importance: at random, large and young
            blocks more often; slots: one block of every family.
        model: the global model.
        state: before the round.
        stacks: the blocks in use.
        client: who asks.
        depth: blocks that it trains.
        young: rounds for which a block counts as young.
    """
    if policy == "persistent":
        return {axis: list(stack.path(client.id, depth)) for axis, stack in stacks.items()}
    draw = seeds.generator(state.seed, state.round, client.id, "path")
    if policy == "slots":
        return {axis: _of_families(stack, depth, draw) for axis, stack in stacks.items()}
    orders = {axis: stack.order for axis, stack in stacks.items()}
    if policy == "resampled":
        return drawn_blocks(model, orders, depth, draw)
    scores = {
        axis: [
            stack.sizes.get(slot, 0.0)
            + _YOUNG * (state.round - stack.born.get(slot, -young) <= young)
            for slot in stack.order
        ]
        for axis, stack in stacks.items()
    }
    return drawn_blocks(model, orders, depth, draw, scores)


def weighed(model: Model, params: Params, stacks: Mapping[str, Stack]) -> Stacks:
    """The stacks, which know how large their blocks are."""
    return {
        axis: replace(
            stack,
            sizes={
                slot: importance(block)
                for slot, block in zip(
                    stack.order, blocks_in_order(model, axis, params, stack.order), strict=True
                )
            },
        )
        for axis, stack in stacks.items()
    }


def importance(block: Params) -> float:
    """2 log(|W_1| |W_2|) of a block of two matrices; four times the mean logarithm of more."""
    norms = [float(value.double().norm()) for value in block.values() if value.dim() > 1]
    logs = [torch.tensor(max(norm, 1e-30)).log() for norm in norms]
    return 4.0 * float(torch.stack(logs).mean()) if logs else 0.0


def scales_of(policy: Policy, stack: Stack, depth: float) -> dict[int, float]:
    """Slot -> residual scale of the server's model: how often a block was in a client's model.

    Args:
        policy: how clients were given their blocks.
        stack: the blocks in use.
        depth: blocks that a client trains, on average.
    """
    if policy == "slots":
        sizes = {slot: len(family) for family in stack.families for slot in family}
        return {slot: 1.0 / sizes[slot] for slot in stack.order}
    return stack.shares(depth)


def _of_families(stack: Stack, depth: int, draw: torch.Generator) -> list[int]:
    families = stack.families
    depth = min(depth, len(families))
    last = max(1, depth - 1)
    chosen = [families[j * (len(families) - 1) // last] for j in range(depth)]
    drawn = [family[int(torch.randint(len(family), (), generator=draw))] for family in chosen]
    return sorted(drawn, key=stack.order.index)
