"""Text to token ids, without a download."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from tesserafl.core.errors import DataError
from tesserafl.core.fit import IGNORED
from tesserafl.data.examples import Examples
from tesserafl.data.tables import Table

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase

    Ids = NDArray[np.int32]


class Tokenizer(Protocol):
    """Text to token ids."""

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        ...

    @property
    def pad_id(self) -> int:
        """Token id that fills short texts."""
        ...

    def encode(self, texts: Sequence[str], length: int | None) -> list[Ids]:
        """Token ids of each text, never none: at most `length`, or the whole text and its end."""
        ...


@dataclass(frozen=True, kw_only=True)
class ByteTokenizer:
    """UTF-8 bytes: ids 0..255 are the bytes, 256 is padding, 257 ends a text."""

    vocab_size: int = 258
    """256 bytes, padding and end"""
    pad_id: int = 256
    """fills short texts"""
    end_id: int = 257
    """ends every text that is not truncated"""

    def encode(self, texts: Sequence[str], length: int | None) -> list[Ids]:
        """Bytes of each text and the end, cut to `length`."""
        import numpy as np

        encoded = []
        for text in texts:
            raw = text[:length].encode(errors="replace")  # a character has at least one byte
            ids = np.empty(len(raw) + 1, dtype=np.int32)
            ids[:-1], ids[-1] = np.frombuffer(raw, dtype=np.uint8), self.end_id
            encoded.append(ids[:length])
        return encoded


@dataclass(frozen=True, kw_only=True)
class HuggingFaceTokenizer:
    """A tokenizer of `transformers`; a cut text gets its special tokens, a whole one its end."""

    tokenizer: PreTrainedTokenizerBase
    """the loaded tokenizer"""
    end_id: int
    """ends a whole text: end-of-text, else the separator"""
    pad_id: int
    """fills short texts: padding, else `end_id`"""

    @property
    def vocab_size(self) -> int:
        """Number of token ids, added ones included."""
        return len(self.tokenizer)

    def encode(self, texts: Sequence[str], length: int | None) -> list[Ids]:
        """Token ids of each text, 1,000 texts at a time."""
        import numpy as np

        encoded: list[Ids] = []
        for start in range(0, len(texts), 1000):
            some = self.tokenizer(
                list(texts[start : start + 1000]),
                add_special_tokens=length is not None,
                truncation=length is not None,
                max_length=length,
                return_attention_mask=False,
                verbose=False,
            )["input_ids"]
            tails = [[self.end_id] if length is None or not ids else [] for ids in some]
            pairs = zip(some, tails, strict=True)
            encoded += [np.array(ids + tail, dtype=np.int32)[:length] for ids, tail in pairs]
        return encoded


def load_tokenizer(folder: Path | None) -> Tokenizer:
    """The byte tokenizer, or the one in a local folder. Raises DataError if there is none."""
    if folder is None:
        return ByteTokenizer()
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise DataError(
            f"data.tokenizer={folder} needs transformers, which is not installed; "
            f"pip install 'tesserafl[huggingface]', or leave data.tokenizer empty for bytes"
        ) from error
    if not folder.is_dir():
        raise DataError(f"data.tokenizer={folder} is not a folder; give one that holds a tokenizer")
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise DataError(
            f"data.tokenizer={folder} holds no tokenizer that can be read: {error}; give a folder "
            f"written by save_pretrained"
        ) from error
    ends = (tokenizer.eos_token_id, tokenizer.sep_token_id, tokenizer.pad_token_id)
    end_id = next((token for token in ends if token is not None), None)
    if end_id is None:
        raise DataError(
            f"data.tokenizer={folder} has neither an end-of-text, a separator nor a padding token; "
            f"set its eos_token and save it again"
        )
    pad_id = end_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    return HuggingFaceTokenizer(tokenizer=tokenizer, end_id=end_id, pad_id=pad_id)


def read_tokens(
    table: Table, column: str, tokenizer: Tokenizer, *, length: int, whole: bool
) -> list[Ids]:
    """Token ids of each row: whole texts, or cut to `length`."""
    if length < 1:
        raise DataError(f"data.sequence_length must be at least 1; got {length}")
    texts = table.column(column).to_pylist()
    if None in texts:
        raise DataError(f"{table.where(texts.index(None))}: {column!r} is empty; remove the row")
    return tokenizer.encode(texts, None if whole else length)


def padded(tokens: Sequence[Ids], length: int, pad_id: int) -> Tensor:
    """Texts of at most `length` tokens, filled at the end: int32 [n, length]."""
    filled = torch.full((len(tokens), length), pad_id, dtype=torch.int32)
    for row, ids in enumerate(tokens):
        filled[row, : len(ids)] = torch.from_numpy(ids)
    return filled


def blocks(tokens: Sequence[Ids], length: int, pad_id: int) -> Examples:
    """Whole texts, one after another, cut into blocks for language modelling.

    A block has `length + 1` tokens, its last one being the next block's first, so that every
    token but the very first is predicted once. The last block is filled with padding.
    """
    import numpy as np

    stream = torch.from_numpy(np.concatenate([np.empty(0, dtype=np.int32), *tokens]))
    num_predicted = max(0, len(stream) - 1)
    num_blocks = -(-num_predicted // length)
    inputs = torch.full((num_blocks * length,), pad_id, dtype=torch.int32)
    labels = torch.full((num_blocks * length,), IGNORED, dtype=torch.int64)
    inputs[:num_predicted] = stream[:num_predicted]
    labels[:num_predicted] = stream[1:]
    return Examples(inputs=inputs.view(-1, length), labels=labels.view(-1, length))
