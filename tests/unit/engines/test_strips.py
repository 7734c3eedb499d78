"""A model in strips: whatever is cut, its entries are found where the model has them."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as some

from tesserafl.core.submodel import SubModel, View, as_index, cut
from tesserafl.engines.strips import packed, places_of, strips_of

SHAPES = {"scale": (), "in": (6, 4), "bias": (5,), "conv": (7, 3, 2, 2), "none": (0, 3)}
PARAMS = {
    name: (100 * number + torch.arange(float(math.prod(shape)))).reshape(shape)
    for number, (name, shape) in enumerate(SHAPES.items())
}
FLAT = torch.cat([tensor.reshape(-1) for tensor in PARAMS.values()])


def submodel() -> SubModel:
    """Windows that wrap, units in no order, a parameter without dimensions."""
    views = {
        "scale": View("scale", ()),
        "in": View("in", (as_index([4, 5, 0, 1]), as_index([3, 0]))),
        "other": View("bias", (as_index([2, 4, 1]),)),
        "conv": View("conv", (slice(2, 6), as_index([2, 0]), slice(0, 2), slice(0, 2))),
    }
    return SubModel({}, views)


@pytest.mark.parametrize("most", [1, 2, 5, 16, 30, 10_000])
def test_strips_are_the_model_in_its_order_and_of_bounded_size(most: int) -> None:
    strips = strips_of(SHAPES, most)
    assert torch.equal(torch.cat([strip.of(PARAMS) for strip in strips]), FLAT)
    assert [s.first for s in strips] == [0, *itertools.accumulate(s.size for s in strips)][:-1]
    for strip in strips:
        (only, *others) = strip.pieces
        one_row = not others and only.rows.stop - only.rows.start == 1
        assert strip.size <= most or one_row
    assert len(strips_of(SHAPES, 10_000)) == 1


@pytest.mark.parametrize("most", [1, 2, 5, 16, 30, 10_000])
def test_a_sub_model_is_found_in_strips(most: int) -> None:
    part = submodel()
    places, small = places_of(part.views), cut(PARAMS, part)
    held = {number for tensor in small.values() for number in tensor.reshape(-1).tolist()}
    masks, spread = [], []
    found = {name: torch.full_like(tensor, -1.0) for name, tensor in small.items()}
    for strip in strips_of(SHAPES, most):
        masks.append(strip.mask(places))
        spread.append(strip.spread(places, small, torch.float32))
        strip.gather(places, strip.of(PARAMS), found)
    mask = torch.cat(masks)
    assert mask.tolist() == [number in held for number in FLAT.tolist()]
    assert torch.equal(torch.cat(spread), FLAT * mask)
    assert all(torch.equal(found[name], small[name]) for name in small)


@given(some.lists(some.lists(some.booleans(), max_size=20), max_size=6))
def test_masks_are_packed_as_one(masks: list[list[bool]]) -> None:
    whole = np.array([each for mask in masks for each in mask], dtype=bool)
    found = packed(torch.tensor(mask, dtype=torch.bool) for mask in masks)
    assert found.tolist() == np.packbits(whole).tolist()
