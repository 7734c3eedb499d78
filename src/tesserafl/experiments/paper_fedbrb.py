"""FedBRB's claims: against its baselines, and without each of its parts.

Grid (reconstructed from the abstract, see docs/methods/fedbrb.md): widths 1/2 to 1/16, all clients
of one width or mixed; IID, Dirichlet and 2-class shards.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from tesserafl.core.errors import ConfigError
from tesserafl.data import DataSettings
from tesserafl.experiments._sizes import base_for
from tesserafl.methods import FedAvg, FedBRB, FedRolex, HeteroFL, MethodSettings
from tesserafl.run.experiment import Experiment


def paper_fedbrb(data: DataSettings | None = None) -> Experiment:
    """What the rows share."""
    return base_for(data, FedBRB(ratio=(0.125,)))


def rows(base: Experiment, asked: frozenset[str]) -> Mapping[str, Experiment]:
    """Methods x widths x partitions, then ablations at the base's width and partition.

    A width or partition that the command line gives is the only one.
    """
    if not isinstance(base.method, FedBRB):
        raise ConfigError(
            "paper_fedbrb varies FedBRB's settings; leave --method away, or run comparison"
        )
    experiments: dict[str, Experiment] = {}
    partitions = {
        "iid": replace(base.data, partition="iid"),
        "dirichlet": replace(base.data, partition="dirichlet"),
        "shards": replace(base.data, partition="shards"),
    }
    widths: dict[str, tuple[float, ...]] = {
        "4th": (0.25,),
        "8th": (0.125,),
        "16th": (0.0625,),
        "mixed": (0.5, 0.25, 0.125, 0.0625),
    }
    if "data.partition" in asked:
        partitions = {base.data.partition: base.data}
    if "method.ratio" in asked:
        widths = {"given": base.method.ratio}
    for partition, data in partitions.items():
        experiments[f"{partition}-fedavg-full"] = replace(base, data=data, method=FedAvg())
        for width, ratio in widths.items():
            methods: dict[str, MethodSettings] = {
                "fedavg-small": FedAvg(ratio=ratio),
                "heterofl": HeteroFL(ratio=ratio),
                "fedrolex": FedRolex(ratio=ratio),
                "fedbrb": replace(base.method, ratio=ratio),
            }
            for label, method in methods.items():
                experiments[f"{partition}-{width}-{label}"] = replace(
                    base, data=data, method=method
                )
    ablations = {
        "rolling-only": replace(base.method, broadcast=0.0),
        "broadcast-0.1": replace(base.method, broadcast=0.1),
        "broadcast-0.3": replace(base.method, broadcast=0.3),
        "broadcast-1": replace(base.method, broadcast=1.0),
        "annealed": replace(base.method, anneal="cosine"),
        "similarity": replace(base.method, broadcast_weight="similarity"),
        "diagonal": replace(base.method, rolling="diagonal"),
        "independent": replace(base.method, rolling="independent"),
        "diagonal-no-broadcast": replace(base.method, rolling="diagonal", broadcast=0.0),
    }
    for label, ablated in ablations.items():
        experiments[f"ablation-{label}"] = replace(base, method=ablated)
    return experiments
