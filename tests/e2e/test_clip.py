"""Short runs of two-tower models and of adapters that are no LoRA, as a user starts them."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from pyarrow import parquet

from tesserafl.cli import main
from tesserafl.core.errors import ModelError
from tesserafl.run.experiment import Experiment, from_json, to_json, with_absolute_paths
from tesserafl.run.runner import start

transformers = pytest.importorskip("transformers")
pytest.importorskip("peft")

# peft reads an attribute that transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

CLIP = {
    "text_config.hidden_size": 32,
    "text_config.num_attention_heads": 4,
    "text_config.num_hidden_layers": 1,
    "text_config.intermediate_size": 48,
    "vision_config.hidden_size": 32,
    "vision_config.num_attention_heads": 4,
    "vision_config.num_hidden_layers": 1,
    "vision_config.intermediate_size": 48,
    "vision_config.patch_size": 4,
    "projection_dim": 32,
}
PROMPT = "a {} picture"
PIXELS = {"dark": (0, 100), "light": (156, 256), "red": (0, 100)}


def folder_of(path: Path, names: tuple[str, ...]) -> Path:
    from PIL import Image

    random = np.random.default_rng(0)
    for name in names:
        for part in ("train", "test"):
            (path / part / name).mkdir(parents=True)
            for i in range(16):
                pixels = random.integers(*PIXELS[name], (8, 8, 3), dtype=np.uint8)
                pixels[..., 0] = 255 if name == "red" else pixels[..., 0]
                Image.fromarray(pixels).save(path / part / name / f"{i}.png")
    return path


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder_of(tmp_path_factory.mktemp("images"), ("dark", "light"))


@pytest.fixture(scope="module")
def pretrained(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model folder of a run that trained a whole two-tower model."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    model = {"name": "huggingface", "config": "clip", "options": CLIP, "prompt": PROMPT}
    summary = start(short(images, model, rounds=8), folder)
    assert summary["accuracy"] > 0.9
    return folder / "model"


def short(folder: Path, model: dict, **changes: object) -> Experiment:
    base = {
        "data": {"path": str(folder), "partition": "iid", "num_clients": 4, "sequence_length": 12},
        "model": model,
        "method": {"name": "fedavg", "ratio": [1.0]},
        "training": {"lr": 0.005, "optimiser": "adamw", "batch_size": 8},
        "rounds": 2,
        "clients_per_round": 4,
    }
    return from_json({**base, **changes})


def test_a_two_tower_model_is_trained_exported_and_cut(images, pretrained, tmp_path):
    model = transformers.CLIPModel.from_pretrained(pretrained)
    assert set(model.config.id2label.values()) == {"dark", "light"}
    tokenizer = transformers.AutoTokenizer.from_pretrained(pretrained)
    texts = tokenizer(["a dark picture", "a light picture"], padding=True, return_tensors="pt")
    pixels = torch.cat([torch.full((1, 3, 8, 8), value) for value in (-0.6, 0.6)])
    with torch.no_grad():
        given = {"input_ids": texts["input_ids"], "pixel_values": pixels}
        assert model.eval()(**given).logits_per_image.argmax(1).tolist() == [0, 1]
    # The saved model is where another run starts, whose clients hold parts of it.
    settings = {"name": "huggingface", "config": str(pretrained), "prompt": PROMPT}
    method = {"name": "heterofl", "ratio": [1.0, 0.5], "width_scaling": "none"}
    summary = start(short(images, settings, method=method, rounds=1), tmp_path / "run")
    assert summary["accuracy"] > 0.9


def test_adapters_of_both_towers_learn_other_classes_from_a_saved_model(pretrained, tmp_path):
    source = folder_of(tmp_path / "images", ("light", "red", "dark"))
    settings = {"name": "lora", "config": str(pretrained), "prompt": PROMPT, "rank": 4}
    experiment = short(source, settings, rounds=8, training={"lr": 0.02, "optimiser": "adamw"})
    summary = start(experiment, tmp_path / "run")
    assert summary["params_full"] == 2 * 2 * (4 * 32 + 32 * 4)  # towers, queries and values
    assert summary["accuracy"] > 0.9
    merged = transformers.CLIPModel.from_pretrained(tmp_path / "run" / "model")
    base = transformers.CLIPModel.from_pretrained(pretrained)
    changed = {
        name.split("_model.")[0]
        for name, value in merged.state_dict().items()
        if not torch.equal(value, base.state_dict()[name])
    }
    assert changed == {"text", "vision"}


FAMILIES = {
    "lora": {"rank": 2, "prompt": PROMPT},
    "prompts": {"context": 3},
    "feature_adapter": {"prompt": PROMPT},
}
ENTRIES = {"prompts": 3 * 32, "feature_adapter": 2 * (32 * 32 + 32)}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["prompts", "feature_adapter"])
def test_two_workers_give_the_bits_of_one(images, pretrained, name, tmp_path):
    settings = {"name": name, "config": str(pretrained), **FAMILIES[name]}
    torch.manual_seed(1)
    one = start(short(images, settings), tmp_path / "one")
    assert one["params_full"] == one["params_largest_client"] == ENTRIES[name]
    assert one["bytes_up"] == 2 * 4 * 4 * ENTRIES[name]
    torch.manual_seed(2)
    two = start(short(images, settings, engine={"workers": 2}), tmp_path / "two")
    assert one["state_sha256"] == two["state_sha256"]
    assert one["loss"] == two["loss"]


@pytest.mark.parametrize("name", ["prompts", "feature_adapter"])
def test_learning_and_a_start_from_an_earlier_run(images, pretrained, name, tmp_path):
    settings = {"name": name, "config": str(pretrained), **FAMILIES[name]}
    experiment = short(images, settings, rounds=6, training={"lr": 0.05, "optimiser": "adamw"})
    first = start(experiment, tmp_path / "first")
    assert first["accuracy"] > 0.9
    adapter = tmp_path / "first" / "model" / "adapter"
    nobody = {"dropout": 0.999999, "rounds": 1}
    second = start(
        short(images, {**settings, "adapter": str(adapter)}, **nobody), tmp_path / "second"
    )
    assert second["state_sha256"] == first["state_sha256"]
    with pytest.raises(ModelError, match="model/adapter of an earlier run"):
        start(short(images, {**settings, "adapter": str(pretrained)}), tmp_path / "third")


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    rows = [f"{('dreadful', 'wonderful')[i % 2]} {i % 7}" for i in range(80)]
    table = pa.table({"text": rows, "label": [i % 2 for i in range(80)]})
    parquet.write_table(table, folder / "train.parquet")
    return folder


def test_prompts_of_a_text_classifier(texts, tmp_path):
    options = {
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_hidden_layers": 1,
        "intermediate_size": 48,
        "initializer_range": 0.3,
    }
    settings = {"name": "prompts", "config": "bert", "options": options, "context": 4}
    experiment = short(texts, settings, rounds=12, training={"lr": 0.05, "optimiser": "adamw"})
    summary = start(experiment, tmp_path / "run")
    assert summary["params_full"] == 4 * 32 + 2 * 32 + 2
    assert summary["accuracy"] > 0.9
    transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "model")


def test_prompts_of_a_language_model(texts, tmp_path):
    options = {"n_layer": 1, "n_embd": 32, "n_head": 4, "initializer_range": 0.3}
    data = {
        "path": str(texts),
        "task": "causal-lm",
        "partition": "iid",
        "num_clients": 4,
        "sequence_length": 12,
    }
    settings = {"name": "prompts", "config": "gpt2", "options": options, "context": 4}
    training = {"lr": 0.05, "optimiser": "adamw"}
    experiment = short(texts, settings, data=data, rounds=4, training=training)
    untrained = start(replace(experiment, dropout=0.999999, rounds=1), tmp_path / "untrained")
    summary = start(experiment, tmp_path / "run")
    assert summary["params_full"] == 4 * 32
    assert summary["loss"] < untrained["loss"] - 0.05
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")


def test_the_command_line_takes_a_prompt(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    options = [part for name, value in CLIP.items() for part in (name, str(value))]
    data = ["--rounds", "1", "--clients-per-round", "2", "--data.num-clients", "4"]
    model = ["--model", "huggingface", "--model.config", "clip"]
    method = ["--method", "fedavg", "--method.ratio", "1", "--out", "run"]
    prompt = ["--model.prompt", "a photo of a {}", "--model.options", *options]
    main(["run", "quickstart", *data, *model, *method, *prompt])
    capsys.readouterr()
    transformers.CLIPModel.from_pretrained(tmp_path / "run" / "model")


@pytest.mark.parametrize("name", FAMILIES)
def test_folders_are_found_from_anywhere(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("base").mkdir()
    model = {"name": name, "config": "base", "adapter": "base/adapter"}
    found = with_absolute_paths(from_json({"model": model}))
    assert found.model.config == str(tmp_path / "base")
    assert found.model.adapter == tmp_path / "base" / "adapter"
    assert from_json(to_json(found)) == found
