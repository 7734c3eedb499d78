"""Who plays a run's rounds: one after another as fast as they can, or in the time of devices."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from tesserafl.core.coverage import Coverage
from tesserafl.core.errors import ConfigError
from tesserafl.core.method import State
from tesserafl.core.metrics import Metrics
from tesserafl.engines.federation import Federation, Held, Star
from tesserafl.engines.fleet import Fleet
from tesserafl.engines.fleet_file import fleet_of
from tesserafl.engines.seam import Engine
from tesserafl.run.costs import CostTable
from tesserafl.run.federate import has_edges, no_edges, topology_of
from tesserafl.run.rounds import Notes, play_round
from tesserafl.run.setup import Setup, evaluator_of
from tesserafl.run.timed import Timed
from tesserafl.run.tree import Tree

_CLOCK = "clock"
"""What a checkpoint calls the clock's own, beside the federation's."""


class Player(Protocol):
    """Plays rounds until a run is over."""

    @property
    def over(self) -> bool:
        """Whether no further round begins."""
        ...

    def play(self, coverage: Coverage) -> Notes:
        """Play the next round; `coverage` counts what was trained."""
        ...

    def held(self) -> Held:
        """All that a checkpoint needs, the federation's included."""
        ...

    def restore(self, held: Held) -> None:
        """Go on from a checkpoint."""
        ...


@dataclass(kw_only=True)
class Untimed:
    """Rounds without a clock: everybody who answers does so at once."""

    setup: Setup
    engine: Engine
    federation: Federation
    costs: CostTable

    @property
    def over(self) -> bool:
        """Whether all rounds are done."""
        return self.federation.round >= self.federation.rounds

    def play(self, coverage: Coverage) -> Notes:
        """A synchronous round."""
        return play_round(self.setup, self.engine, self.federation, coverage, self.costs)

    def held(self) -> Held:
        """The federation's."""
        return self.federation.held()

    def restore(self, held: Held) -> None:
        """Go on from a checkpoint."""
        self.federation.restore(held)


@dataclass(kw_only=True)
class Clocked:
    """Rounds in virtual time, with all that a checkpoint needs."""

    timed: Timed | Tree

    @property
    def over(self) -> bool:
        """Whether all rounds or the horizon's time are over."""
        return self.timed.over

    def play(self, coverage: Coverage) -> Notes:
        """What makes the next model."""
        return self.timed.play(coverage)

    def held(self) -> Held:
        """The federation's and the clock's."""
        states, values, tensors = self.timed.federation.held()
        clock, flights = self.timed.held()
        return states, {**values, _CLOCK: clock}, {**tensors, **flights}

    def restore(self, held: Held) -> None:
        """Go on from a checkpoint."""
        states, values, tensors = held
        flights = {name: group for name, group in tensors.items() if name.startswith(_CLOCK)}
        others = {name: group for name, group in tensors.items() if name not in flights}
        rest = {name: value for name, value in values.items() if name != _CLOCK}
        self.timed.federation.restore((states, rest, others))
        self.timed.restore(values[_CLOCK], flights)


def fleet_for(setup: Setup, federation: Federation) -> Fleet | None:
    """The devices that an experiment's rounds are played with; None: it has none.

    Raises:
        ConfigError: peers have no clock, a tree no edges, or the fleet does not fit.
    """
    experiment = setup.experiment
    if topology_of(experiment) == "tree" and not has_edges(experiment):
        raise no_edges(experiment)
    if not experiment.fleet.is_there:
        return None
    if not isinstance(federation, Star):
        raise ConfigError(
            "virtual time is for runs with a server; leave fleet away, or set network.topology to "
            "'star'"
        )
    if topology_of(experiment) != "star" and experiment.clock.mode == "asynchronous":
        raise ConfigError(
            "the nodes of a tree play rounds, and clock.mode 'asynchronous' has none: use "
            "'semi-synchronous', or network.topology 'star', whose messages pass the edges' links"
        )
    return fleet_of(experiment.fleet, len(setup.clients), experiment.seed)


def player_of(setup: Setup, engine: Engine, federation: Federation, costs: CostTable) -> Player:
    """Plays the rounds of an experiment, in virtual time if it has a fleet.

    Raises:
        ConfigError: as `fleet_for`.
    """
    experiment, fleet = setup.experiment, fleet_for(setup, federation)
    if fleet is None or not isinstance(federation, Star):
        return Untimed(setup=setup, engine=engine, federation=federation, costs=costs)
    given: dict[str, Any] = {"setup": setup, "engine": engine, "costs": costs}
    if topology_of(experiment) == "star":
        return Clocked(timed=Timed(federation=federation, fleet=fleet.flat(), **given))
    watches = getattr(experiment.method, "watches_accuracy", False)
    sketch = getattr(experiment.method, "sketch", None)
    tree = Tree(
        federation=federation,
        fleet=fleet,
        measure=accuracy_of(setup) if watches else None,
        sketch=sketch and sketch(setup.model),
        schedule=getattr(experiment.method, "periods", None),
        **given,
    )
    return Clocked(timed=tree)


def metrics_of(setup: Setup) -> Callable[[State], Metrics]:
    """Measures a state on the cloud's test examples."""
    evaluator = evaluator_of(setup)

    def measured(state: State) -> Metrics:
        predictor = setup.experiment.method.predictor(setup.model, state)
        return evaluator.evaluate(predictor, setup.data.test)

    return measured


def accuracy_of(setup: Setup) -> Callable[[State], float]:
    """Measures a state's accuracy on the cloud's test examples."""
    measured = metrics_of(setup)
    return lambda state: measured(state).accuracy
