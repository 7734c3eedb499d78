"""Trials of configurations: groups of clients that go on from the same parameters, and who wins.

The first group's parameters are the state's; those that others train lie in `State.extra`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from torch import Tensor

from tesserafl.core.errors import ConfigError
from tesserafl.core.messages import Update
from tesserafl.core.method import State
from tesserafl.core.model import Model
from tesserafl.core.params import Params
from tesserafl.core.submodel import SubModel, Units
from tesserafl.methods._activation import most_blocks


class Group(NamedTuple):
    """A configuration under trial."""

    name: str
    depth: int
    """Blocks next to the output whose adapters are trained."""
    width: int
    """Ranks of an adapter that are trained."""


class _Found(NamedTuple):
    """What the clients of a group measured."""

    right: int = 0
    """Validation examples that they answered rightly."""
    seen: int = 0
    """Validation examples."""
    loss: float = 0.0
    """Sum of the training loss over examples."""
    examples: int = 0
    """Training examples."""


def groups_of(state: State) -> list[Group]:
    """The groups of the window, the one that keeps the configuration first."""
    return [Group(*group) for group in state.notes["groups"]]


def group_of(state: State, client: int, round: int) -> Group:
    """The client's group in a round: clients take turns, whoever else takes part."""
    groups = groups_of(state)
    return groups[(client + round) % len(groups)]


def tensor_of(state: State, group: Group, name: str) -> Tensor:
    """A parameter as the group has it."""
    own = f"{group.name}/{name}"
    return state.extra[own] if own in state.extra else state.params[name]


def params_of(state: State, group: Group) -> Params:
    """All parameters as the group has them."""
    return {name: tensor_of(state, group, name) for name in state.params}


def held_by(model: Model, group: Group, ratio: float) -> SubModel:
    """What a client of this share of the ranks holds: the group's adapters, and no others."""
    keep: dict[str, Units] = {}
    for axis in model.cuttable:
        width = min(group.width, model.units(axis))
        keep[axis] = range(math.ceil(round(ratio * width, 9)))
    for axis, depth in model.depths.items():
        if depth.last is not None:
            keep[axis] = range(min(max(1, group.depth), depth.blocks))
    return model.slice(keep)


@dataclass(frozen=True, kw_only=True)
class Trials:
    """The settings of trials, and what follows from them; a method that has some inherits it."""

    start_depth: int = 1
    """blocks next to the output whose adapters are trained at first"""
    start_width: int = 8
    """ranks of an adapter that are trained at first; no more than model.rank"""
    depth_step: int = 1
    """blocks that the deeper group adds"""
    width_step: int = 8
    """ranks that the wider group adds"""
    most_depth: int = 12
    """most blocks, beside what the model has"""
    most_width: int = 64
    """most ranks, beside model.rank"""
    window: int = 9
    """rounds of a trial; where fewer are left of the run, all clients train one configuration"""

    def check_trials(self) -> None:
        """Check the settings.

        Raises:
            ConfigError: a number is too small, or a start is above its most.
        """
        least = {"start_depth": 0, "start_width": 1, "depth_step": 1, "width_step": 1, "window": 2}
        for name, low in least.items():
            if getattr(self, name) < low:
                raise ConfigError(
                    f"method.{name} must be at least {low}; got {getattr(self, name)}"
                )
        for size in ("depth", "width"):
            start, most = getattr(self, f"start_{size}"), getattr(self, f"most_{size}")
            if start > most:
                raise ConfigError(
                    f"method.start_{size} must be at most method.most_{size}, {most}; got {start}"
                )

    def begun(self, model: Model, state: State, depth: int, width: int) -> State:
        """The state at the beginning of a window: its groups all have the state's parameters."""
        most_depth = min(self.most_depth, most_blocks(model))
        most_width = min(self.most_width, max(model.units(axis) for axis in model.cuttable))
        depth, width = min(depth, most_depth), min(width, most_width)
        groups = [Group("keep", depth, width)]
        if state.round + self.window <= state.rounds:
            if width < most_width:
                groups.append(Group("wider", depth, min(width + self.width_step, most_width)))
            if depth < most_depth:
                groups.append(Group("deeper", min(depth + self.depth_step, most_depth), width))
        notes = {"groups": [list(group) for group in groups], "begun": state.round, "since": 0}
        state = replace(state, notes={**state.notes, **notes, "tally": {}})
        return _with_params(model, state, dict.fromkeys(groups, state.params))

    def is_judged(self, state: State) -> bool:
        """Whether the next round's measurements count; in a window's first groups are equal.

        As many rounds as there are groups: who takes part in all is in every group once.
        """
        judged = self.window - len(state.notes["groups"])
        return self.in_groups(state) and state.notes["since"] >= max(1, judged)

    def in_groups(self, state: State) -> bool:
        """Whether the next round's clients train from unequal parameters, without one mean."""
        return len(state.notes["groups"]) > 1

    def after(
        self, model: Model, state: State, params: Mapping[Group, Params], tally: Tally
    ) -> State:
        """The state after a round that made these parameters; at a window's end the winner's."""
        notes = {**state.notes, "since": state.notes["since"] + 1}
        if self.is_judged(state):
            notes["tally"] = tally.added(notes["tally"])
        after = replace(state, round=state.round + 1, notes=notes)
        if notes["since"] < self.window and after.round < after.rounds:
            return _with_params(model, after, params)
        groups = list(params)
        scores = scores_of(groups, notes["tally"])
        best = winner_of(groups, scores)
        if self.in_groups(state):
            entry = [state.round, *best, dict(zip([g.name for g in groups], scores, strict=True))]
            notes["log"] = [*notes["log"], entry]
        after = replace(after, params=params[best], notes=notes)
        return self.begun(model, after, best.depth, best.width)


@dataclass
class Tally:
    """What clients measured in a round, noted while their updates pass by."""

    found: dict[int, tuple[str, _Found]] = field(default_factory=dict)
    """Client -> its group, and what it measured."""

    def note(self, group: Group, update: Update) -> None:
        """Note one answer."""
        metrics = update.metrics
        seen = round(metrics.get("validation_examples", 0.0))
        right = round(metrics.get("validation_accuracy", 0.0) * seen)
        examples = update.num_examples if "loss" in metrics else 0
        loss = metrics.get("loss", 0.0) * examples
        self.found[update.client] = group.name, _Found(right, seen, loss, examples)

    def added(self, before: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
        """Sums of this round and of those before, group -> `_Found`; not by order of arrival."""
        sums = {name: list(found) for name, found in before.items()}
        for _, (name, found) in sorted(self.found.items()):
            old = sums.get(name, _Found())
            sums[name] = [a + b for a, b in zip(old, found, strict=True)]
        return sums


def scores_of(groups: Sequence[Group], tally: Mapping[str, Sequence[Any]]) -> list[float | None]:
    """How good each group is; None: nobody measured it.

    Accuracy on the clients' validation examples, if any client has some; else minus the training
    loss.
    """
    found = [_Found(*tally.get(group.name, ())) for group in groups]
    if any(each.seen for each in found):
        return [each.right / each.seen if each.seen else None for each in found]
    return [-each.loss / each.examples if each.examples else None for each in found]


def winner_of(groups: Sequence[Group], scores: Sequence[float | None]) -> Group:
    """The best group, the first of equal ones; the first of all if it was not measured itself."""
    best, most = groups[0], scores[0]
    for group, score in zip(groups[1:], scores[1:], strict=True):
        if most is not None and score is not None and score > most:
            best, most = group, score
    return best


def _with_params(model: Model, state: State, params: Mapping[Group, Params]) -> State:
    first, *others = params
    extra: Params = {}
    for group in others:
        trained = model.adapted(group.depth)
        own = {name: params[group][name] for name in model.shapes if name in trained}
        extra |= {f"{group.name}/{name}": tensor for name, tensor in own.items()}
    return replace(state, params=params[first], extra=extra)
