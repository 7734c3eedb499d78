"""Runs over Flower with real processes, TLS and keys: the bits of `tessera run`."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
from commands_on_devices import site

from tesserafl.run import proxy
from tesserafl.run.experiment import Experiment, from_json
from tesserafl.run.runner import start

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("flwr") is None,
        reason="Flower is not installed: pip install 'tesserafl[flower]'",
    ),
    # peft reads an attribute that transformers has renamed.
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
]

ALIKE = ("state_sha256", "accuracy", "loss", "bytes_up", "bytes_down", "coverage")
"""What the summaries of a run here and of one on devices have in common."""


def digits(devices: int, **changes: object) -> Experiment:
    """FedBRB on devices of which every second has room for the smallest sub-model alone."""
    settings = {
        "data": {"num_clients": devices, "max_train": 60 * devices, "max_test": 60},
        "model": {"name": "mlp", "hidden": [32, 32]},
        "method": {"name": "fedbrb", "ratio": [0.25, 0.5]},
        "client_memory_mib": [0.16, 0.04],
        "engine": {"batching": "sequential"},
        "rounds": 2,
        "clients_per_round": devices,
    }
    return from_json({**settings, **changes})


def served(folder: Path, experiment: Experiment, devices: int, *arguments: str) -> dict:
    """Serve it to so many devices, each with a key; the summary."""
    names = [f"device-{client}" for client in range(devices)]
    with site(folder) as here:
        keys = here.keys(names)
        here.serve(experiment, "--keys", str(keys), "--devices", str(devices), *arguments)
        for client, name in enumerate(names):
            bundle = str(keys / "devices" / name)
            here.begin(name, "join", bundle, "--client", str(client), "--once", "--device", "cpu")
        summary = here.finish()
        for name in names:
            assert here.running[name].wait() == 0, here.said()
        failures = [event["failures"] for event in here.events("round")]
        assert not any(failures), failures
    return summary


def same(found: dict, wanted: dict, *more: str) -> None:
    for key in (*ALIKE, *more):
        assert found[key] == wanted[key], key


def test_devices_with_keys_give_the_bits_of_tessera_run(tmp_path: Path) -> None:
    experiment = digits(2)
    wanted = start(experiment, tmp_path / "here")
    rows = [json.loads(line) for line in (tmp_path / "here/events.jsonl").read_text().splitlines()]
    (first, *_) = [event for event in rows if event["kind"] == "round"]
    assert len({row["entries"] for row in first["clients"]}) == 2  # unequal parts, of two sizes
    same(served(tmp_path, experiment, 2, "--no-through-proxy"), wanted)


@pytest.mark.slow
@pytest.mark.skipif(proxy.program() is None, reason="nginx is not installed (nginx-light)")
def test_four_devices_through_nginx_give_the_bits_of_tessera_run(tmp_path: Path) -> None:
    experiment = digits(4, rounds=3)
    wanted = start(experiment, tmp_path / "here")
    same(served(tmp_path, experiment, 4, "--listen", "127.0.0.1"), wanted)
