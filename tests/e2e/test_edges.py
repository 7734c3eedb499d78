"""A tree of real processes over Flower: cloud, edges and devices; the bits of `tessera run`."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from commands_on_devices import site
from edges_at_hand import events_of, simulated
from flower_processes import free_port

from tesserafl.run.experiment import Experiment, from_json

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("flwr") is None,
        reason="Flower is not installed: pip install 'tesserafl[flower]'",
    ),
]


def digits(method: dict[str, object]) -> Experiment:
    """Digits on 2 edges x 2 devices."""
    return from_json(
        {
            "data": {"num_clients": 4, "max_train": 240, "max_test": 60},
            "model": {"name": "mlp", "hidden": [32, 32]},
            "method": method,
            "engine": {"batching": "sequential"},
            "rounds": 3,
            "clients_per_round": 4,
        }
    )


@pytest.mark.parametrize(
    "method",
    [{"name": "hierfavg", "local_steps": 2, "edge_rounds": 2}, {"name": "tomtit"}],
    ids=["hierfavg", "tomtit"],
)
def test_a_tree_of_processes_gives_the_bits_of_tessera_run(
    tmp_path: Path, method: dict[str, object]
) -> None:
    experiment = digits(method)
    with site(tmp_path) as here:
        here.serve(experiment, "--port", str(here.port), "--devices", "4", "--edges", "2")
        devices = []
        for number in range(2):
            port, edge = str(free_port()), f"edge-{number}"
            place = f"127.0.0.1:{here.port}"
            here.begin(edge, "edge", place, "--name", edge, "--port", port, "--once")
            for client in (2 * number, 2 * number + 1):
                name = f"device-{client}"
                taken = ("--client", str(client), "--device", "cpu", "--once")
                here.begin(name, "join", f"127.0.0.1:{port}", "--name", name, *taken)
                devices.append(name)
        found = here.finish()
        for name in (*devices, "edge-0", "edge-1"):
            assert here.running[name].wait(60) == 0, here.said()
    rounds = events_of(here.run)
    assert not any(event["failures"] for event in rounds), rounds
    wanted = simulated(experiment, 2, tmp_path / "here", here.run)
    for key in ("state_sha256", "accuracy", "loss", "bytes_up", "bytes_down", "coverage"):
        assert found[key] == wanted[key], key
