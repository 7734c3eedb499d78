"""The one place that says whether an update may be summed: beside its task and the large model.

Every engine's answers pass here (`run.rounds.answers`), whoever sent them. What is refused costs
its sender's work and nothing else: it is not summed, and nothing of the round changes.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tesserafl.core.buffers import shown
from tesserafl.core.checks import MAX_ENTRY, check_delta, check_entries
from tesserafl.core.errors import UpdateError
from tesserafl.core.model import CLASSES, Model
from tesserafl.core.params import Packed, Params

if TYPE_CHECKING:
    from tesserafl.core.layout import Index, Shape
    from tesserafl.core.messages import Task, Update
    from tesserafl.core.submodel import SubModel, View

MAX_METRIC = 2.0**53
"""Largest magnitude of a metric: what a double counts exactly."""
LEAST_DIVISOR = 1.0 - 1e-9
"""Least of a divisor: what is counted in doubles may fall short of 1 by their rounding."""
MAX_METRICS = 64
"""Most metrics of an update, and most letters of a metric's name."""
NOTED = frozenset(
    {
        "client",
        "examples",
        "steps",
        "entries",
        "flops",
        "seconds",
        "bytes_up",
        "bytes_down",
        "joules",
        "pieces",
        "edge",
        "staleness",
        "reason",
        "text",
    }
)
"""What a run notes of an update beside its metrics: no metric has such a name."""


def check_update(
    task: Task,
    update: Update,
    large: Params,
    model: Model,
    *,
    summable: bool = False,
) -> None:
    """Raise UpdateError unless the update answers the task and may be summed.

    It does if it is of the task's round and client; holds the changes and further tensors that the
    task wants (`Task.wanted`) and no others; of the task's sub-model, each of the model's type, all
    finite and at most `MAX_ENTRY`; and its counts and metrics can be.

    Args:
        task: what was asked.
        update: what came back.
        large: the large model's parameters, read for shapes and types only.
        model: the large model, whose axes say which rows may be left out.
        summable: whether the delta's places and entries were found good by
            `core.checks.check_deltas`, which looks at those of many at once.
    """
    check_claims(task, update)
    _check_names(task, update)
    _check_types(update, large)
    if not summable:
        check_delta(update.submodel, update.delta, large)
    _check_rows(task, update.submodel, model)
    _check_extra(task, update)


def check_claims(task: Task, update: Update) -> None:
    """Raise UpdateError unless what an update says beside its tensors can be of the task."""
    if (update.round, update.client) != (task.round, task.client.id):
        raise UpdateError(
            f"the update is of client {update.client} in round {update.round}; asked was client "
            f"{task.client.id} in round {task.round}"
        )
    _check_counts(task, update)
    _check_metrics(task, update)
    check_part(task, update.submodel)


def check_part(task: Task, part: SubModel) -> None:
    """Raise UpdateError unless a sub-model is the task's, or rows of it where those are allowed.

    What it takes is bounded by the task's sub-model, whatever the other claims to be.
    """
    given = task.submodel
    if part is given:
        return
    if part.sizes != given.sizes:
        raise UpdateError("the update's sub-model is of other sizes than the task's")
    # Where nothing of it is wanted, it may be left out.
    wanted = task.wanted.deltas != frozenset() or not given.views.keys().isdisjoint(
        task.wanted.extra
    )
    if len(part.views) != len(given.views) and (part.views or wanted):
        raise UpdateError(
            f"the update's sub-model has {len(part.views)} parameters; the task's has "
            f"{len(given.views)}"
        )
    fewer = task.wanted.fewer or task.training.mask_absent_classes
    for name, view in part.views.items():
        asked = given.views.get(name)
        if asked is None or view.name != asked.name or len(view.index) != len(asked.index):
            raise UpdateError(
                f"the update's sub-model holds {shown(repr(name))}, which the task's does not"
            )
        for dim, (own, whole) in enumerate(zip(view.index, asked.index, strict=True)):
            if not _same(own, whole) and not (fewer and _within(own, whole)):
                raise UpdateError(
                    f"the update's {name!r} has other rows in dimension {dim} than the task's"
                )


def reported_by(task: Task) -> Collection[str]:
    """The parameters whose changes the task wants."""
    if task.wanted.deltas is not None:
        return task.wanted.deltas
    return task.submodel.views.keys() if task.trainable is None else task.trainable


def most_header_bytes(task: Task) -> int:
    """What the header of an update that answers the task takes at most.

    By names and index lists of its sub-model; JSON within JSON writes a letter in up to 7 bytes,
    and every name thrice.
    """
    names = [*task.submodel.views, *task.wanted.extra]
    names += [view.name for view in task.submodel.views.values()]
    entries = sum(
        0 if isinstance(index, slice) else len(index)
        for view in task.submodel.views.values()
        for index in view.index
    )
    return (1 << 16) + sum(21 * len(name) + 500 for name in names) + 22 * entries


def _check_counts(task: Task, update: Update) -> None:
    examples, training = task.client.num_examples, task.training
    if not 0 <= update.num_examples <= examples:
        raise UpdateError(
            f"the update says that it saw {update.num_examples} examples; client "
            f"{task.client.id} has {examples}"
        )
    most = max(training.steps or 0, training.epochs * max(1, examples))
    if not 0 <= update.num_steps <= most:
        raise UpdateError(
            f"the update says that it made {update.num_steps} steps; its task has {most} at most"
        )


def _check_metrics(task: Task, update: Update) -> None:
    if len(update.metrics) > MAX_METRICS:
        raise UpdateError(
            f"the update has {len(update.metrics)} metrics; allowed are {MAX_METRICS}"
        )
    for name, value in update.metrics.items():
        if name in NOTED or not name.isidentifier() or len(name) > MAX_METRICS:
            raise UpdateError(
                f"an update has no metric {shown(repr(name))}; a metric has a short name like "
                f"'loss', and none that a run notes itself: {', '.join(sorted(NOTED))}"
            )
        least = 0.0 if name.endswith(("_examples", "_entries")) else -MAX_METRIC
        if name in task.wanted.divisors:
            least = LEAST_DIVISOR
        if not least <= value <= MAX_METRIC:  # never true for NaN
            raise UpdateError(
                f"the update's metric {name!r} is {value:g}; allowed is {least:g} to "
                f"{MAX_METRIC:g}. Did training diverge? lower training.lr or set training.clip_norm"
            )
    if not task.wanted.divisors <= update.metrics.keys():
        lacking = min(task.wanted.divisors - update.metrics.keys())
        raise UpdateError(f"the update lacks the metric {lacking!r}, which its task wants")


def _check_names(task: Task, update: Update) -> None:
    expected = set(reported_by(task))
    if update.delta.keys() != expected:
        lacking, other = expected - update.delta.keys(), update.delta.keys() - expected
        what = (
            f"lacks the change of {min(lacking)!r}"
            if lacking
            else f"holds {shown(repr(min(other)))}"
        )
        raise UpdateError(
            f"the update {what}; wanted are the {len(expected)} parameters of its task. A method "
            f"that reports others says so in Task.wanted"
        )


def _check_types(update: Update, large: Params) -> None:
    if isinstance(update.delta, Packed) and all(t.dtype == torch.float32 for t in large.values()):
        return
    for name, tensor in update.delta.items():
        view = update.submodel.views.get(name)
        if view is not None and view.name in large and tensor.dtype != large[view.name].dtype:
            raise UpdateError(
                f"update entry {name!r} is {tensor.dtype}; the model's is {large[view.name].dtype}"
            )


def _check_rows(task: Task, part: SubModel, model: Model) -> None:
    """Of what may be left out: ranks, of both factors the same; and classes, everywhere the same.

    What else there is to a row differs from method to method.
    """
    if part is task.submodel:
        return
    ranks = {pair.down: 0 for pair in model.low_rank} | {pair.up: 1 for pair in model.low_rank}
    classes: Index | None = None
    for name, view in part.views.items():
        asked, ties = task.submodel.views[name], model.ties[view.name]
        for dim, (own, whole) in enumerate(zip(view.index, asked.index, strict=True)):
            if _same(own, whole) or (task.wanted.fewer and ranks.get(view.name) == dim):
                continue
            tie = ties[dim]
            if task.training.mask_absent_classes and tie is not None and tie.axis == CLASSES:
                classes = own if classes is None else classes
                if _same(own, classes):
                    continue
            raise UpdateError(
                f"the update's {name!r} lacks rows in dimension {dim} that its task wants"
            )
    for pair in model.low_rank:
        down, up = part.views.get(pair.down), part.views.get(pair.up)
        if down is not None and up is not None and not _same(down.index[0], up.index[1]):
            raise UpdateError(
                f"the update's {pair.down!r} and {pair.up!r} are factors of one change, and it "
                f"reports other ranks of the one than of the other"
            )


def _check_extra(task: Task, update: Update) -> None:
    wanted = task.wanted.extra
    if update.extra.keys() != wanted.keys():
        lacking, other = wanted.keys() - update.extra.keys(), update.extra.keys() - wanted.keys()
        what = (
            f"lacks the tensor {min(lacking)!r}" if lacking else f"holds {shown(repr(min(other)))}"
        )
        raise UpdateError(f"the update {what}; its task wants {len(wanted)} further tensors")
    for name, tensor in update.extra.items():
        shape: Shape = tuple(wanted[name])
        view: View | None = update.submodel.views.get(name)
        if view is not None and len(view.shape) == len(shape):
            shape = view.shape
        sent = task.extra.get(name, task.params.get(name))
        dtype = torch.float32 if sent is None else sent.dtype
        if tuple(tensor.shape) != shape or tensor.dtype != dtype:
            raise UpdateError(
                f"update tensor {name!r} is {tensor.dtype} {shown(list(tensor.shape))}; wanted is "
                f"{dtype} {list(shape)}"
            )
    check_entries(update.extra, MAX_ENTRY)


def _length(index: Index) -> int:
    return index.stop - index.start if isinstance(index, slice) else len(index)


def _same(one: Index, other: Index) -> bool:
    if isinstance(one, slice) or isinstance(other, slice):
        return isinstance(one, slice) and isinstance(other, slice) and one == other
    return one is other or torch.equal(one, other)


def _within(part: Index, whole: Index) -> bool:
    """Whether every entry of a part is one of the whole's, and none is there twice."""
    count = _length(part)
    if not 0 < count <= _length(whole):
        return False
    if isinstance(whole, slice):
        if isinstance(part, slice):
            return bool(whole.start <= part.start and part.stop <= whole.stop)
        inside = int(part.min()) >= whole.start and int(part.max()) < whole.stop
        return inside and _distinct(part)
    entries = torch.arange(part.start, part.stop) if isinstance(part, slice) else part
    return bool(torch.isin(entries, whole).all()) and _distinct(entries)


def _distinct(entries: Tensor) -> bool:
    return bool((entries.sort().values.diff() > 0).all())
