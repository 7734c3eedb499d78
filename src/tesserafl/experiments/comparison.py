"""All width methods on one data set, between the bar and the ceiling."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from tesserafl.data import DataSettings
from tesserafl.experiments._sizes import base_for
from tesserafl.methods import (
    FedAvg,
    FedBRB,
    FedEcover,
    FederatedDropout,
    FedRolex,
    HeteroFL,
    MethodSettings,
    MSfusion,
)
from tesserafl.run.experiment import Experiment


def comparison(data: DataSettings | None = None) -> Experiment:
    """What the rows share; `--method.ratio` is the clients' width in all of them."""
    return base_for(data, FedBRB(ratio=(0.25,)))


def rows(base: Experiment, asked: frozenset[str] = frozenset()) -> Mapping[str, Experiment]:
    """FedAvg at full width (the ceiling), at the clients' width (the bar), and every method.

    A method that is given on the command line keeps its own settings in its row.
    """
    ratio = base.method.ratio
    methods: dict[str, MethodSettings] = {
        "fedavg-full": FedAvg(ratio=(1.0,)),
        "fedavg-small": FedAvg(ratio=ratio),
        "heterofl": HeteroFL(ratio=ratio),
        "federated_dropout": FederatedDropout(ratio=ratio),
        "fedrolex": FedRolex(ratio=ratio),
        "fedecover": FedEcover(ratio=ratio),
        "fedbrb": FedBRB(ratio=ratio),
        "msfusion": MSfusion(ratio=ratio),
    }
    for label, method in methods.items():
        if type(method) is type(base.method) and label not in ("fedavg-full", "fedavg-small"):
            methods[label] = base.method
    # Those made for peers have the same bits with a server, and bytes that can be compared.
    network = base.network
    if network.topology == "auto":
        network = replace(network, topology="star")
    return {
        label: replace(base, method=method, network=network) for label, method in methods.items()
    }
