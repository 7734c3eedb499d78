"""What the server does every few rounds: merge, prune, tune scales, choose what is served."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

from tesserafl.core.method import PUBLIC_LABELS, State
from tesserafl.core.model import Model
from tesserafl.core.params import Params
from tesserafl.methods._depth import block_names, blocks_in_order
from tesserafl.methods._growing import Growing
from tesserafl.methods._match import parameter_distance
from tesserafl.methods._public import accuracy_of, calibrated, public_of, weak_blocks
from tesserafl.methods._stack import Stack, Stacks, noted, orders_of, stacks_of

_LOOKS = 3
"""Looks in a row at which two blocks must be alike before they become one."""


def looked(growing: Growing, model: Model, state: State) -> State:
    """Every `cooldown` rounds and after the last one: merge, prune, calibrate, guard."""
    if state.round % growing.cooldown and state.round != state.rounds:
        return state
    state = _tidied(growing, model, state)
    if state.notes["grown"] is None or not len(state.extra.get(PUBLIC_LABELS, ())):
        return state
    public, stacks = public_of(state, "method.guard"), stacks_of(state)
    state = replace(state, notes={**state.notes, "calibrated": None, "served": None})
    orders, scales = orders_of(stacks), growing.scales(model, state, stacks)
    notes: dict[str, Any] = {}
    if growing.calibrate:
        scales = calibrated(model, state.params, orders, scales, public, growing.calibrate)
        notes["calibrated"] = {
            axis: {str(slot): value for slot, value in own.items()} for axis, own in scales.items()
        }
    if growing.guard:
        deep = accuracy_of(model, state.params, orders, scales, public)
        paths = _paths(growing, stacks)
        plain = {axis: dict.fromkeys(order, 1.0) for axis, order in orders.items()}
        found = [accuracy_of(model, state.params, path, plain, public) for path in paths]
        if deep < max(found) - growing.guard:
            notes["served"] = paths[found.index(max(found))]
    return replace(state, notes={**state.notes, **notes})


def _paths(growing: Growing, stacks: Stacks) -> list[dict[str, list[int]]]:
    """Models of a client's size: the first one of all, and what is held most."""
    depth = max(growing.depth)
    first = {axis: list(stack.path(-1, depth)) for axis, stack in stacks.items()}
    most = {}
    for axis, stack in stacks.items():
        shares = stack.shares(depth)
        top = sorted(stack.order, key=lambda slot: -shares[slot])[:depth]
        most[axis] = sorted(top, key=stack.order.index)
    return [first, most]


def _tidied(growing: Growing, model: Model, state: State) -> State:
    stacks, params, log = stacks_of(state), dict(state.params), list(state.notes["log"])
    if growing.prune and state.notes["grown"] is not None:
        public = public_of(state, "method.prune")
        scales = growing.scales(model, state, stacks)
        for added, axis, slot in weak_blocks(model, params, stacks, scales, public):
            is_old = state.round - stacks[axis].born.get(slot, 0) >= growing.cooldown
            may_go = is_old and _may_go(growing, model, axis, stacks[axis], slot)
            if added < growing.prune and may_go:
                stacks[axis] = stacks[axis].without(slot)
                log.append([state.round, "prune", axis, slot, -1, []])
                break
    if growing.merge:
        for axis in stacks:
            stacks[axis] = _merged(growing, model, state.round, axis, stacks[axis], params, log)
    return replace(state, params=params, notes={**state.notes, **noted(stacks), "log": log})


def _merged(
    growing: Growing,
    model: Model,
    round: int,
    axis: str,
    stack: Stack,
    params: Params,
    log: list[Any],
) -> Stack:
    """Neighbours that were alike at several looks in a row become one; changes `params`."""
    blocks, close = blocks_in_order(model, axis, params, stack.order), {}
    for j, (slot, other) in enumerate(pairwise(stack.order)):
        if slot not in model.movable(axis) or not _may_go(growing, model, axis, stack, other):
            continue
        if parameter_distance(blocks[j], blocks[j + 1]) < growing.merge:
            close[slot] = stack.close.get(slot, 0) + 1
    stack = replace(stack, close=close)
    ready = [slot for slot, looks in close.items() if looks >= _LOOKS]
    if not ready:
        return stack
    kept = ready[0]
    gone = stack.order[stack.order.index(kept) + 1]
    names, shares = block_names(model, axis), stack.shares(len(stack.order))
    both = shares[kept] + shares[gone]
    part = shares[gone] / both if both else 0.5
    for rest, name in names[kept].items():
        params[name] = (1.0 - part) * params[name] + part * params[names[gone][rest]]
    log.append([round, "merge", axis, gone, kept, []])
    return stack.without(gone, into=kept)


def _may_go(growing: Growing, model: Model, axis: str, stack: Stack, slot: int) -> bool:
    """Every client must find as many blocks as it trains."""
    return slot in model.movable(axis) and len(stack.order) > max(growing.depth)
