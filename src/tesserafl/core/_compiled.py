"""The loops of `kernels`, compiled. Importing this imports numba; only `kernels` does, if it pays.

Every loop walks rows `low` to `high` (excluded) of a layout once, makes no array and does not hold
the interpreter's lock. Arrays are flat; offsets are those of `layout.Layout`. No fast-math: an
entry's arithmetic is the one that is written here. Places are unsigned: with signed ones each
could be an index from the end, which is checked per entry and keeps a loop from being vectorised.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
from numba import njit

U = np.uint64
Function = TypeVar("Function", bound=Callable[..., object])


def _compiled(function: Function) -> Function:
    options: dict[str, Any] = {"nogil": True, "error_model": "numpy"}
    try:
        compiled: Function = njit(cache=True, **options)(function)
    except RuntimeError:  # no folder that a cache could be written to: compile in every process
        compiled = njit(**options)(function)
    return compiled


@_compiled
def read(
    large: Any, small: Any, rows: Any, planes: Any, starts: Any, lengths: Any, low: int, high: int
) -> None:
    """small <- the viewed entries of large."""
    at = U(low * len(planes) * lengths.sum())
    for r in range(low, high):
        for p in range(len(planes)):
            for k in range(len(starts)):
                base = U(rows[r] + planes[p] + starts[k])
                for i in range(U(lengths[k])):
                    small[at + i] = large[base + i]
                at += U(lengths[k])


@_compiled
def add_number(
    large: Any, number: Any, rows: Any, planes: Any, starts: Any, lengths: Any, low: int, high: int
) -> None:
    """The viewed entries of large += number."""
    for r in range(low, high):
        for p in range(len(planes)):
            for k in range(len(starts)):
                base = U(rows[r] + planes[p] + starts[k])
                for i in range(U(lengths[k])):
                    large[base + i] += number


@_compiled
def add_fixed(
    sums: Any,
    small: Any,
    scale: float,
    bound: float,
    weight: int,
    rows: Any,
    planes: Any,
    starts: Any,
    lengths: Any,
    low: int,
    high: int,
) -> Any:
    """Viewed entries of sums += weight x round(small x scale); how many lie beyond `bound`.

    Those, not-a-number among them, add nothing. So the same call with -weight takes back exactly
    what was added.
    """
    at = U(low * len(planes) * lengths.sum())
    bad = np.int64(0)
    for r in range(low, high):
        for p in range(len(planes)):
            for k in range(len(starts)):
                base = U(rows[r] + planes[p] + starts[k])
                for i in range(U(lengths[k])):
                    value = np.float64(small[at + i])
                    if not abs(value) <= bound:
                        bad += 1
                        value = np.float64(0.0)
                    sums[base + i] += weight * np.int64(np.rint(value * scale))
                at += U(lengths[k])
    return bad


@_compiled
def finish(
    old: Any,
    sums: Any,
    new: Any,
    grid: float,
    first: int,
    rows: Any,
    planes: Any,
    starts: Any,
    lengths: Any,
    runs: Any,
    table: Any,
    low: int,
    high: int,
) -> None:
    """new <- old + (sums x grid) / weight, in double precision; see `layout.Weighted`."""
    at = U(first + low * len(planes) * lengths.sum())
    for r in range(low, high):
        for p in range(len(planes)):
            for k in range(len(starts)):
                # The sum is 0 where the weight is.
                weight = np.float64(max(table[rows[r], planes[p], runs[k]], 1))
                for i in range(U(lengths[k])):
                    mean = (np.float64(sums[at + i]) * grid) / weight
                    new[at + i] = np.float64(old[at + i]) + mean
                at += U(lengths[k])
