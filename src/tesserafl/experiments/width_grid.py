"""The comparison at two widths and two kinds of non-IID data: the tables of the lab log."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from tesserafl.data import DataSettings
from tesserafl.experiments import comparison
from tesserafl.experiments._sizes import base_for
from tesserafl.methods import FedBRB
from tesserafl.run.experiment import Experiment

RATIOS = {"4th": (0.25,), "8th": (0.125,)}


def width_grid(data: DataSettings | None = None) -> Experiment:
    """All width methods at 1/4 and 1/8, on Dirichlet and on 2-class shards."""
    return base_for(data, FedBRB(ratio=(0.25,)))


def rows(base: Experiment) -> Mapping[str, Experiment]:
    """The rows of `comparison` per partition and width; the ceiling once per partition."""
    experiments: dict[str, Experiment] = {}
    for partition in ("dirichlet", "shards"):
        shared = replace(base, data=replace(base.data, partition=partition))
        for width, ratio in RATIOS.items():
            cell = replace(shared, method=replace(base.method, ratio=ratio))
            for label, row in comparison.rows(cell).items():
                ceiling = label == "fedavg-full"
                experiments[f"{partition}-{label if ceiling else f'{width}-{label}'}"] = row
    return experiments
