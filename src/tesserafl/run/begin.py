"""Who holds what before the first round, after all that can be wrong was looked at."""

from __future__ import annotations

from tesserafl.engines.federation import Federation
from tesserafl.engines.process import threads
from tesserafl.run.federate import federate
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
    device_of(experiment)
    check_personal(setup)
    with threads(experiment.engine.threads):
        state = first_state(experiment, setup.model, setup.data)
    check_memory(setup, state, setup.costs())
    federation = federate(setup, state)
    if not elsewhere:
        fleet_for(setup, federation)
    return federation
