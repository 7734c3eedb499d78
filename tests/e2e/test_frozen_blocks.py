"""Frozen blocks left out of training, in short runs as a user starts them."""

from pathlib import Path

import pytest
from bytes_encoder import write_texts

from tesserafl.engines import frozen
from tesserafl.run.experiment import Experiment, from_json
from tesserafl.run.runner import start
from tesserafl.run.setup import client_worker, prepare

pytest.importorskip("transformers")
pytest.importorskip("peft")

# peft reads an attribute that transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

BERT = {
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "intermediate_size": 48,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_texts(tmp_path_factory.mktemp("texts"), 120)


def short(folder: Path, engine: dict) -> Experiment:
    return from_json(
        {
            "data": {
                "path": str(folder),
                "partition": "iid",
                "num_clients": 4,
                "sequence_length": 12,
                "validation": 0.2,
            },
            "model": {"name": "lora", "config": "bert", "rank": 4, "options": BERT},
            "method": {"name": "fedfmsl", "schedule": "manual", "depths": [1]},
            "training": {"lr": 0.1, "batch_size": 4, "epochs": 2},
            "engine": {"batching": "sequential", **engine},
            "rounds": 6,
            "clients_per_round": 3,
        }
    )


def test_a_worker_is_given_the_memory_and_the_validation_examples(texts: Path) -> None:
    setup = prepare(short(texts, {"cache_mib": 3}))
    worker = client_worker(setup)
    assert worker.kept.most_bytes == 3 << 20
    assert worker.validation is not None
    for client, data in enumerate(setup.data.clients):
        assert worker.validation(client) is data.validation
        assert len(data.validation)
    assert client_worker(prepare(short(texts, {"cache_mib": 0}))).kept.most_bytes == 0


@pytest.mark.slow
def test_what_is_kept_does_not_change_a_run(texts: Path, tmp_path: Path, monkeypatch) -> None:
    computed: list[int] = []
    plain_hidden_of = frozen.hidden_of

    def counting(module, forward, params, inputs, towers):
        computed.append(len(inputs))
        return plain_hidden_of(module, forward, params, inputs, towers)

    monkeypatch.setattr(frozen, "hidden_of", counting)
    one = start(short(texts, {}), tmp_path / "one")
    two = start(short(texts, {"workers": 2}), tmp_path / "two")
    plain = start(short(texts, {"cache_mib": 0}), tmp_path / "plain")
    assert one["state_sha256"] == two["state_sha256"]
    assert one["loss"] == two["loss"]
    assert one["loss"] == pytest.approx(plain["loss"], rel=1e-3)
    setup = prepare(short(texts, {}))
    batches = [-(-len(part) // 4) for c in setup.data.clients for part in (c.train, c.validation)]
    # At most once in each stage, though every client is asked in more rounds than one.
    assert max(batches) < len(computed) <= 2 * sum(batches) < 6 * 3 * sum(batches) / 4
