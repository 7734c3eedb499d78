"""Counting by view and counting by entry say the same."""

from __future__ import annotations

import pytest
import torch

from tesserafl.core.coverage import Coverage
from tesserafl.core.submodel import SubModel, View

SHAPES = {"w": (40, 3), "b": (40,)}


def window(start: int, count: int) -> SubModel:
    rows = (torch.arange(count) + start) % 40
    views = {"w": View("w", (rows, slice(0, 2))), "b": View("b", (rows,))}
    return SubModel({"rows": count}, views)


@pytest.mark.parametrize("distinct", [1, 3, 30])
def test_counts_and_share_against_plain_indexing(distinct: int) -> None:
    coverage = Coverage(SHAPES)
    expected = {name: torch.zeros(shape, dtype=torch.int32) for name, shape in SHAPES.items()}
    for step in range(45):
        part = window(step % distinct, 11)
        coverage.add([part, part])
        rows = (torch.arange(11) + step % distinct) % 40
        expected["w"][rows, :2] += 2
        expected["b"][rows] += 2
        trained = sum(int((count > 0).sum()) for count in expected.values())
        assert coverage.share == trained / 160
    assert all(torch.equal(coverage.counts[name], expected[name]) for name in SHAPES)


@pytest.mark.parametrize("distinct", [0, 1, 30])
def test_restored_counts_go_on_the_same(distinct: int) -> None:
    everything = SubModel(
        {}, {"w": View("w", (slice(0, 40), slice(0, 3))), "b": View("b", (slice(0, 40),))}
    )
    coverage, restored = Coverage(SHAPES), Coverage(SHAPES)
    coverage.add([everything, *(window(start, 5) for start in range(distinct))])
    restored.counts = coverage.counts
    for each in (coverage, restored):
        each.add([everything, window(2, 3)])
    assert restored.share == coverage.share
    assert all(torch.equal(restored.counts[name], coverage.counts[name]) for name in SHAPES)


def test_nothing_trained_is_nothing() -> None:
    coverage = Coverage(SHAPES)
    assert coverage.share == 0.0
    assert not coverage.zero_untrained({"b": torch.ones(40)})["b"].any()
