"""Text to tokens, and whole texts to blocks for language modelling."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tesserafl.core.errors import DataError
from tesserafl.data import ByteTokenizer, load_tokenizer
from tesserafl.data.text import blocks, padded


def test_bytes_end_with_the_end_and_are_cut() -> None:
    tokenizer = ByteTokenizer()
    assert [ids.tolist() for ids in tokenizer.encode(["ab", ""], None)] == [[97, 98, 257], [257]]
    assert [ids.tolist() for ids in tokenizer.encode(["abc", "a"], 2)] == [[97, 98], [97, 257]]
    assert tokenizer.encode(["\u00e9"], None)[0].tolist() == [0xC3, 0xA9, 257]


@given(st.lists(st.text(max_size=8), min_size=1, max_size=5), st.integers(1, 6))
def test_cutting_is_a_prefix_of_the_whole(texts: list[str], length: int) -> None:
    tokenizer = ByteTokenizer()
    pairs = zip(tokenizer.encode(texts, None), tokenizer.encode(texts, length), strict=True)
    assert all(cut.tolist() == whole[:length].tolist() for whole, cut in pairs)


def test_short_texts_are_padded() -> None:
    filled = padded([np.array([1, 2], np.int32), np.array([3], np.int32)], 3, pad_id=9)
    assert filled.tolist() == [[1, 2, 9], [3, 9, 9]] and filled.dtype == torch.int32


def test_labels_are_the_next_tokens() -> None:
    texts = [np.array([1, 2, 0], np.int32), np.array([3, 4, 5, 0], np.int32)]
    made = blocks(texts, 4, pad_id=9)
    assert made.inputs.tolist() == [[1, 2, 0, 3], [4, 5, 9, 9]]
    assert made.labels.tolist() == [[2, 0, 3, 4], [5, 0, -100, -100]]
    assert made.inputs.dtype == torch.int32 and made.labels.dtype == torch.int64


@given(st.lists(st.integers(0, 8), max_size=40), st.integers(1, 7))
def test_every_token_but_the_first_is_predicted_once(stream: list[int], length: int) -> None:
    made = blocks([np.array(stream, np.int32)], length, pad_id=9)
    counted = made.labels >= 0
    assert made.labels[counted].tolist() == stream[1:]
    assert made.inputs[counted].tolist() == stream[:-1]
    assert set(made.inputs[~counted].tolist()) <= {9}


def test_no_text_gives_no_block() -> None:
    assert tuple(blocks([], 4, pad_id=9).inputs.shape) == (0, 4)


@pytest.fixture
def tokenizer_folder(tmp_path: Path) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"[UNK]": 0, "</s>": 1, "a": 2, "b": 3}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", unk_token="[UNK]")
    fast.save_pretrained(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


def test_a_local_hugging_face_tokenizer(tokenizer_folder: Path) -> None:
    tokenizer = load_tokenizer(tokenizer_folder)
    assert (tokenizer.vocab_size, tokenizer.pad_id) == (4, 1)  # it has no padding of its own
    assert [ids.tolist() for ids in tokenizer.encode(["a b", ""], None)] == [[2, 3, 1], [1]]
    assert [ids.tolist() for ids in tokenizer.encode(["a b c", ""], 2)] == [[2, 3], [1]]


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"(?s)data\.tokenizer=.*save_pretrained"):
        load_tokenizer(tmp_path)
    with pytest.raises(DataError, match="not a folder"):
        load_tokenizer(tmp_path / "absent")
