"""A tuning job that is played again and again, each time in another world.

    warm-up   one round of the cloud with the first periods; a basis for what agents see of models
    episode   from the state after the warm-up until the threshold time T; the devices' load is
              another in every episode
    reward    r_k = (A(k) - A(k - 1)) - epsilon x sum of E_i(k), A in points, E in joules; A is the
              accuracy, or e^-loss: how likely the test's labels are, which does not jump

After Hwamei (Qi et al., ICDCS 2023), Algorithm 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch

from tesserafl.core import seeds
from tesserafl.core.coverage import Coverage
from tesserafl.core.decisions import Deciding, Decision, Observation, periods_of
from tesserafl.core.errors import ConfigError
from tesserafl.core.method import State
from tesserafl.core.metrics import Metrics
from tesserafl.core.model import Model
from tesserafl.core.params import Params
from tesserafl.core.policy import Basis, Policy, fit_basis
from tesserafl.core.schedule import Periods, Report, Situation
from tesserafl.core.submodel import SubModel
from tesserafl.engines.federation import Star
from tesserafl.engines.fleet import Fleet
from tesserafl.engines.seam import Engine
from tesserafl.run.agents import Moment
from tesserafl.run.begin import first_federation
from tesserafl.run.player import Clocked, metrics_of, player_of
from tesserafl.run.setup import Setup
from tesserafl.run.tree import Tree

Choose = Callable[[Observation, Situation], Decision]
"""What an agent chooses; the situation tells the round."""
SHARE = 1 / 7
"""What energy takes of the gain of the warm-up, where its price is not given: Tomtit's is unknown;
the gain of the first rounds should be five to ten times as much."""


Gain = Literal["likelihood", "accuracy"]
"""What A is in rewards."""


@dataclass(frozen=True, kw_only=True)
class Price:
    """What energy and overrun cost."""

    joule: float
    """epsilon: points of accuracy that a joule costs"""
    own: bool = False
    """whether an agent pays for its own edge's joules times the number of edges, or for the mean"""
    overrun: bool = True
    """whether a round that ends after T counts only up to T: no gain, a share of its joules"""


@dataclass(frozen=True, kw_only=True)
class Episode:
    """One tuning job."""

    moments: list[Moment]
    total: float
    """Sum of the rewards, agents' mean."""
    metrics: Metrics
    """Of the model at T."""
    joules: float
    """Up to T."""


@dataclass(frozen=True, kw_only=True)
class Warm:
    """Where episodes begin."""

    state: State
    seconds: float
    reports: dict[str, Report]
    metrics: Metrics
    gained: float
    """Points in the warm-up."""
    joules: float
    """Of the warm-up."""
    basis: Basis

    @property
    def price(self) -> float:
        """epsilon such that the energy of the warm-up costs a share of what it gained."""
        return SHARE * max(self.gained, 1.0) / self.joules if self.joules else 0.0


@dataclass
class _Recorder:
    """Keeps the models of edges, of which there are no coordinates yet."""

    models: list[Params] = field(default_factory=list)

    def model(self, params: Params) -> tuple[float, ...]:
        self.models.append(params)
        return ()

    def change(self, delta: Params, submodel: SubModel) -> tuple[float, ...]:
        return ()


@dataclass
class _Measured:
    """Measures a state once, however often it is asked."""

    measure: Callable[[State], Metrics]
    last: tuple[State, Metrics] | None = None

    def __call__(self, state: State) -> Metrics:
        if self.last is None or self.last[0] is not state:
            self.last = (state, self.measure(state))
        return self.last[1]


@dataclass(kw_only=True)
class TuningJob:
    """The job of an experiment on a tree with a threshold time."""

    setup: Setup
    method: Deciding
    tree: Tree
    """At the experiment's beginning."""
    engine: Engine
    horizon: float
    """T, virtual seconds."""
    measure: Callable[[State], Metrics]
    coverage: Coverage
    gain: Gain = "likelihood"

    @property
    def edges(self) -> tuple[str, ...]:
        """All edges, in the fleet's order."""
        return tuple(edge.name for edge in self.tree.fleet.edges)

    def warm_up(self, components: int, basis: Basis | None = None) -> Warm:
        """Play the first round, and fit a basis of so many components, if none is given.

        The model that the job begins with is among those that it is fitted to: the way that
        training goes is worth a component, and the cloud's model is only a mean of the edges'.

        Raises:
            ConfigError: no time is left afterwards.
        """
        before = self._reached(self.measure(self.tree.federation.state))
        if basis is None:
            recorder = _Recorder()
            tree = self._fresh(sketch=recorder)
            tree.play(self.coverage)
            ends = [self.tree.federation.state.params, tree.federation.state.params]
            basis = fit_basis([*ends, *recorder.models], components)
        # Once more with the basis: the same bits, and reports in its coordinates.
        tree = self._fresh(sketch=basis)
        notes = tree.play(self.coverage)
        if tree.over:
            raise ConfigError(
                f"the first round takes {tree.now:.4g} virtual seconds, and clock.horizon_seconds "
                f"is {self.horizon:.4g}, rounds {self.setup.experiment.rounds}: nothing is left to "
                f"decide on; raise them"
            )
        metrics = self.measure(tree.federation.state)
        return Warm(
            state=tree.federation.state,
            seconds=tree.now,
            reports=tree.reports,
            metrics=metrics,
            gained=self._reached(metrics) - before,
            joules=notes.joules,
            basis=basis,
        )

    def _reached(self, metrics: Metrics) -> float:
        """A, in points."""
        return 100 * (metrics.accuracy if self.gain == "accuracy" else math.exp(-metrics.loss))

    def _fresh(self, **changes: Any) -> Tree:
        """A tree at the experiment's beginning, but for the changes; nobody remembers anything."""
        self.engine.restore({})
        return replace(self.tree, **{"federation": replace(self.tree.federation), **changes})

    def play(
        self, warm: Warm, policy: Policy, price: Price, choose: Choose, world: int | None
    ) -> Episode:
        """One episode.

        Args:
            warm: where it begins.
            policy: whose coordinates agents see.
            price: of energy.
            choose: what an agent does.
            world: number of the world; None: the experiment's own.
        """
        agents = self.method.agents(self.edges)
        decided: list[tuple[torch.Tensor, list[Observation], list[Decision]]] = []

        def schedule(model: Model, state: State, seen: Situation) -> Mapping[str, Periods]:
            observations = self.method.observe(policy, model, state, seen)
            decisions = [choose(observation, seen) for observation in observations]
            # The critic is told what the next reward counts from.
            known = torch.tensor([self._reached(self.measure(state)) / 100])
            overview = torch.cat([self.method.overview(policy, state, seen), known])
            decided.append((overview, observations, decisions))
            periods: dict[str, Periods] = {}
            for observation, decision in zip(observations, decisions, strict=True):
                periods |= periods_of(observation, decision, self.method.options)
            return periods

        tree = self._fresh(
            federation=replace(self.tree.federation, state=warm.state),
            fleet=_in_world(self.tree.fleet, world),
            sketch=warm.basis,
            schedule=schedule,
            now=warm.seconds,
            reports=warm.reports,
        )
        moments: list[Moment] = []
        metrics, joules, total = warm.metrics, 0.0, 0.0
        while not tree.over:
            start, known = tree.now, dict(tree.reports)
            notes = tree.play(self.coverage)
            took = {e: r.joules for e, r in tree.reports.items() if r is not known.get(e)}
            late = price.overrun and tree.now > self.horizon
            counted = (self.horizon - start) / (tree.now - start) if late else 1.0
            after = metrics if late else self.measure(tree.federation.state)
            spent = torch.full((agents,), counted * notes.joules)
            if price.own and agents == len(self.edges):
                each = [took.get(edge, 0.0) for edge in self.edges]
                spent = counted * agents * torch.tensor(each)
            rewards = self._reached(after) - self._reached(metrics) - price.joule * spent
            metrics, joules = after, joules + counted * notes.joules
            total += float(rewards.mean())
            seen, observations, decisions = decided[-1]
            moments.append(
                Moment(
                    seen=seen,
                    observations=tuple(observations),
                    decisions=tuple(decisions),
                    rewards=rewards,
                    length=20 * (tree.now - start) / self.horizon,
                )
            )
        return Episode(moments=moments, total=total, metrics=metrics, joules=joules)


def _in_world(fleet: Fleet, world: int | None) -> Fleet:
    """The fleet, whose loads and presence follow from the number of a world."""
    if world is None:
        return fleet
    devices = (
        replace(device, seed=seeds.derive(device.seed, "world", world)) for device in fleet.devices
    )
    return replace(fleet, devices=tuple(devices))


def tuning_job(setup: Setup, engine: Engine, gain: Gain = "likelihood") -> TuningJob:
    """The job of an experiment whose method a policy may decide for.

    Raises:
        ConfigError: it has no such method, no tree or no threshold time.
    """
    experiment = setup.experiment
    horizon, method = experiment.clock.horizon_seconds, experiment.method
    if not getattr(method, "learns", False):
        raise ConfigError(
            f"{type(method).__name__} does not decide by a policy; choose --method tomtit or "
            f"--method hwamei"
        )
    if horizon is None:
        raise ConfigError(
            "a policy is learnt for a job that ends at a threshold time; set clock.horizon_seconds"
        )
    federation = first_federation(setup)
    player = player_of(setup, engine, federation, setup.costs())
    if not isinstance(player, Clocked) or not isinstance(player.timed, Tree):
        raise ConfigError(
            "a policy decides on the periods of a tree; add fleet.profiles and fleet.edges, or "
            "fleet.file"
        )
    measure = _Measured(metrics_of(setup))
    tree = replace(player.timed, measure=lambda state: measure(state).accuracy)
    assert isinstance(federation, Star)
    shapes = {name: tuple(tensor.shape) for name, tensor in federation.shapes.items()}
    return TuningJob(
        setup=setup,
        method=method,  # type: ignore[arg-type]
        tree=tree,
        engine=engine,
        horizon=horizon,
        measure=measure,
        coverage=Coverage(shapes),
        gain=gain,
    )
