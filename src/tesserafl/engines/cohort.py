"""Several clients of one shape, trained in one vectorised program instead of one after another.

    parameters  [clients, ...]       batches  [clients, width, ...], what is missing does not count
    step        vmap over clients of (gradient, clipping, optimiser), traced once, run every step

For small models the cost of a step is Python and dispatch, not arithmetic; here it is paid once for
all clients. A client's numbers never meet another's: results are those of `execute` up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.func import grad_and_value, vmap

from tesserafl.core.fit import IGNORED, Fit, Fitted, Forward, Training
from tesserafl.core.params import Params, aligned
from tesserafl.data.examples import Examples
from tesserafl.engines.batches import batches
from tesserafl.engines.graphs import Program, trace
from tesserafl.engines.optimisers import num_slots, optimise, scalars_of

_Given = tuple[Tensor, int | None]
"""An input of a step: a tensor, and 0 if it is stacked or None if all members share it."""
_AT_ONCE = 1 << 22
"""Bytes of batches that are gathered at once."""


@dataclass(frozen=True, kw_only=True)
class Member:
    """One client's work in a cohort."""

    fit: Fit
    examples: Examples
    draw: torch.Generator
    """The order of the examples comes from it."""

    @property
    def shape(self) -> tuple[object, ...]:
        """Members are trained together only if this is equal for them."""
        fit = self.fit
        return (
            fit.training,
            fit.objective,
            fit.trainable,
            fit.width_scaling,
            _signature(fit.params),
            _signature(fit.extra),
            len(self.examples.classes) if fit.training.mask_absent_classes else None,
        )


def obstacle(module: nn.Module, training: Training) -> str | None:
    """Why clients of this module cannot be trained together; None if they can."""
    if training.augment:
        return "augmentation draws for one batch at a time"
    for part in module.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            return "BatchNorm would mix a client's batch with its padding"
        if isinstance(part, nn.modules.dropout._DropoutNd) and part.p > 0:
            return "dropout draws other numbers for many clients than for one"
    return None


@dataclass(kw_only=True)
class Cohorts:
    """Trains members together; keeps the traced programs."""

    most: int
    """Members of one program, at most."""
    width: Callable[[int], int]
    """Batch size asked for -> examples in the largest batch that any client ever has."""
    compiled: bool = False
    """Hand the programs to torch.compile."""
    device: str = "cpu"
    _programs: dict[object, Program] = field(default_factory=dict)

    def train(self, members: Sequence[Member], forward: Forward, key: object) -> list[Fitted]:
        """What came of each member's fit, in their order.

        Args:
            members: of one `shape`, at most `most` of them.
            forward: the sub-model as a function of its parameters.
            key: equal for equal `forward`s only; the programs are kept under it.
        """
        orders = [_order(member) for member in members]
        # The longest first: whoever still trains is then always the top of the stack.
        ranks = sorted(range(len(members)), key=lambda i: -len(orders[i]))
        stack = _Stack(self, forward, key, [members[i] for i in ranks])
        fitted = stack.train([orders[i] for i in ranks])
        return [fitted[ranks.index(i)] for i in range(len(members))]

    def rows(self, count: int) -> int:
        """Rows of the program for so many members: few sizes, so that few programs are traced."""
        return min(1 << (count - 1).bit_length(), self.most)

    def program(self, key: object, function: Program, inputs: Sequence[Tensor]) -> Program:
        """The function as a program, traced when the key is first asked for."""
        if key not in self._programs:
            self._programs[key] = trace(function, inputs, compiled=self.compiled)
        return self._programs[key]


class _Stack:
    """The members' numbers, stacked along a new first dimension."""

    def __init__(
        self, cohorts: Cohorts, forward: Forward, key: object, members: Sequence[Member]
    ) -> None:
        self.cohorts, self.forward, self.members = cohorts, forward, members
        self.fit = fit = members[0].fit
        # A schedule changes the rate in every round; programs take it as an input.
        self.key = (key, replace(fit.training, lr=1.0), fit.objective)
        self.trained = [n for n in fit.params if fit.trainable is None or n in fit.trainable]
        self.frozen = [n for n in fit.params if n not in self.trained]
        self.extra = list(fit.extra) + ["classes"] * fit.training.mask_absent_classes

    def train(self, orders: Sequence[list[NDArray[np.int64]]]) -> list[Fitted]:
        """Every member's steps; `orders` holds the rows of each of its batches."""
        number, (weights, frozen, extra) = len(self.trained), self._tensors()
        slots = [(torch.zeros_like(t), dim) for t, dim in weights] * num_slots(self.fit.training)
        losses: list[Tensor] = []
        finals: dict[int, tuple[Tensor, ...]] = {}
        rows, program = 0, None
        for step, (inputs, labels) in enumerate(self._batches(orders)):
            last = [len(order) == step + 1 for order in orders]
            needed = self.cohorts.rows(sum(len(order) > step for order in orders))
            if needed != rows:
                rows, program = needed, None
                weights, slots, frozen, extra = (
                    _top(tensors, rows) for tensors in (weights, slots, frozen, extra)
                )
            batch = [(inputs[:rows], 0), (labels[:rows], 0)]
            given = [*weights, *slots, *frozen, *extra, *batch, *self._scalars(step)]
            tensors = [tensor for tensor, _ in given]
            if program is None or step == 1:  # in the first step members may share their weights
                program = self._program(given)
            with torch.no_grad():
                *after, loss = program(*tensors)
            losses.append(loss)
            weights = [(tensor, 0) for tensor in after[:number]]
            slots = [(tensor, 0) for tensor in after[number:]]
            if any(last):
                members = zip(*(tensor.cpu().unbind() for tensor in after[:number]), strict=True)
                finals |= {r: own for r, own in enumerate(members) if r < len(last) and last[r]}
        return self._fitted(orders, finals, losses)

    def _scalars(self, step: int) -> list[_Given]:
        if step == 0 or self.fit.training.optimiser == "adamw":
            numbers = scalars_of(self.fit.training, step, self.cohorts.device)
            self.scalars: list[_Given] = [(number, None) for number in numbers]
        return self.scalars

    def _batches(
        self, orders: Sequence[list[NDArray[np.int64]]]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Inputs and labels of every step [rows, width, ...], several steps gathered at once."""
        table, examples, device = self._batch_rows(orders), self._examples(), self.cohorts.device
        size = table[0].numel() * 4 * max(1, examples.inputs[0].numel())
        for rows in torch.split(table, max(1, _AT_ONCE // size)):
            inputs, labels = examples.batch(rows)
            yield from zip(inputs.to(device), labels.to(device), strict=True)

    def _program(self, given: Sequence[_Given]) -> Program:
        names = (tuple(self.trained), tuple(self.frozen), tuple(self.extra))
        strides = self.cohorts.compiled  # a compiled program is made for these too
        signature = (
            names,
            *((t.shape, t.dtype, t.stride() if strides else None, dim) for t, dim in given),
        )
        function = self._step(tuple(dim for _, dim in given))
        return self.cohorts.program((self.key, signature), function, [t for t, _ in given])

    def _step(self, dims: tuple[int | None, ...]) -> Program:
        """One step of all members, a function of flat tensors: see `train` for their order."""
        numbers = [len(self.trained), num_slots(self.fit.training) * len(self.trained)]
        numbers += [len(self.frozen), len(self.extra), 2]
        cuts = list(accumulate(numbers))
        training, objective, forward = self.fit.training, self.fit.objective, self.forward

        def one(*flat: Tensor) -> list[Tensor]:
            weights, slots, frozen, extra, batch, scalars = (
                list(flat[a:b]) for a, b in zip([0, *cuts], [*cuts, None], strict=True)
            )
            fixed = dict(zip(self.frozen, frozen, strict=True))
            given = dict(zip(self.extra, extra, strict=True))

            def loss_of(trained: Params) -> Tensor:
                return objective(forward, {**trained, **fixed}, batch[0], batch[1], given)

            gradients, loss = grad_and_value(loss_of)(dict(zip(self.trained, weights, strict=True)))
            slopes = [gradients[name] for name in self.trained]
            return [*optimise(training, weights, slots, slopes, scalars), loss]

        return lambda *flat: list(vmap(one, in_dims=dims)(*flat))

    def _tensors(self) -> tuple[list[_Given], ...]:
        """Trained and frozen parameters and the objective's tensors, each with its vmap dimension.

        A tensor that is equal for all members is not copied, until a step makes them differ.
        """
        rows, device = self.cohorts.rows(len(self.members)), self.cohorts.device

        def stacked(tensors: Sequence[Tensor]) -> _Given:
            # By value: in a worker process equal tensors are not the same object, and which
            # program runs must not depend on that.
            if all(t is tensors[0] or torch.equal(t, tensors[0]) for t in tensors):
                return aligned(tensors[0].detach().to(device)), None
            filled = [*tensors, *[tensors[0]] * (rows - len(tensors))]
            return torch.stack(filled).detach().to(device), 0

        fits = [member.fit for member in self.members]
        given: list[Mapping[str, Tensor]] = [fit.extra for fit in fits]
        if self.fit.training.mask_absent_classes:
            given = [{**m.fit.extra, "classes": m.examples.classes} for m in self.members]
        weights = [stacked([fit.params[name] for fit in fits]) for name in self.trained]
        if self.cohorts.compiled:  # one program to compile, not a second for the first step
            weights = [
                (t, 0) if d == 0 else (t.expand(rows, *t.shape).clone(), 0) for t, d in weights
            ]
        return (
            weights,
            [stacked([fit.params[name] for fit in fits]) for name in self.frozen],
            [stacked([tensors[name] for tensors in given]) for name in self.extra],
        )

    def _examples(self) -> Examples:
        """All members' examples and one more, which does not count and fills batches up."""
        parts = [member.examples for member in self.members]
        inputs = [part.inputs for part in parts]
        labels = [part.labels for part in parts]
        return Examples(
            inputs=torch.cat([*inputs, torch.zeros_like(inputs[0][:1])]),
            labels=torch.cat([*labels, torch.full_like(labels[0][:1], IGNORED)]),
        )

    def _batch_rows(self, orders: Sequence[list[NDArray[np.int64]]]) -> Tensor:
        """Rows of `_examples`: int64 [steps, rows of the program, width]."""
        counts = [len(member.examples) for member in self.members]
        width = self.cohorts.width(self.fit.training.batch_size)
        shape = (len(orders[0]), self.cohorts.rows(len(orders)), width)
        table = np.full(shape, sum(counts), dtype=np.int64)
        first = 0
        for rank, (order, count) in enumerate(zip(orders, counts, strict=True)):
            for step, rows in enumerate(order):
                table[step, rank, : len(rows)] = rows + first
            table[len(order) :, rank] = table[0, rank]  # who is done goes on, and nobody looks
            first += count
        table[:, len(orders) :] = table[:, :1]
        return torch.from_numpy(table)

    def _fitted(
        self,
        orders: Sequence[list[NDArray[np.int64]]],
        finals: Mapping[int, tuple[Tensor, ...]],
        losses: Sequence[Tensor],
    ) -> list[Fitted]:
        table = np.zeros((len(losses), self.cohorts.rows(len(orders))))
        for step, loss in enumerate(losses):
            table[step, : len(loss)] = loss.detach().cpu().numpy()
        fitted = []
        for rank, (member, order) in enumerate(zip(self.members, orders, strict=True)):
            total = len(member.examples)
            epoch = len(order) // member.fit.training.epochs  # steps of one
            sizes = [len(batch) for batch in order[-epoch:]]
            last = table[len(order) - epoch : len(order), rank]
            fitted.append(
                Fitted(
                    params=dict(zip(self.trained, finals[rank], strict=True)),
                    num_examples=total,
                    num_steps=len(order),
                    metrics={"loss": float(last @ np.array(sizes)) / total},
                    classes=member.examples.classes,
                )
            )
        return fitted


def _order(member: Member) -> list[NDArray[np.int64]]:
    """The rows of every batch of every epoch, drawn as `execute` draws them."""
    training, total = member.fit.training, len(member.examples)
    return [
        rows.numpy()
        for _ in range(training.epochs)
        for rows in batches(total, training.batch_size, member.draw)
    ]


def _top(tensors: Sequence[_Given], rows: int) -> list[_Given]:
    return [(t if d is None or len(t) == rows else t[:rows], d) for t, d in tensors]


def _signature(tensors: Mapping[str, Tensor]) -> tuple[object, ...]:
    return tuple((name, tuple(t.shape), t.dtype) for name, t in tensors.items())
