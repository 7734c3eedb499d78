"""What the server's public examples say of a model that grows: functions of blocks, accuracy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tesserafl.core.errors import ConfigError
from tesserafl.core.fit import cross_entropy
from tesserafl.core.messages import Update
from tesserafl.core.method import PUBLIC_INPUTS, PUBLIC_LABELS, State
from tesserafl.core.model import Model
from tesserafl.core.params import Params
from tesserafl.core.submodel import cut
from tesserafl.methods._blockscale import Scales, scaled_blocks
from tesserafl.methods._distances import Distances
from tesserafl.methods._match import function_distances, gram
from tesserafl.methods._stack import Stack
from tesserafl.models.inside import Inside

Orders = Mapping[str, Sequence[int]]
"""Depth axis -> slots from input to output."""


class Public(NamedTuple):
    """Examples that the server holds, as a model takes them."""

    inputs: Tensor
    labels: Tensor

    def inside(self, model: Model) -> Inside:
        """A model that is run on them."""
        return Inside(model=model, inputs=self.inputs, labels=self.labels)


def public_of(state: State, what_for: str) -> Public:
    """The server's public examples.

    Raises:
        ConfigError: it has none.
    """
    if not len(state.extra.get(PUBLIC_LABELS, ())):
        raise ConfigError(
            f"{what_for} looks at public examples that the server holds, and there are none; give "
            f"it some with --data.public, for instance 256"
        )
    return Public(state.extra[PUBLIC_INPUTS], state.extra[PUBLIC_LABELS])


def part_of(model: Model, params: Params, orders: Orders, scales: Scales) -> tuple[Model, Params]:
    """The model of these blocks, scaled."""
    part = model.slice(orders)
    small = model.resized(part)
    return small, scaled_blocks(cut(params, part), small, by_place(orders, scales))


def by_place(orders: Orders, scales: Scales) -> dict[str, dict[int, float | Tensor]]:
    """Scales of slots as scales of the blocks of the model that has them in this order."""
    return {
        axis: {j: scales[axis].get(slot, 1.0) for j, slot in enumerate(order)}
        for axis, order in orders.items()
    }


def accuracy_of(
    model: Model, params: Params, orders: Orders, scales: Scales, public: Public
) -> float:
    """Accuracy of the model of these blocks on public examples, 0 to 1."""
    small, values = part_of(model, params, orders, scales)
    return public.inside(small).metrics(values).accuracy


def functions_apart(
    model: Model, state: State, stacks: Mapping[str, Stack], scales: Scales, public: Public
) -> Distances:
    """M3: by what the blocks of the server's model and of the client's give for public inputs."""
    known: dict[object, Inside] = {}
    server: dict[str, list[Tensor]] = {}

    def look() -> None:
        orders = {axis: stack.order for axis, stack in stacks.items()}
        small, values = part_of(model, state.params, orders, scales)
        whole = public.inside(small)
        server.update({a: [gram(out) for out in whole.outputs(values, a)] for a in stacks})

    def distances(axis: str, update: Update, slots: Sequence[int]) -> list[list[float]]:
        if not server:  # when the first update is there: nobody may answer
            look()
        own = cut(state.params, update.submodel)
        own |= {name: own[name] + change for name, change in update.delta.items()}
        shape = update.submodel.shape
        if shape not in known:
            known[shape] = public.inside(model.resized(update.submodel))
        client = [gram(out) for out in known[shape].outputs(own, axis)]
        return function_distances(server[axis], client)

    return distances


def weak_blocks(
    model: Model, params: Params, stacks: Mapping[str, Stack], scales: Scales, public: Public
) -> list[tuple[float, str, int]]:
    """(|what it adds| / |what enters|, axis, slot) of every block but the first, ascending."""
    orders = {axis: stack.order for axis, stack in stacks.items()}
    small, values = part_of(model, params, orders, scales)
    inside, found = public.inside(small), []
    for axis, stack in stacks.items():
        outputs = inside.outputs(values, axis)
        for number in range(1, len(outputs)):
            before, after = outputs[number - 1], outputs[number]
            if before.shape == after.shape:
                added = float((after - before).norm() / before.norm().clamp(min=1e-30))
                found.append((added, axis, stack.order[number]))
    return sorted(found)


def calibrated(
    model: Model,
    params: Params,
    orders: Orders,
    scales: Scales,
    public: Public,
    steps: int,
    lr: float = 0.02,
) -> dict[str, dict[int, float]]:
    """Residual scales that lower the loss on public examples; nothing else is changed.

    Adam on the scales of the blocks, on every second example; the step counts that is best on the
    others, step 0 included.
    """
    part = model.slice(orders)
    small, own = model.resized(part), cut(params, part)
    inside = public.inside(small)
    plan = [(axis, j) for axis in orders for j in range(len(orders[axis]))]
    plan = [(axis, j) for axis, j in plan if small.depths[axis].outputs]
    begun = by_place(orders, scales)
    values = torch.tensor([float(begun[axis][j]) for axis, j in plan], requires_grad=True)
    optimiser = torch.optim.Adam([values], lr=lr)
    number = len(public.labels)
    learn, check = torch.arange(0, number, 2), torch.arange(1, number, 2)

    def scaled(given: Tensor) -> Params:
        asked: dict[str, dict[int, float | Tensor]] = {axis: {} for axis in orders}
        for (axis, j), value in zip(plan, given, strict=True):
            asked[axis][j] = value
        return scaled_blocks(own, small, asked)

    best = (inside.metrics(scaled(values.detach()), check).loss, values.detach().clone())
    for _ in range(steps if plan else 0):
        optimiser.zero_grad()
        with torch.enable_grad():
            inside.loss(scaled(values), learn, cross_entropy).backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        loss = inside.metrics(scaled(values.detach()), check).loss
        if loss < best[0]:
            best = (loss, values.detach().clone())
    found = {axis: {slot: 1.0 for slot in order} for axis, order in orders.items()}
    for (axis, j), value in zip(plan, best[1].tolist(), strict=True):
        found[axis][orders[axis][j]] = value
    return found
