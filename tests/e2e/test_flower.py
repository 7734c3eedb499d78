"""Runs over Flower with real processes, TLS and keys: the bits of `tessera run`."""

from __future__ import annotations

import importlib.util
import json
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from bytes_encoder import WORDS, write_encoder, write_texts
from commands_on_devices import site
from devices_at_hand import PostAtHand
from devices_at_hand import parts as at_hand
from pyarrow import parquet

from tesserafl.core.params import sha256
from tesserafl.engines.attendance import Undelivered
from tesserafl.engines.orders import Order, Work
from tesserafl.run import checkpoint as checkpoints
from tesserafl.run import proxy
from tesserafl.run.deployed import Deployment, begin, serve_over
from tesserafl.run.experiment import Experiment, from_json
from tesserafl.run.federate import network_of
from tesserafl.run.runner import start
from tesserafl.run.setup import prepare

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


def served(
    folder: Path,
    experiment: Experiment,
    devices: Sequence[Sequence[str]],
    *arguments: str,
    tokens: bool = False,
) -> dict[str, Any]:
    """Serve it to devices with a key or a token each, and these arguments; the summary."""
    names = [f"device-{number}" for number in range(len(devices))]
    with site(folder) as here:
        keys = here.keys([] if tokens else names)
        lines = [here.tell("token", str(keys), "--name", name) for name in names if tokens]
        here.serve(experiment, "--keys", str(keys), "--devices", str(len(devices)), *arguments)
        if tokens:
            here.wait_for(here.enrol_port)
        for number, name in enumerate(names):
            place = [str(keys / "devices" / name)]
            if tokens:
                place = [lines[number].strip(), "--name", name]
            here.begin(name, "join", *place, *devices[number], "--once", "--device", "cpu")
        summary = here.finish()
        for name in names:
            assert here.running[name].wait() == 0, here.said()
        failures = [event["failures"] for event in here.events("round")]
        assert not any(failures), failures
    return summary


def parts(number: int) -> list[list[str]]:
    """Arguments of devices that take a part of the experiment's data."""
    return [["--client", str(client)] for client in range(number)]


def same(found: dict[str, Any], wanted: dict[str, Any], *more: str) -> None:
    for key in (*ALIKE, *more):
        assert found[key] == wanted[key], key


def copies_of(folder: Path) -> list[str]:
    """Digests of the copies of all peers at the end of a run here."""
    checkpoint = checkpoints.latest(folder / "checkpoints")
    assert checkpoint is not None
    digests = [sha256(state.params) for state in checkpoint.states]
    return [digests[number] for number in checkpoint.federation["copy_of"]]


def test_devices_with_keys_give_the_bits_of_tessera_run(tmp_path: Path) -> None:
    experiment = digits(2)
    wanted = start(experiment, tmp_path / "here")
    rows = [json.loads(line) for line in (tmp_path / "here/events.jsonl").read_text().splitlines()]
    (first, *_) = [event for event in rows if event["kind"] == "round"]
    assert len({row["entries"] for row in first["clients"]}) == 2  # unequal parts, of two sizes
    same(served(tmp_path, experiment, parts(2), "--no-through-proxy"), wanted)


@pytest.mark.slow
@pytest.mark.skipif(proxy.program() is None, reason="nginx is not installed (nginx-light)")
def test_four_devices_through_nginx_give_the_bits_of_tessera_run(tmp_path: Path) -> None:
    experiment = digits(4, rounds=3)
    wanted = start(experiment, tmp_path / "here")
    same(served(tmp_path, experiment, parts(4), "--listen", "127.0.0.1"), wanted)


@pytest.mark.slow
@pytest.mark.parametrize("exchange", ["lean", "all_gather"])
def test_peers_whose_letters_the_server_carries(tmp_path: Path, exchange: str) -> None:
    """MSfusion: no server sums, and of lean peers nobody holds the model."""
    method = {"name": "msfusion", "ratio": [0.5]}
    network = {"topology": "peers", "exchange": exchange}
    experiment = digits(4, method=method, network=network, client_memory_mib=[])
    wanted = start(experiment, tmp_path / "here")
    found = served(tmp_path, experiment, parts(4), "--no-through-proxy")
    folders = [str(p.parent) for p in (tmp_path / "keys").glob("devices/*/state/model-*/*.json")]
    assert len(folders) == 4
    if exchange == "all_gather":
        assert found["state_sha256"] == wanted["state_sha256"]
        assert found["accuracy"] == wanted["accuracy"]
        return
    with site(tmp_path) as here:
        told = json.loads(here.tell("assemble", *folders, "--out", "whole", "--json"))
    assert told["state_sha256"] == wanted["state_sha256"]
    assert (tmp_path / "whole/model.safetensors").exists()


@pytest.mark.slow
@pytest.mark.parametrize("graph", ["ring", "erdos_renyi"])
def test_peers_that_gossip_by_letters_which_the_server_carries(tmp_path: Path, graph: str) -> None:
    """D-PSGD: every peer ends with a copy of its own, the one that it has in `tessera run`."""
    method = {"name": "dpsgd", "ratio": [1.0, 0.5]}
    network = {"topology": "peers", "exchange": "gossip", "graph": graph, "probability": 0.6}
    experiment = digits(4, method=method, network=network, client_memory_mib=[], rounds=3)
    links = network_of(prepare(experiment)).graph.edges
    assert 3 <= len(links) < 6  # neither all to all, nor in pieces
    wanted = start(experiment, tmp_path / "here")
    copies = copies_of(tmp_path / "here")
    assert len(set(copies)) == 4
    found = served(tmp_path, experiment, parts(4), "--no-through-proxy")
    assert [peer["sha256"] for peer in found["peers"]] == copies
    assert found["accuracy_peers"] == wanted["accuracy_peers"]
    assert found["coverage"] == wanted["coverage"] == 1.0
    # A letter to all neighbours goes up once.
    assert 0 < found["bytes_up"] < found["bytes_down"]


@pytest.mark.slow
def test_experts_that_stay_on_devices_are_measured_there(tmp_path: Path) -> None:
    """FedFMSL: an expert of its own stays on each device, and so do the examples of its test."""
    pytest.importorskip("peft")
    experiment = from_json(
        {
            "data": {
                "path": str(write_texts(tmp_path / "texts", 120)),
                "partition": "iid",
                "num_clients": 4,
                "sequence_length": 12,
                "test": 0.2,
                "validation": 0.2,
            },
            "model": {
                "name": "lora",
                "rank": 2,
                "config": str(write_encoder(tmp_path / "encoder", 2)),
            },
            "method": {"name": "fedfmsl", "ratio": [1.0], "start": 1, "step": 1, "patience": 2},
            "training": {"lr": 0.1, "batch_size": 8},
            "engine": {"batching": "sequential"},
            "rounds": 3,
            "clients_per_round": 4,
        }
    )
    wanted = start(experiment, tmp_path / "here")
    assert len(wanted["accuracy_personal"]) == 4
    found = served(tmp_path, experiment, parts(4), "--no-through-proxy")
    same(found, wanted, "accuracy_personal", "own_share")


@pytest.mark.slow
def test_devices_with_data_of_their_own_join_by_token(tmp_path: Path) -> None:
    """The server has data for its tests alone; no device has all of its classes."""
    texts = write_texts(tmp_path / "server", 40)
    rows = [(f"{WORDS[i % 2]} {i}", i % 2) for i in range(60)]
    devices = []
    for number, own in enumerate(([r for r in rows if r[1] == 0], [r for r in rows if r[1]])):
        folder = tmp_path / f"own-{number}"
        folder.mkdir()
        table = pa.table({"text": [text for text, _ in own], "label": [label for _, label in own]})
        parquet.write_table(table, folder / "train.parquet")
        devices.append(["--data", str(folder)])
    pytest.importorskip("peft")
    experiment = from_json(
        {
            "data": {"path": str(texts), "num_clients": 2, "sequence_length": 12},
            "model": {
                "name": "lora",
                "rank": 2,
                "config": str(write_encoder(tmp_path / "encoder", 1)),
            },
            "method": {"name": "fedit"},
            "training": {"lr": 0.1, "batch_size": 8},
            "rounds": 2,
            "clients_per_round": 2,
        }
    )
    found = served(tmp_path, experiment, devices, "--own-data", "--no-through-proxy", tokens=True)
    assert found["rounds"] == 2 and found["bytes_up"] > 0
    kept = json.loads((tmp_path / "run" / "devices.json").read_text())
    assert [kept[str(n)]["name"] for n in range(2)] == ["device-0", "device-1"]
    assert [kept[str(n)]["num_examples"] for n in range(2)] == [30, 30]
    starts = (tmp_path / "run" / "events.jsonl").read_text().splitlines()[0]
    assert [c["num_examples"] for c in json.loads(starts)["clients"]] == [30, 30]


def with_the_same_participants(
    folder: Path, experiment: Experiment, rounds: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """The summary of a run on devices in this process in which who failed in a round does again,
    and nobody is disturbed."""
    missing = {(e["round"] - 1, f["client"]) for e in rounds for f in e["failures"]}

    def lost(node: int, order: Order) -> Undelivered | None:
        if not isinstance(order, Work):
            return None
        there = (order.letter["header"]["round"], order.client) not in missing
        return None if there else Undelivered("offline", "as it was")

    clients = range(experiment.data.num_clients)
    post = PostAtHand(residents=at_hand(folder / "devices", clients), loss=lost)
    begin(experiment, Deployment(devices=len(clients)), folder / "run")
    return serve_over(post, folder / "run")


@pytest.mark.slow
def test_processes_are_killed_and_the_run_completes(tmp_path: Path) -> None:
    """Of the devices 30 % in every round, and the server twice; all are started again. Who was
    missed in a round is all that changes the bits."""
    draw, rounds = random.Random(1), 6
    experiment = replace(digits(4, rounds=rounds), checkpoint_every=1)
    with site(tmp_path) as here:
        names = [f"device-{client}" for client in range(4)]
        keys = here.keys(names)
        here.serve(
            experiment,
            *("--keys", str(keys), "--devices", "4", "--no-through-proxy"),
            *("--task-seconds", "400"),
        )

        def join(client: int) -> None:
            bundle = str(keys / "devices" / names[client])
            here.begin(names[client], "join", bundle, "--client", str(client), "--once")

        for client in range(4):
            join(client)
        done, cuts, killed = 0, [2, 4], 0
        while not (here.run / "summary.json").exists():
            for _ in here.while_it_runs():
                now = len(here.events("round"))
                if now <= done:
                    continue
                done = now
                for client in range(4):
                    if done < rounds and draw.random() < 0.3:
                        here.kill(names[client])
                        killed += 1
                        join(client)
                if cuts and done >= cuts[0]:
                    cuts.pop(0)
                    here.kill("server")
                    here.begin("server", "resume", str(here.run))
            assert here.running["server"].poll() == 0, here.said()
        summary = here.summary()
        rows = [dict(event) for event in here.events("round")]
    failures = [failure for event in rows for failure in event["failures"]]
    again = with_the_same_participants(tmp_path / "again", experiment, rows)
    same(again, summary)
    assert summary["rounds"] == rounds and summary["coverage"] == 1.0
    assert not cuts and killed >= 3 and failures
    assert {failure["reason"] for failure in failures} <= {"offline", "crashed", "expired"}
