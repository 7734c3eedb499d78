"""Peers on devices: letters that a server carries give the bits of the simulated network."""

from __future__ import annotations

import json

import pytest
import torch
from devices_at_hand import PostAtHand, parts, prepare_once

from tesserafl.core.errors import CheckpointError, ConfigError
from tesserafl.data import DataSettings
from tesserafl.engines.attendance import Undelivered
from tesserafl.engines.network import NetworkSettings
from tesserafl.engines.parcels import letter_of
from tesserafl.methods import DPSGD, FedAvg, FedRolex, MSfusion
from tesserafl.models import MLP
from tesserafl.run.deployed import Deployment, begin, serve_over
from tesserafl.run.experiment import EngineSettings, Experiment
from tesserafl.run.parts import assemble
from tesserafl.run.runner import start

ALL = range(4)


@pytest.fixture(autouse=True)
def _prepared_once(monkeypatch):
    prepare_once(monkeypatch)


def _experiment(exchange="lean", graph="complete", **changes):
    settings = {
        "data": DataSettings(num_clients=4, max_train=120, max_test=50),
        "model": MLP(hidden=(16, 16)),
        "method": MSfusion(ratio=(0.5,)),
        "engine": EngineSettings(batching="sequential"),
        "network": NetworkSettings(topology="peers", exchange=exchange, graph=graph),
        "rounds": 3,
        "clients_per_round": 4,
    }
    return Experiment(**(settings | changes))


def _served(tmp_path, experiment, post=None, **deployment):
    folder = tmp_path / "served"
    post = post or PostAtHand(residents=parts(tmp_path / "devices", ALL))
    begin(experiment, Deployment(devices=4, **deployment), folder)
    return serve_over(post, folder), post


def _kept(tmp_path, file):
    return sorted(tmp_path.glob(f"devices/*/model-*/{file}"))


@pytest.mark.parametrize("method", [FedAvg(), FedRolex(ratio=(0.5,)), MSfusion(ratio=(0.5,))])
@pytest.mark.parametrize("clients", [4, 3])
def test_copies_on_devices_have_the_bits_of_the_simulated_ones(tmp_path, method, clients):
    experiment = _experiment("all_gather", method=method, clients_per_round=clients)
    here = start(experiment, tmp_path / "here")
    served, _ = _served(tmp_path, experiment)
    assert served["state_sha256"] == here["state_sha256"]
    assert served["accuracy"] == here["accuracy"]
    assert len({peer["sha256"] for peer in served["peers"]}) == 1
    assert len(_kept(tmp_path, "model.safetensors")) == 4


@pytest.mark.parametrize("graph", ["complete", "ring"])
@pytest.mark.parametrize("clients", [4, 2])
def test_parts_on_devices_are_together_the_simulated_model(tmp_path, graph, clients):
    experiment = _experiment(graph=graph, clients_per_round=clients, rounds=4)
    here = start(experiment, tmp_path / "here")
    served, _ = _served(tmp_path, experiment)
    assert served["accuracy"] is None and served["state_sha256"] is None
    folders = [path.parent for path in _kept(tmp_path, "part.json")]
    assert len(folders) == 4
    found = assemble(folders, tmp_path / "whole")
    assert found["state_sha256"] == here["state_sha256"]
    with pytest.raises(CheckpointError, match="entries are in none of the parts"):
        assemble(folders[:1], tmp_path / "none")


def test_gossip_on_devices_has_the_copies_of_the_simulated_peers(tmp_path):
    experiment = _experiment("gossip", "ring", method=DPSGD())
    here = start(experiment, tmp_path / "here")
    served, _ = _served(tmp_path, experiment)
    assert served["accuracy_peers"] == here["accuracy_peers"]
    assert len({peer["sha256"] for peer in served["peers"]}) == 4
