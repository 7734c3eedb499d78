"""Two-word texts with a class each, and a small saved encoder that reads bytes."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest
import torch
from pyarrow import parquet

WORDS = ("dreadful", "wonderful")
"""Of class 0 and of class 1."""


def write_texts(folder: Path, count: int = 80) -> Path:
    """A data set of so many texts."""
    rows = [f"{WORDS[i % 2]} {i % 7}" for i in range(count)]
    table = pa.table({"text": rows, "label": [i % 2 for i in range(count)]})
    folder.mkdir(parents=True, exist_ok=True)
    parquet.write_table(table, folder / "train.parquet")
    return folder


def write_encoder(folder: Path, layers: int = 1, *, dropout: float = 0.1) -> Path:
    """A saved encoder, without a head."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=32,
        num_attention_heads=4,
        num_hidden_layers=layers,
        intermediate_size=48,
        vocab_size=258,
        max_position_embeddings=16,
        pad_token_id=256,
        initializer_range=0.3,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    transformers.BertModel(config).save_pretrained(folder)
    return folder
