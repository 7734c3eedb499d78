"""The pilot: after the first insertion each policy has its turn from one state; the best stays.

The state is forked. What the trials cost is a part of the run's cost: their rounds are rounds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from tesserafl.core.method import State
from tesserafl.core.model import Model
from tesserafl.core.params import Params
from tesserafl.methods._blockscale import scaled_blocks
from tesserafl.methods._growing import TRIALS, Growing
from tesserafl.methods._public import accuracy_of, public_of
from tesserafl.methods._stack import noted, orders_of, stacks_of

_FORK, _KEPT = "fork/", "kept/"
_DAMPED = 0.1
"""What a new block adds at first, of what its members' mean adds, where paths are drawn."""


def settled(growing: Growing, model: Model, state: State) -> State:
    """The state after an insertion, which is the newest entry of its log.

    The first one begins the pilot. A new block adds little at first where clients' paths are drawn
    anew in every round, since most of them have never seen it.
    """
    if growing.policy == "pilot" and state.notes["pilot"] is None:
        stacks = state.notes["stacks"]
        known = {"found": [], "first": None, "log": state.notes["log"], "firsts": []}
        return _trial(growing, model, state, state.params, stacks, known)
    return _begun(growing, model, state)


def piloted(growing: Growing, model: Model, state: State) -> State:
    """After a round: end a trial that has had its rounds, begin the next, or keep the best."""
    pilot = state.notes["pilot"]
    if pilot is None or pilot["done"]:
        return state
    last = state.round == state.rounds
    if state.round - pilot["begun"] < growing.pilot_rounds and not last:
        return state
    stacks, public = stacks_of(state), public_of(state, "method.policy pilot")
    scales = growing.scales(model, state, stacks)
    accuracy = accuracy_of(model, state.params, orders_of(stacks), scales, public)
    found = [*pilot["found"], accuracy]
    if len(found) < len(TRIALS) and not last:
        kept = {f"{_KEPT}{name}": tensor for name, tensor in state.params.items()}
        state = replace(state, extra={**state.extra, **kept})
        known = {**pilot, "found": found, "first": noted(stacks)["stacks"]}
        known |= {"firsts": state.notes["log"]}
        return _trial(growing, model, state, _named(state, _FORK), pilot["stacks"], known)
    best = max(range(len(found)), key=lambda number: (found[number], -number))
    params, log = state.params, state.notes["log"]
    notes = {**state.notes, "policy": TRIALS[best], "grown": state.round}
    if best < len(found) - 1:  # nothing of the trial that is dropped may stay
        params, log = _named(state, _KEPT), pilot["firsts"]
        notes |= {"stacks": pilot["first"], "calibrated": None, "served": None}
    entry = [state.round, TRIALS[best], "", -1, -1, found]
    notes |= {"pilot": {"done": True, "found": found}, "log": [*log, entry]}
    extra = {n: t for n, t in state.extra.items() if not n.startswith((_FORK, _KEPT))}
    return replace(state, params=params, notes=notes, extra=extra)


def _trial(
    growing: Growing,
    model: Model,
    state: State,
    params: Params,
    stacks: Mapping[str, Any],
    known: Mapping[str, Any],
) -> State:
    """Begin the next trial from the fork."""
    pilot = {**known, "begun": state.round, "stacks": stacks, "done": False}
    policy = TRIALS[len(known["found"])]
    notes = {**state.notes, "stacks": stacks, "policy": policy, "pilot": pilot}
    notes |= {"log": pilot["log"], "calibrated": None, "served": None}
    fork = {f"{_FORK}{name}": tensor for name, tensor in params.items()}
    forked = replace(state, params=params, notes=notes, extra={**state.extra, **fork})
    return _begun(growing, model, forked)


def _begun(growing: Growing, model: Model, state: State) -> State:
    """The state with the newest block as it is to begin."""
    is_drawn = state.notes["policy"] in ("resampled", "importance")
    factor = 0.0 if growing.insertion == "identity" else _DAMPED if is_drawn else 1.0
    axis, slot = next(e[2:4] for e in reversed(state.notes["log"]) if e[1] == "insert")
    return replace(state, params=scaled_blocks(state.params, model, {axis: {slot: factor}}))


def _named(state: State, start: str) -> Params:
    return {n.removeprefix(start): t for n, t in state.extra.items() if n.startswith(start)}
