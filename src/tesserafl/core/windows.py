"""Where the sub-models of one model lie relative to each other.

A window is the units that a sub-model keeps of a width axis, here of 6 units:

    old  keeps 4 5 0 1    entries  [ 4 5 0 1 ]
    new  keeps 0 1 2 3    entries  [ 0 1 2 3 ]
    carry                 values   [ old's third, old's fourth, 0, 0 ]

A view is a product of one index per dimension, so what two views share is a product too: it is
found dimension by dimension, and no tensor of the large model's size is ever made.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from tesserafl.core.axis import Tie
from tesserafl.core.errors import ModelError, did_you_mean
from tesserafl.core.model import Model
from tesserafl.core.params import Params
from tesserafl.core.submodel import Index, SubModel, View, as_index, index_length, index_tensor


def kept(model: Model, submodel: SubModel) -> dict[str, Index]:
    """The units that a sub-model keeps of every cuttable width axis, read off from its views.

    The inverse of `model.slice`: what was given there, in the same order, as `as_index` writes it;
    a slice over all units for an axis that was not cut.

    Args:
        model: the model whose entries the views name.
        submodel: a sub-model of it, such as `model.slice` makes.

    Returns:
        Axis -> its kept units, a slice where they are one ascending run, else int64 [kept].

    Raises:
        ModelError: the views hold no whole units of an axis, hold others in one parameter than in
            another, have no parameter that tells, or name a parameter that the model lacks.
    """
    return {axis: _kept(model, submodel, axis) for axis in model.cuttable}


def feature_entries(model: Model, submodel: SubModel) -> Tensor:
    """Which entries of the whole model's features the sub-model's features are.

    Args:
        model: the model whose entries the views name.
        submodel: a sub-model of it; only the views along the features' own axis are read.

    Returns:
        int64 [features of the sub-model], in the sub-model's order: entry i of its
        `Output.features` stands where entry `result[i]` of the whole model's stands.

    Raises:
        ModelError: the model's features follow no axis, or the views hold no whole units of it.
    """
    tie = model.features
    if tie is None:
        raise ModelError(
            "the model's features follow no cuttable axis, so a cut's features have no known place "
            "in the whole; its module must return Output(logits, features) with features "
            "[batch, features] in which one axis of the sizes is laid out (not None, not two axes "
            "side by side), or choose a method that does not compare features of unequal models"
        )
    return index_tensor(tie.expand(_kept(model, submodel, tie.axis), model.units(tie.axis)))


def carry(values: Params, old: SubModel, new: SubModel) -> Params:
    """Values of one sub-model's entries, moved to where another sub-model of the model has them.

    Parameters are matched by the large parameter that their views name, so the small names may
    differ (other blocks kept) and windows may wrap around or be in any order.

    Args:
        values: small parameter of `old` -> tensor of its view's shape; those left out are zero.
        old: the sub-model that `values` lie on.
        new: the sub-model to carry them to.

    Returns:
        Small parameter of `new` -> fresh tensor of its view's shape: the value of every entry that
        `old` holds too, zero elsewhere.

    Raises:
        ModelError: a value whose name is not in `old`, or whose shape is not its view's.
    """
    sources: dict[str, list[str]] = {}
    for name, value in values.items():
        if name not in old.views:
            raise ModelError(
                f"values have {name!r}, the old sub-model does not; {did_you_mean(name, old.views)}"
            )
        if value.shape != old.views[name].shape:
            raise ModelError(
                f"{name!r} has shape {tuple(value.shape)}, its view in the old sub-model "
                f"{old.views[name].shape}; give the sub-model that the values lie on"
            )
        sources.setdefault(old.views[name].name, []).append(name)
    anything = next(iter(values.values()), torch.empty(0))
    carried: Params = {}
    for small, view in new.views.items():
        names = sources.get(view.name, [])
        carried[small] = (values[names[0]] if names else anything).new_zeros(view.shape)
        for name in names:
            places = [
                shared(*indices) for indices in zip(old.views[name].index, view.index, strict=True)
            ]
            if any(index_length(there) == 0 for _, there in places):
                continue
            # Positions in the small tensors take the place of entries in the large one.
            here = View(name, tuple(source for source, _ in places))
            there = View(small, tuple(target for _, target in places))
            there.add(carried[small], here.read(values[name]))
    return carried


def _kept(model: Model, submodel: SubModel, axis: str) -> Index:
    """Units of one axis, the same in every parameter that is tied to it."""
    total = model.units(axis)
    found: tuple[str, Index] | None = None
    read: dict[object, Index | None] = {}  # most parameters are cut alike
    for name, index, tie in _tied(model, submodel, axis):
        key = (
            tie,
            (index.start, index.stop) if isinstance(index, slice) else index.numpy().tobytes(),
        )
        if key not in read:
            read[key] = _units(index, tie, total)
        units = read[key]
        if units is None:
            raise ModelError(
                f"axis {axis!r}: {name!r} of the sub-model does not hold whole units (parts of "
                f"{tie.parts} entries, {total} units); make the sub-model with model.slice, and "
                f"restrict no rows of this axis"
            )
        if found is not None and not _equal(units, found[1]):
            raise ModelError(
                f"axis {axis!r}: {name!r} of the sub-model keeps other units than {found[0]!r}; "
                f"make the sub-model with model.slice, which cuts all parameters of an axis alike"
            )
        found = found or (name, units)
    if found is None:
        raise ModelError(
            f"axis {axis!r}: no parameter of the sub-model lies along it, so the units it keeps "
            f"are not known; keep a parameter of the axis in the sub-model"
        )
    return found[1]


def _tied(model: Model, submodel: SubModel, axis: str) -> Iterator[tuple[str, Index, Tie]]:
    for name, view in submodel.views.items():
        if view.name not in model.ties:
            raise ModelError(
                f"the sub-model's {name!r} views {view.name!r}, which is no parameter of this "
                f"model; {did_you_mean(view.name, model.ties)}"
            )
        for index, tie in zip(view.index, model.ties[view.name], strict=True):
            if tie is not None and tie.axis == axis:
                yield name, index, tie


def _units(index: Index, tie: Tie, total: int) -> Index | None:
    """The inverse of `tie.expand`; None if the entries are not whole units in its layout."""
    count, rest = divmod(index_length(index), sum(tie.parts))
    if rest or not count:
        return None
    size = tie.parts[0]
    units = as_index(index_tensor(index)[: count * size : size] // size)
    # A unit beyond the axis would be read off from entries of the next part.
    if int(index_tensor(units).max()) >= total or not _equal(tie.expand(units, total), index):
        return None
    return units


def _equal(left: Index, right: Index) -> bool:
    return torch.equal(index_tensor(left), index_tensor(right))


_NOTHING = slice(0, 0)


def shared(old: Index, new: Index) -> tuple[Index, Index]:
    """(positions in old, positions in new) of the entries that are in both."""
    if isinstance(old, slice) and isinstance(new, slice):
        start = max(old.start, new.start)
        stop = max(start, min(old.stop, new.stop))
        return (
            slice(start - old.start, stop - old.start),
            slice(start - new.start, stop - new.start),
        )
    before, after = index_tensor(old), index_tensor(new)
    ordered, order = before.sort()
    places = torch.searchsorted(ordered, after).clamp(max=len(ordered) - 1)
    positions = (ordered[places] == after).nonzero().flatten()
    if not len(positions):
        return _NOTHING, _NOTHING
    return as_index(order[places[positions]]), as_index(positions)
