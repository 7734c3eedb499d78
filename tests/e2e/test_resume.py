"""A run that is killed at any moment and resumed ends in the bits of the undisturbed one."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tesserafl.core.errors import CheckpointError
from tesserafl.run.events import read_events
from tesserafl.run.experiment import Experiment, from_json
from tesserafl.run.runner import resume, start

SMALL = {
    "data": {"num_clients": 8},
    "model": {"name": "mlp", "hidden": [16, 16], "norm": "layer"},
    "rounds": 7,
    "clients_per_round": 4,
    "checkpoint_every": 2,
    "dropout": 0.2,
}


def small(**changes: object) -> Experiment:
    return from_json({**SMALL, **changes})


def without_time(summary: dict[str, object]) -> dict[str, object]:
    return {key: value for key, value in summary.items() if key not in ("seconds", "run")}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, object], list[dict]]:
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    summary = start(small(), folder)
    return summary, read_events(folder / "events.jsonl")


class Killed(Exception):
    """Stands for a power cut in the middle of a run."""


@pytest.mark.parametrize("events_before_the_cut", [1, 3, 6, 9, 11])
def test_resume_after_a_cut_between_any_two_events(tmp_path, undisturbed, events_before_the_cut):
    folder, seen = tmp_path / "run", []

    def cut(event: object) -> None:
        seen.append(event)
        if len(seen) == events_before_the_cut:
            raise Killed

    with pytest.raises(Killed):
        start(small(), folder, cut)
    with (folder / "events.jsonl").open("ab") as file:
        file.write(b'{"kind": "rou')  # and a line that was never finished
    summary = resume(folder)
    assert without_time(summary) == without_time(undisturbed[0])
    kinds = [event["kind"] for event in read_events(folder / "events.jsonl")]
    assert kinds == [event["kind"] for event in undisturbed[1]]


def test_kill_9_of_the_process_and_resume(tmp_path):
    settings = {**SMALL, "rounds": 40, "checkpoint_every": 1}
    folder, config = tmp_path / "run", tmp_path / "config.json"
    config.write_text(json.dumps(settings))
    command = [sys.executable, "-m", "tesserafl.cli"]
    process = subprocess.Popen(
        [*command, "run", str(config), "--out", str(folder)],
        stdout=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    while process.poll() is None and not list(folder.glob("checkpoints/round-*.json")):
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it ended before it could be killed"
    assert not (folder / "summary.json").exists()
    out = subprocess.run(
        [*command, "resume", str(folder), "--json"], capture_output=True, text=True, check=True
    )
    resumed = json.loads(out.stdout.splitlines()[-1])
    whole = start(from_json(settings), tmp_path / "whole")
    assert without_time(resumed) == without_time(whole)


def test_a_finished_run_resumes_to_its_summary(tmp_path):
    folder = tmp_path / "run"
    summary = start(small(rounds=2), folder)
    assert resume(folder) == summary


def test_a_torn_or_changed_checkpoint_is_named_and_nothing_is_lost(tmp_path):
    folder, seen = tmp_path / "run", []

    def cut(event: object) -> None:
        seen.append(event)
        if len(seen) == 9:
            raise Killed

    with pytest.raises(Killed):
        start(small(), folder, cut)
    tensors = sorted((folder / "checkpoints").glob("*.safetensors"))
    assert len(tensors) == 2
    data = bytearray(tensors[-1].read_bytes())
    data[-1] ^= 1
    tensors[-1].write_bytes(data)
    with pytest.raises(CheckpointError, match=tensors[-1].name):
        resume(folder)
    # The way out that the message gives leads to the same bits.
    tensors[-1].unlink()
    tensors[-1].with_suffix(".json").unlink()
    assert resume(folder)["rounds"] == 7


def test_a_folder_in_use_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="not empty"):
        start(small(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_full_disk_is_named_and_the_old_checkpoint_stays(tmp_path, monkeypatch):
    folder, real = tmp_path / "run", os.replace

    def full(source: str, target: str) -> None:
        if "round-000004.safetensors" in str(target):
            raise OSError(28, "No space left on device")
        real(source, target)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(CheckpointError, match="No space left on device"):
        start(small(), folder)
    monkeypatch.undo()
    assert [path.name for path in sorted((folder / "checkpoints").iterdir())] == [
        "round-000002.json",
        "round-000002.safetensors",
    ]
    assert resume(folder)["rounds"] == 7


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"is .* a run folder"):
        resume(tmp_path / "nothing")
