"""Who holds what before the first round, after all that can be wrong was looked at."""

from __future__ import annotations

import torch

from tesserafl.core.errors import ConfigError
from tesserafl.core.method import State
from tesserafl.core.model import Model
from tesserafl.core.params import Params
from tesserafl.engines.federation import Federation
from tesserafl.engines.process import threads
from tesserafl.run.experiment import Experiment
from tesserafl.run.federate import exchange_of, federate, topology_of
from tesserafl.run.first import first_state
from tesserafl.run.personal import check_personal
from tesserafl.run.player import fleet_for
from tesserafl.run.rounds import check_memory
from tesserafl.run.setup import Setup, device_of


def first_federation(setup: Setup, elsewhere: bool = False) -> Federation:
    """Who holds what before the first round; raises if the settings do not fit together.

    `elsewhere`: devices and edges are real ones.
    """
    experiment = setup.experiment
    with threads(experiment.engine.threads):
        state = first_state(experiment, setup.model, setup.data)
    return check_first(setup, state, elsewhere)


def shapes_of(model: Model) -> Params:
    """A model's parameters without values."""
    return {name: torch.empty(shape, device="meta") for name, shape in model.shapes.items()}


def first_peers(setup: Setup) -> Federation:
    """The same of peers, of whom nobody may hold the whole: then without values, to be looked at.

    Raises:
        ConfigError: the run has a server.
    """
    if topology_of(setup.experiment) != "peers":
        raise ConfigError("this run has a server; its devices are no peers")
    if not is_lean(setup.experiment):
        return first_federation(setup)
    return check_first(setup, without_values(setup))


def is_lean(experiment: Experiment) -> bool:
    """Whether nobody may hold the whole model."""
    return topology_of(experiment) == "peers" and exchange_of(experiment) == "lean"


def without_values(setup: Setup) -> State:
    """The first state of a method that keeps nothing beside the model, on `meta`."""
    experiment = setup.experiment
    params = shapes_of(setup.model)
    return State(params=params, seed=experiment.seed, rounds=experiment.rounds)


def check_first(setup: Setup, state: State, elsewhere: bool = False) -> Federation:
    """The federation that begins with this state, if its settings fit together.

    Of a state without values, on `meta`, it is only good to be looked at.
    """
    device_of(setup.experiment)
    check_personal(setup)
    check_memory(setup, state, setup.costs())
    federation = federate(setup, state)
    if not elsewhere:
        fleet_for(setup, federation)
    return federation
