"""What the probe finds of an axis: units or blocks, and how dimensions are laid out along it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch

from tesserafl.core.submodel import Index, as_index, index_tensor


@dataclass(frozen=True)
class Tie:
    """One dimension's layout along an axis: parts one after another, each all units in turn.

    A fused query-key-value projection with 64 entries a head is `parts=(64, 64, 64)`: all heads'
    queries, all keys, all values. A flattened 7 x 7 map is `parts=(49,)`: one run per channel.
    """

    axis: str
    parts: tuple[int, ...]
    """Entries of one unit in each part."""

    def expand(self, units: Index, num_units: int) -> Index:
        """Entries of this dimension that belong to the units, of `num_units` in all."""
        if len(self.parts) == 1 and isinstance(units, slice):
            return slice(units.start * self.parts[0], units.stop * self.parts[0])
        runs, offset = [], 0
        for size in self.parts:
            runs.append(
                (index_tensor(units)[:, None] * size + torch.arange(size)).reshape(-1) + offset
            )
            offset += num_units * size
        return as_index(torch.cat(runs))


@dataclass(frozen=True)
class Width:
    """An axis whose units (channels, whole heads) can be kept or left out."""

    units: int
    """Number of units."""
    quantum: int
    """Entries of the axis's size that make one unit; a size is units x quantum."""
    size: str
    """The key in `sizes` that counts them; axes that share one keep equally many units."""
    cuttable: bool = True
    """False for classes and the like: probed, so that their rows are known, but never cut."""


@dataclass(frozen=True)
class Depth:
    """An axis whose size is a number of blocks of one structure, or of adapters in such blocks."""

    blocks: int
    prefixes: tuple[str, ...]
    """Parameters of block i begin with one of these, followed by `i.`."""
    last: int | None = None
    """Of adapters: the number of the block next to the output, whose adapters are unit 0; those of
    the block before are unit 1, and so on. The blocks themselves are frozen and stay, so only the
    adapters furthest from the output can be left out. None: the blocks are the units."""
    outputs: tuple[str, ...] = ()
    """Of blocks that add to what enters them: the parameters (`rest` of their names) that what a
    block adds is proportional to, branch by branch. At zero the block is the identity. Empty: the
    blocks do not add, as where the sum is normalised."""
    below: tuple[str, ...] = ()
    """Parameters in no block that what enters the blocks depends on: a stem, embeddings."""

    def locate(self, name: str) -> tuple[str, int, str] | None:
        """(prefix, unit, rest) of a parameter of these blocks, None for any other."""
        for prefix in self.prefixes:
            if name.startswith(prefix):
                number, dot, rest = name[len(prefix) :].partition(".")
                if dot and number.isdigit():
                    unit = int(number) if self.last is None else self.last - int(number)
                    return prefix, unit, rest
        return None


def structures_of(
    depth: Depth,
    ties: Mapping[str, tuple[Tie | None, ...]],
    shapes: Mapping[str, tuple[int, ...]],
) -> dict[int, object]:
    """How each block of a depth axis is built: equal for those that are built alike."""
    structures: dict[int, dict[tuple[str, str], object]] = {}
    for name, tied in ties.items():
        if place := depth.locate(name):
            structures.setdefault(place[1], {})[place[0], place[2]] = (
                tied,
                [size for tie, size in zip(tied, shapes[name], strict=True) if not tie],
            )
    return dict(structures)


class LowRank(NamedTuple):
    """The change of one frozen weight [out, in] as a product: scale x up @ down."""

    down: str
    """Parameter [rank, in]."""
    up: str
    """Parameter [out, rank]."""
    scale: float
    merged: str | None = None
    """Parameter [out, in] that the product may be merged into; None: the weight is frozen."""
    turned: bool = False
    """Whether `merged` is [in, out]."""
