"""The embedded engine: workers, failures and drop-outs do not change what is computed."""

import contextlib
import sys
from dataclasses import replace

import pytest
import torch

from tesserafl.core.errors import CapacityError, TesseraError, UpdateError
from tesserafl.core.messages import Task
from tesserafl.engines.local import InProcess
from tesserafl.engines.pool import WorkerPool
from tesserafl.engines.processes import Processes
from tesserafl.engines.seam import Done
from tesserafl.run.events import read_events
from tesserafl.run.experiment import Experiment, from_json
from tesserafl.run.runner import start
from tesserafl.run.setup import Setup, make_engine, prepare


def small(**changes: object) -> Experiment:
    base = {
        "data": {"num_clients": 8},
        "model": {"name": "mlp", "hidden": [16, 16], "norm": "layer"},
        "method": {"name": "fedbrb", "ratio": [0.5, 0.25]},
        "rounds": 3,
        "clients_per_round": 4,
    }
    return from_json({**base, **changes})


@pytest.mark.parametrize(
    ("method", "batching"),
    [
        ("fedbrb", "sequential"),
        *[
            pytest.param(method, batching, marks=pytest.mark.slow)
            for method, batching in [
                ("fedbrb", "vmapped"),
                ("heterofl", "sequential"),
                ("heterofl", "vmapped"),
                ("fedecover", "sequential"),
                ("fedecover", "vmapped"),
            ]
        ],
    ],
)
def test_two_workers_give_the_same_bits_as_one(tmp_path, method, batching):
    chosen = {"name": method, "ratio": [0.5, 0.25]}
    how = {"batching": batching, "group": 3}
    training = {"clip_norm": 0.5, "momentum": 0.9}  # the norm sums over parameters in their order
    one = start(small(method=chosen, engine=how, training=training), tmp_path / "one")
    how["workers"] = 2
    two = start(small(method=chosen, engine=how, training=training), tmp_path / "two")
    assert one["state_sha256"] == two["state_sha256"]
    assert one["loss"] == two["loss"]


def first_tasks(setup: Setup) -> list[Task]:
    state = setup.experiment.method.init(setup.model, 0, 3)
    tasks = setup.experiment.method.configure(
        setup.model, state, setup.cohort(0), setup.experiment.training
    )
    return list(tasks)


DIES = """
import sys
from tesserafl.engines.frames import read_frame, write_frame
read_frame(sys.stdin.buffer)
write_frame(sys.stdout.buffer, b"ready")
read_frame(sys.stdin.buffer)
sys.exit(9)
"""


def test_a_task_that_kills_two_workers_is_an_error():
    tasks = first_tasks(prepare(small()))
    workers = Processes([sys.executable, "-c", DIES], b"", 1)
    with contextlib.closing(WorkerPool(workers=workers)) as deadly:
        deadly.submit([tasks[0]])
        with pytest.raises(TesseraError, match=r"code 9, twice.*memory"):
            deadly.poll()


def test_a_fault_of_ours_in_a_worker_is_not_taken_for_a_client_that_failed():
    setup = prepare(small(engine={"workers": 2}))
    tasks = first_tasks(setup)
    wrong = {name: t[:, None] for name, t in tasks[0].params.items()}
    with contextlib.closing(make_engine(setup)) as engine:
        engine.submit([replace(tasks[0], params=wrong)])
        with pytest.raises(RuntimeError, match=f"client {tasks[0].client.id}, round 0"):
            engine.poll()


def test_a_diverging_client_costs_its_update_not_the_run(tmp_path, monkeypatch):
    events = []
    broken = InProcess.poll

    def poll(self):
        return [spoilt(outcome) for outcome in broken(self)]

    def spoilt(outcome):
        if not isinstance(outcome, Done) or outcome.update.client % 2:
            return outcome
        delta = {name: torch.full_like(t, torch.nan) for name, t in outcome.update.delta.items()}
        return replace(outcome, update=replace(outcome.update, delta=delta))

    monkeypatch.setattr(InProcess, "poll", poll)
    summary = start(small(), tmp_path / "run", events.append)
    assert summary["loss"] == summary["loss"]  # finite: nothing of the broken clients got in
    failures = [row for event in events if event["kind"] == "round" for row in event["failures"]]
    assert failures
    assert all(row["client"] % 2 == 0 and "nan" in row["text"] for row in failures)


def test_divergence_of_everybody_is_an_error(tmp_path):
    diverging = {"lr": 1e6, "momentum": 0.9, "epochs": 3}
    with pytest.raises(UpdateError, match=r"lower training\.lr"):
        start(small(training=diverging), tmp_path / "run")


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_static_batch_norm_trains_predicts_and_is_saved_with_its_statistics(tmp_path, workers):
    from safetensors.torch import load_file

    experiment = small(
        model={"name": "cnn", "channels": [8, 8], "norm": "batch"},
        method={"name": "heterofl", "ratio": [0.5]},
        training={"batch_size": 16, "lr": 0.05},
        engine={"workers": workers},
    )
    summary = start(experiment, tmp_path / "run")
    tensors = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert tensors["norms.0.running_var"].unique().numel() > 1  # of data, not the initial ones
    assert summary["loss"] < 5.0


def test_dropouts_are_counted_and_repeat(tmp_path):
    def failures(folder):
        start(small(dropout=0.5), folder)
        events = read_events(folder / "events.jsonl")
        return [event["failures"] for event in events if event["kind"] == "round"]

    first = failures(tmp_path / "a")
    assert any(first)
    assert first == failures(tmp_path / "b")
    assert all(row["reason"] == "offline" for rows in first for row in rows)


def test_nobody_answers_and_nothing_changes(tmp_path):
    summary = start(small(dropout=0.999999), tmp_path / "run")
    untrained = start(small(dropout=0.999999, rounds=1), tmp_path / "one")
    assert summary["state_sha256"] == untrained["state_sha256"]
    assert summary["coverage"] == 0.0
    assert summary["bytes_up"] == 0
    assert summary["bytes_down"] > 0


def test_a_client_without_the_memory_is_refused_before_training(tmp_path):
    with pytest.raises(CapacityError, match="MiB"):
        start(small(client_memory_mib=[1000.0, 0.001]), tmp_path / "run")


@pytest.mark.parametrize(("batching", "held"), [("sequential", 1), ("vmapped", 2)])
def test_a_round_holds_one_group_of_updates_at_a_time(monkeypatch, batching, held):
    """Server memory does not grow with the number of clients: cut, train, fold, forget."""
    setup = prepare(small(clients_per_round=8, engine={"batching": batching, "group": 2}))
    state = setup.experiment.method.init(setup.model, 0, 3)
    engine = make_engine(setup)
    alive, most = set(), 0
    submit, poll = engine.submit, engine.poll

    def counted_submit(tasks):
        nonlocal most
        alive.update(task.client.id for task in tasks)
        most = max(most, len(alive))
        submit(tasks)

    def counted_poll():
        outcomes = poll()
        alive.difference_update(outcome.update.client for outcome in outcomes)
        return outcomes

    monkeypatch.setattr(engine, "submit", counted_submit)
    monkeypatch.setattr(engine, "poll", counted_poll)
    from tesserafl.core.coverage import Coverage
    from tesserafl.run.federate import federate
    from tesserafl.run.rounds import play_round

    play_round(setup, engine, federate(setup, state), Coverage(setup.model.shapes), setup.costs())
    assert most == held
