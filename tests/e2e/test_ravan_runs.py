"""Short runs of RAVAN on a frozen model, as a user starts them."""

import json
from pathlib import Path

import pytest
import torch
from bytes_encoder import WORDS, write_encoder, write_texts

from tesserafl.run.experiment import Experiment, from_json
from tesserafl.run.runner import resume, start

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

# peft reads an attribute that transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

HEAD = 4 * (2 * 32 + 2)
"""Bytes of the classifier's output layer."""
CORES = 4 * 2 * 4 * (2 * 2)
"""Bytes of the cores: of the queries and of the values, 4 heads of rank 2."""


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_texts(tmp_path_factory.mktemp("texts"))


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved encoder of bytes, without a head."""
    return write_encoder(tmp_path_factory.mktemp("encoder"))


def short(folder: Path, encoder: Path, *, ratio: list[float], **changes: object) -> Experiment:
    base = {
        "data": {"path": str(folder), "partition": "iid", "num_clients": 4, "sequence_length": 12},
        "model": {"name": "lora", "rank": 8, "alpha": 16.0, "config": str(encoder)},
        "method": {"name": "ravan", "ratio": ratio},
        "training": {"lr": 0.1, "batch_size": 16},
        "rounds": 2,
        "clients_per_round": 4,
    }
    return from_json({**base, **changes})


def rounds_of(run: Path) -> list[dict]:
    lines = (run / "events.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["kind"] == "round"]


def test_it_learns_and_only_cores_and_the_head_travel(tmp_path, texts, encoder):
    learning = {"rounds": 10, "training": {"lr": 0.3, "batch_size": 8}}
    summary = start(short(texts, encoder, ratio=[1.0], **learning), tmp_path / "run")
    assert summary["accuracy"] > 0.9
    assert summary["bytes_up"] == summary["bytes_down"] == 10 * 4 * (HEAD + CORES)
    assert summary["coverage"] == 1.0
    assert all(event["aggregation_error"] < 1e-6 for event in rounds_of(tmp_path / "run"))
    # The cores have their part in it: with a frozen output layer as well nothing else can learn.
    model = {"name": "lora", "rank": 8, "alpha": 16.0, "config": str(encoder), "train_head": False}
    frozen = short(texts, encoder, ratio=[1.0], model=model, **{**learning, "rounds": 1})
    first = start(frozen, tmp_path / "first")
    frozen = short(texts, encoder, ratio=[1.0], model=model, **learning)
    last = start(frozen, tmp_path / "last")
    assert last["bytes_up"] == 10 * 4 * CORES
    assert last["loss"] < 0.8 * first["loss"]

    folder = tmp_path / "run" / "model"
    merged = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    base = transformers.AutoModelForSequenceClassification.from_pretrained(encoder, num_labels=2)
    adapted = peft.PeftModel.from_pretrained(base, folder / "adapter").eval()
    tokens = torch.tensor([list(WORDS[1].encode())])
    with torch.no_grad():
        assert torch.allclose(merged(tokens).logits, adapted(tokens).logits, atol=1e-4)


def test_unequal_clients_train_some_of_the_heads(tmp_path, texts, encoder):
    start(short(texts, encoder, ratio=[1.0, 0.25]), tmp_path / "run")
    for event in rounds_of(tmp_path / "run"):
        for row in event["clients"]:
            share = 1 if row["client"] % 2 == 0 else 4
            assert (row["bytes_down"], row["bytes_up"]) == (HEAD + CORES, HEAD + CORES // share)


@pytest.mark.slow
def test_two_workers_give_the_bits_of_one(tmp_path, texts, encoder):
    one, two = (
        start(
            short(texts, encoder, ratio=[1.0, 0.5], engine={"workers": workers}),
            tmp_path / str(workers),
        )
        for workers in (1, 2)
    )
    assert one["state_sha256"] == two["state_sha256"]
    assert one["loss"] == two["loss"]


def test_a_killed_run_resumes_to_the_same_bits(tmp_path, texts, encoder):
    class Killed(Exception):
        pass

    def cut(event: dict) -> None:
        if event["kind"] == "round" and event["round"] == 2:
            raise Killed

    experiment = short(texts, encoder, ratio=[0.5], rounds=3, checkpoint_every=1)
    with pytest.raises(Killed):
        start(experiment, tmp_path / "run", cut)
    torch.manual_seed(5)
    resumed = resume(tmp_path / "run")
    assert resumed["state_sha256"] == start(experiment, tmp_path / "whole")["state_sha256"]
