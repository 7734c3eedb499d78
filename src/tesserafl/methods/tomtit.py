"""Tomtit: every edge has an agent, which decides when its devices and itself synchronise.

Qi, Zhan, Li, Xia, "Tomtit: Hierarchical Federated Fine-Tuning of Giant Models based on Autonomous
Synchronization", INFOCOM 2024, pp. 1910-1919. https://doi.org/10.1109/infocom52122.2024.10621369

The agent of edge i sees what the cloud tells all, and its own devices. It chooses gamma_i, its
averages in a round of the cloud, and gamma_i^j, the steps of each of its devices. Agents learn
together, with a critic at the cloud; afterwards each decides alone.

Departures from the paper: its text could not be had; docs/methods/tomtit.md says step by step what
is sourced and what is ours. Without a policy the periods are those of `equal_finish`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from torch import Tensor

from tesserafl.core.decisions import Observation, Options
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
    edge_logits,
    first_edge_actor,
    policy_of,
    scheduled,
    sketched,
)
from tesserafl.methods._levels import counted_blocks, mean_of_level, size_of
from tesserafl.methods._normalised import relayed_normed, report_normed
from tesserafl.methods._observed import context_of, overview, rows_of, scene_of, times_of


@dataclass(frozen=True, kw_only=True)
class Tomtit:
    """Averaging in two levels, with periods that an agent at each edge decides on."""

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
    """Gamma_1: units of a device before its edge averages, at most"""
    most_rounds: int = 5
    """Gamma_2: averages of an edge before the cloud's, at most"""
    first_steps: int = 3
    """units of a device in the first round, before anything was measured; without a policy those
    of the median device later too"""
    first_rounds: int = 2
    """averages of an edge in the first round"""
    normalised: bool = False
    """whether a change counts per local step (FedNova)"""

    name: ClassVar[str] = "tomtit"
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
        """Each device has steps of its own."""
        return Options(
            most_rounds=self.most_rounds, most_steps=self.most_steps, unit=self.unit, each=True
        )

    def init(self, model: Model, seed: int, rounds: int) -> State:
        """The global model; a policy that does not fit it is refused here."""
        policy_of(self, model)
        return init_whole(self, model, seed, rounds)

    def agents(self, edges: Sequence[str]) -> int:
        """One at each edge."""
        return len(edges)

    def first_actor(self, components: int, edges: Sequence[str], seed: int) -> Params:
        """One for all edges."""
        return first_edge_actor(components, self.most_rounds, self.most_steps, seed)

    def observe(
        self, policy: Policy, model: Model, state: State, seen: Situation
    ) -> list[Observation]:
        """o_i: the global information, and rows of the edge's own devices."""
        scene, components = scene_of(policy, state, seen), policy.basis.num_components
        observations = []
        for edge, clients in seen.edges.items():
            report = seen.reports.get(edge)
            rows = rows_of(
                scene,
                clients,
                report,
                components,
                self.unit * self.most_steps,
                lambda client: size_of(self, model, client),
            )
            observations.append(
                Observation(
                    agent=policy.edges.index(edge) if edge in policy.edges else 0,
                    rows=rows,
                    context=context_of(scene, report),
                    times=(times_of(scene, edge, clients, report, first=0),),
                )
            )
        return observations

    def logits(self, actor: Params, rows: Tensor, present: Tensor, context: Tensor) -> Tensor:
        """Of gamma_i, and of every gamma_i^j."""
        return edge_logits(actor, rows, present, context, self.options.size)

    overview = overview
    sketch = sketched
    periods = scheduled
    configure = counted_blocks
    local = train_everything
    report = report_normed
    aggregate = mean_of_level
    relayed = relayed_normed
    predictor = predict_whole
