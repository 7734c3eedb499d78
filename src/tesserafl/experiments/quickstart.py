"""The first run: no client can hold the model, and yet it is trained."""

from __future__ import annotations

from tesserafl.data import DataSettings
from tesserafl.experiments._sizes import base_for
from tesserafl.methods import FedBRB
from tesserafl.run.experiment import Experiment


def quickstart(data: DataSettings | None = None) -> Experiment:
    """FedBRB on handwritten digits, 20 clients, each at a quarter of the width or an eighth."""
    return base_for(data, FedBRB(ratio=(0.25, 0.125)))
