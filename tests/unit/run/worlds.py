"""Small federations in virtual time: fleets by hand, and an engine that trains nothing."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch

from tesserafl.core import seeds
from tesserafl.core.coverage import Coverage
from tesserafl.core.fit import Training
from tesserafl.core.messages import Memory, Task, Update
from tesserafl.core.model import Model
from tesserafl.core.params import Params, num_bytes
from tesserafl.core.wire import pack, unpack
from tesserafl.data.examples import ClientData, Examples, FederatedData, Spec
from tesserafl.engines.batches import num_steps
from tesserafl.engines.clock import ClockSettings
from tesserafl.engines.device import Device, Link, Placed
from tesserafl.engines.federation import Star
from tesserafl.engines.fleet import CLOUD, Edge, Fleet, FleetSettings
from tesserafl.engines.seam import Done, Failed, Outcome
from tesserafl.engines.settings import EngineSettings
from tesserafl.methods import FedAvg, MethodSettings
from tesserafl.models import MLP
from tesserafl.run.costs import CostTable
from tesserafl.run.experiment import Experiment
from tesserafl.run.rounds import Notes
from tesserafl.run.setup import Setup, clients_of
from tesserafl.run.timed import Timed
from tesserafl.run.tree import Tree

SPEC = Spec(kind="vector", task="vector-classification", shape=(4,), num_classes=2)
SMALL = MLP(hidden=(3,))


@cache
def data_of(sizes: tuple[int, ...]) -> FederatedData:
    """Clients with so many examples each."""
    clients = []
    for client, size in enumerate(sizes):
        inputs = torch.randn(size, 4, generator=seeds.generator(9, client))
        train = Examples(inputs=inputs, labels=torch.arange(size) % 2)
        clients.append(ClientData(train=train, validation=_none(), test=_none()))
    return FederatedData(spec=SPEC, clients=tuple(clients), test=_none())


def _none() -> Examples:
    return Examples(inputs=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.int64))


@cache
def model_of(family: MLP) -> Model:
    """Probed once."""
    return family.build_model(SPEC)


MODEL = model_of(SMALL)
BYTES = num_bytes(MODEL.init(0))


def setup_of(
    sizes: Sequence[int] = (4, 4, 4, 4),
    *,
    model: MLP = SMALL,
    method: MethodSettings | None = None,
    clock: ClockSettings | None = None,
    training: Training | None = None,
    **settings: Any,
) -> Setup:
    """An experiment on these clients, all of whom are asked, unless told otherwise."""
    experiment = Experiment(
        model=model,
        method=method or FedAvg(weighting="uniform"),
        training=training or Training(lr=0.1, batch_size=4),
        engine=EngineSettings(batching="sequential"),
        fleet=FleetSettings(profiles=("phone",)),  # so that a clock is allowed; not used
        clock=clock or ClockSettings(),
        **{"clients_per_round": len(sizes), **settings},
    )
    data = data_of(tuple(sizes))
    return Setup(
        experiment=experiment,
        data=data,
        model=model_of(model),
        clients=clients_of(experiment, data),
    )


@cache
def flops() -> int:
    """FLOPs of training on one example of the whole model."""
    setup = setup_of()
    task = next(setup.experiment.method.configure(MODEL, state_of(setup), setup.clients, TRAINING))
    return int(setup.costs().of(task).flops_per_example)


TRAINING = Training(lr=0.1, batch_size=4)


def state_of(setup: Setup) -> Any:
    """The state before the first round."""
    experiment = setup.experiment
    return experiment.method.init(setup.model, experiment.seed, experiment.rounds)


def link(down: float, up: float, num_bytes: float = BYTES) -> Link:
    """A link that takes so many seconds for a message of so many bytes: the model's."""
    return Link(down_mbps=num_bytes * 8e-6 / down, up_mbps=num_bytes * 8e-6 / up)


def device(example: float, down: float = 0.0, up: float = 0.0, **settings: Any) -> Device:
    """A device that takes so many seconds for an example and for the model on its way."""
    way = {"link": link(down, up)} if down and up else {}
    return Device(gflops=flops() * 1e-9 / example, **way, **settings)


def fleet_of(
    devices: Sequence[Device],
    edges: Sequence[Edge] = (),
    homes: Sequence[str] | None = None,
    seed: int = 0,
) -> Fleet:
    """These devices, which report to the cloud unless told otherwise."""
    return Fleet(
        devices=tuple(Placed(device=each, id=n, seed=seed) for n, each in enumerate(devices)),
        edges=tuple(edges),
        homes=tuple(homes or [CLOUD] * len(devices)),
    )


def change_of(client: int, round: int) -> float:
    """By how much a client moves every entry: tells works apart, and is exact."""
    return (1 + client + 8 * (round % 127)) / 4096


@dataclass(kw_only=True)
class Constant:
    """An engine whose clients answer the same to the same task, without any training."""

    bad: Callable[[Task], bool] = lambda task: False
    """Whose answers are not finite."""
    trained: list[tuple[int, int]] = field(default_factory=list)
    """(client, round) of all tasks so far"""
    tasks: list[Task] = field(default_factory=list)
    memories: dict[int, Memory] = field(default_factory=dict)
    _waiting: deque[Sequence[Task]] = field(default_factory=deque)

    capacity = 1
    group = 1

    def restore(self, memories: Mapping[int, Memory]) -> None:
        self.memories = dict(memories)

    def submit(self, tasks: Sequence[Task]) -> None:
        self._waiting.append(tasks)

    def poll(self) -> list[Outcome]:
        outcomes: list[Outcome] = []
        for task in self._waiting.popleft():
            self.trained.append((task.client.id, task.round))
            self.tasks.append(task)
            outcomes.append(Done(client=task.client.id, update=self.answer(task), seconds=0.0))
        return outcomes

    def answer(self, task: Task) -> Update:
        value = float("nan") if self.bad(task) else change_of(task.client.id, task.round)
        return Update(
            round=task.round,
            client=task.client.id,
            submodel=task.submodel,
            delta={name: torch.full_like(t, value) for name, t in task.params.items()},
            num_examples=task.client.num_examples,
            num_steps=num_steps(task.client.num_examples, task.training),
            metrics={"loss": 1.0, "accumulated_steps": 1.0},
        )

    def close(self) -> None:
        pass


@dataclass(kw_only=True)
class Failing(Constant):
    """One of the clients cannot do its work."""

    client: int

    def poll(self) -> list[Outcome]:
        return [
            Failed(client=o.client, reason="error", text="broken") if o.client == self.client else o
            for o in Constant.poll(self)
        ]


def costs_of(setup: Setup) -> CostTable:
    """Counted once for all tests; the same for all of these experiments."""
    table = setup.costs()
    if setup.model is model_of(SMALL):
        table._known.update(_counted())
    return table


@cache
def _counted() -> dict[object, Any]:
    setup = setup_of()
    table = setup.costs()
    task = next(setup.experiment.method.configure(MODEL, state_of(setup), setup.clients, TRAINING))
    table.of(task)
    return table._known


def timed_of(setup: Setup, fleet: Fleet, engine: Any = None) -> Timed:
    """A server before its first round."""
    star = Star(model=setup.model, method=setup.experiment.method, state=state_of(setup))
    return Timed(
        setup=setup,
        engine=engine or Constant(),
        federation=star,
        fleet=fleet,
        costs=costs_of(setup),
    )


def tree_of(setup: Setup, fleet: Fleet, engine: Any = None) -> Tree:
    """A cloud before its first round."""
    star = Star(model=setup.model, method=setup.experiment.method, state=state_of(setup))
    return Tree(
        setup=setup,
        engine=engine or Constant(),
        federation=star,
        fleet=fleet,
        costs=costs_of(setup),
        schedule=getattr(setup.experiment.method, "periods", None),
    )


def play(player: Timed | Tree, rounds: int = 1) -> list[Notes]:
    """The next rounds' notes."""
    coverage = Coverage(player.setup.model.shapes)
    return [player.play(coverage) for _ in range(rounds)]


def restored(before: Timed, setup: Setup, fleet: Fleet, engine: Any = None) -> Timed:
    """Another server that goes on from what the first would leave in a checkpoint's files."""
    values, tensors = before.held()
    _, tensors = unpack(pack({}, tensors))
    after = timed_of(setup, fleet, engine)
    after.federation.restore(before.federation.held())
    after.restore(json.loads(json.dumps(values)), tensors)
    return after


def seen(notes: Notes) -> dict[str, Any]:
    """What notes tell, without the wall's clock."""
    rows = [{k: v for k, v in row.items() if k != "seconds"} for row in notes.clients]
    return {
        "clients": sorted(rows, key=lambda row: row["client"]),
        "failures": sorted(notes.failures, key=lambda row: row["client"]),
        "virtual_seconds": notes.virtual_seconds,
        "joules": notes.joules,
        "traffic": dict(notes.traffic),
    }


def entry(params: Params) -> float:
    """The first entry of a model; `Constant` moves all alike."""
    return float(next(iter(params.values())).reshape(-1)[0])
