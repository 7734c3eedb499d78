"""Parameters that a client keeps to itself between rounds, and the model that it has with them."""

from __future__ import annotations

from tesserafl.core.messages import Memory
from tesserafl.core.method import Predictor, State
from tesserafl.core.model import Model
from tesserafl.core.params import Params
from tesserafl.core.submodel import SubModel, cut

_OWN = "own/"


def remember(params: Params) -> Memory:
    """A memory that keeps these."""
    return {f"{_OWN}{name}": tensor for name, tensor in params.items()}


def own_of(memory: Memory) -> Params:
    """What `remember` kept; empty in a client's first round."""
    return {n.removeprefix(_OWN): t for n, t in memory.items() if n.startswith(_OWN)}


def personal_of(model: Model, state: State, memory: Memory) -> Predictor:
    """The global model with the client's own parameters in place, at the client's own width."""
    own = own_of(memory)
    part = part_like(model, own)
    return Predictor(model=resized_to(model, part), params={**cut(state.params, part), **own})


def part_like(model: Model, params: Params) -> SubModel:
    """The first units of every axis, as many as these parameters have."""
    keep = {}
    for name, tensor in params.items():
        for tie, size in zip(model.ties[name], tensor.shape, strict=True):
            if tie is not None and tie.axis in model.cuttable:
                keep[tie.axis] = range(size // sum(tie.parts))
    return model.slice(keep)


def resized_to(model: Model, part: SubModel) -> Model:
    """The part as a model; the model itself if the part leaves nothing out."""
    return model if part.sizes == model.sizes else model.resized(part)
