"""A server model that grows: when blocks are put in, tidied up, scaled; which policy is kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from tesserafl.core.errors import ConfigError
from tesserafl.core.messages import Client
from tesserafl.core.method import PUBLIC_LABELS, State
from tesserafl.core.model import Model
from tesserafl.core.params import Params
from tesserafl.methods._blockscale import Scales, scaled_blocks
from tesserafl.methods._depth import block_names, blocks_in_order, depth_axes, depth_of
from tesserafl.methods._growth import Distances, Grown, Ledger, Measure, new_delta, parameters_apart
from tesserafl.methods._handback import Policy, scales_of
from tesserafl.methods._match import parameter_distances
from tesserafl.methods._public import (
    accuracy_of,
    calibrated,
    functions_apart,
    public_of,
    weak_blocks,
)
from tesserafl.methods._stack import Stack

Stacks = dict[str, Stack]
_TRIALS: tuple[Policy, ...] = ("persistent", "importance")
_DAMPED = 0.1
"""What a new block adds at first, of what its members' mean adds, where paths are drawn."""
_LOOKS = 3
"""Looks in a row at which two blocks must be alike before they become one."""


@dataclass(frozen=True, kw_only=True)
class Growing:
    """The settings of growth, and the server's steps; a method that grows inherits it."""

    depth: tuple[int, ...] = (5,)
    """blocks (of every stage) that each client class trains, dealt to the clients in turn; the
    model's own number of blocks is the most that the server's may have"""
    policy: Literal["persistent", "resampled", "importance", "slots", "pilot"] = "pilot"
    """what clients receive: their blocks as matched, blocks at random, at random by importance, one
    block of every family; pilot: the better of persistent and importance on public examples"""
    measure: Measure = "updates"
    """what tells blocks apart: disagreement of the clients' updates; distance of parameters; CKA of
    what blocks give for public examples"""
    threshold: float = 2.5
    """c: a distance is an outlier beyond the median and so many median absolute deviations"""
    cutoff: float = 0.0
    """a fixed distance beyond which a block is matched to none; 0: the adaptive threshold"""
    warmup: int = 30
    """rounds before the first block is put in"""
    cooldown: int = 15
    """rounds between two insertions, and between two looks at public examples"""
    support: float = 0.1
    """share of a round's weight that must stand behind a new block"""
    scaling: bool = True
    """the server scales what a block adds by how often clients held it"""
    calibrate: int = 0
    """steps that tune residual scales on public examples, at every look; 0: they stay"""
    merge: float = 0.0
    """distance below which neighbours become one block, three looks in a row; 0: never"""
    prune: float = 0.0
    """a block is taken out that adds less than this share of what enters it; 0: never"""
    guard: float = 0.01
    """the deep model is not served where a client's path is better by more than this accuracy"""
    pilot_rounds: int = 15
    """rounds that the pilot gives each policy"""

    def check_growth(self, model: Model) -> None:
        """Check the settings.

        Raises:
            ConfigError: one is outside of what it may be.
        """
        least = {"warmup": 0, "cooldown": 1, "calibrate": 0, "pilot_rounds": 1}
        for name, low in least.items():
            if getattr(self, name) < low:
                raise ConfigError(
                    f"method.{name} must be at least {low}; got {getattr(self, name)}"
                )
        for name in ("threshold", "cutoff", "merge", "prune", "guard"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"method.{name} must be 0 or more; got {getattr(self, name)}")
        if not 0.0 <= self.support <= 0.5:
            raise ConfigError(f"method.support must be in [0, 0.5]; got {self.support}")
        most = max(
            depth_of(self.depth, Client(id=i, num_examples=1)) for i in range(len(self.depth))
        )
        for axis in depth_axes(model):
            if most > model.units(axis):
                raise ConfigError(
                    f"method.depth has {most} blocks, but axis {axis!r} of the model has only "
                    f"{model.units(axis)}, the most that the server's model may have; raise it"
                )

    @property
    def needs_public(self) -> str | None:
        """What looks at public examples; None: nothing must."""
        wanted = {
            "method.policy pilot": self.policy == "pilot",
            "method.measure functions": self.measure == "functions",
            "method.calibrate": self.calibrate > 0,
            "method.prune": self.prune > 0,
        }
        return next((name for name, is_so in wanted.items() if is_so), None)

    def first_notes(self, model: Model) -> dict[str, Any]:
        """What a state notes before the first round."""
        stacks = {
            axis: Stack(order=tuple(range(min(max(self.depth), model.units(axis)))))
            for axis in depth_axes(model)
        }
        policy = _TRIALS[0] if self.policy == "pilot" else self.policy
        notes = {"policy": policy, "grown": None, "served": None, "calibrated": None}
        return {**notes, "pilot": None, "log": [], "paths": {}, **noted(stacks)}

    def scales(self, model: Model, state: State, stacks: Mapping[str, Stack]) -> Scales:
        """Residual scales of the server's model, axis -> slot -> scale."""
        if state.notes["calibrated"] is not None:
            known = state.notes["calibrated"]
            return {axis: {int(s): v for s, v in known[axis].items()} for axis in stacks}
        if not self.scaling:
            return {axis: dict.fromkeys(stack.order, 1.0) for axis, stack in stacks.items()}
        depth = sum(self.depth) / len(self.depth)
        policy: Policy = state.notes["policy"]
        return {axis: scales_of(policy, stack, depth) for axis, stack in stacks.items()}

    def ledger(
        self, model: Model, state: State, clients: Sequence[Client], weighting: Any
    ) -> Ledger:
        """A round's ledger: what is set aside is decided before the round."""
        stacks, is_open = stacks_of(state), self._is_open(model, state)
        distances: Distances = parameters_apart(model, state, stacks)
        if self.measure == "functions":
            public = public_of(state, "method.measure functions")
            distances = functions_apart(
                model, state, stacks, self.scales(model, state, stacks), public
            )
        delta = new_delta(stacks, self.cutoff, self.threshold)
        return Ledger(
            model=model,
            state=state,
            stacks=stacks,
            clients=clients,
            weighting=weighting,
            measure=self.measure,
            distances=distances,
            delta=delta if is_open else dict.fromkeys(delta, float("inf")),
            split=_most_at_odds(model, stacks) if is_open and self.measure == "updates" else None,
        )

    def put_in(
        self,
        state: State,
        model: Model,
        stacks: Stacks,
        grown: Grown,
        block: Params,
        ledger: Ledger,
    ) -> State:
        """The state with a new block; under the pilot, with two copies of what was before it."""
        members = {client: ledger.paths[client][grown.axis] for client in grown.members}
        stack = stacks[grown.axis].with_block(
            grown.slot, grown.origin, grown.after, members, grown.part, state.round
        )
        names = block_names(model, grown.axis)[grown.slot]
        params = {**state.params, **{names[rest]: value for rest, value in block.items()}}
        entry = [state.round, "insert", grown.axis, grown.slot, grown.after, list(grown.members)]
        notes = {**state.notes, **noted({**stacks, grown.axis: stack})}
        notes |= {"grown": state.round, "log": [*state.notes["log"], entry], "calibrated": None}
        state = replace(state, params=params, notes=notes)
        if self.policy == "pilot" and notes["pilot"] is None:
            return self._trial(model, state, state.params, notes["stacks"], 0, [])
        return _damped(model, state, grown.axis, grown.slot)

    def look(self, model: Model, state: State) -> State:
        """Every `cooldown` rounds: tidy up, calibrate, guard; and the pilot's decisions."""
        state = self._pilot(model, state)
        if state.round % self.cooldown and state.round != state.rounds:
            return state
        state = self._tidied(model, state)
        if not len(state.extra.get(PUBLIC_LABELS, ())):
            return state
        public, stacks = public_of(state, "method.guard"), stacks_of(state)
        state = replace(state, notes={**state.notes, "calibrated": None, "served": None})
        orders = {axis: list(stack.order) for axis, stack in stacks.items()}
        scales = self.scales(model, state, stacks)
        notes: dict[str, Any] = {}
        if self.calibrate and state.notes["grown"] is not None:
            scales = calibrated(model, state.params, orders, scales, public, self.calibrate)
            notes["calibrated"] = {
                axis: {str(slot): value for slot, value in own.items()}
                for axis, own in scales.items()
            }
        if self.guard and state.notes["grown"] is not None:
            deep = accuracy_of(model, state.params, orders, scales, public)
            plain = {axis: dict.fromkeys(order, 1.0) for axis, order in orders.items()}
            paths = self._paths(stacks)
            best = max(
                (accuracy_of(model, state.params, path, plain, public), -number)
                for number, path in enumerate(paths)
            )
            if deep < best[0] - self.guard:
                notes["served"] = paths[-int(best[1])]
        return replace(state, notes={**state.notes, **notes})

    def _is_open(self, model: Model, state: State) -> bool:
        """Whether a block may be put in after this round."""
        notes, stacks = state.notes, stacks_of(state)
        rested = notes["grown"] is None or state.round - notes["grown"] >= self.cooldown
        free = any(slot is not None for slot in free_slots(model, stacks).values())
        trying = notes["pilot"] is not None and not notes["pilot"]["done"]
        return (
            state.round >= self.warmup
            and rested
            and free
            and notes["served"] is None
            and not trying
        )

    def _paths(self, stacks: Mapping[str, Stack]) -> list[dict[str, list[int]]]:
        """Models of a client's size: the first one of all, and what is held most."""
        depth = max(self.depth)
        first = {axis: list(stack.path(-1, depth)) for axis, stack in stacks.items()}
        most = {}
        for axis, stack in stacks.items():
            shares = stack.shares(depth)
            top = sorted(stack.order, key=lambda slot: -shares[slot])[:depth]
            most[axis] = sorted(top, key=stack.order.index)
        return [first, most]

    def _tidied(self, model: Model, state: State) -> State:
        stacks, params, log = stacks_of(state), dict(state.params), list(state.notes["log"])
        if self.prune and state.notes["grown"] is not None:
            public = public_of(state, "method.prune")
            scales = self.scales(model, state, stacks)
            for added, axis, slot in weak_blocks(model, params, stacks, scales, public)[:1]:
                if added < self.prune and len(stacks[axis].order) > max(self.depth):
                    stacks[axis] = stacks[axis].without(slot)
                    log.append([state.round, "prune", axis, slot, -1, []])
        if self.merge:
            for axis in stacks:
                stacks[axis] = self._merged(model, state, axis, stacks[axis], params, log)
        notes = {**state.notes, **noted(stacks), "log": log}
        return replace(state, params=params, notes=notes)

    def _merged(
        self, model: Model, state: State, axis: str, stack: Stack, params: Params, log: list[Any]
    ) -> Stack:
        """Neighbours that were alike at several looks in a row become one; changes `params`."""
        blocks = blocks_in_order(model, axis, params, stack.order)
        close = {}
        for j, (slot, other) in enumerate(zip(stack.order, stack.order[1:], strict=False)):
            distance = parameter_distances([blocks[j]], [blocks[j + 1]])[0][0]
            if distance < self.merge and {slot, other} <= set(model.movable(axis)):
                close[slot] = stack.close.get(slot, 0) + 1
        stack = replace(stack, close=close)
        ready = [slot for slot, looks in close.items() if looks >= _LOOKS]
        if not ready or len(stack.order) <= max(self.depth):
            return stack
        kept = ready[0]
        gone = stack.order[stack.order.index(kept) + 1]
        names = block_names(model, axis)
        for rest, name in names[kept].items():
            params[name] = (params[name] + params[names[gone][rest]]) / 2
        log.append([state.round, "merge", axis, gone, kept, []])
        return stack.without(gone, into=kept)

    def _trial(
        self,
        model: Model,
        state: State,
        params: Params,
        stacks: Mapping[str, Any],
        number: int,
        found: list[float],
    ) -> State:
        """Begin a trial of the pilot from where it was forked."""
        fork = {f"{_FORK}{name}": tensor for name, tensor in params.items()}
        policy = _TRIALS[number]
        pilot = {
            "begun": state.round,
            "number": number,
            "found": found,
            "stacks": stacks,
            "done": False,
        }
        notes = {**state.notes, "stacks": stacks, "policy": policy, "pilot": pilot}
        state = replace(state, params=params, notes=notes, extra={**state.extra, **fork})
        last = state.notes["log"][-1]
        return _damped(model, state, last[2], last[3])

    def _pilot(self, model: Model, state: State) -> State:
        """End a trial after its rounds: begin the next, or keep what the best one reached."""
        pilot = state.notes["pilot"]
        if pilot is None or pilot["done"]:
            return state
        if state.round - pilot["begun"] < self.pilot_rounds and state.round != state.rounds:
            return state
        stacks = stacks_of(state)
        orders = {axis: list(stack.order) for axis, stack in stacks.items()}
        scales = self.scales(model, state, stacks)
        public = public_of(state, "method.policy pilot")
        found = [*pilot["found"], accuracy_of(model, state.params, orders, scales, public)]
        if pilot["number"] + 1 < len(_TRIALS) and state.round != state.rounds:
            kept = {f"{_KEPT}{name}": tensor for name, tensor in state.params.items()}
            forked = _named(state, _FORK)
            state = replace(state, extra={**state.extra, **kept})
            state = self._trial(model, state, forked, pilot["stacks"], pilot["number"] + 1, found)
            pilot = {**state.notes["pilot"], "first": state_stacks(stacks)}
            return replace(state, notes={**state.notes, "pilot": pilot})
        best = max(range(len(found)), key=lambda number: (found[number], -number))
        notes = {**state.notes, "policy": _TRIALS[best], "grown": state.round}
        params = state.params
        if best < pilot["number"]:
            params, notes["stacks"] = _named(state, _KEPT), pilot["first"]
        entry = [state.round, _TRIALS[best], "", -1, -1, found]
        notes |= {"pilot": {"done": True, "found": found}, "log": [*notes["log"], entry]}
        extra = {n: t for n, t in state.extra.items() if not n.startswith((_FORK, _KEPT))}
        return replace(state, params=params, notes=notes, extra=extra)


_FORK, _KEPT = "fork/", "kept/"


def noted(stacks: Mapping[str, Stack]) -> dict[str, Any]:
    """The stacks as a part of a state's notes."""
    return {"stacks": state_stacks(stacks)}


def state_stacks(stacks: Mapping[str, Stack]) -> dict[str, Any]:
    """The stacks as plain JSON values."""
    return {axis: stack.to_notes() for axis, stack in stacks.items()}


def stacks_of(state: State) -> Stacks:
    """The stacks that a state notes."""
    return {axis: Stack.from_notes(notes) for axis, notes in state.notes["stacks"].items()}


def free_slots(model: Model, stacks: Mapping[str, Stack]) -> dict[str, int | None]:
    """Axis -> the first slot that is not in use; None: all are."""
    return {
        axis: next((s for s in model.movable(axis) if s not in stack.order), None)
        for axis, stack in stacks.items()
    }


def _named(state: State, start: str) -> Params:
    return {n.removeprefix(start): t for n, t in state.extra.items() if n.startswith(start)}


def _most_at_odds(model: Model, stacks: Mapping[str, Stack]) -> tuple[str, int] | None:
    """The block whose updates cancel most, of axes with a free slot; None: none was measured."""
    free = free_slots(model, stacks)
    found = [
        (unrest, axis, slot)
        for axis, stack in stacks.items()
        for slot, unrest in stack.unrest.items()
        if free[axis] is not None and slot in model.movable(axis) and slot in stack.order
    ]
    if not found:
        return None
    most = max(unrest for unrest, _, _ in found)
    return min((axis, slot) for unrest, axis, slot in found if unrest == most)


def _damped(model: Model, state: State, axis: str, slot: int) -> State:
    """A new block adds little at first where clients' paths are drawn anew in every round."""
    if state.notes["policy"] not in ("resampled", "importance"):
        return state
    params = scaled_blocks(model, state.params, {axis: {slot: _DAMPED}})
    return replace(state, params=params)
