"""A tree of real processes over Flower: cloud, edges and devices; the bits of `tessera run`."""

from __future__ import annotations

import importlib.util
import signal
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from commands_on_devices import Site, site
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


EDGES = {"edge-0": (0, 1), "edge-1": (2, 3)}
"""Edge -> its clients."""


def digits(method: dict[str, object], rounds: int) -> Experiment:
    """Digits on 2 edges x 2 devices."""
    return from_json(
        {
            "data": {"num_clients": 4, "max_train": 240, "max_test": 60},
            "model": {"name": "mlp", "hidden": [32, 32]},
            "method": method,
            "engine": {"batching": "sequential"},
            "rounds": rounds,
            "clients_per_round": 4,
        }
    )


def certs(here: Site, folder: str, port: int, names: Sequence[str]) -> str:
    """Keys of a server and of who may join it; the folder."""
    place = ["--server", "127.0.0.1", "--port", str(port), "--enrol-port", str(free_port())]
    here.tell("certs", folder, *place, "--devices", ",".join(names))
    return folder


def test_a_tree_of_processes_gives_the_bits_of_tessera_run(tmp_path: Path) -> None:
    experiment = digits({"name": "hierfavg", "local_steps": 2, "edge_rounds": 2}, rounds=3)
    with site(tmp_path) as here:
        here.serve(experiment, "--port", str(here.port), "--devices", "4", "--edges", "2")
        joined(here, "--once")
        compare(here, experiment, tmp_path / "here")


def joined(here: Site, *options: str) -> None:
    """Begin the server's edges and their devices, without keys."""
    for edge, clients in EDGES.items():
        port = str(free_port())
        here.begin(edge, "edge", f"127.0.0.1:{here.port}", "--name", edge, "--port", port, *options)
        for client in clients:
            name = f"device-{client}"
            taken = ("--client", str(client), "--device", "cpu", *options)
            here.begin(name, "join", f"127.0.0.1:{port}", "--name", name, *taken)


def test_models_of_their_own_stay_on_devices_below_edges_and_are_measured_there(
    tmp_path: Path,
) -> None:
    experiment = digits({"name": "local"}, rounds=2)
    experiment = replace(experiment, data=replace(experiment.data, test=0.2))
    with site(tmp_path) as here:
        here.serve(experiment, "--port", str(here.port), "--devices", "4", "--edges", "2")
        joined(here, "--once")
        compare(here, experiment, tmp_path / "here", "accuracy_personal")
        assert len(here.summary()["accuracy_personal"]) == 4


def test_a_device_below_an_edge_that_stops_for_two_rounds_counts_when_it_goes_on(
    tmp_path: Path,
) -> None:
    """An edge needs one answer of two; a device stands still after round 2 and goes on after 4."""
    experiment = digits({"name": "hierfavg", "local_steps": 2}, rounds=8)
    with site(tmp_path) as here:
        waits = ("--waiting.quorum", "0.5", "--waiting.round-seconds", "300")
        here.serve(experiment, "--port", str(here.port), "--devices", "4", "--edges", "2", *waits)
        joined(here)
        signals = {2: signal.SIGSTOP, 4: signal.SIGCONT}
        for _ in here.while_it_runs():
            done = len(here.events("round"))
            for round in [round for round in signals if done >= round]:
                here.running["device-3"].send_signal(signals.pop(round))
        found, rounds = here.finish(), here.events("round")
    assert found["rounds"] == 8 and not signals
    assert not any(event["failures"] for event in rounds)
    late = [row["staleness"] for e in rounds for row in e["clients"] if row["client"] == 3]
    assert max(late) >= 1, late
    assert {row["edge"] for row in rounds[-1]["clients"]} == set(EDGES)


def test_tomtits_tree_with_keys_on_both_tiers(tmp_path: Path) -> None:
    """Its periods follow from measured time: `tessera run` is given those of the served run."""
    experiment = digits({"name": "tomtit"}, rounds=2)
    with site(tmp_path) as here:
        keys, direct = certs(here, "keys", here.port, list(EDGES)), "--no-through-proxy"
        here.serve(experiment, "--keys", keys, direct, "--devices", "4", "--edges", "2")
        for edge, clients in EDGES.items():
            names = {client: f"device-{client}" for client in clients}
            own = certs(here, f"{edge}-keys", free_port(), list(names.values()))
            here.begin(edge, "edge", f"{keys}/devices/{edge}", "--keys", own, direct, "--once")
            for client, name in names.items():
                taken = ("--client", str(client), "--device", "cpu", "--once")
                here.begin(name, "join", f"{own}/devices/{name}", *taken)
        compare(here, experiment, tmp_path / "here")


def compare(here: Site, experiment: Experiment, folder: Path, *more: str) -> None:
    """Wait for the run's end; it has the bits of the same tree in virtual time."""
    found = here.finish()
    for name, process in here.running.items():
        assert process.wait(60) == 0, (name, here.said())
    rounds = events_of(here.run)
    assert not any(event["failures"] for event in rounds), rounds
    assert {row["edge"] for row in rounds[0]["clients"]} == set(EDGES)
    scheduled = here.run if "periods" in rounds[0] else None
    wanted = simulated(experiment, 2, folder, scheduled)
    for key in ("state_sha256", "accuracy", "loss", "bytes_up", "bytes_down", "coverage", *more):
        assert found[key] == wanted[key], key


def test_an_edge_and_the_cloud_are_killed_and_the_run_completes(tmp_path: Path) -> None:
    """By -9, each once; the edge's devices are named as failed until it is there again."""
    experiment = digits({"name": "hierfavg", "local_steps": 2}, rounds=8)
    with site(tmp_path) as here:
        here.serve(experiment, "--port", str(here.port), "--devices", "4", "--edges", "2")
        ports = {edge: str(free_port()) for edge in EDGES}

        def begin(edge: str) -> None:
            place = f"127.0.0.1:{here.port}"
            here.begin(edge, "edge", place, "--name", edge, "--port", ports[edge])

        for edge, clients in EDGES.items():
            begin(edge)
            for client in clients:
                name = f"device-{client}"
                taken = ("--client", str(client), "--device", "cpu")
                here.begin(name, "join", f"127.0.0.1:{ports[edge]}", "--name", name, *taken)
        cuts = {"edge-1": 2, "server": 4}
        while not (here.run / "summary.json").exists():
            for _ in here.while_it_runs():
                done = len(here.events("round"))
                for name in [name for name, round in cuts.items() if done >= round]:
                    del cuts[name]
                    here.kill(name)
                    if name == "server":
                        here.begin("server", "resume", str(here.run))
                    else:
                        begin(name)
            assert here.running["server"].poll() == 0, here.said()
        assert here.finish()["rounds"] == 8 and not cuts
        failures = [f for event in here.events("round") for f in event["failures"]]
        last = here.events("round")[-1]
    assert failures and {f["edge"] for f in failures} == {"edge-1"}, failures
    assert {f["reason"] for f in failures} <= {"offline", "crashed", "expired"}, failures
    assert {row["client"] for row in last["clients"]} >= {0, 1}
