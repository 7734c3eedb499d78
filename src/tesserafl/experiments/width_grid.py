"""The comparison at two widths and two kinds of non-IID data: the tables of the lab log."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from tesserafl.core.errors import ConfigError
from tesserafl.data import DataSettings
from tesserafl.experiments import comparison
from tesserafl.experiments._sizes import base_for
from tesserafl.methods import FedBRB
from tesserafl.run.experiment import Experiment

RATIOS = {"4th": (0.25,), "8th": (0.125,)}


def width_grid(data: DataSettings | None = None) -> Experiment:
    """All width methods at 1/4 and 1/8, on Dirichlet and on 2-class shards."""
    return base_for(data, FedBRB(ratio=(0.25,)))


def rows(base: Experiment, asked: frozenset[str]) -> Mapping[str, Experiment]:
    """The rows of `comparison` per partition and width; the ceiling once per partition.

    A width or partition that the command line gives is the only one.
    """
    method: Any = base.method
    if "ratio" not in {field.name for field in fields(method)}:
        raise ConfigError(
            f"width_grid varies method.ratio, and {type(method).__name__} cuts no width; leave "
            f"--method away or choose one that does"
        )
    experiments: dict[str, Experiment] = {}
    partitions = [base.data] if "data.partition" in asked else _partitions(base)
    widths = {"given": base.method.ratio} if "method.ratio" in asked else RATIOS
    for data in partitions:
        partition, shared = data.partition, replace(base, data=data)
        for width, ratio in widths.items():
            cell = replace(shared, method=replace(method, ratio=ratio))
            for label, row in comparison.rows(cell).items():
                ceiling = label == "fedavg-full"
                experiments[f"{partition}-{label if ceiling else f'{width}-{label}'}"] = row
    return experiments


def _partitions(base: Experiment) -> list[DataSettings]:
    return [replace(base.data, partition="dirichlet"), replace(base.data, partition="shards")]
