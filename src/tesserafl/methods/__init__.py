"""Federated methods, one file per paper."""

from __future__ import annotations

from tesserafl.methods.dpsgd import DPSGD
from tesserafl.methods.fedavg import FedAvg
from tesserafl.methods.fedbrb import FedBRB
from tesserafl.methods.fedecover import FedEcover
from tesserafl.methods.federated_dropout import FederatedDropout
from tesserafl.methods.fedrolex import FedRolex
from tesserafl.methods.heterofl import HeteroFL
from tesserafl.methods.msfusion import MSfusion

MethodSettings = (
    FedAvg | HeteroFL | FederatedDropout | FedRolex | FedEcover | FedBRB | MSfusion | DPSGD
)

METHODS: dict[str, type[MethodSettings]] = {
    "fedavg": FedAvg,
    "heterofl": HeteroFL,
    "federated_dropout": FederatedDropout,
    "fedrolex": FedRolex,
    "fedecover": FedEcover,
    "fedbrb": FedBRB,
    "msfusion": MSfusion,
    "dpsgd": DPSGD,
}

__all__ = [
    "DPSGD",
    "METHODS",
    "FedAvg",
    "FedBRB",
    "FedEcover",
    "FedRolex",
    "FederatedDropout",
    "HeteroFL",
    "MSfusion",
    "MethodSettings",
]
