"""What travels in fewer bytes than it has: what a client sends, what it keeps of the rest for the
next time, and what is sent to it.

    p = delta + left        what should be sent
    sent = C(p)             what is sent: `core.coding`
    left = p - decoded(sent)

Error feedback: Seide et al., Interspeech 2014; for any compressor that loses a share of what it is
given, SGD then converges as without it: Stich, Cordonnier and Jaggi, "Sparsified SGD with Memory",
NeurIPS 2018 (https://arxiv.org/abs/1809.07599); Karimireddy et al., "Error Feedback Fixes SignSGD
and other Gradient Compression Schemes", ICML 2019, Algorithm 2 (https://arxiv.org/abs/1901.09847).
Here the gradient is a client's change of a round, and each client has a rest of its own.

What goes down may be rounded to bfloat16. A client begins with what it received, and its change is
that of what it received; the server adds the change to its own float32 parameters. So what is lost
on the way down is never lost on the server.

The rest lies in the client's `Memory` under names that no method sees, with its place in the large
model: a client may train another part next time. What of the rest lies in that part is sent with
it; what lies elsewhere is dropped, so that a device never keeps more than one part.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from tesserafl.core.checks import MAX_ENTRY, check_entries
from tesserafl.core.coding import coded, coded_bytes
from tesserafl.core.errors import ConfigError
from tesserafl.core.layout import Index
from tesserafl.core.messages import Memory, Task, Update
from tesserafl.core.method import Method, Topology
from tesserafl.core.submodel import View

_OURS = "compression/"
"""Names of a memory that begin so are not the method's."""
_LEFT, _PLACE = f"{_OURS}left/", f"{_OURS}place/"
_LISTED = -1
"""Begins a place that is a list of entries; any other is a first entry and one past the last."""


@dataclass(frozen=True, kw_only=True)
class CompressionSettings:
    """How clients' changes are sent, and the parameters that go down to them."""

    deltas: Literal["none", "bfloat16", "int8", "topk"] = "none"
    """none: float32, as they are; bfloat16: half the bytes; int8: a quarter, with a scale for every
    row of a tensor; topk: the largest entries alone, 8 bytes each"""
    share: float = 0.01
    """of topk: share of every tensor's entries that is sent, at least one"""
    error_feedback: bool = True
    """a client adds what was lost to its next change; takes memory like its trained parameters"""
    params: Literal["none", "bfloat16"] = "none"
    """what goes down. none: as it is; bfloat16: float32 parameters in half the bytes"""

    def __post_init__(self) -> None:
        if not 0.0 < self.share <= 1.0:
            raise ConfigError(f"compression.share must be in (0, 1]; got {self.share}")

    def check(self, method: Method, topology: Topology) -> None:
        """Check that a method's changes can be compressed.

        Raises:
            ConfigError: there are none, or what was lost of one is not worth anything in the next.
        """
        if self.params != "none" and topology == "peers":
            raise ConfigError(
                f"compression.params {self.params} is for what a server sends down; peers have "
                f"none: set compression.params to none"
            )
        if self.deltas == "none":
            return
        name, off = type(method).__name__, "set compression.deltas to none"
        if topology == "peers":
            raise ConfigError(
                f"compression.deltas {self.deltas} is for clients of a server; peers exchange "
                f"values of a model, which cannot miss entries: {off}"
            )
        if not getattr(method, "sends_changes", True):
            raise ConfigError(
                f"compression.deltas {self.deltas} is for changes of parameters, and {name} sends "
                f"none: {off}"
            )
        if self.error_feedback and getattr(method, "rewrites", False):
            raise ConfigError(
                f"between two rounds {name} puts entries into another order, basis or model, so "
                f"what was lost of a change has no place in the next; set "
                f"compression.error_feedback to false"
            )


def as_sent(task: Task, settings: CompressionSettings) -> Task:
    """The task as its client gets it, with what it is sent of the parameters."""
    if settings.params == "none" or task.wanted.exact:
        return task
    return replace(task, params=coded(task.params, settings.params))


def apart(memory: Memory) -> tuple[Memory, Memory]:
    """What of a client's memory is its method's, and what was left of its last change."""
    ours = {name: tensor for name, tensor in memory.items() if name.startswith(_OURS)}
    if not ours:
        return memory, ours
    return {name: tensor for name, tensor in memory.items() if name not in ours}, ours


def compressed(
    update: Update, left: Memory, settings: CompressionSettings
) -> tuple[Update, Memory]:
    """The update as it is sent, and what is left of its change.

    Further tensors (`Update.extra`) are the method's own business: they are sent as they are.

    Args:
        update: as the method made it.
        left: of the client's last update.
        settings: how.

    Raises:
        UpdateError: an entry has diverged. Nothing of it may be remembered.
    """
    if settings.deltas == "none" or not update.delta:
        return update, left
    views, wanted = update.submodel.views, dict(update.delta)
    if settings.error_feedback and left:
        wanted = {n: _with_left(tensor, views[n], left) for n, tensor in update.delta.items()}
    check_entries(wanted, MAX_ENTRY)
    sent = coded(wanted, settings.deltas, settings.share)
    rest: Memory = {}
    if settings.error_feedback:
        for name in sorted(sent.coded):
            view = views[name]
            rest[f"{_LEFT}{view.name}"] = wanted[name] - sent[name]
            for dim, index in enumerate(view.index):
                rest[f"{_PLACE}{dim}/{view.name}"] = _written(index)
    return replace(update, delta=sent), rest


def task_bytes(task: Task, settings: CompressionSettings) -> int:
    """Bytes of the tensors that go down with a task, which need not have values."""
    total = sum(tensor.nbytes for tensor in task.extra.values())
    for tensor in task.params.values():
        half = settings.params != "none" and tensor.dtype == torch.float32
        total += tensor.nbytes // 2 if half else tensor.nbytes
    return total


def answer_bytes(task: Task, settings: CompressionSettings) -> int:
    """Bytes of the changes that a task's answer holds, of its further tensors too.

    Counted for all rows, where an answer may hold some alone.
    """
    names = task.wanted.deltas
    if names is None:
        names = task.trainable
    total = 0
    for name, view in task.submodel.views.items():
        if names is not None and name not in names:
            continue
        held = task.params.get(name)
        dtype = torch.float32 if held is None else held.dtype
        if settings.deltas == "none" or dtype != torch.float32:
            total += dtype.itemsize * _count(view.shape)
        else:
            total += coded_bytes(view.shape, settings.deltas, settings.share)
    return total + sum(4 * _count(shape) for shape in task.wanted.extra.values())


def _with_left(change: Tensor, view: View, left: Mapping[str, Tensor]) -> Tensor:
    """The change and what lies in its place of the last one's rest."""
    rest = left.get(f"{_LEFT}{view.name}")
    if rest is None or change.dtype != rest.dtype or change.dim() != rest.dim():
        return change
    before = [left[f"{_PLACE}{dim}/{view.name}"] for dim in range(rest.dim())]
    now = [_written(index) for index in view.index]
    if all(torch.equal(one, other) for one, other in zip(before, now, strict=True)):
        return change + rest
    pairs = [_common(_entries(o), _entries(n)) for o, n in zip(before, now, strict=True)]
    for dim, (there, _) in enumerate(pairs):
        rest = rest.index_select(dim, there)
    moved = torch.zeros_like(change)
    moved[torch.meshgrid(*(here for _, here in pairs), indexing="ij")] = rest
    return change + moved


def _written(index: Index) -> Tensor:
    if isinstance(index, slice):
        return torch.tensor([index.start, index.stop])
    return torch.cat([torch.tensor([_LISTED]), index])


def _entries(written: Tensor) -> Tensor:
    if int(written[0]) == _LISTED:
        return written[1:]
    return torch.arange(int(written[0]), int(written[1]))


def _common(old: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
    """Where the entries lie that both have: in the one, and in the other."""
    order = old.argsort()
    found = order[torch.searchsorted(old[order], new).clamp(max=len(old) - 1)]
    here = (old[found] == new).nonzero()[:, 0]
    return found[here], here


def _count(shape: Sequence[int]) -> int:
    return torch.Size(shape).numel()
