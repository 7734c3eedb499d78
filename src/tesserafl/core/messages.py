"""What goes down to a client and what comes up."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from tesserafl.core.coding import sent_bytes
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
class Wanted:
    """What the answer to a task holds. An update that holds less, more or other is refused."""

    deltas: frozenset[str] | None = None
    """Parameters whose change it holds; None: all that are trained (`Task.trainable`)."""
    fewer: bool = False
    """Whether it may hold some rows of them alone; with masked classes it always may."""
    extra: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Further tensors and their shapes. Of what has a parameter's name its own rows are held."""
    divisors: frozenset[str] = frozenset()
    """Metrics that the method divides by: 1 or more."""
    exact: bool = False
    """Whether changes come as they are in a run that compresses them."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """One client's part of one round."""

    round: int
    client: Client
    submodel: SubModel
    params: Params
    """The sub-model's parameters, cut from the global model; `core.coding.Coded` where they are
    sent in fewer bytes."""
    training: Training
    trainable: frozenset[str] | None = None
    """Names that the client is to train; None: the method's `local` says so. Costs go by it."""
    extra: Params = field(default_factory=dict)
    """Further tensors that the method sends."""
    options: Options = field(default_factory=dict)
    """Further values that the method sends."""
    wanted: Wanted = field(default_factory=Wanted)
    """What the answer holds."""

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensors that go down, as they are sent."""
        return sent_bytes(self.params) + num_bytes(self.extra)


@dataclass(frozen=True, kw_only=True)
class Update:
    """What a client answers."""

    round: int
    client: int
    submodel: SubModel
    """Where the deltas lie; may hold fewer rows than the task's."""
    delta: Params
    """Trained minus received parameters; of a run with compression `core.coding.Coded`."""
    num_examples: int
    num_steps: int
    metrics: Mapping[str, float]
    extra: Params = field(default_factory=dict)
    """Further tensors that the method reports."""

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensors that come up, as they are sent."""
        return sent_bytes(self.delta) + num_bytes(self.extra)
