"""Which blocks of a client's model are which of the server's: distances, and matching in order.

    parameters  d(i, j) = |phi_j - theta_i|^2 / (|phi_j|^2 + |theta_i|^2)
    functions   d(i, j) = 1 - CKA of what the blocks give for the same inputs

Matching keeps the order of the blocks: a path through a table of i x j, by dynamic programming. A
server's block may be skipped at no cost; a client's block that is matched to none costs delta.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tesserafl.core.params import Params


class Place(NamedTuple):
    """Where one block of a client's model belongs."""

    matched: int | None
    """Number of the server's block, counted from the input; None: it is like none of them."""
    after: int
    """The last of the server's blocks that lies in front of it; -1: none does."""


def aligned_order(distances: Sequence[Sequence[float]], delta: float) -> tuple[list[Place], float]:
    """The cheapest order-preserving match, and its cost.

    Args:
        distances: [server's blocks][client's blocks].
        delta: what a block costs that is matched to none; infinity: all are matched, as far as
            there are enough blocks.

    Ties are decided for the match, then for the server's earlier block: the result is a matter of
    the numbers alone.
    """
    rows, columns = len(distances), len(distances[0]) if distances else 0
    cost = [[0.0] * (columns + 1) for _ in range(rows + 1)]
    step: list[list[str]] = [[""] * (columns + 1) for _ in range(rows + 1)]
    for j in range(1, columns + 1):
        cost[0][j], step[0][j] = cost[0][j - 1] + delta, "insert"
    for i in range(1, rows + 1):
        step[i][0] = "skip"
        for j in range(1, columns + 1):
            options = (
                (cost[i - 1][j - 1] + distances[i - 1][j - 1], "match"),
                (cost[i - 1][j], "skip"),
                (cost[i][j - 1] + delta, "insert"),
            )
            cost[i][j], step[i][j] = min(options, key=lambda option: option[0])
    places: list[Place] = []
    i, j = rows, columns
    while j:
        if step[i][j] == "match":
            places.append(Place(i - 1, i - 1))
            i, j = i - 1, j - 1
        elif step[i][j] == "skip":
            i -= 1
        else:
            places.append(Place(None, i - 1))
            j -= 1
    return places[::-1], cost[rows][columns]


def parameter_distance(one: Params, other: Params) -> float:
    """M1 of two blocks with the same names and shapes, 0 to 2; 0 where both are zero."""
    theta, phi = flat(one), flat(other)
    # Not by products: blocks that are equal must have a distance of exactly zero.
    apart, both = float((theta - phi).square().sum()), float(theta.square().sum())
    both += float(phi.square().sum())
    return apart / both if both else 0.0


def function_distances(server: Sequence[Tensor], client: Sequence[Tensor]) -> list[list[float]]:
    """M3, 1 - linear CKA (Kornblith et al., ICML 2019), from centred Gram matrices [n, n]."""
    return [[1.0 - cka(one, other) for other in client] for one in server]


def gram(outputs: Tensor) -> Tensor:
    """The centred Gram matrix [n, n] of what a block gives for n inputs, [n, ...]."""
    rows = outputs.double().flatten(1)
    rows = rows - rows.mean(dim=0)
    return rows @ rows.T


def cka(one: Tensor, other: Tensor) -> float:
    """Linear CKA of two centred Gram matrices, 0 to 1; 0 where one of them is zero."""
    scale = float(one.norm() * other.norm())
    return float((one * other).sum()) / scale if scale else 0.0


def flat(block: Mapping[str, Tensor]) -> Tensor:
    """A block's parameters as one vector, in double precision."""
    return torch.cat([block[name].double().flatten() for name in sorted(block)])


def spread_of(distances: Sequence[float]) -> tuple[float, float]:
    """Median, and median absolute deviation from it."""
    values = torch.tensor(sorted(distances), dtype=torch.float64)
    middle = values.quantile(0.5)
    return float(middle), float((values - middle).abs().quantile(0.5))


def clusters(updates: Tensor) -> list[list[int]]:
    """Single-link clusters of updates [n, k], largest first.

    Two are linked that are closer to each other than to where they came from: their angle is below
    60 degrees, if they are of one length. So no scale has to be known.
    """
    squares = updates.square().sum(dim=1)
    apart = torch.stack([(row[None, :] - updates).square().sum(dim=1) for row in updates])
    links = (apart < torch.minimum(squares[:, None], squares[None, :])).tolist()
    found: list[list[int]] = []
    left = set(range(len(updates)))
    while left:
        group, edge = set[int](), {min(left)}
        while edge:
            group |= edge
            edge = {b for a in edge for b in left if links[a][b]} - group
        left -= group
        found.append(sorted(group))
    return sorted(found, key=lambda group: (-len(group), group))


def halves(vectors: Tensor) -> tuple[list[int], list[int]]:
    """Two groups by the sign of the first principal direction of the normalised vectors [n, k].

    The first vector is in the first group. Vectors that are all alike make one group.
    """
    length = vectors.norm(dim=1, keepdim=True)
    rows = vectors / length.clamp(min=torch.finfo(torch.float64).tiny)
    rows = rows - rows.mean(dim=0)
    products = rows @ rows.T
    if not float(products.diagonal().sum()) > len(vectors) * _ALIKE:
        return list(range(len(vectors))), []
    direction = torch.linalg.eigh(products).eigenvectors[:, -1]
    sides = (direction >= 0) == (direction[0] >= 0)
    numbers = range(len(vectors))
    return [n for n in numbers if sides[n]], [n for n in numbers if not sides[n]]


_ALIKE = 1e-9


def threshold(spread: tuple[float, float] | None, deviations: float) -> float:
    """Beyond it a distance is an outlier; infinity where nothing is known yet."""
    if spread is None:
        return math.inf
    middle, deviation = spread
    return middle + deviations * deviation
