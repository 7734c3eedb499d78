"""Where a client's first round begins: at the shared model, or at an initialisation of its own."""

from __future__ import annotations

from typing import Literal

from tesserafl.core import seeds
from tesserafl.core.model import Model
from tesserafl.core.params import Params
from tesserafl.core.submodel import SubModel

Start = Literal["shared", "own"]


def own_start(model: Model, submodel: SubModel, seed: int, client: int) -> Params:
    """The part, initialised at its own sizes from (seed, client); a saved model's as it was saved.

    Another client draws other parameters, and the server a third.
    """
    part = model if submodel.sizes == model.sizes else model.resized(submodel)
    return part.init(seeds.derive(seed, client, "own start"))
