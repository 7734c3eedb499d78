"""HierFAVG: devices average at their edges, edges at the cloud, with one period each for all.

Liu et al., "Client-Edge-Cloud Hierarchical Federated Learning", ICC 2020, Algorithm 1.
https://arxiv.org/abs/1905.06641

A device takes kappa_1 steps, its edge averages; after kappa_2 averages the cloud does.

Departures from the paper: without `local_steps` devices train whole epochs. `normalised` is not the
paper's: it averages per step (FedNova), for devices whose steps are unequal.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from tesserafl.core.errors import ConfigError
from tesserafl.core.method import (
    State,
    Topology,
    Weighting,
    init_whole,
    predict_whole,
    train_everything,
)
from tesserafl.core.model import Model
from tesserafl.core.schedule import Periods, Situation
from tesserafl.methods._levels import counted_blocks, mean_of_level
from tesserafl.methods._normalised import relayed_normed, report_normed


@dataclass(frozen=True, kw_only=True)
class HierFAVG:
    """Averaging in two levels, or more, with fixed periods."""

    ratio: tuple[float, ...] = (1.0,)
    """share of every axis that each client class trains, dealt to the clients in turn"""
    depth: tuple[int, ...] = ()
    """blocks next to the output whose adapters each client class trains, dealt to the clients in
    turn; empty: all"""
    weighting: Weighting = "examples"
    """weight of a device in the means: its number of examples (as in the paper), or one each"""
    local_steps: int | None = None
    """kappa_1, optimiser steps of a device before its edge averages; None: as training says"""
    edge_rounds: int = 1
    """kappa_2, averages of an edge before the cloud's"""
    normalised: bool = False
    """whether a change counts per local step (FedNova)"""

    topology: ClassVar[Topology] = "tree"

    def __post_init__(self) -> None:
        for name in ("local_steps", "edge_rounds"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"HierFAVG: {name} must be at least 1; got {value}")

    @property
    def entrywise(self) -> bool:
        """Normalised means look at how many steps an update took."""
        return not self.normalised

    init = init_whole

    def periods(self, model: Model, state: State, seen: Situation) -> Mapping[str, Periods]:
        """The same for all, always."""
        return {
            edge: Periods(
                rounds=self.edge_rounds,
                steps={} if self.local_steps is None else {c.id: self.local_steps for c in clients},
            )
            for edge, clients in seen.edges.items()
        }

    configure = counted_blocks
    local = train_everything
    report = report_normed
    aggregate = mean_of_level
    relayed = relayed_normed
    predictor = predict_whole
