"""What the columns of a table mean, and labels and vectors out of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tesserafl.core.errors import DataError
from tesserafl.data.examples import Kind, Task
from tesserafl.data.settings import DataSettings
from tesserafl.data.tables import Table

if TYPE_CHECKING:
    import pyarrow as pa

INPUT_COLUMNS: dict[str, Kind] = {"image": "image", "img": "image", "text": "tokens"}
"""Columns that are taken for the inputs when none is named, and what they must hold."""
LABEL_COLUMNS = ("label", "labels", "fine_label")
KINDS: dict[Task, Kind] = {
    "image-classification": "image",
    "text-classification": "tokens",
    "causal-lm": "tokens",
    "vector-classification": "vector",
}


@dataclass(frozen=True, kw_only=True)
class Columns:
    """The columns that are learned from."""

    task: Task
    """what is learned"""
    inputs: tuple[str, ...]
    """one column, or all features of a vector"""
    label: str | None
    """the classes; None: there are none"""


def choose(settings: DataSettings, table: Table) -> Columns:
    """Which columns to learn from, and what. Raises DataError if they do not fit together."""
    label = settings.label_column or next(
        (name for name in LABEL_COLUMNS if name in table.rows.column_names), None
    )
    if label is not None:
        table.column(label)
    inputs = _inputs(settings, table, label)
    kind = _kind(table.column(inputs[0]).type)
    natural: Task
    if kind == "tokens":
        natural = "causal-lm" if label is None else "text-classification"
    else:
        natural = "image-classification" if kind == "image" else "vector-classification"
    task = natural if settings.task == "auto" else settings.task
    if task not in KINDS:
        raise DataError(f"data.task={task!r} is unknown; allowed: auto, {', '.join(KINDS)}")
    if KINDS[task] != kind:
        raise DataError(
            f"data.task={task} learns from {KINDS[task]} inputs, but column {inputs[0]!r} of "
            f"{table.origin} holds {kind} inputs; use data.task={natural} or data.input_column"
        )
    if task != "causal-lm" and label is None:
        raise DataError(
            f"{table.origin} has no label column ({', '.join(LABEL_COLUMNS)}), its columns are "
            f"{', '.join(table.rows.column_names)}; name one with --data.label-column"
        )
    return Columns(task=task, inputs=inputs, label=label)


def _inputs(settings: DataSettings, table: Table, label: str | None) -> tuple[str, ...]:
    if settings.input_column:
        table.column(settings.input_column)
        return (settings.input_column,)
    names = table.rows.column_names
    for name, kind in INPUT_COLUMNS.items():
        if name in names:
            if _kind(table.rows[name].type) != kind:
                raise DataError(
                    f"column {name!r} of {table.origin} holds {table.rows[name].type}, not "
                    f"{kind} inputs; images are stored as bytes (Parquet) or as a folder of files"
                )
            return (name,)
    features = [name for name in names if name not in (label, settings.partition_column)]
    if not features or any(_kind(table.rows[name].type) != "vector" for name in features):
        raise DataError(
            f"{table.origin} has no column {', '.join(INPUT_COLUMNS)}, and its columns "
            f"({', '.join(names)}) are not all numbers; name one with --data.input-column"
        )
    return tuple(features)


def _kind(column: pa.DataType) -> Kind:
    """What a column holds, by its Arrow type."""
    from pyarrow import types

    if types.is_dictionary(column):
        column = column.value_type
    if types.is_string(column) or types.is_large_string(column):
        return "tokens"
    nested = (
        types.is_list(column) or types.is_large_list(column) or types.is_fixed_size_list(column)
    )
    bytes_like = types.is_struct(column) or types.is_binary(column) or types.is_large_binary(column)
    if bytes_like or (nested and types.is_nested(column.value_type)):
        return "image"
    return "vector"


def read_labels(
    table: Table, column: str, names: tuple[str, ...] | None = None
) -> tuple[Tensor, tuple[str, ...]]:
    """Class of each row (int64 [n]) and the classes' names.

    With `names` (those of the training part) every class must be one of them; without, strings
    are numbered in sorted order and numbers keep their value.
    """
    values = table.column(column).to_pylist()
    missing = next((row for row, value in enumerate(values) if value is None), None)
    if missing is not None:
        raise DataError(f"{table.where(missing)}: {column!r} is empty; label the row or remove it")
    if isinstance(values[0], str):
        names = names or tuple(sorted(set(values)))
        ids = {name: number for number, name in enumerate(names)}
        for row, value in enumerate(values):
            if value not in ids:
                raise DataError(
                    f"{table.where(row)}: {column!r} is {value!r}, a class that the training part "
                    f"does not have; allowed: {', '.join(names)}"
                )
        return torch.tensor([ids[value] for value in values]), names
    known = table.class_names.get(column)
    if names and not known and not all(name.isdigit() for name in names):
        raise DataError(
            f"{table.origin}: {column!r} holds numbers, but the training part names its classes "
            f"({', '.join(names[:4])}, ...); use the same names in both parts"
        )
    names = names or known
    most = len(names) - 1 if names else None
    for row, value in enumerate(values):
        whole = isinstance(value, int | float) and value == value // 1
        if not whole or value < 0 or (most is not None and value > most):
            allowed = f"0..{most}" if most is not None else "0, 1, 2, ..."
            raise DataError(
                f"{table.where(row)}: {column!r} is {value!r}; allowed: whole numbers {allowed}; "
                f"correct the row, or name another column with --data.label-column"
            )
    labels = torch.tensor([int(value) for value in values])
    if not names and int(labels.max()) >= max(1000, 10 * len(labels)):
        raise DataError(
            f"{table.origin}: {column!r} goes up to {int(labels.max())} with only {len(labels)} "
            f"rows; classes are numbered 0, 1, 2, ... without gaps. Renumber them, or name "
            f"another column with --data.label-column"
        )
    return labels, names or tuple(str(number) for number in range(int(labels.max()) + 1))


def read_vectors(table: Table, columns: tuple[str, ...]) -> Tensor:
    """The features of each row: float32 [n, features]. Raises DataError if one is not finite."""
    import numpy as np
    import pyarrow as pa

    nested = len(columns) == 1 and pa.types.is_nested(table.column(columns[0]).type)
    try:
        if nested:
            vectors = np.array(table.column(columns[0]).to_pylist(), dtype=np.float32)
        else:
            numbers = [table.column(c).cast(pa.float64(), safe=False).to_numpy() for c in columns]
            vectors = np.stack(numbers, axis=1).astype(np.float32)
    except (pa.ArrowException, TypeError, ValueError) as error:
        raise DataError(
            f"{table.origin}: {', '.join(columns[:4])} cannot be read as vectors of equal length: "
            f"{error}; correct the rows, or name another column with --data.input-column"
        ) from error
    bad = np.argwhere(~np.isfinite(vectors))
    if len(bad):
        row, feature = bad[0].tolist()
        name = f"{columns[0]}[{feature}]" if nested else columns[feature]
        raise DataError(
            f"{table.where(row)}: {name!r} is missing or not a finite float32; fill it or remove "
            f"the row"
        )
    return torch.from_numpy(vectors)  # [n, features]
