"""The embedded engine: workers, failures and drop-outs do not change what is computed."""

from dataclasses import replace

import pytest
import torch

from tesserafl.core.errors import CapacityError, UpdateError
from tesserafl.engines.local import InProcess, WorkerPool
from tesserafl.engines.seam import Done, Failed
from tesserafl.run.events import read_events
from tesserafl.run.experiment import Experiment, from_json
from tesserafl.run.runner import start
from tesserafl.run.setup import make_engine, prepare


def small(**changes: object) -> Experiment:
    base = {
        "data": {"num_clients": 8},
        "model": {"name": "mlp", "hidden": [16, 16], "norm": "layer"},
        "method": {"name": "fedbrb", "ratio": [0.5, 0.25]},
        "rounds": 3,
        "clients_per_round": 4,
    }
    return from_json({**base, **changes})


@pytest.mark.parametrize("method", ["fedbrb", "fedecover"])
def test_two_workers_give_the_same_bits_as_one(tmp_path, method):
    chosen = {"name": method, "ratio": [0.5, 0.25]}
    one = start(small(method=chosen), tmp_path / "one")
    two = start(small(method=chosen, engine={"workers": 2}), tmp_path / "two")
    assert one["state_sha256"] == two["state_sha256"]
    assert one["loss"] == two["loss"]


def test_a_worker_that_is_killed_fails_its_task_and_is_replaced():
    setup = prepare(small(engine={"workers": 2}))
    state = setup.experiment.method.init(setup.model, 0, 3)
    tasks = list(
        setup.experiment.method.configure(
            setup.model, state, setup.cohort(0), setup.experiment.training
        )
    )
    engine = make_engine(setup)
    assert isinstance(engine, WorkerPool)
    try:
        engine.submit(tasks[0])
        engine.submit(tasks[1])
        engine._processes[0].process.kill()
        outcomes = []
        while len(outcomes) < 2:
            outcomes += engine.poll()
        (failed,) = [outcome for outcome in outcomes if isinstance(outcome, Failed)]
        assert failed.reason == "crashed"
        engine.submit(tasks[2])
        (again,) = engine.poll()
        assert isinstance(again, Done)
        assert again.update.client == tasks[2].client.id
    finally:
        engine.close()


def test_a_diverging_client_costs_its_update_not_the_run(tmp_path, monkeypatch):
    events = []
    broken = InProcess.poll

    def poll(self):
        (outcome,) = broken(self)
        if isinstance(outcome, Done) and outcome.update.client % 2 == 0:
            delta = {
                name: torch.full_like(t, torch.nan) for name, t in outcome.update.delta.items()
            }
            return [replace(outcome, update=replace(outcome.update, delta=delta))]
        return [outcome]

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


def test_a_round_holds_one_update_at_a_time(monkeypatch):
    """Server memory does not grow with the number of clients: cut, train, fold, forget."""
    setup = prepare(small(clients_per_round=8))
    state = setup.experiment.method.init(setup.model, 0, 3)
    engine = make_engine(setup)
    alive, most = set(), 0
    submit, poll = engine.submit, engine.poll

    def counted_submit(task):
        nonlocal most
        alive.add(task.client.id)
        most = max(most, len(alive))
        submit(task)

    def counted_poll():
        outcomes = poll()
        alive.difference_update(outcome.update.client for outcome in outcomes)
        return outcomes

    monkeypatch.setattr(engine, "submit", counted_submit)
    monkeypatch.setattr(engine, "poll", counted_poll)
    from tesserafl.core.submodel import Coverage
    from tesserafl.run.rounds import CostTable, play_round

    play_round(setup, engine, state, Coverage(setup.model.shapes), CostTable(setup=setup))
    assert most == 1
