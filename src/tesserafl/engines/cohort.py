"""Several clients of one shape, trained in one vectorised program instead of one after another.

    parameters  [clients, ...]       batches  [clients, width, ...], what is missing does not count
    step        vmap over clients of (gradient, clipping, optimiser), traced once, run every step
    references  their outputs for all examples, once before the first step; batches hold their rows

For small models the cost of a step is Python and dispatch, not arithmetic; here it is paid once for
all clients. A client's numbers never meet another's: results are those of `execute` up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import grad_and_value, vmap

from tesserafl.core.fit import Fitted, Forward, Training
from tesserafl.core.params import Params, packable, packed_rows
from tesserafl.engines.batches import steps_of_last_pass
from tesserafl.engines.gather import Order, batch_rows, order_of, pooled
from tesserafl.engines.graphs import Program, trace
from tesserafl.engines.member import Member
from tesserafl.engines.optimisers import (
    check_momentum,
    num_slots,
    optimise,
    scalars_of,
    trained_names,
)
from tesserafl.engines.stacking import Given, shared_or_stacked, stacked, top
from tesserafl.engines.together import Reads


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

        Raises:
            ConfigError: momentum is to be carried on, and the optimiser has none.
            ModelError: there are references, and the model returns no features.
        """
        for member in members:
            check_momentum(member.fit)
        orders = [order_of(len(m.examples), m.fit.training, m.draw) for m in members]
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
        self.key = (key, replace(fit.training, lr=1.0, steps=None), fit.objective)
        self.trained = trained_names(fit)
        self.frozen = [n for n in fit.params if n not in self.trained]
        self.extra = list(fit.extra) + ["classes"] * fit.training.mask_absent_classes
        self.keeps = any(member.fit.keep_momentum for member in members)

    def train(self, orders: Sequence[Order]) -> list[Fitted]:
        """Every member's steps; `orders` holds the rows of each of its batches."""
        number, (weights, frozen, extra) = len(self.trained), self._tensors()
        slots, kept = self._slots(weights), slice(number, 2 * number if self.keeps else number)
        losses: list[Tensor] = []
        finals: dict[int, tuple[Params, Sequence[Tensor]]] = {}
        rows, program, ends = 0, None, [len(order) for order in orders]
        for step, held in enumerate(self._batches(orders)):
            needed = self.cohorts.rows(sum(end > step for end in ends))
            if needed != rows:
                rows, program = needed, None
                weights, slots, frozen, extra = (
                    top(tensors, rows) for tensors in (weights, slots, frozen, extra)
                )
            batch = [(tensor[:rows], 0) for tensor in held]
            given = [*weights, *slots, *frozen, *extra, *batch, *self._scalars(step)]
            if program is None or step == 1:  # in the first step members may share their weights
                program = self._program(given)
            with torch.no_grad():
                *after, loss = program(*(tensor for tensor, _ in given))
            losses.append(loss)
            weights = [(tensor, 0) for tensor in after[:number]]
            slots = [(tensor, 0) for tensor in after[number:]]
            done = [rank for rank, end in enumerate(ends) if end == step + 1]
            if done:
                trained = self._members(after[:number])
                buffers = [tensor.cpu() for tensor in after[kept]]
                for rank in done:
                    finals[rank] = trained[rank], [buffer[rank] for buffer in buffers]
        return self._fitted(orders, finals, losses)

    def _members(self, stacks: Sequence[Tensor]) -> list[Params]:
        """Each row's trained parameters; those of small models as one tensor."""
        given = dict(zip(self.trained, [tensor.cpu() for tensor in stacks], strict=True))
        if packable({name: tensor[0] for name, tensor in given.items()}):
            return list(packed_rows(given))
        rows = zip(*(tensor.unbind() for tensor in given.values()), strict=True)
        return [dict(zip(self.trained, row, strict=True)) for row in rows]

    def _scalars(self, step: int) -> list[Given]:
        if step == 0 or self.fit.training.optimiser == "adamw":
            numbers = scalars_of(self.fit.training, step, self.cohorts.device)
            self.scalars: list[Given] = [(number, None) for number in numbers]
        return self.scalars

    def _slots(self, weights: Sequence[Given]) -> list[Given]:
        starts = [member.fit.momentum for member in self.members]
        if all(start is None for start in starts):
            return [(torch.zeros_like(t), d) for t, d in weights] * num_slots(self.fit.training)
        empty = {name: torch.zeros_like(self.fit.params[name]) for name in self.trained}
        buffers = [empty if start is None else start for start in starts]
        rows, device = self.cohorts.rows(len(starts)), self.cohorts.device
        return [(stacked([own[n] for own in buffers], rows, device), 0) for n in self.trained]

    def _batches(self, orders: Sequence[Order]) -> Iterator[tuple[Tensor, ...]]:
        """Inputs, labels and what `reads` names of every step, each [rows, width, ...]."""
        pool = pooled([member.examples for member in self.members])
        counts = [len(member.examples) for member in self.members]
        references = {
            name: {
                own: self._given([member.fit.references[name][own] for member in self.members])
                for own in params
            }
            for name, params in self.fit.references.items()
        }
        held = None
        if self.fit.held_out:  # padding is not
            held = torch.cat([*[m.held for m in self.members], torch.tensor([False])])
        device = self.cohorts.device
        self.reads = Reads(self.fit, self.forward, references, pool, counts, held, device)
        width = self.cohorts.width(self.fit.training.batch_size)
        table = batch_rows(orders, counts, self.cohorts.rows(len(orders)), width)
        return self.reads.batches(table)

    def _program(self, given: Sequence[Given]) -> Program:
        kinds = (self.trained, self.frozen, self.extra, self.reads.names)
        strides = self.cohorts.compiled  # a compiled program is made for these too
        signature = (
            *map(tuple, kinds),
            *((t.shape, t.dtype, t.stride() if strides else None, dim) for t, dim in given),
        )
        function = self._step(tuple(dim for _, dim in given))
        return self.cohorts.program((self.key, signature), function, [t for t, _ in given])

    def _step(self, dims: tuple[int | None, ...]) -> Program:
        """One step of all members, a function of flat tensors: see `train` for their order."""
        numbers = [len(self.trained), num_slots(self.fit.training) * len(self.trained)]
        numbers += [len(self.frozen), len(self.extra), 2 + len(self.reads.names)]
        cuts = list(accumulate(numbers))
        training, objective, forward = self.fit.training, self.fit.objective, self.forward
        read = [*self.extra, *self.reads.names]

        def one(*flat: Tensor) -> list[Tensor]:
            weights, slots, frozen, extra, batch, scalars = (
                list(flat[a:b]) for a, b in zip([0, *cuts], [*cuts, None], strict=True)
            )
            fixed = dict(zip(self.frozen, frozen, strict=True))
            inputs, labels, *others = batch
            given = dict(zip(read, [*extra, *others], strict=True))

            def loss_of(trained: Params) -> Tensor:
                return objective(forward, {**trained, **fixed}, inputs, labels, given)

            gradients, loss = grad_and_value(loss_of)(dict(zip(self.trained, weights, strict=True)))
            slopes = [gradients[name] for name in self.trained]
            return [*optimise(training, weights, slots, slopes, scalars), loss]

        return lambda *flat: list(vmap(one, in_dims=dims)(*flat))

    def _tensors(self) -> tuple[list[Given], ...]:
        """Trained and frozen parameters and the objective's tensors, each with its vmap dimension.

        A tensor that is equal for all members is not copied, until a step makes them differ.
        """
        rows = self.cohorts.rows(len(self.members))
        fits = [member.fit for member in self.members]
        given: list[Mapping[str, Tensor]] = [fit.extra for fit in fits]
        if self.fit.training.mask_absent_classes:
            given = [{**m.fit.extra, "classes": m.examples.classes} for m in self.members]
        weights = [self._given([fit.params[name] for fit in fits]) for name in self.trained]
        if self.cohorts.compiled:  # one program to compile, not a second for the first step
            weights = [
                (t, 0) if d == 0 else (t.expand(rows, *t.shape).clone(), 0) for t, d in weights
            ]
        return (
            weights,
            [self._given([fit.params[name] for fit in fits]) for name in self.frozen],
            [self._given([tensors[name] for tensors in given]) for name in self.extra],
        )

    def _given(self, tensors: Sequence[Tensor]) -> Given:
        rows = self.cohorts.rows(len(self.members))
        return shared_or_stacked(tensors, rows, self.cohorts.device)

    def _fitted(
        self,
        orders: Sequence[Order],
        finals: Mapping[int, tuple[Params, Sequence[Tensor]]],
        losses: Sequence[Tensor],
    ) -> list[Fitted]:
        table = np.zeros((len(losses), self.cohorts.rows(len(orders))))
        for step, loss in enumerate(losses):
            table[step, : len(loss)] = loss.detach().cpu().numpy()
        fitted = []
        for rank, (member, order) in enumerate(zip(self.members, orders, strict=True)):
            total = len(member.examples)
            epoch = steps_of_last_pass(total, member.fit.training)
            sizes = [len(batch) for batch in order[-epoch:]]
            last = table[len(order) - epoch : len(order), rank]
            metrics = {"loss": float(last @ np.array(sizes)) / sum(sizes)}
            passes = self.reads.num_passes[rank]
            if self.fit.references:
                metrics["reference_examples"] = float(passes)
            (params, buffers), momentum = finals[rank], None
            if member.fit.keep_momentum:  # copied: it may last, and the others' with it
                kept = [buffer.clone() for buffer in buffers]
                momentum = dict(zip(self.trained, kept, strict=True))
            fitted.append(
                Fitted(
                    params=params,
                    num_examples=total,
                    num_steps=len(order),
                    metrics=metrics,
                    classes=member.examples.classes,
                    num_reference_examples=passes,
                    momentum=momentum,
                )
            )
        return fitted
