"""Equal finish: every device and every edge works as long as the median one; nobody waits long.

The heuristic that a learnt scheme must beat. It makes the hand-made schedules explicit that Hwamei
(Qi et al., ICDCS 2023, Section 2) motivates its agent with: more local steps for fast devices, more
averages for edges with a slow way to the cloud.

    D_i       = median over devices j of edge i of t_j, times `local_steps`
    gamma_i^j = floor(D_i / t_j), in 1 ... `most_steps`
    gamma_i   = round((max_m (n_m Ts_m + Tc_m) - Tc_i) / Ts_i), in 1 ... `most_rounds`
    n_m       = round(Tc_m / Ts_m), likewise: an edge works at least as long as its link takes

t_j is a device's seconds for a step and Ts_m an edge's for an average, in the round before; Tc_m is
its link's.
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
from tesserafl.methods._balance import equal_finish
from tesserafl.methods._levels import counted_blocks, mean_of_level
from tesserafl.methods._normalised import relayed_normed, report_normed


@dataclass(frozen=True, kw_only=True)
class EqualFinish:
    """Averaging in levels, with periods that let all finish together."""

    ratio: tuple[float, ...] = (1.0,)
    """share of every axis that each client class trains, dealt to the clients in turn"""
    depth: tuple[int, ...] = ()
    """blocks next to the output whose adapters each client class trains, dealt to the clients in
    turn; empty: all"""
    weighting: Weighting = "examples"
    """weight of a device in the means: its number of examples, or one each"""
    local_steps: int = 5
    """steps of the median device"""
    edge_rounds: int = 1
    """averages of an edge in the first round, before anything was measured"""
    most_steps: int = 25
    """Gamma_1: steps of a device, at most"""
    most_rounds: int = 5
    """Gamma_2: averages of an edge in a round of the cloud, at most"""
    normalised: bool = False
    """whether a change counts per local step (FedNova)"""

    topology: ClassVar[Topology] = "tree"

    def __post_init__(self) -> None:
        for name, most in (("local_steps", "most_steps"), ("edge_rounds", "most_rounds")):
            value, limit = getattr(self, name), getattr(self, most)
            if not 1 <= value <= limit:
                raise ConfigError(
                    f"EqualFinish: {name} must be from 1 to {most} ({limit}); got {value}"
                )

    @property
    def entrywise(self) -> bool:
        """Normalised means look at how many steps an update took."""
        return not self.normalised

    init = init_whole

    def periods(self, model: Model, state: State, seen: Situation) -> Mapping[str, Periods]:
        """By what the last round took."""
        return equal_finish(
            seen,
            steps=self.local_steps,
            rounds=self.edge_rounds,
            most_steps=self.most_steps,
            most_rounds=self.most_rounds,
        )

    configure = counted_blocks
    local = train_everything
    report = report_normed
    aggregate = mean_of_level
    relayed = relayed_normed
    predictor = predict_whole
