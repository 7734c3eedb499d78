"""Training alone, by hand; and what runs say of clients' own models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from worked import TRAINING, clients, mlp, state_of

from tesserafl.core.errors import ConfigError
from tesserafl.core.messages import Memory
from tesserafl.core.params import sha256
from tesserafl.data.examples import Examples
from tesserafl.engines.client import ClientWorker
from tesserafl.methods import Local
from tesserafl.run.experiment import Experiment, from_json
from tesserafl.run.runner import start

EXAMPLES = Examples(inputs=torch.tensor([[1.0, 0.0], [0.0, 1.0]]), labels=torch.tensor([0, 1]))


def test_a_client_goes_on_where_it_stopped_and_shares_nothing() -> None:
    model, method, asked = mlp(4), Local(), clients(2, 2)
    worker = ClientWorker(model=model, method=method, examples=lambda client: EXAMPLES, seed=0)
    state = method.init(model, 3, 5)
    begin, memory = sha256(state.params), Memory()
    before: dict[str, torch.Tensor] = {}
    for _ in range(3):
        task = next(method.configure(model, state, asked, TRAINING))
        started = method.local(model, task, memory).params
        if before:
            assert sha256(started) == sha256(before)
        update, memory = worker.work(task, memory)
        assert not update.delta and update.num_bytes == 0
        before = method.personal(model, state, memory).params
        assert sha256(before) != sha256(started)
        state = method.aggregate(model, state, asked, [update])
    assert sha256(state.params) == begin and state.round == 3


def test_a_narrow_client_has_a_narrow_model() -> None:
    model, method = mlp(4), Local(ratio=(0.5,))
    worker = ClientWorker(model=model, method=method, examples=lambda client: EXAMPLES, seed=0)
    state = state_of(model)
    _, memory = worker.work(next(method.configure(model, state, clients(2), TRAINING)), {})
    own = method.personal(model, state, memory)
    assert own.model.units("hidden1") == 2
    assert {n: tuple(t.shape) for n, t in own.params.items()} == dict(own.model.shapes)


def experiment(**changes: Any) -> Experiment:
    return from_json(
        {
            "data": {"num_clients": 4, "alpha": 0.2, "test": 0.25, "max_train": 400},
            "model": {"name": "mlp", "hidden": [32]},
            "method": {"name": "fedavg", "ratio": [1.0]},
            "rounds": 3,
            "clients_per_round": 4,
            **changes,
        }
    )


def test_own_models_are_tested_on_own_examples(tmp_path: Path) -> None:
    summary = start(experiment(method={"name": "local", "ratio": [1.0]}, rounds=8), tmp_path / "l")
    own, shared = summary["accuracy_personal"], summary["accuracy_clients"]
    assert len(own) == len(shared) == 4
    assert sum(own) / 4 > 0.6 > 0.3 > sum(shared) / 4  # the global model has learnt nothing
    page = (tmp_path / "l" / "report.html").read_text()
    assert "accuracy of own models, mean over the clients" in page


@pytest.mark.slow
def test_fine_tuning_helps_where_clients_differ(tmp_path: Path) -> None:
    tuned = start(experiment(finetune_epochs=8), tmp_path / "tuned")
    plain = start(experiment(), tmp_path / "plain")
    assert tuned["state_sha256"] == plain["state_sha256"]  # the run itself is the same
    assert "accuracy_finetuned" not in plain
    assert len(tuned["accuracy_finetuned"]) == 4
    assert sum(tuned["accuracy_finetuned"]) > sum(tuned["accuracy_clients"]) + 0.4
    again = start(
        experiment(finetune_epochs=8, engine={"workers": 2, "batching": "sequential"}),
        tmp_path / "again",
    )
    assert again["accuracy_finetuned"] == tuned["accuracy_finetuned"]


def test_fine_tuning_takes_reports_of_a_part(tmp_path: Path) -> None:
    masked = experiment(finetune_epochs=8, training={"mask_absent_classes": True})
    summary = start(masked, tmp_path / "masked")
    assert sum(summary["accuracy_finetuned"]) > sum(summary["accuracy_clients"])


def test_peers_are_tuned_from_the_mean_of_their_copies(tmp_path: Path) -> None:
    ring = {"topology": "peers", "exchange": "gossip", "graph": "ring"}
    tuned = start(experiment(finetune_epochs=8, network=ring, rounds=6), tmp_path / "ring")
    assert sum(tuned["accuracy_finetuned"]) > sum(tuned["accuracy_clients"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": {"name": "local", "ratio": [1.0]}}, "tested as accuracy_personal"),
        ({"data": {"num_clients": 4}}, r"set data\.test"),
        ({"method": {"name": "fedrolex", "ratio": [0.5]}}, r"set method\.ratio to 1"),
        ({"finetune_epochs": -1}, "must be 0 or more"),
    ],
)
def test_fine_tuning_that_cannot_be_measured_is_refused(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        start(experiment(**{"finetune_epochs": 1, **changes}), tmp_path / "run")
    assert not (tmp_path / "run").exists()
