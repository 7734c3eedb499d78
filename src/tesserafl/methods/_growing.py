"""A server model that grows: when blocks are put in, tidied up, scaled; which policy is kept."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from tesserafl.core.errors import ConfigError
from tesserafl.core.messages import Client
from tesserafl.core.method import State
from tesserafl.core.model import Model
from tesserafl.core.params import Params
from tesserafl.methods._blockscale import Scales
from tesserafl.methods._depth import block_names, check_depths, depth_axes
from tesserafl.methods._distances import Distances, new_delta, parameters_apart
from tesserafl.methods._growth import Ledger
from tesserafl.methods._handback import Policy, scales_of
from tesserafl.methods._public import (
    functions_apart,
    public_of,
)
from tesserafl.methods._stack import Stack, Stacks, free_slots, noted, stacks_of
from tesserafl.methods._unlike import Grown, Measure

TRIALS: tuple[Policy, ...] = ("persistent", "importance")
"""What the pilot tries, in this order."""

_LEAST = 0.01
"""Disagreement of updates below which they are alike."""


@dataclass(frozen=True, kw_only=True)
class Growing:
    """The settings of growth, and the server's steps; a method that grows inherits it."""

    depth: tuple[int, ...] = (5,)
    """blocks (of every stage) that each client class trains, dealt to the clients in turn; the
    model's own number of blocks is the most that the server's may have"""
    policy: Literal["persistent", "resampled", "importance", "slots", "pilot"] = "persistent"
    """what clients receive: their blocks as matched, blocks at random, at random by importance, one
    block of every family; pilot: the better of persistent and importance on public examples"""
    measure: Measure = "updates"
    """what tells blocks apart: disagreement of the clients' updates; distance of parameters; CKA of
    what blocks give for public examples"""
    align: bool = False
    """permute the units of clients' models to match the server's before blocks are compared"""
    threshold: float = 2.5
    """c: a distance is an outlier beyond the median and so many median absolute deviations (not of
    measure updates)"""
    cutoff: float = 0.0
    """a fixed distance beyond which a block is matched to none, instead of the adaptive threshold;
    of measure updates, where the block with the most disagreement is split when it is time, the
    least disagreement; 0: the threshold, and 0.01"""
    warmup: int = 30
    """rounds before the first block is put in"""
    cooldown: int = 15
    """rounds between two insertions, and between two looks at public examples"""
    insertion: Literal["mean", "identity"] = "mean"
    """what a new block begins as: the mean of its clients' (little of it where paths are drawn), or
    that with outputs of zero, which leaves the server's function as it was"""
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
    """the deep model is not served where a client's path is better by more than this accuracy; 0:
    it always is"""
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
        check_depths(self.depth)
        most = max(self.depth)
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
        policy = TRIALS[0] if self.policy == "pilot" else self.policy
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
        distances: Distances = parameters_apart(model, state, stacks, self.align)
        if self.measure == "functions":
            public = public_of(state, "method.measure functions")
            distances = functions_apart(
                model, state, stacks, self.scales(model, state, stacks), public
            )
        delta = new_delta(stacks, self.cutoff, self.threshold)
        free = free_slots(model, stacks)
        return Ledger(
            model=model,
            state=state,
            stacks=stacks,
            clients=clients,
            weighting=weighting,
            measure=self.measure,
            align=self.align,
            distances=distances,
            delta={a: d if is_open and free[a] is not None else math.inf for a, d in delta.items()},
            split=self._most_at_odds(model, stacks) if is_open else None,
        )

    def put_in(
        self, state: State, model: Model, stacks: Stacks, grown: Grown, block: Params
    ) -> State:
        """The state with a new block."""
        stack = stacks[grown.axis].with_block(
            grown.slot, grown.origin, grown.after, grown.members, grown.part, state.round
        )
        names = block_names(model, grown.axis)[grown.slot]
        params = {**state.params, **{names[rest]: value for rest, value in block.items()}}
        entry = [state.round, "insert", grown.axis, grown.slot, grown.after, sorted(grown.members)]
        notes = {**state.notes, **noted({**stacks, grown.axis: stack})}
        notes |= {"grown": state.round, "log": [*state.notes["log"], entry], "calibrated": None}
        return replace(state, params=params, notes=notes)

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

    def _most_at_odds(self, model: Model, stacks: Mapping[str, Stack]) -> tuple[str, int] | None:
        """The block whose updates cancel most, of axes with a free slot; None: none do enough."""
        free = free_slots(model, stacks)
        found = [
            (unrest, axis, slot)
            for axis, stack in stacks.items()
            for slot, unrest in stack.unrest.items()
            if free[axis] is not None and slot in model.movable(axis) and slot in stack.order
        ]
        most = max((unrest for unrest, _, _ in found), default=0.0)
        if self.measure != "updates" or most < (self.cutoff or _LEAST):
            return None
        return min((axis, slot) for unrest, axis, slot in found if unrest == most)
