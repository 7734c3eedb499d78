from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tesserafl.methods._match import (
    Place,
    aligned_order,
    cka,
    clusters,
    function_distances,
    gram,
    halves,
    parameter_distance,
    spread_of,
    threshold,
)

COSTS = st.floats(0.0, 2.0, allow_nan=False, width=32)


def by_brute_force(distances: list[list[float]], delta: float) -> float:
    """The cheapest way to match some of the client's blocks in order and to insert the others."""
    rows, columns = len(distances), len(distances[0])
    best = math.inf
    for number in range(min(rows, columns) + 1):
        for server in itertools.combinations(range(rows), number):
            for client in itertools.combinations(range(columns), number):
                pairs = zip(server, client, strict=True)
                cost = sum(distances[i][j] for i, j in pairs)
                left = columns - number
                best = min(best, cost + (left * delta if left else 0.0))
    return best


@given(
    st.integers(1, 6).flatmap(
        lambda rows: st.integers(1, 6).flatmap(
            lambda columns: st.lists(
                st.lists(COSTS, min_size=columns, max_size=columns), min_size=rows, max_size=rows
            )
        )
    ),
    COSTS,
)
def test_the_cheapest_match_is_found(distances: list[list[float]], delta: float) -> None:
    places, cost = aligned_order(distances, delta)
    assert cost == pytest.approx(by_brute_force(distances, delta), abs=1e-9)
    matched = [place.matched for place in places if place.matched is not None]
    assert matched == sorted(set(matched))  # strictly increasing
    spent = sum(
        delta if place.matched is None else distances[place.matched][j]
        for j, place in enumerate(places)
    )
    assert spent == pytest.approx(cost, abs=1e-9)
    gaps = [place.after for place in places]
    assert gaps == sorted(gaps) and len(places) == len(distances[0])


def test_a_block_like_none_is_put_between_its_neighbours() -> None:
    distances = [[0.1, 0.9, 0.9], [0.9, 0.8, 0.1]]
    places, cost = aligned_order(distances, 0.5)
    assert places == [Place(0, 0), Place(None, 0), Place(1, 1)]
    assert cost == pytest.approx(0.7)


def test_without_a_threshold_all_are_matched() -> None:
    places, _ = aligned_order([[2.0, 2.0], [2.0, 2.0], [2.0, 2.0]], math.inf)
    assert all(place.matched is not None for place in places)


def test_a_match_wins_where_it_costs_as_much_as_an_insertion() -> None:
    assert aligned_order([[0.5]], 0.5)[0] == [Place(0, 0)]


def test_distances_of_parameters() -> None:
    one = {"a": torch.tensor([1.0, 0.0]), "b": torch.tensor([[1.0]])}
    other = {"a": torch.tensor([0.0, 1.0]), "b": torch.tensor([[-1.0]])}
    assert parameter_distance(one, dict(one)) == 0.0
    assert parameter_distance(one, other) == pytest.approx((1 + 1 + 4) / (2 + 2))


def test_zeros_are_at_no_distance_from_each_other() -> None:
    zero = {"a": torch.zeros(3)}
    assert parameter_distance(zero, zero) == 0.0


def test_cka_ignores_rotation_scale_and_offset() -> None:
    draw = torch.Generator().manual_seed(0)
    outputs = torch.randn(20, 6, generator=draw, dtype=torch.float64)
    turned = torch.linalg.qr(torch.randn(6, 6, generator=draw, dtype=torch.float64)).Q
    other = torch.randn(20, 6, generator=draw, dtype=torch.float64)
    same = gram(3.0 * outputs @ turned + 7.0)
    assert cka(gram(outputs), same) == pytest.approx(1.0)
    assert cka(gram(outputs), gram(other)) < 0.6
    assert cka(gram(outputs), gram(torch.ones(20, 6))) == 0.0
    (row,) = function_distances([gram(outputs)], [same, gram(other)])
    assert row[0] == pytest.approx(0.0, abs=1e-12) and row[1] > 0.4


def test_the_threshold_is_robust() -> None:
    spread = spread_of([0.1, 0.2, 0.3, 0.2, 5.0])
    assert spread == (pytest.approx(0.2), pytest.approx(0.1))
    assert threshold(spread, 2.5) == pytest.approx(0.45)
    assert threshold(None, 2.5) == math.inf


def vectors(*rows: list[float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def test_halves_are_told_apart_by_direction() -> None:
    updates = vectors([1, 0.1], [-2, 0.1], [3, -0.1], [-1, 0.0], [0.5, 0.0])
    assert halves(updates) == ([0, 2, 4], [1, 3])


def test_what_is_alike_is_one_group() -> None:
    assert halves(vectors([1, 2], [2, 4], [0.5, 1])) == ([0, 1, 2], [])
    assert halves(vectors([0, 0], [0, 0])) == ([0, 1], [])


def test_clusters_are_linked_by_single_steps() -> None:
    # 50 degrees apart, so that the first and the last are linked by the one between them.
    found = clusters(vectors([1, 0], [0.64, 0.77], [-0.17, 0.98], [-1, -1], [-1.1, -1.3]))
    assert found == [[0, 1, 2], [3, 4]]
    assert clusters(vectors([1, 0], [0, 1])) == [[0], [1]]
    assert clusters(vectors([0, 0], [0, 0])) == [[0], [1]]  # who did not move is like nobody
