"""A client's change, told of its model with the units in the server's order."""

from __future__ import annotations

from dataclasses import replace

from tesserafl.core.checks import check_delta
from tesserafl.core.messages import Update
from tesserafl.core.model import Model
from tesserafl.core.params import Params, subtract
from tesserafl.core.submodel import cut
from tesserafl.methods._align import aligned, aligned_block
from tesserafl.methods._depth import block_names


def in_order_of(model: Model, params: Params, update: Update) -> Update:
    """A client's change, to the client's model with its units in the order of `params`.

    As it came where nothing moves.

    Args:
        model: the global model.
        params: its parameters, from which the client's part was cut.
        update: the client's answer.

    Raises:
        UpdateError: an entry is not finite, or does not fit.
    """
    check_delta(update.submodel, update.delta, params)
    small = model if update.submodel.sizes == model.sizes else model.resized(update.submodel)
    reference = cut(params, update.submodel)
    given = {name: reference[name] + change for name, change in update.delta.items()}
    moved = aligned(small, reference, given)
    permuted = {name: value for name, value in moved.items() if value is not given[name]}
    return replace(update, delta={**update.delta, **subtract(permuted, reference)})


def turned(model: Model, axis: str, reference: Params, given: Params) -> Params:
    """One block with its inner units in the order of another's; names within the block.

    Between blocks of several towers, or where only some rows are known, it stays as it is: the
    whole model was aligned before.
    """
    prefixes = model.depths[axis].prefixes
    shapes = {n: tuple(t.shape) for n, t in given.items()}
    whole = any(
        all(model.shapes[name] == shapes[rest] for rest, name in names.items())
        for names in block_names(model, axis)
        if names.keys() == shapes.keys()
    )
    if len(prefixes) > 1 or not whole:
        return given
    inner = [
        {name.removeprefix(prefixes[0]): value for name, value in block.items()}
        for block in (reference, given)
    ]
    found = aligned_block(model, axis, *inner)
    return {f"{prefixes[0]}{name}": value for name, value in found.items()}
