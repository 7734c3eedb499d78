"""Short runs of adapters on a frozen model that is kept in fewer bytes."""

from pathlib import Path

import pytest
import torch
from bytes_encoder import WORDS, write_encoder, write_texts

from tesserafl.engines import frozen
from tesserafl.run.experiment import from_json
from tesserafl.run.runner import resume, start

transformers = pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")

# peft reads an attribute that transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts, and a saved encoder of bytes beside them."""
    folder = tmp_path_factory.mktemp("texts")
    write_texts(folder / "data")
    write_encoder(folder / "encoder", 2, dropout=0.0)
    return folder


def run(folder: Path, base: str, to: Path, **changes) -> dict:
    settings = {
        "data": {
            "path": str(folder / "data"),
            "partition": "iid",
            "num_clients": 4,
            "sequence_length": 12,
        },
        "model": {"name": "lora", "config": str(folder / "encoder"), "rank": 4, "base": base},
        "method": {"name": "fedavg", "ratio": [1.0]},
        "training": {"lr": 0.3, "batch_size": 8},
        "rounds": 3,
        "clients_per_round": 4,
    }
    return start(from_json({**settings, **changes}), to)


@pytest.mark.parametrize("base", ["bfloat16", "int8", "nf4"])
def test_it_learns_and_the_result_loads_without_us(tmp_path, folder, base):
    summary = run(folder, base, tmp_path / "run")
    assert summary["accuracy"] > 0.9
    assert summary["params_full"] == 2 * 2 * (4 * 32 + 32 * 4) + 2 * 32 + 2
    merged = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "run" / "model"
    ).eval()
    tokens = torch.full((14, 12), 256)
    for i in range(14):
        text = f"{WORDS[i % 2]} {i % 7}".encode()
        tokens[i, : len(text)] = torch.tensor(list(text))[:12]
    with torch.no_grad():
        rows = merged(input_ids=tokens, attention_mask=(tokens != 256).long()).logits
    assert (rows.argmax(1) == torch.arange(14) % 2).float().mean() > 0.9
    assert resume(tmp_path / "run")["state_sha256"] == summary["state_sha256"]


@pytest.mark.slow
def test_two_workers_give_the_bits_of_one(tmp_path, folder):
    one = run(folder, "nf4", tmp_path / "one")
    two = run(folder, "nf4", tmp_path / "two", engine={"workers": 2})
    assert one["state_sha256"] == two["state_sha256"] and one["loss"] == two["loss"]


def test_what_frozen_blocks_give_is_kept(tmp_path, folder, monkeypatch):
    computed: list[int] = []
    plain = frozen.hidden_of

    def counting(module, forward, params, inputs, towers):
        computed.append(len(inputs))
        return plain(module, forward, params, inputs, towers)

    monkeypatch.setattr(frozen, "hidden_of", counting)
    method = {"name": "fedfmsl", "schedule": "manual", "depths": [1]}
    losses = []
    for mib in (0, 64):
        engine = {"batching": "sequential", "cache_mib": mib}
        summary = run(folder, "nf4", tmp_path / str(mib), method=method, engine=engine)
        losses.append(summary["loss"])
        assert bool(computed) == (mib > 0)
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
