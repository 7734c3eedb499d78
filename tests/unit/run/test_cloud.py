"""Trees over edges elsewhere: the bits of `tessera run`, whatever is lost on the way."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from devices_at_hand import prepare_once
from edges_at_hand import TreeAtHand, at_once, events_of, simulated

from tesserafl.core.errors import ConfigError
from tesserafl.data import DataSettings
from tesserafl.engines.attendance import Undelivered
from tesserafl.methods import EqualFinish, FedAvg, FedBRB, FedNova, HierFAVG, Tomtit
from tesserafl.models import MLP
from tesserafl.run.deployed import Deployment, begin, serve_over
from tesserafl.run.experiment import EngineSettings, Experiment
from tesserafl.run.live import Waiting

ALIKE = ("state_sha256", "accuracy", "loss", "bytes_up", "bytes_down", "coverage", "flops")
ALIKE += ("params_largest_client", "params_trained", "rounds")


@pytest.fixture(autouse=True)
def _prepared_once(monkeypatch):
    prepare_once(monkeypatch)


def _experiment(**changes):
    settings = {
        "data": DataSettings(num_clients=4, max_train=120, max_test=50),
        "model": MLP(hidden=(16, 16)),
        "method": HierFAVG(),
        "engine": EngineSettings(batching="sequential"),
        "rounds": 3,
        "clients_per_round": 4,
    }
    return Experiment(**(settings | changes))


@pytest.mark.parametrize(
    "method",
    [
        HierFAVG(),
        HierFAVG(local_steps=2, edge_rounds=3),
        HierFAVG(ratio=(0.5, 1.0), local_steps=2, edge_rounds=2),
        HierFAVG(local_steps=2, edge_rounds=2, normalised=True),
        FedBRB(ratio=(0.25, 0.5)),
        FedNova(),
        FedAvg(weighting="uniform"),
    ],
    ids=["once", "several", "unequal", "normalised", "fedbrb", "fednova", "fedavg"],
)
def test_a_tree_elsewhere_has_the_bits_of_this_process(tmp_path, method):
    experiment = _experiment(method=method)
    tree = TreeAtHand(folder=tmp_path)
    served = serve_over(tree.post, tree.begin(experiment), watch=at_once)
    here = simulated(experiment, 2, tmp_path / "here")
    assert {key: served[key] for key in ALIKE} == {key: here[key] for key in ALIKE}
    found, wanted = events_of(tmp_path / "served"), events_of(tmp_path / "here")
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours["bytes_backhaul"] == theirs["bytes_backhaul"]
        assert ours.get("periods") == theirs.get("periods")
        told = ("client", "edge", "examples", "steps", "loss", "flops", "bytes_up", "bytes_down")
        rows = [[{k: row[k] for k in told} for row in e["clients"]] for e in (ours, theirs)]
        assert rows[0] == rows[1]
    assert "joules" not in found[0]["clients"][0]
