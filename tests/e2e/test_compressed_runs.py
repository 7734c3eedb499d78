"""Runs whose clients send fewer bytes: the same bits everywhere, and the bytes that are counted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tesserafl.core.coding import num_kept
from tesserafl.core.errors import ConfigError
from tesserafl.core.params import sha256
from tesserafl.run.begin import first_federation
from tesserafl.run.events import read_events
from tesserafl.run.experiment import Experiment, from_json
from tesserafl.run.plan import described, make_plan
from tesserafl.run.runner import resume, start
from tesserafl.run.setup import prepare

BASE = {
    "data": {"num_clients": 6},
    "model": {"name": "mlp", "hidden": [16, 16], "norm": "layer"},
    "method": {"name": "fedbrb", "ratio": [0.5, 0.25]},
    "rounds": 4,
    "clients_per_round": 3,
    "checkpoint_every": 1,
    "evaluate_every": 4,
}


def small(deltas: str, workers: int = 1, **changes: object) -> Experiment:
    compression = {"deltas": deltas, "share": 0.1}
    engine = {"batching": "sequential", "workers": workers}
    return from_json({**BASE, "engine": engine, "compression": compression, **changes})


class Killed(Exception):
    """Stands for a power cut."""


def killed_after(rounds: int) -> Callable[[dict[str, object]], None]:
    seen: list[object] = []

    def listener(event: dict[str, object]) -> None:
        seen.append(event["kind"])
        if seen.count("round") == rounds:
            raise Killed

    return listener


@pytest.mark.slow
@pytest.mark.parametrize("deltas", ["int8", pytest.param("topk", marks=pytest.mark.slow)])
def test_workers_and_a_resume_change_no_bit(tmp_path: Path, deltas: str) -> None:
    one = start(small(deltas), tmp_path / "one")
    two = start(small(deltas, workers=2), tmp_path / "two")
    assert one["state_sha256"] == two["state_sha256"]
    assert one["bytes_up"] == two["bytes_up"]
    with pytest.raises(Killed):
        start(small(deltas), tmp_path / "cut", killed_after(2))
    again = resume(tmp_path / "cut")
    assert again["state_sha256"] == one["state_sha256"]
    assert again["bytes_up"] == one["bytes_up"]
    # What is lost and sent later counts: without it another model comes out.
    alone = {"deltas": deltas, "share": 0.1, "error_feedback": False}
    other = start(small(deltas, compression=alone), tmp_path / "alone")
    assert other["state_sha256"] != one["state_sha256"]


def test_bytes_up_are_those_that_are_sent(tmp_path: Path) -> None:
    # 64-16-16-10 with two layer norms, whole: by hand, matrices [16, 64], [16, 16], [10, 16].
    matrices, vectors = ((16, 64), (16, 16), (10, 16)), (16, 16, 16, 16, 16, 16, 10)
    entries = sum(rows * columns for rows, columns in matrices) + sum(vectors)
    sizes = [rows * columns for rows, columns in matrices] + list(vectors)
    expected = {
        "none": 4 * entries,
        "bfloat16": 2 * entries,
        "int8": entries + 4 * (16 + 16 + 10 + len(vectors)),
        "topk": sum(8 * num_kept(size, 0.1) for size in sizes),
    }
    for deltas, bytes_up in expected.items():
        experiment = small(deltas, method={"name": "fedavg"}, rounds=1)
        summary = start(experiment, tmp_path / deltas)
        assert summary["bytes_up"] == 3 * bytes_up, deltas
        assert summary["bytes_down"] == 3 * 4 * entries
        (round,) = [
            e for e in read_events(tmp_path / deltas / "events.jsonl") if e["kind"] == "round"
        ]
        assert [row["bytes_up"] for row in round["clients"]] == [bytes_up] * 3
        plan = make_plan(prepare(experiment))
        assert [kind.bytes_up for kind in plan.classes] == [bytes_up]
        table = next(part for part in described(plan) if not isinstance(part, str))
        headers = [str(column.header) for column in table.columns]
        assert ("MB up" in headers) == (deltas != "none")


@pytest.mark.parametrize("topology", ["star", "tree"])
def test_what_goes_down_is_rounded_and_the_servers_model_is_not(
    tmp_path: Path, topology: str
) -> None:
    """Of clients that change nothing the server's model stays as it is, to the bit."""
    changes: dict[str, object] = {"method": {"name": "fedavg"}, "rounds": 2}
    if topology == "tree":
        fleet = {"profiles": ["laptop"], "edges": 2}
        changes |= {"method": {"name": "hierfavg"}, "fleet": fleet}
    half = {"params": "bfloat16"}
    still = small("none", compression=half, training={"lr": 1e-30}, **changes)
    first = first_federation(prepare(still)).assembled().params
    summary = start(still, tmp_path / "still")
    assert summary["state_sha256"] == sha256(first)
    assert any(not torch.equal(t, t.bfloat16().float()) for t in first.values())
    whole = start(small("none", **changes), tmp_path / "whole")
    rounded = start(small("none", compression=half, **changes), tmp_path / "rounded")
    assert rounded["bytes_down"] * 2 == whole["bytes_down"] == summary["bytes_down"] * 2
    assert rounded["bytes_up"] == whole["bytes_up"]
    assert rounded["state_sha256"] != whole["state_sha256"]
    (planned,) = make_plan(prepare(still)).classes
    assert planned.bytes_down * 6 == rounded["bytes_down"]


def test_devices_send_for_as_long_as_their_bytes_take(tmp_path: Path) -> None:
    fleet = {"profiles": ["raspberry-pi-4"]}
    times = {}
    for deltas in ("none", "int8"):
        experiment = small(deltas, method={"name": "fedavg"}, rounds=1, fleet=fleet)
        start(experiment, tmp_path / deltas)
        events = read_events(tmp_path / deltas / "events.jsonl")
        (round,) = [event for event in events if event["kind"] == "round"]
        (upload,) = [p for p in round["clients"][0]["pieces"] if p[0] == "upload"]
        times[deltas] = upload[2] - upload[1]
    assert times["int8"] < times["none"]


def test_what_cannot_be_compressed_does_not_start(tmp_path: Path) -> None:
    experiment = small("int8", method={"name": "local"})
    with pytest.raises(ConfigError, match="sends none"):
        start(experiment, tmp_path / "run")
    with pytest.raises(ConfigError, match="sends none"):
        make_plan(prepare(experiment))
