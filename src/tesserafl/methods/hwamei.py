"""Hwamei: one agent at the cloud decides when every edge and its devices synchronise.

Qi et al., "Hwamei: A Learning-Based Synchronization Scheme for Hierarchical Federated Learning",
ICDCS 2023; technical report "Arena": https://arxiv.org/abs/2308.10298

The agent sees the models of the cloud and of all edges in few coordinates, the edges' times and
energies, the time that is left and the accuracy. For every edge it chooses gamma_2, the edge's
averages in a round of the cloud, and gamma_1, the steps of all its devices.

Departures from the paper: docs/methods/hwamei.md. Without a policy the periods are those of
`equal_finish`, which gives every device its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from torch import Tensor

from tesserafl.core.decisions import Observation, Options
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
from tesserafl.core.params import Params
from tesserafl.core.policy import Policy
from tesserafl.core.schedule import Situation
from tesserafl.methods._actor import (
    check_first,
    cloud_logits,
    first_cloud_actor,
    policy_of,
    scheduled,
    sketched,
)
from tesserafl.methods._levels import counted_blocks, mean_of_level
from tesserafl.methods._normalised import relayed_normed, report_normed
from tesserafl.methods._observed import matrix_of, no_rows, overview, scene_of, times_of


@dataclass(frozen=True, kw_only=True)
class Hwamei:
    """Averaging in two levels, with periods that one agent decides on."""

    ratio: tuple[float, ...] = (1.0,)
    """share of every axis that each client class trains, dealt to the clients in turn"""
    depth: tuple[int, ...] = ()
    """blocks next to the output whose adapters each client class trains, dealt to the clients in
    turn; empty: all"""
    weighting: Weighting = "examples"
    """weight of a device in the means: its number of examples, or one each"""
    policy: Path | None = None
    """folder with a policy that `tessera learn` wrote; None: all finish together, nothing learnt"""
    unit: int = 1
    """u: optimiser steps that periods of devices are counted in"""
    most_steps: int = 10
    """gamma_1, at most: units of a device before its edge averages"""
    most_rounds: int = 5
    """gamma_2, at most: averages of an edge before the cloud's"""
    first_steps: int = 3
    """units of a device in the first round, before anything was measured; without a policy those
    of the median device later too"""
    first_rounds: int = 2
    """averages of an edge in the first round"""
    normalised: bool = False
    """whether a change counts per local step (FedNova)"""

    name: ClassVar[str] = "hwamei"
    topology: ClassVar[Topology] = "tree"
    watches_accuracy: ClassVar[bool] = True
    learns: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_first(self)

    @property
    def entrywise(self) -> bool:
        """Normalised means look at how many steps an update took."""
        return not self.normalised

    @property
    def options(self) -> Options:
        """The devices of an edge train alike."""
        return Options(
            most_rounds=self.most_rounds, most_steps=self.most_steps, unit=self.unit, each=False
        )

    def init(self, model: Model, seed: int, rounds: int) -> State:
        """The global model; a policy that does not fit it is refused here."""
        policy_of(self, model)
        return init_whole(self, model, seed, rounds)

    def agents(self, edges: Sequence[str]) -> int:
        """One at the cloud."""
        return 1

    def first_actor(self, components: int, edges: Sequence[str], seed: int) -> Params:
        """For a tree with these edges alone."""
        return first_cloud_actor(components, len(edges), self.most_rounds, self.most_steps, seed)

    def observe(
        self, policy: Policy, model: Model, state: State, seen: Situation
    ) -> list[Observation]:
        """The state matrix; a tree with other edges than the policy's is refused.

        Raises:
            ConfigError: it has an edge that the policy does not know.
        """
        if unknown := sorted(seen.edges.keys() - set(policy.edges)):
            raise ConfigError(
                f"edge {unknown[0]!r} is none of those that the policy was learnt for "
                f"({', '.join(policy.edges)}); learn one for this fleet with: tessera learn"
            )
        scene = scene_of(policy, state, seen)
        times = [
            times_of(scene, edge, seen.edges[edge], seen.reports.get(edge), first=2 * number)
            for number, edge in enumerate(policy.edges)
            if edge in seen.edges
        ]
        matrix = matrix_of(policy, scene, seen)
        return [Observation(agent=0, rows=no_rows(), context=matrix.flatten(), times=tuple(times))]

    def logits(self, actor: Params, rows: Tensor, present: Tensor, context: Tensor) -> Tensor:
        """Of every edge's gamma_2 and gamma_1 in turn."""
        return cloud_logits(actor, context, self.most_rounds, self.options.size)

    overview = overview
    sketch = sketched
    periods = scheduled
    configure = counted_blocks
    local = train_everything
    report = report_normed
    aggregate = mean_of_level
    relayed = relayed_normed
    predictor = predict_whole
