"""Runs of peers on devices in this process, for tests."""

from __future__ import annotations

import json

from devices_at_hand import PostAtHand, parts

from tesserafl.core.params import sha256
from tesserafl.data import DataSettings
from tesserafl.engines.network import NetworkSettings
from tesserafl.methods import MSfusion
from tesserafl.models import MLP
from tesserafl.run import checkpoint as checkpoints
from tesserafl.run.deployed import Deployment, begin, serve_over
from tesserafl.run.experiment import EngineSettings, Experiment
from tesserafl.run.parts import assemble

ALL = range(4)


def experiment_of(exchange="lean", graph="complete", **changes):
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


def served_to(tmp_path, experiment, post=None, **deployment):
    folder = tmp_path / "served"
    post = post or PostAtHand(residents=parts(tmp_path / "devices", ALL))
    begin(experiment, Deployment(devices=4, **deployment), folder)
    return serve_over(post, folder), post


def kept_by_peers(tmp_path, file):
    return sorted(tmp_path.glob(f"devices/*/model-*/{file}"))


def events_of(tmp_path, kind="round"):
    lines = (tmp_path / "served/events.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["kind"] == kind]


def copies_of(folder):
    """Digests of the copies of all peers at the end of a simulated run."""
    checkpoint = checkpoints.latest(folder / "checkpoints")
    digests = [sha256(state.params) for state in checkpoint.states]
    return [digests[number] for number in checkpoint.federation["copy_of"]]


def assert_same(tmp_path, served, here):
    """The bits of the simulated run: of equal copies, or of all parts together."""
    if served["state_sha256"] is not None:
        assert served["state_sha256"] == here["state_sha256"]
        return
    folders = [path.parent for path in kept_by_peers(tmp_path, "part.json")]
    assert assemble(folders, tmp_path / "whole")["state_sha256"] == here["state_sha256"]
