"""What participants of a fusion remember of their own and others' parts; how they disagree."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch

from tesserafl.core.coverage import Coverage
from tesserafl.core.errors import ConfigError, ModelError
from tesserafl.core.exactsum import ExactSum
from tesserafl.core.fit import Fit, Fitted, Training
from tesserafl.core.messages import Memory, Task, Update
from tesserafl.core.method import State
from tesserafl.core.model import Model
from tesserafl.core.params import Params
from tesserafl.core.submodel import cut, index_tensor
from tesserafl.core.windows import carry, feature_entries, kept
from tesserafl.methods._contrast import ENTRIES, POSITIVE, Contrast, entries_of
from tesserafl.methods._shift import adapted

Negatives = Literal["own", "peers", "both"]
Momentum = Literal["reset", "carry"]
_OWN = "previous"
_LARGEST = 1.0
"""Changes count up to this in the disagreement: a weight that moved further has diverged."""


def wants_peers(contrast: float, negatives: Negatives) -> bool:
    """Whether others' sub-models are looked at."""
    return contrast > 0 and negatives != "own"


def num_references(contrast: float, negatives: Negatives, peers: int) -> int:
    """The part as received, the own last one, and peers' ones."""
    if contrast == 0:
        return 0
    return 1 + (negatives != "peers") + peers * wants_peers(contrast, negatives)


def check_able(model: Model, training: Training, contrast: float, momentum: Momentum) -> None:
    """Raise ConfigError or ModelError where the settings cannot work on this model."""
    if contrast > 0 and model.features is None:
        raise ModelError(
            "method.contrast compares representations, and this model gives none that can be cut: "
            "return core.model.Output(logits, features) from its module, or set method.contrast 0"
        )
    if momentum == "carry" and (training.optimiser != "sgd" or not training.momentum):
        raise ConfigError(
            f"method.momentum 'carry' keeps SGD's momentum, but training.optimiser is "
            f"{training.optimiser!r} with training.momentum {training.momentum:g}; set "
            f"training.momentum above 0, or method.momentum 'reset'"
        )


def contrasted(
    fit: Fit, model: Model, task: Task, memory: Memory, strength: float, temperature: float
) -> Fit:
    """The fit with the contrastive loss, where there is a sub-model to keep away from."""
    given = {**memory, **task.extra}
    names = [name.removesuffix(entries_of("")) for name in given if name.endswith(entries_of(""))]
    if not names:
        return fit
    references = {name: _under(f"{name}/", given) for name in names}
    extra = {entries_of(name): given[entries_of(name)] for name in names}
    return replace(
        fit,
        objective=Contrast(strength=strength, temperature=temperature, negatives=tuple(names)),
        references={POSITIVE: task.params, **references},
        extra={**fit.extra, **extra, ENTRIES: feature_entries(model, task.submodel)},
    )


def with_momentum(fit: Fit, model: Model, task: Task, memory: Memory) -> Fit:
    """The fit with the momentum of the last round where the window stayed, zero elsewhere."""
    buffers, fit = _under("momentum/", memory), replace(fit, keep_momentum=True)
    if not buffers:
        return fit
    units = _under("units/", memory)
    moved = carry(buffers, model.slice(units), task.submodel)
    return replace(fit, momentum={name: moved[name] for name in fit.params})


def remembered(
    model: Model, task: Task, fitted: Fitted, contrast: bool, negatives: Negatives
) -> Memory:
    """What the next round needs: the own sub-model where it is a negative, the momentum."""
    memory: Memory = {}
    if contrast and negatives != "peers":
        memory |= {f"{_OWN}/{name}": fitted.params[name] for name in task.params}
        memory[entries_of(_OWN)] = feature_entries(model, task.submodel)
    if fitted.momentum is not None:
        memory |= {f"momentum/{name}": tensor for name, tensor in fitted.momentum.items()}
        places = kept(model, task.submodel)
        memory |= {f"units/{axis}": index_tensor(units) for axis, units in places.items()}
    return memory


@dataclass(kw_only=False)
class RawParts:
    """The sub-models of the last round as their participants trained them, before fusion."""

    tensors: Params
    """`client/parameter`, and `client entries`: which features they give."""

    def collecting(
        self, model: Model, params: Params, updates: Iterable[Update]
    ) -> Iterator[Update]:
        """Pass updates on and keep the values behind them; `params` are those before the round."""
        for update in updates:
            # With all rows of the outputs, of which an update may hold its client's own alone.
            begun = cut(params, model.slice(kept(model, update.submodel)))
            for name, delta in update.delta.items():
                if begun[name].shape == delta.shape:  # the others do not make features
                    begun[name] = begun[name] + delta
            self.tensors |= {f"{update.client}/{name}": t for name, t in begun.items()}
            entries = feature_entries(model, update.submodel)
            self.tensors[entries_of(str(update.client))] = entries
            yield update

    def after(self, task: Task, ranks: Mapping[int, int], count: int) -> Params:
        """The parts of `count` participants that follow the task's in rank, named `peer 0/...`.

        Those of other shapes are left out: they are no parameters of the same module.
        """
        own, found = ranks[task.client.id], 0
        extra: Params = {}
        if not self.tensors:
            return extra
        for peer in sorted(ranks, key=lambda peer: (ranks[peer] - own - 1) % len(ranks)):
            part = _under(f"{peer}/", self.tensors)
            same = {n: t.shape for n, t in part.items()} == {
                n: t.shape for n, t in task.params.items()
            }
            if peer != task.client.id and same and found < count:
                extra |= {f"peer {found}/{name}": tensor for name, tensor in part.items()}
                extra[entries_of(f"peer {found}")] = self.tensors[entries_of(str(peer))]
                found += 1
        return extra


@dataclass
class Disagreement:
    """How far the trained values of an entry's holders lie apart."""

    model: Model
    weights: Mapping[int, int]
    """Client -> its weight in the mean."""
    _squares: ExactSum | None = None
    _counts: Coverage = field(init=False)

    def watching(self, params: Params, updates: Iterable[Update]) -> Iterator[Update]:
        """Pass updates on and sum up the squares of their changes."""
        bound = max(1, sum(self.weights.values()))
        self._squares = ExactSum(max_weight=bound, max_entry=_LARGEST)
        self._counts = Coverage(self.model.shapes)
        for update in updates:
            squares = {
                name: delta.clamp(-_LARGEST, _LARGEST).square()
                for name, delta in update.delta.items()
            }
            self._squares.fold(update.submodel, squares, self.weights[update.client], params)
            views = {name: update.submodel.views[name] for name in update.delta}
            self._counts.add([replace(update.submodel, views=views)])
            yield update

    def notes(self, before: State, after: State, overlap: float) -> dict[str, Any]:
        """The state's notes, with the next overlap if something was measured."""
        notes = dict(after.notes)
        measured = self._measured(before.params, after.params)
        return notes if measured is None else notes | adapted(overlap, measured, notes)

    def _measured(self, before: Params, after: Params) -> float | None:
        """Variance over the squared mean of the values, on entries with several holders."""
        if self._squares is None:
            return None
        variance, size, counts = 0.0, 0.0, self._counts.counts
        for name, square, _ in self._squares.means(before):
            shared = counts[name] > 1
            mean = after[name].double() - before[name].double()
            variance += float((square - mean.square()).clamp(min=0.0)[shared].sum())
            size += float(after[name][shared].double().square().sum())
        return variance / size if size else None


def _under(begin: str, tensors: Mapping[str, torch.Tensor]) -> Params:
    return {n.removeprefix(begin): t for n, t in tensors.items() if n.startswith(begin)}
