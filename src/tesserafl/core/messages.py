"""What goes down to a client and what comes up."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from tesserafl.core.fit import Training
from tesserafl.core.params import Params, num_bytes
from tesserafl.core.submodel import SubModel

Options = Mapping[str, Any]
"""Plain JSON values."""

Memory = dict[str, Tensor]
"""What a client keeps on its own device between rounds."""


@dataclass(frozen=True, kw_only=True)
class Client:
    """What the server knows of a device."""

    id: int
    """0, 1, 2, ..."""
    num_examples: int
    """training examples that the client says it has"""
    memory_bytes: int | None = None
    """what training may take at its peak; None: unlimited"""
    depth: int | None = None
    """most blocks whose adapters its memory and its time let it train; None: all"""
    mixing: int = 1
    """weight of its word with the one who averages; unequal only where peers of unequal numbers of
    neighbours average among themselves"""


@dataclass(frozen=True, kw_only=True)
class Task:
    """One client's part of one round."""

    round: int
    client: Client
    submodel: SubModel
    params: Params
    """The sub-model's parameters, cut from the global model."""
    training: Training
    trainable: frozenset[str] | None = None
    """Names that the client is to train; None: the method's `local` says so. Costs go by it."""
    extra: Params = field(default_factory=dict)
    """Further tensors that the method sends."""
    options: Options = field(default_factory=dict)
    """Further values that the method sends."""

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensors that go down."""
        return num_bytes(self.params) + num_bytes(self.extra)


@dataclass(frozen=True, kw_only=True)
class Update:
    """What a client answers."""

    round: int
    client: int
    submodel: SubModel
    """Where the deltas lie; may hold fewer rows than the task's."""
    delta: Params
    """Trained minus received parameters."""
    num_examples: int
    num_steps: int
    metrics: Mapping[str, float]
    extra: Params = field(default_factory=dict)
    """Further tensors that the method reports."""

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensors that come up."""
        return num_bytes(self.delta) + num_bytes(self.extra)
