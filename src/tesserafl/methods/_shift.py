"""Double shifting: whose window of channels begins where, in a round and between rounds.

Everybody works it out alone, from the round, its rank among those that take part and their widths:

    start of rank n on the l-th axis = stride t + (gaps of the ranks before it), modulo the units
    gap of a rank = (1 - c) its width, half up         c = 1: all windows equal, c = 0: side by side
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor

from tesserafl.core.errors import ConfigError
from tesserafl.core.model import Model
from tesserafl.methods._width import kept_units, window

Overlap = Literal["decaying", "constant", "growing", "adaptive"]
Phase = Literal["same", "staggered"]
_STEP = 0.05
"""How far the adaptive overlap moves in a round."""
_LAST = 0.2
"""Overlap of the last round, unless full coverage asks for less."""


def start_of(
    widths: Sequence[int],
    rank: int,
    units: int,
    overlap: float,
    *,
    round: int,
    stride: int,
    axis: int,
    phase: Phase,
) -> int:
    """First unit of a rank's window.

    Args:
        widths: units that each rank keeps of this axis, by rank.
        rank: whose window.
        units: of the whole axis.
        overlap: c, the share of its window that a rank has in common with the next.
        round: t, from 0.
        stride: units that all windows move from round to round.
        axis: l, the axis's place from input to output.
        phase: `same`: one offset on all axes. `staggered`: gaps are (1 + l) times as wide, and
            windows jump by l widths more after every units / width rounds. Two axes that meet in a
            weight then do not go in step, so that more pairs of their units meet.
    """
    gaps = sum(_gap(width, overlap) for width in widths[:rank])
    start = stride * round + gaps
    if phase == "staggered":
        width = widths[rank]
        start += axis * (gaps + round // math.ceil(units / width) * width)
    return start % units


def _gap(width: int, overlap: float) -> int:
    """Half up, and never none: narrow windows would all be the same."""
    return 0 if overlap == 1.0 else max(1, math.floor(width * (1.0 - overlap) + 0.5))


def shifted(
    model: Model,
    ratios: Sequence[float],
    rank: int,
    overlap: float,
    round: int,
    stride: int,
    phase: Phase,
) -> dict[str, Tensor]:
    """The rank's window on every axis; `ratios` by rank."""
    keep = {}
    for number, axis in enumerate(model.cuttable):
        units = model.units(axis)
        widths = [kept_units(model, axis, ratio) for ratio in ratios]
        start = start_of(
            widths, rank, units, overlap, round=round, stride=stride, axis=number, phase=phase
        )
        keep[axis] = window(start, widths[rank], units)
    return keep


def widest_overlap(ratios: Sequence[float]) -> float:
    """The largest overlap with which these ranks together hold every unit in every round.

    Of equal ratios that is 1 - (1/mu - 1)/(N - 1). Negative where even disjoint windows leave gaps.
    """
    before, widest = 0.0, -math.inf
    for ratio in ratios:
        if ratio >= 1.0:
            return 1.0
        if before:
            widest = max(widest, 1.0 - (1.0 - ratio) / before)
        before += ratio
    return widest


def union_of(ratios: Sequence[float], overlap: float) -> float:
    """Share of an axis's units that are trained in a round.

    Of equal ratios min(1, mu (1 + (N - 1)(1 - c))): how far the window that reaches furthest ends.
    """
    before, end = 0.0, 0.0
    for ratio in ratios:
        end = max(end, before * (1.0 - overlap) + ratio)
        before += ratio
    return min(1.0, end)


def overlap_at(
    schedule: Overlap, first: float, last: float | None, ratios: Sequence[float], progress: float
) -> float:
    """c of a round; `progress` runs from 0 in the first round towards 1.

    Along half a cosine from `first` towards `last`. Without `last` that is 0.2, or less if `first`
    or the largest overlap with full coverage is less.
    """
    if schedule == "constant":
        return first
    end = min(_LAST, first, max(0.0, widest_overlap(ratios))) if last is None else last
    if schedule == "growing":
        first, end = end, first
    return end + (first - end) * (1.0 + math.cos(math.pi * progress)) / 2.0


def check_shift(first: float, last: float | None, stride: int) -> None:
    """Raise ConfigError unless the overlaps are shares that fall, and windows move forwards."""
    if stride < 0:
        raise ConfigError(f"method.stride must be 0 or more; got {stride}")
    for name, value in (("overlap", first), ("overlap_end", last)):
        if value is not None and not 0.0 <= value <= 1.0:
            raise ConfigError(
                f"method.{name} is the share of a window that neighbours have in common, in "
                f"[0, 1]; got {value}"
            )
    if last is not None and last > first:
        raise ConfigError(
            f"method.overlap_end {last} is above method.overlap {first}; the overlap decays from "
            f"overlap to overlap_end, and method.overlap_schedule growing turns that around"
        )


def adapted(overlap: float, disagreement: float, notes: dict[str, Any]) -> dict[str, Any]:
    """The adaptive schedule's next notes: more overlap where peers disagree more than before."""
    seen, mean = notes.get("rounds_measured", 0), notes.get("disagreement", 0.0)
    if seen:
        overlap += _STEP if disagreement > mean else -_STEP
    mean = (mean * seen + disagreement) / (seen + 1)
    overlap = min(1.0, max(0.0, overlap))
    return {"overlap": overlap, "disagreement": mean, "rounds_measured": seen + 1}
