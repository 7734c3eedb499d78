"""Short runs of adapters on a frozen model, as a user starts them."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from bytes_encoder import WORDS, write_encoder, write_texts

from tesserafl.core.errors import ModelError
from tesserafl.run.experiment import Experiment, from_json
from tesserafl.run.runner import resume, start

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

# peft reads an attribute that transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

BERT = {
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_hidden_layers": 1,
    "intermediate_size": 48,
}


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_texts(tmp_path_factory.mktemp("texts"))


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved encoder of bytes, without a head."""
    return write_encoder(tmp_path_factory.mktemp("encoder"))


def short(folder: Path, model: dict, **changes: object) -> Experiment:
    base = {
        "data": {"path": str(folder), "partition": "iid", "num_clients": 4, "sequence_length": 12},
        "model": {"name": "lora", "rank": 4, "alpha": 8.0, **model},
        "method": {"name": "fedavg", "ratio": [1.0]},
        "training": {"lr": 0.1, "batch_size": 16},
        "rounds": 2,
        "clients_per_round": 2,
    }
    return from_json({**base, **changes})


def of_texts(folder: Path, encoder: Path, **changes: object) -> Experiment:
    return short(folder, {"config": str(encoder)}, **changes)


NESTED = {"name": "heterofl", "ratio": [1.0, 0.5], "width_scaling": "none"}


@pytest.mark.slow
def test_two_workers_give_the_bits_of_one(tmp_path, texts, encoder):
    """They read the folder for themselves, and draw what is in no file."""
    torch.manual_seed(1)
    one = start(of_texts(texts, encoder, method=NESTED), tmp_path / "one")
    torch.manual_seed(2)
    engine = {"workers": 2}
    two = start(of_texts(texts, encoder, method=NESTED, engine=engine), tmp_path / "two")
    assert one["state_sha256"] == two["state_sha256"]
    assert one["loss"] == two["loss"]


def test_adapters_alone_travel_and_the_result_loads_without_us(tmp_path, texts, encoder):
    experiment = of_texts(
        texts, encoder, rounds=10, clients_per_round=4, training={"lr": 0.3, "batch_size": 8}
    )
    summary = start(experiment, tmp_path / "run")
    entries = 2 * (4 * 32 + 32 * 4) + 2 * 32 + 2  # queries, values, head
    assert summary["params_full"] == summary["params_largest_client"] == entries
    assert summary["bytes_up"] == 10 * 4 * 4 * entries
    assert summary["accuracy"] > 0.9

    folder = tmp_path / "run" / "model"
    merged = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    base = transformers.AutoModelForSequenceClassification.from_pretrained(encoder, num_labels=2)
    adapted = peft.PeftModel.from_pretrained(base, folder / "adapter").eval()
    tokens = torch.full((14, 12), 256)
    for i in range(14):
        text = f"{WORDS[i % 2]} {i % 7}".encode()
        tokens[i, : len(text)] = torch.tensor(list(text))[:12]
    with torch.no_grad():
        given = {"input_ids": tokens, "attention_mask": (tokens != 256).long()}
        ours, theirs = merged(**given).logits, adapted(**given).logits
    assert torch.allclose(ours, theirs, atol=1e-4)
    assert (ours.argmax(1) == torch.arange(14) % 2).float().mean() > 0.9


def test_a_run_starts_from_the_adapter_of_another(tmp_path, texts, encoder):
    first = start(of_texts(texts, encoder), tmp_path / "first")
    adapter = tmp_path / "first" / "model" / "adapter"
    model = {"config": str(encoder), "adapter": str(adapter)}
    nobody = {"dropout": 0.999999, "rounds": 1}
    second = start(short(texts, model, **nobody), tmp_path / "second")
    assert second["state_sha256"] == first["state_sha256"]
    with pytest.raises(ModelError, match="rank 4"):
        start(short(texts, {**model, "rank": 2}), tmp_path / "third")
    assert not (tmp_path / "third").exists()


def test_a_killed_run_resumes_to_the_same_bits(tmp_path, texts, encoder):
    class Killed(Exception):
        pass

    def cut(event: dict) -> None:
        if event["kind"] == "round" and event["round"] == 2:
            raise Killed

    experiment = of_texts(texts, encoder, rounds=3, checkpoint_every=1)
    with pytest.raises(Killed):
        start(experiment, tmp_path / "run", cut)
    torch.manual_seed(5)
    resumed = resume(tmp_path / "run")
    assert resumed["state_sha256"] == start(experiment, tmp_path / "whole")["state_sha256"]


def test_clients_of_unequal_ranks_train_one_language_model(tmp_path, texts):
    options = {"n_layer": 1, "n_embd": 32, "n_head": 4}
    experiment = short(
        texts,
        {"config": "gpt2", "options": options},
        data={
            "path": str(texts),
            "task": "causal-lm",
            "partition": "iid",
            "num_clients": 4,
            "sequence_length": 12,
        },
        method={**NESTED, "ratio": [1.0, 0.25]},
        clients_per_round=4,
    )
    seen = []
    summary = start(experiment, tmp_path / "run", seen.append)
    rows = [row for event in seen if event["kind"] == "round" for row in event["clients"]]
    assert {row["entries"] for row in rows} == {4 * (32 + 96), 32 + 96}
    assert summary["coverage"] == 1.0
    config = json.loads(
        (tmp_path / "run" / "model" / "adapter" / "adapter_config.json").read_text()
    )
    assert config["r"] == 4
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")


def test_images(tmp_path):
    from PIL import Image

    source = tmp_path / "images"
    random = np.random.default_rng(0)
    for label, low in (("dark", 0), ("light", 128)):
        for part in ("train", "test"):
            (source / part / label).mkdir(parents=True)
            for i in range(16):
                pixels = random.integers(low, low + 128, (8, 8, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(source / part / label / f"{i}.png")
    experiment = short(
        source,
        {"config": "vit", "options": {**BERT, "patch_size": 4}},
        rounds=4,
    )
    summary = start(experiment, tmp_path / "run")
    assert summary["accuracy"] > 0.9
    model = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "run" / "model")
    assert set(model.config.id2label.values()) == {"dark", "light"}
