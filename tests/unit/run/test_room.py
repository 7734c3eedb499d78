"""Devices with data of their own and too little memory: the run goes on without them."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pyarrow as pa
import pytest
from devices_at_hand import PostAtHand, prepare_once
from pyarrow import parquet

from tesserafl.core.errors import ConfigError
from tesserafl.data import DataSettings
from tesserafl.methods import FedBRB
from tesserafl.models import MLP
from tesserafl.run.deployed import Deployment, begin, serve_over
from tesserafl.run.experiment import EngineSettings, Experiment
from tesserafl.run.holding import Local
from tesserafl.run.plan import make_plan
from tesserafl.run.resident import Resident
from tesserafl.run.setup import prepare

MIB = 1 << 20


@pytest.fixture(autouse=True)
def _prepared_once(monkeypatch: pytest.MonkeyPatch) -> None:
    prepare_once(monkeypatch)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "images"
    image = [[[40 * label for _ in range(6)] for _ in range(6)] for label in range(3)]
    rows = {
        "image": [image[number % 3] for number in range(24)],
        "label": [("ant", "bee", "cat")[number % 3] for number in range(24)],
    }
    folder.mkdir()
    parquet.write_table(pa.table(rows), folder / "train.parquet")
    return folder


def experiment(data: Path, devices: int = 4) -> Experiment:
    return Experiment(
        data=DataSettings(path=data, num_clients=devices, partition="iid"),
        model=MLP(hidden=(64, 64)),
        method=FedBRB(ratio=(0.25, 0.5)),
        engine=EngineSettings(batching="sequential"),
        rounds=2,
        clients_per_round=devices,
    )


def served(folder: Path, data: Path, memories: dict[str, float | None]) -> tuple[str, PostAtHand]:
    """Serve to devices of these names; the model's digest. The clock stops after some looks."""
    residents = {
        number: Resident(
            name=name,
            folder=folder / name,
            local=Local(data=data, device="cpu"),
            memory_mib=memory,
        )
        for number, (name, memory) in enumerate(memories.items())
    }
    post = PostAtHand(residents=residents, at_once=9)
    deployment = Deployment(devices=len(memories), own_data=True, wait_seconds=1e9)
    begin(experiment(data, len(memories)), deployment, folder / "run")
    return str(serve_over(post, folder / "run")["state_sha256"]), post


def test_who_lacks_memory_hears_it_and_the_others_train(
    tmp_path: Path, data: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Numbers go by names, and odd ones are dealt more than b has; d has room for nothing."""
    setup = prepare(experiment(data))
    small, large = (kind.peak_bytes / MIB for kind in make_plan(setup).classes)
    assert small < large
    middle = (small + large) / 2
    with caplog.at_level(logging.WARNING):
        memories = {"d": small / 2, "a": middle, "b": middle, "c": None}
        found, post = served(tmp_path / "four", data, memories)
    kept = json.loads((tmp_path / "four/run/devices.json").read_text())
    assert {number: profile["name"] for number, profile in kept.items()} == {"0": "a", "1": "c"}
    heard = [text for text in caplog.messages if "no seat for this device: too little" in text]
    limits = {f"has {limit:.2f} MiB" for limit in (small / 2, middle)}
    assert len(heard) == len(limits) == 2
    assert all(any(limit in text for text in heard) for limit in limits), heard
    told = [json.loads(x) for x in (tmp_path / "four/run/guests.jsonl").read_text().splitlines()]
    assert {each["device"] for each in told if "too little memory" in each["text"]} == {"b", "d"}
    for resident in post.residents.values():  # the end of the run is for all of them
        assert resident.over
    alone, _ = served(tmp_path / "two", data, {"a": middle, "c": None})
    assert found == alone


def test_a_run_without_anybody_who_can_train_says_why(tmp_path: Path, data: Path) -> None:
    with pytest.raises(ConfigError, match="can take part; 'a': too little memory: client 1 has"):
        served(tmp_path, data, {"a": 0.001, "b": 0.001})


def test_a_device_that_was_turned_away_waits_for_the_next_run(tmp_path: Path, data: Path) -> None:
    _, post = served(tmp_path / "one", data, {"a": None, "b": 0.001})
    (turned,) = [r for r in post.residents.values() if r.name == "b"]
    kinds = [kind for node, kind, _ in post.log if node == 1]
    assert kinds == ["hello", "bye", "bye"]
    assert not any(turned.folder.iterdir())  # it keeps nothing of the run
