"""Federated methods, one file per paper."""

from __future__ import annotations

from tesserafl.methods.fedavg import FedAvg
from tesserafl.methods.fedbrb import FedBRB
from tesserafl.methods.fedecover import FedEcover
from tesserafl.methods.federated_dropout import FederatedDropout
from tesserafl.methods.fedrolex import FedRolex
from tesserafl.methods.heterofl import HeteroFL

MethodSettings = FedAvg | HeteroFL | FederatedDropout | FedRolex | FedEcover | FedBRB

METHODS: dict[str, type[MethodSettings]] = {
    "fedavg": FedAvg,
    "heterofl": HeteroFL,
    "federated_dropout": FederatedDropout,
    "fedrolex": FedRolex,
    "fedecover": FedEcover,
    "fedbrb": FedBRB,
}

__all__ = [
    "METHODS",
    "FedAvg",
    "FedBRB",
    "FedEcover",
    "FedRolex",
    "FederatedDropout",
    "HeteroFL",
    "MethodSettings",
]
