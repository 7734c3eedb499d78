"""Examples as compact tensors, and who holds them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

Kind = Literal["image", "vector", "tokens"]
"""What one input is."""
Task = Literal["image-classification", "text-classification", "causal-lm", "vector-classification"]
"""What is learned."""


@dataclass(frozen=True, kw_only=True)
class Spec:
    """What a model must know of a data set."""

    kind: Kind
    """what one input is"""
    task: Task
    """what is learned"""
    shape: tuple[int, ...]
    """of one input: (channels, height, width), (features,) or (sequence_length,)"""
    num_classes: int
    """number of classes; for causal-lm the size of the vocabulary"""
    class_names: tuple[str, ...] = ()
    """name of each class; empty for causal-lm"""
    vocab_size: int = 0
    """number of token ids; 0 unless the inputs are tokens"""
    pad_id: int = 0
    """token id of padding; 0 unless the inputs are tokens"""


@dataclass(frozen=True, kw_only=True)
class Examples:
    """A set of examples, kept as small as it comes and converted one batch at a time."""

    inputs: Tensor
    """uint8 [n, channels, height, width], float32 [n, features] or int32 [n, time]"""
    labels: Tensor
    """int64 [n]; for causal-lm [n, time], the token after each input, -100 where none follows"""

    def __post_init__(self) -> None:
        assert len(self.inputs) == len(self.labels), "inputs and labels differ in length"

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def num_bytes(self) -> int:
        """Memory that the tensors hold."""
        return self.inputs.nbytes + self.labels.nbytes

    def take(self, rows: Tensor) -> Examples:
        """The examples at `rows` (int64 [k]), in that order, as a copy."""
        return Examples(inputs=self.inputs[rows], labels=self.labels[rows])

    def batch(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs and labels at `rows` (int64, any shape) as a model takes them.

        Images become float32 in [-1, 1], tokens int64; vectors stay float32.
        """
        inputs = _rows_of(self.inputs, rows)
        if inputs.dtype == torch.uint8:
            inputs = inputs.float().div_(127.5).sub_(1.0)
        elif inputs.dtype == torch.int32:
            inputs = inputs.long()
        return inputs, _rows_of(self.labels, rows)

    @cached_property
    def classes(self) -> Tensor:
        """The distinct labels, sorted, without the ignored ones: int64 [k]."""
        distinct: Tensor = torch.unique(self.labels)
        return distinct[distinct >= 0]


def _rows_of(tensor: Tensor, rows: Tensor) -> Tensor:
    """`tensor[rows]`, at half the cost of a call that takes any index."""
    if rows.dim() == 1:
        return tensor.index_select(0, rows)
    return tensor.index_select(0, rows.reshape(-1)).view(*rows.shape, *tensor.shape[1:])


@dataclass(frozen=True, kw_only=True)
class ClientData:
    """What lies on one client."""

    train: Examples
    """what it trains on; never empty"""
    validation: Examples
    """what it chooses settings on; may be empty"""
    test: Examples
    """what its own model is judged by; may be empty"""


@dataclass(frozen=True, kw_only=True)
class FederatedData:
    """A data set spread over clients, with a test set that no client holds."""

    spec: Spec
    """what a model must know of it"""
    clients: tuple[ClientData, ...]
    """client 0, 1, ..."""
    test: Examples
    """the global test set"""
    public: Examples | None = None
    """what the server holds itself; None: nothing"""
    elsewhere: bool = False
    """The clients' examples lie on devices; those here only have their shape."""
