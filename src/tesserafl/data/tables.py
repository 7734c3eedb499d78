"""Rows as they were read, before anyone says what the columns mean."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tesserafl.core.errors import DataError
from tesserafl.core.seeds import generator

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of a data set, and where they come from."""

    rows: pa.Table
    """the columns"""
    numbers: Tensor
    """int64 [n], the number of each row in its source, counted from 0; for messages"""
    origin: str
    """what a message calls the source"""
    class_names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """names of the classes of the label columns that carry them"""
    files: tuple[Path, ...] = ()
    """files that hold the rows; none: too cheap to cache"""

    def __len__(self) -> int:
        return len(self.numbers)

    def take(self, rows: Tensor) -> Table:
        """The rows at `rows` (int64 [k]), in that order."""
        if torch.equal(rows, torch.arange(len(self))):
            return self
        return replace(self, rows=self.rows.take(rows.numpy()), numbers=self.numbers[rows])

    def column(self, name: str) -> pa.ChunkedArray:
        """One column. Raises DataError with the columns that there are."""
        if name not in self.rows.column_names:
            raise DataError(
                f"{self.origin} has no column {name!r}; its columns are "
                f"{', '.join(self.rows.column_names)}; name one of them"
            )
        return self.rows[name]

    def where(self, row: int) -> str:
        """How a message names a row of this table."""
        return f"{self.origin}, row {int(self.numbers[row])}"

    def identity(self) -> str:
        """A digest of which rows of the files these are."""
        return hashlib.sha256(self.numbers.numpy().tobytes()).hexdigest()


def table(
    rows: pa.Table,
    *,
    origin: str,
    class_names: Mapping[str, tuple[str, ...]] | None = None,
    files: tuple[Path, ...] = (),
) -> Table:
    """A table of all rows of a source. Raises DataError if there is none."""
    if len(rows) == 0:
        raise DataError(f"{origin} has no rows; give a data set with at least one")
    return Table(
        rows=rows,
        numbers=torch.arange(len(rows)),
        origin=origin,
        class_names=class_names or {},
        files=files,
    )


def hold_out(whole: Table, fraction: float, seed: int) -> tuple[Table, Table]:
    """Training and test rows of a source that has no test part, drawn at random."""
    num_test = max(1, round(len(whole) * fraction))
    if num_test >= len(whole):
        raise DataError(
            f"{whole.origin} has {len(whole)} row and no test part; give a test part or more rows"
        )
    order = torch.randperm(len(whole), generator=generator(seed, "data", "hold-out"))
    return whole.take(order[num_test:].sort().values), whole.take(order[:num_test].sort().values)


def sample(num_rows: int, most: int | None, seed: int, part: str) -> Tensor:
    """Sorted numbers of at most `most` rows of `num_rows`, drawn at random: int64 [k]."""
    if most is not None and most < 1:
        raise DataError(f"data.max_{part} must be at least 1, or None for all rows; got {most}")
    if most is None or most >= num_rows:
        return torch.arange(num_rows)
    order = torch.randperm(num_rows, generator=generator(seed, "data", "sample", part))
    return order[:most].sort().values
