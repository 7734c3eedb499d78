"""When the nodes of a tree synchronise, and what they saw of each other: plain values.

kappa_1, the local steps of a device before its edge averages, and kappa_2, the averages of an edge
before the cloud's, in HierFAVG (Liu et al., ICC 2020); one of each per node in Tomtit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from tesserafl.core.messages import Client
from tesserafl.core.params import Params
from tesserafl.core.submodel import SubModel


@dataclass(frozen=True, kw_only=True)
class Periods:
    """One node's scheme for a round of the cloud."""

    rounds: int = 1
    """the node's own averages before it reports (kappa_2, gamma_i)"""
    steps: Mapping[int, int] = field(default_factory=dict)
    """client -> its optimiser steps before it reports (kappa_1, gamma_i^j); those that are not
    named train as `Training` says"""


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What a device's last work took."""

    client: int
    steps: int
    compute_seconds: float
    link_seconds: float
    joules: float
    change: float
    """L2 norm of what it changed"""
    sketch: tuple[float, ...] = ()
    """what it changed, in the coordinates of the method's `Sketch`"""


@dataclass(frozen=True, kw_only=True)
class Report:
    """What an edge's last round of the cloud took."""

    rounds: int
    seconds: float
    """of its own averages together"""
    link_seconds: float
    """of its link to the cloud, down and up"""
    joules: float
    """of its devices; 0 where nobody measured it, as on real ones"""
    devices: tuple[Seen, ...]
    """of its last average"""
    sketch: tuple[float, ...] = ()
    """its model, in the coordinates of the method's `Sketch`"""


@dataclass(frozen=True, kw_only=True)
class Situation:
    """What is known before a round of the cloud."""

    round: int
    seconds: float
    """time since the start, virtual or of real devices"""
    horizon: float | None
    """virtual time at which the job ends (the threshold time, T); None: it has no end"""
    accuracy: float | None
    """of the cloud's model on its test examples; None: it was not measured"""
    edges: Mapping[str, tuple[Client, ...]]
    """edge -> the clients below it that take part"""
    reports: Mapping[str, Report]
    """edge -> of its last round; none before the first"""


class Sketch(Protocol):
    """A few coordinates of models and changes, for methods that decide by them."""

    def model(self, params: Params) -> tuple[float, ...]:
        """Of a global model's parameters."""
        ...

    def change(self, delta: Params, submodel: SubModel) -> tuple[float, ...]:
        """Of what a device changed in its part."""
        ...
