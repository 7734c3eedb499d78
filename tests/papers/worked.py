"""Small models and hand-made answers for examples that are worked out on paper."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from tesserafl.core.axis import LowRank, Tie, Width
from tesserafl.core.coverage import Coverage
from tesserafl.core.fit import Training
from tesserafl.core.messages import Client, Task, Update
from tesserafl.core.method import State
from tesserafl.core.model import Model, Output, Sizes
from tesserafl.core.params import Params
from tesserafl.core.submodel import index_tensor
from tesserafl.data.examples import Examples, Spec
from tesserafl.engines.client import ClientWorker
from tesserafl.methods import MethodSettings
from tesserafl.models import MLP, Residual

TRAINING = Training(lr=0.5, batch_size=100)
"""One full-batch step."""


def mlp(*hidden: int, inputs: int = 2, classes: int = 2) -> Model:
    spec = Spec(kind="vector", task="vector-classification", shape=(inputs,), num_classes=classes)
    return MLP(hidden=hidden).build_model(spec)


class Adapter(nn.Module):
    """x -> x (I + B A)^T: the identity is frozen, the factors are trained."""

    def __init__(self, rank: int, inputs: int, outputs: int) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.randn(rank, inputs))
        self.b = nn.Parameter(torch.zeros(outputs, rank))

    def forward(self, inputs: Tensor) -> Tensor:
        frozen = torch.eye(len(self.b), self.a.shape[1], device=inputs.device)
        return inputs @ frozen.T + inputs @ self.a.T @ self.b.T


class Adapted(nn.Module):
    """Linear layers with adapters, one after another, and a head if there are classes."""

    def __init__(self, sizes: Sizes, widths: Sequence[int]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Adapter(sizes["rank"], a, b) for a, b in pairwise(widths))
        self.head = nn.Linear(widths[-1], sizes["classes"]) if "classes" in sizes else None

    def forward(self, inputs: Tensor) -> Output:
        inputs = inputs.flatten(1)
        for layer in self.layers:
            inputs = layer(inputs)
        return Output(inputs if self.head is None else self.head(inputs), None)


def adapted(rank: int, *widths: int, classes: int | None = None) -> Model:
    """A model of adapters alone, `layers.0.a` [rank, in] and `layers.0.b` [out, rank] and so on;
    with `classes` there is a head too, which is trained whole."""
    sizes = {"rank": rank} if classes is None else {"rank": rank, "classes": classes}
    named = dict(Adapted(sizes, widths).named_parameters())
    ties: dict[str, tuple[Tie | None, ...]] = {}
    for name, value in named.items():
        if name.endswith(".a"):
            ties[name] = (Tie("rank", (1,)), None)
        elif name.endswith(".b"):
            ties[name] = (None, Tie("rank", (1,)))
        else:
            ties[name] = (Tie("classes", (1,)), *[None] * (value.dim() - 1))
    return Model(
        build=lambda s: Adapted(s, widths),
        sizes=sizes,
        widths={axis: Width(n, 1, axis, cuttable=axis == "rank") for axis, n in sizes.items()},
        depths={},
        ties=ties,
        shapes={name: tuple(value.shape) for name, value in named.items()},
        low_rank=tuple(
            LowRank(f"layers.{i}.a", f"layers.{i}.b", 1.0) for i in range(len(widths) - 1)
        ),
    )


def clients(*num_examples: int) -> list[Client]:
    return [Client(id=i, num_examples=n) for i, n in enumerate(num_examples)]


def state_of(model: Model, round: int = 0, rounds: int = 10, **values: Sequence[object]) -> State:
    """Zeros, but for the parameters given: `layers_0_bias=[1, 2]`."""
    params = {name: torch.zeros(shape) for name, shape in model.shapes.items()}
    for name, value in values.items():
        params[real_name(model, name)] = torch.tensor(value, dtype=torch.float32)
    return State(params=params, seed=0, rounds=rounds, round=round)


def real_name(model: Model, name: str) -> str:
    return {full.replace(".", "_"): full for full in model.shapes}[name]


def answer(task: Task, change: float, **changes: float | list[object]) -> Update:
    """An update that moves every entry by `change`, but for the parameters given."""
    named = {name.replace(".", "_"): name for name in task.params}
    delta = {name: torch.full_like(tensor, change) for name, tensor in task.params.items()}
    for name, value in changes.items():
        shape = task.params[named[name]].shape
        delta[named[name]] = torch.as_tensor(value, dtype=torch.float32).expand(shape).clone()
    return Update(
        round=task.round,
        client=task.client.id,
        submodel=task.submodel,
        delta=delta,
        num_examples=task.client.num_examples,
        num_steps=1,
        metrics={},
    )


def trained(
    method: MethodSettings, model: Model, task: Task, inputs: list[list[float]], labels: list[int]
) -> Update:
    """What a client answers after really training on these examples."""
    examples = Examples(inputs=torch.tensor(inputs), labels=torch.tensor(labels))
    worker = ClientWorker(model=model, method=method, examples=lambda client: examples, seed=0)
    return worker.work(task, {})[0]


def units_of(model: Model, task: Task) -> dict[str, list[int]]:
    """The units of every axis that a task keeps, ascending."""
    kept: dict[str, list[int]] = {}
    for view in task.submodel.views.values():
        for tie, index in zip(model.ties[view.name], view.index, strict=True):
            if tie is not None and len(tie.parts) == 1:
                units = sorted(set((index_tensor(index) // tie.parts[0]).tolist()))
                assert kept.setdefault(tie.axis, units) == units
    return {axis: kept[axis] for axis in model.cuttable}


def rounds_of(
    method: MethodSettings, model: Model, num_clients: int, rounds: Sequence[int]
) -> list[list[Task]]:
    """The tasks of these rounds; nothing is trained and no parameter has a value."""
    params = {name: torch.empty(shape, device="meta") for name, shape in model.shapes.items()}
    asked = clients(*[1] * num_clients)
    return [
        list(
            method.configure(
                model, State(params=params, seed=0, rounds=100, round=round), asked, TRAINING
            )
        )
        for round in rounds
    ]


def times_trained(model: Model, rounds: Sequence[Sequence[Task]]) -> Params:
    """How often each entry of the large model was trained."""
    coverage = Coverage(model.shapes)
    for tasks in rounds:
        coverage.add([task.submodel for task in tasks])
    return coverage.counts


def share(counts: Tensor) -> float:
    return float((counts > 0).double().mean())


def values(params: Mapping[str, Tensor], name: str) -> list[object]:
    """A parameter as lists, by its name with underscores."""
    full = {full.replace(".", "_"): full for full in params}[name]
    listed: list[object] = params[full].tolist()
    return listed


def setting(task: Task, **values: Sequence[object]) -> Update:
    """The update of a client whose trained parameters are these; the others stay as they were."""
    named = {name.replace(".", "_"): name for name in task.params}
    update = answer(task, 0.0)
    for name, value in values.items():
        before = task.params[named[name]]
        update.delta[named[name]] = torch.tensor(value, dtype=torch.float32) - before
    return update


def trained_factors(task: Task, seed: int) -> Update:
    """An update of factors drawn at random."""
    draw = torch.Generator().manual_seed(seed)
    update = answer(task, 0.0)
    for name, tensor in task.params.items():
        update.delta[name] = torch.randn(tensor.shape, generator=draw)
    return update


def mean_product(
    model: Model, tasks: Sequence[Task], updates: Sequence[Update], shares: Sequence[float]
) -> list[Tensor]:
    """Per adapter the mean of the clients' products, by way of dense matrices."""
    means = []
    for pair in model.low_rank:
        total = torch.zeros(model.shapes[pair.up][0], model.shapes[pair.down][1]).double()
        for task, update, share in zip(tasks, updates, shares, strict=True):
            up, down = (
                (task.params[n] + update.delta.get(n, torch.zeros(()))).double()
                for n in (pair.up, pair.down)
            )
            total += share * up @ down
        means.append(total)
    return means


def products(model: Model, params: Params) -> list[Tensor]:
    """Per adapter the product of its factors."""
    return [params[p.up].double() @ params[p.down].double() for p in model.low_rank]


def deep(blocks: int, *, exits: bool = False, classes: int = 2) -> Model:
    """A residual model on vectors of 2 entries, its stream 2 wide."""
    spec = Spec(kind="vector", task="vector-classification", shape=(2,), num_classes=classes)
    return Residual(stream=2, inner=2, blocks=blocks, exits=exits).build_model(spec)


def blocks_of(model: Model, task: Task) -> list[int]:
    """The blocks of a deep model that a task holds, from input to output."""
    (depth,) = model.depths.values()
    places = {}
    for small, view in task.submodel.views.items():
        here, there = depth.locate(small), depth.locate(view.name)
        if here and there:
            assert places.setdefault(here[1], there[1]) == there[1]
    return [places[number] for number in sorted(places)]
