"""Permutations of units that bring one model close to another: weight matching by assignment.

Units of an axis have no order of their own: permuted in every tied dimension at once they leave the
function as it is, so two models may differ by nothing but that order. Given a reference, the units
of each axis in turn are assigned to the reference's so that the inner product over all tied entries
is largest (an assignment problem), until nothing changes: coordinate descent, Ainsworth et al.,
"Git Re-Basin", ICLR 2023, Alg. 1. As a permutation keeps the norm, the distance is then smallest.

Coordinate descent finds the nearest local optimum, so it is begun twice, with the units as they are
and with the axes assigned layer by layer, each seen through what is assigned already (as in FedMA,
Wang et al., ICLR 2020, and OTFusion, Singh and Jaggi, NeurIPS 2020); the closer end is taken, and
where nothing is closer than the units as they are, they stay.

Entries are rounded to integers for the assignment, so few bits that their products add up exactly:
the permutation does not depend on the number of threads. What is accepted is closer unrounded.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from scipy.optimize import linear_sum_assignment

from tesserafl.core.axis import Tie
from tesserafl.core.errors import ModelError
from tesserafl.core.model import Model
from tesserafl.core.params import Params
from tesserafl.core.submodel import index_tensor

_SWEEPS = 20
"""Over all axes, at most. A sweep that changes nothing is the last one."""
_EXACT_BITS = 52
"""Of integers that float64 adds without error, and a bit to spare."""

_Array = npt.NDArray[Any]
_Arrays = dict[str, _Array]


class _Place(NamedTuple):
    name: str
    dim: int
    tie: Tie


class _Group(NamedTuple):
    """Units that are permuted by themselves, in all these places at once."""

    units: int
    places: tuple[_Place, ...]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(place.name for place in self.places))


def private_axes(model: Model, depth_axis: str) -> tuple[str, ...]:
    """Width axes tied inside the blocks of a depth axis alone, in the model's order.

    No block reads what another one has along such an axis (what blocks hand on is tied outside of
    them too, at the model's input or output), so each block may order its units by itself.
    """
    depth = model.depths[depth_axis]
    inside: set[str] = set()
    outside: set[str] = set()
    for name, tied in model.ties.items():
        tied_there = inside if depth.locate(name) else outside
        tied_there.update(tie.axis for tie in tied if tie)
    return tuple(axis for axis in model.cuttable if axis in inside - outside)


def aligned_block(model: Model, axis: str, reference: Params, given: Params) -> Params:
    """One block with the units of its private axes permuted to match another block best.

    The squared distance never grows. Parameters that nothing permutes are the same tensors.

    Args:
        model: the model whose block it is.
        axis: the depth axis that counts the block.
        reference: the block to match; names are the `rest` of `Depth.locate`.
        given: the block to permute, finite, with the same names and shapes.

    Raises:
        ModelError: two towers use one name for parameters with other units.
    """
    private, depth = private_axes(model, axis), model.depths[axis]
    ties: dict[str, tuple[Tie | None, ...]] = {}
    for name, tied in model.ties.items():
        place = depth.locate(name)
        if place is None or place[2] not in given:
            continue
        own = tuple(tie if tie and tie.axis in private else None for tie in tied)
        if ties.setdefault(place[2], own) != own:
            raise ModelError(
                f"axis {axis!r}: {place[2]!r} has other units in one tower than in another; a "
                f"block of such a model cannot be aligned by itself"
            )
    places: dict[str, list[_Place]] = {name: [] for name in private}
    for name, own in ties.items():
        for dim, tie in enumerate(own):
            if tie is not None:
                places[tie.axis].append(_Place(name, dim, tie))
    groups = [_Group(model.units(name), tuple(found)) for name, found in places.items() if found]
    return _aligned(groups, reference, given)


def aligned(model: Model, reference: Params, given: Params) -> Params:
    """A whole model with the units of all cuttable axes permuted to match another one best.

    Axes in the model's order; the units of an axis that is private to blocks block by block, of any
    other in all its places at once. The function stays as it is, up to rounding in its sums, and
    the squared distance never grows. Parameters that nothing permutes are the same tensors.

    Args:
        model: the model; dimensions that no cuttable axis is tied to may be shorter than its.
        reference: the parameters to match.
        given: the parameters to permute, finite, with the same names and shapes.
    """
    counted = {axis: depth for depth in model.depths for axis in private_axes(model, depth)}
    places: dict[str, dict[tuple[str, int] | None, list[_Place]]] = {a: {} for a in model.cuttable}
    for name, tied in model.ties.items():
        for dim, tie in enumerate(tied):
            if tie is None or tie.axis not in places or name not in given:
                continue
            block = model.depths[counted[tie.axis]].locate(name) if tie.axis in counted else None
            found = places[tie.axis].setdefault(block and block[:2], [])
            found.append(_Place(name, dim, tie))
    groups = [
        _Group(model.units(axis), tuple(found))
        for axis, blocks in places.items()
        for found in blocks.values()
    ]
    return _aligned(groups, reference, given)


def _aligned(groups: Sequence[_Group], reference: Params, given: Params) -> Params:
    names = {name for group in groups for name in group.names}
    wanted = {name: _array(reference[name]) for name in names}
    start = {name: _array(given[name]) for name in names}
    identity = [np.arange(group.units) for group in groups]
    best = _descended(groups, wanted, start, identity)
    if _are_linked(groups):
        layered = _layer_by_layer(groups, wanted, start)
        if any(map(_moves, layered)):
            other = _descended(groups, wanted, start, layered)
            best = max((best, other), key=lambda end: end.product)  # the first one if equal
    if best.product <= _product(wanted, start, names):
        return dict(given)
    result = dict(given)
    for group, order in zip(groups, best.orders, strict=True):
        if not _moves(order):
            continue
        for name, dim, tie in group.places:
            index = index_tensor(tie.expand(torch.from_numpy(order), group.units))
            result[name] = result[name].index_select(dim, index.to(result[name].device))
    return result


class _End(NamedTuple):
    product: float
    orders: list[_Array]


def _descended(
    groups: Sequence[_Group], wanted: _Arrays, start: _Arrays, orders: Sequence[_Array]
) -> _End:
    """Coordinate descent from these orders of units."""
    moved, orders = dict(start), list(orders)
    for group, order in zip(groups, orders, strict=True):
        moved |= _permuted(group, moved, order)
    waiting = set(range(len(groups)))
    for _ in range(_SWEEPS):
        for number in sorted(waiting):
            waiting.discard(number)
            group = groups[number]
            order = _assigned(group, group.places, wanted, moved)
            if not _moves(order):
                continue
            changed = _permuted(group, moved, order)
            # Rounding may mislead; so may a parameter that has the axis in two dimensions, of which
            # an assignment moves one.
            if _product(wanted, changed, group.names) <= _product(wanted, moved, group.names):
                continue
            moved |= changed
            orders[number] = orders[number][order]
            waiting |= {n for n, other in enumerate(groups) if _meet(other, group)}
        if not waiting:
            break
    return _End(_product(wanted, moved, moved), orders)


def _layer_by_layer(groups: Sequence[_Group], wanted: _Arrays, start: _Arrays) -> list[_Array]:
    """Every group assigned by those of its places that only groups before it permute too."""
    moved, orders = dict(start), []
    for number, group in enumerate(groups):
        later = {place.name for other in groups[number + 1 :] for place in other.places}
        own = [place.name for place in group.places]
        seen = [p for p in group.places if p.name not in later and own.count(p.name) == 1]
        order = _assigned(group, seen, wanted, moved) if seen else np.arange(group.units)
        moved |= _permuted(group, moved, order)
        orders.append(order)
    return orders


def _assigned(group: _Group, places: Sequence[_Place], wanted: _Arrays, moved: _Arrays) -> _Array:
    """The units in the order in which their inner product with the wanted ones is largest.

    Units that would change places among themselves for no gain stay.
    """
    rows = [[_by_unit(group, place, side) for place in places] for side in (wanted, moved)]
    per_unit = sum(part.shape[1] for part in rows[0])
    largest = max(float(np.abs(part).max()) for side in rows for part in side if part.size)
    if largest == 0.0:
        return np.arange(group.units)
    step = largest / 2 ** ((_EXACT_BITS - math.ceil(math.log2(per_unit + 1))) // 2)
    gains = np.zeros((group.units, group.units))
    for left, right in zip(*rows, strict=True):
        gains += np.round(left / step) @ np.round(right / step).T
    order: _Array = linear_sum_assignment(gains, maximize=True)[1]
    return _without_idle_cycles(order, gains)


def _without_idle_cycles(order: _Array, gains: _Array) -> _Array:
    kept, seen = np.arange(len(order)), np.zeros(len(order), bool)
    for first in np.flatnonzero(order != kept).tolist():
        cycle = []
        unit = first
        while not seen[unit]:
            seen[unit] = True
            cycle.append(unit)
            unit = int(order[unit])
        if sum(gains[u, order[u]] - gains[u, u] for u in cycle) > 0:
            kept[cycle] = order[cycle]
    return kept


def _by_unit(group: _Group, place: _Place, arrays: Mapping[str, _Array]) -> _Array:
    """[units, entries]: what a parameter holds of each unit."""
    array = np.moveaxis(arrays[place.name], place.dim, 0)
    parts, offset = [], 0
    for size in place.tie.parts:
        count = group.units * size
        parts.append(array[offset : offset + count].reshape(group.units, -1))
        offset += count
    return np.concatenate(parts, axis=1)


def _permuted(group: _Group, arrays: Mapping[str, _Array], order: _Array) -> _Arrays:
    """The group's parameters once its units are permuted."""
    changed = {name: arrays[name] for name in group.names}
    for name, dim, tie in group.places:
        index = index_tensor(tie.expand(torch.from_numpy(order), group.units)).numpy()
        changed[name] = changed[name].take(index, axis=dim)
    return changed


def _product(wanted: _Arrays, moved: Mapping[str, _Array], names: Collection[str]) -> float:
    # Not a dot product of BLAS, whose sum depends on the number of threads.
    return math.fsum(float((wanted[name] * moved[name]).sum()) for name in names)


def _meet(one: _Group, other: _Group) -> bool:
    return not set(one.names).isdisjoint(other.names) and (
        one is not other or len(one.names) < len(one.places)
    )


def _are_linked(groups: Sequence[_Group]) -> bool:
    return any(_meet(a, b) for number, a in enumerate(groups) for b in groups[: number + 1])


def _moves(order: _Array) -> bool:
    return bool((order != np.arange(len(order))).any())


def _array(tensor: torch.Tensor) -> _Array:
    return tensor.detach().double().cpu().numpy()
