"""MSfusion's claims: against its baselines, as participants grow in number, and part by part.

Grid (reconstructed, see docs/methods/msfusion.md): 5, 10 and 20 participants that all take part in
every round; widths 1/2 to 1/8; IID, Dirichlet and 2-class shards.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from tesserafl.core.errors import ConfigError
from tesserafl.data import DataSettings
from tesserafl.engines.network import NetworkSettings
from tesserafl.experiments._sizes import base_for
from tesserafl.methods import (
    DPSGD,
    FedAvg,
    FedBRB,
    FedEcover,
    FedRolex,
    HeteroFL,
    MethodSettings,
    MSfusion,
)
from tesserafl.run.experiment import Experiment

RATIOS = {"half": (0.5,), "4th": (0.25,), "8th": (0.125,)}
PARTICIPANTS = (5, 10, 20)
NARROWEST = {2: 0.6667, 5: 0.3334, 10: 0.1819, 20: 0.0953}
"""Participants -> the width at which half-overlapping windows just cover every axis."""


def paper_msfusion(data: DataSettings | None = None) -> Experiment:
    """What the rows share."""
    return with_participants(base_for(data, MSfusion(ratio=(0.25,))), 10)


def rows(base: Experiment, asked: frozenset[str]) -> Mapping[str, Experiment]:
    """Methods x widths x participants x partitions; ablations and networks at the base's cell.

    A width, a number of clients or a partition that the command line gives is the only one.
    """
    method, base = base.method, with_participants(base, base.data.num_clients)
    if not isinstance(method, MSfusion):
        raise ConfigError(
            "paper_msfusion varies MSfusion's settings; leave --method away, or run comparison"
        )
    partitions = {
        "iid": replace(base.data, partition="iid"),
        "dirichlet": replace(base.data, partition="dirichlet"),
        "shards": replace(base.data, partition="shards"),
    }
    if "data.partition" in asked:
        partitions = {base.data.partition: base.data}
    counts = (base.data.num_clients,) if "data.num_clients" in asked else PARTICIPANTS
    cells = {
        f"{partition}-{count}": with_participants(replace(base, data=data), count)
        for partition, data in partitions.items()
        for count in counts
    }
    widths = {"given": method.ratio} if "method.ratio" in asked else RATIOS
    experiments: dict[str, Experiment] = {}
    for name, cell in cells.items():
        experiments[f"{name}-fedavg-full"] = replace(cell, method=FedAvg())
        experiments[f"{name}-dpsgd-full"] = on_a_ring(replace(cell, method=DPSGD()))
        for width, ratio in widths.items():
            methods = methods_at(replace(method, ratio=ratio))
            for label, each in methods.items():
                row = replace(cell, method=each)
                experiments[f"{name}-{width}-{label}"] = on_a_ring(row) if label == "dpsgd" else row
    if not {"method.ratio", "data.num_clients"} & asked:
        experiments |= {
            f"scale-{count}": replace(
                with_participants(base, count), method=replace(method, ratio=(ratio,))
            )
            for count, ratio in NARROWEST.items()
        }
    experiments |= {
        f"ablation-{label}": replace(base, method=ablated)
        for label, ablated in ablations(method).items()
        if ablated.momentum == "reset" or base.training.momentum  # there is none to carry
    }
    for label, network in networks().items():
        experiments[f"network-{label}"] = replace(base, network=network)
    return experiments


def methods_at(method: MSfusion) -> dict[str, MethodSettings]:
    """MSfusion and what it is compared with, at its width."""
    ratio = method.ratio
    return {
        "fedavg-small": FedAvg(ratio=ratio),
        "heterofl": HeteroFL(ratio=ratio),
        "fedrolex": FedRolex(ratio=ratio),
        "fedecover": FedEcover(ratio=ratio),
        "fedbrb": FedBRB(ratio=ratio),
        "dpsgd": DPSGD(ratio=ratio),
        "msfusion": method,
    }


def ablations(method: MSfusion) -> dict[str, MSfusion]:
    """MSfusion without each of its parts, and with each alternative."""
    return {
        "no-contrast": replace(method, contrast=0.0),
        "strong-contrast": replace(method, contrast=1.0),
        "negatives-of-peers": replace(method, negatives="peers"),
        "negatives-of-both": replace(method, negatives="both"),
        **{
            f"overlap-{overlap:g}": replace(method, overlap_schedule="constant", overlap=overlap)
            for overlap in (0.0, 0.2, 0.5, 0.8)
        },
        "overlap-growing": replace(method, overlap_schedule="growing"),
        "overlap-adaptive": replace(method, overlap_schedule="adaptive"),
        "no-shift-in-round": replace(method, overlap_schedule="constant", overlap=1.0),
        "no-shift-between-rounds": replace(method, stride=0),
        "staggered": replace(method, layer_phase="staggered"),
        "momentum-carried": replace(method, momentum="carry"),
    }


def networks() -> dict[str, NetworkSettings]:
    """Other networks than a complete graph without loss."""
    return {
        "lean": NetworkSettings(exchange="lean"),
        "loss-0.3": NetworkSettings(loss=0.3),
        "late-0.3": NetworkSettings(delay=0.3),
        "gossip-ring": NetworkSettings(graph="ring", exchange="gossip"),
        "gossip-random": NetworkSettings(graph="erdos_renyi", probability=0.5, exchange="gossip"),
    }


def with_participants(experiment: Experiment, count: int) -> Experiment:
    """So many clients, all of which take part in every round."""
    data = replace(experiment.data, num_clients=count)
    return replace(experiment, data=data, clients_per_round=count)


def on_a_ring(experiment: Experiment) -> Experiment:
    """Gossip's usual worst case."""
    return replace(experiment, network=replace(experiment.network, graph="ring"))
