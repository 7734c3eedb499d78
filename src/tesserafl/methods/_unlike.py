"""Blocks that were set aside: which of them are alike, and what those have in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tesserafl.core.exactsum import ExactSum
from tesserafl.core.params import Params
from tesserafl.core.submodel import SubModel, View, merge
from tesserafl.methods._match import clusters, flat, halves

Measure = Literal["parameters", "updates", "functions"]
"""What tells blocks apart."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Unlike:
    """A client's block that was set aside."""

    client: int
    stake: int
    """The client's weight in a mean."""
    axis: str
    origin: int
    """The slot that the client got it from."""
    place: int
    """Which of the client's blocks it is, counted from the input."""
    after: int
    """The slot that it would follow; -1: it would be the first."""
    delta: Params
    """What the client changed, by the parameters' names within the block."""
    views: Mapping[str, View]
    """Where that lies in the block that it came from, by the same names."""

    def update(self, origin: Params) -> Tensor:
        """The change as one vector; what was not reported is 0."""
        whole = {rest: torch.zeros_like(value) for rest, value in origin.items()}
        for rest, change in self.delta.items():
            self.views[rest].add(whole[rest], change)
        return flat(whole)


@dataclass(frozen=True, kw_only=True)
class Grown:
    """A block that was put in."""

    axis: str
    slot: int
    origin: int
    after: int
    members: Mapping[int, tuple[int, ...]]
    """Clients that made it, and the slots that they hold from now on."""
    part: float
    """The members' part of the weight that held the origin."""


def alike(measure: Measure, group: Sequence[Unlike], origin: Params) -> list[list[Unlike]]:
    """Groups that are alike among themselves, of blocks that came from one and belong in one place.

    By updates: two halves, by the sign of the updates' first principal direction. Else clusters.
    """
    updates = torch.stack([unlike.update(origin) for unlike in group])
    found = halves(updates) if measure == "updates" else clusters(updates)
    return [[group[n] for n in numbers] for numbers in found if numbers]


def mean_block(group: Sequence[Unlike], origin: Params) -> Params:
    """The exact weighted mean of blocks that came from `origin`."""
    total = ExactSum(max_weight=max(1, sum(unlike.stake for unlike in group)))
    for unlike in group:
        own = {rest: View(rest, view.index) for rest, view in unlike.views.items()}
        total.fold(SubModel({}, own), unlike.delta, unlike.stake, origin)
    return merge(origin, total)
