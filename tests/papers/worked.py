"""Small models and hand-made answers for examples that are worked out on paper."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from tesserafl.core.fit import Training
from tesserafl.core.messages import Client, Task, Update
from tesserafl.core.method import State
from tesserafl.core.model import Model
from tesserafl.core.params import Params
from tesserafl.core.submodel import Coverage, index_tensor
from tesserafl.data.examples import Examples, Spec
from tesserafl.engines.client import ClientWorker
from tesserafl.methods import MethodSettings
from tesserafl.models import MLP

TRAINING = Training(lr=0.5, batch_size=100)
"""One full-batch step."""


def mlp(*hidden: int, inputs: int = 2, classes: int = 2) -> Model:
    spec = Spec(kind="vector", task="vector-classification", shape=(inputs,), num_classes=classes)
    return MLP(hidden=hidden).build_model(spec)


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
