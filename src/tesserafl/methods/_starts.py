"""Where a client's first round begins: at the shared model, or at an initialisation of its own."""

from __future__ import annotations

from typing import Literal

from tesserafl.core import seeds
from tesserafl.core.fit import Fit
from tesserafl.core.messages import Memory, Options, Task
from tesserafl.core.method import State
from tesserafl.core.model import Model
from tesserafl.core.params import Params
from tesserafl.core.submodel import SubModel

Start = Literal["shared", "own"]
_START = "start"
"""Option of a task: the seed to draw an initialisation from."""


def own_start(model: Model, submodel: SubModel, seed: int, client: int) -> Params:
    """The part, initialised at its own sizes from (seed, client); a saved model's as it was saved.

    Another client draws other parameters, and the server a third.
    """
    part = model if submodel.sizes == model.sizes else model.resized(submodel)
    return part.init(seeds.derive(seed, client, "own start"))


def start_options(start: Start, state: State) -> Options:
    """What a task says of where to start: in round 0 perhaps a seed, else nothing."""
    return {_START: state.seed} if start == "own" and state.round == 0 else {}


def train_from_start(self: object, model: Model, task: Task, memory: Memory) -> Fit:
    """Plain local training of all parameters, from the start that the task names.

    A report of deltas then tells the way from the shared model to what was trained.
    """
    params = task.params
    if _START in task.options:
        params = own_start(model, task.submodel, int(task.options[_START]), task.client.id)
    return Fit(params=params, training=task.training)
