"""From an experiment to the things that run: data, model, clients, and an engine to train them."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field, replace

import torch

from tesserafl.core import seeds
from tesserafl.core.errors import ConfigError
from tesserafl.core.messages import Client
from tesserafl.core.model import Model
from tesserafl.data import load
from tesserafl.data.examples import Examples, FederatedData
from tesserafl.engines.client import ClientWorker
from tesserafl.engines.fleet_file import fleet_of
from tesserafl.engines.kept import Kept, nothing_kept
from tesserafl.engines.local import InProcess, WorkerPool
from tesserafl.engines.seam import Engine
from tesserafl.methods import MethodSettings
from tesserafl.run.batching import choose, cohorts_of, group_of
from tesserafl.run.costs import CostTable, with_depth
from tesserafl.run.evaluate import Evaluator
from tesserafl.run.experiment import Experiment, to_json

_MIB = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Setup:
    """An experiment with its data loaded and its model probed."""

    experiment: Experiment
    data: FederatedData
    model: Model
    clients: tuple[Client, ...]
    kept: Kept = field(default_factory=nothing_kept)
    """What this process keeps of what frozen layers gave: in training and in tests together."""

    def costs(self) -> CostTable:
        """An empty table of costs."""
        return CostTable(experiment=self.experiment, model=self.model, data=self.data)

    def cohort(self, round: int) -> list[Client]:
        """The clients that are asked in a round, in the order in which they are asked."""
        picked = self.order(round)[: self.experiment.clients_per_round]
        return [self.clients[i] for i in picked]

    def order(self, round: int) -> list[int]:
        """All clients' numbers, in the order in which a round would ask them."""
        draw = seeds.generator(self.experiment.seed, round, "cohort")
        numbers: list[int] = torch.randperm(len(self.clients), generator=draw).tolist()
        return numbers

    def answers(self, round: int, client: Client) -> bool:
        """Whether a client that was asked answers."""
        if self.experiment.dropout == 0.0:
            return True
        draw = seeds.generator(self.experiment.seed, round, client.id, "answers")
        return float(torch.rand((), generator=draw)) >= self.experiment.dropout


def prepare(experiment: Experiment) -> Setup:
    """Load the data, probe the model, describe the clients; the same in every process."""
    data = load(experiment.data, experiment.seed)
    model, clients = experiment.model.build_model(data.spec), clients_of(experiment, data)
    batching = choose(experiment, model, data, clients)
    return with_depths(
        Setup(
            experiment=replace(experiment, engine=replace(experiment.engine, batching=batching)),
            data=data,
            model=model,
            clients=clients,
            kept=Kept(most_bytes=experiment.engine.cache_mib * _MIB),
        )
    )


def with_depths(setup: Setup) -> Setup:
    """The setup, whose clients know how many blocks they can train by the experiment's method.

    Raises:
        CapacityError: a client cannot train one.
    """
    costs = setup.costs()
    return replace(setup, clients=tuple(with_depth(client, costs) for client in setup.clients))


def clients_of(experiment: Experiment, data: FederatedData) -> tuple[Client, ...]:
    """What the server knows of every client."""
    limits = experiment.client_memory_mib
    if experiment.fleet.is_there and not limits:
        fleet = fleet_of(experiment.fleet, len(data.clients), experiment.seed)
        devices = [placed.device.memory_mib for placed in fleet.devices]
    else:
        devices = [limits[n % len(limits)] if limits else None for n in range(len(data.clients))]
    if experiment.clients_per_round > len(data.clients):
        raise ConfigError(
            f"clients_per_round is {experiment.clients_per_round}, but there are only "
            f"{len(data.clients)} clients; lower it or raise data.num_clients"
        )
    return tuple(
        Client(
            id=number,
            num_examples=len(client.train),
            memory_bytes=None if memory is None else int(memory * _MIB),
        )
        for number, (client, memory) in enumerate(zip(data.clients, devices, strict=True))
    )


def device_of(experiment: Experiment) -> str:
    """The device that clients train on; ConfigError if it is not there."""
    asked, found = experiment.engine.device, torch.cuda.is_available()
    if asked == "cuda" and not found:
        raise ConfigError("engine.device is 'cuda', but torch finds no GPU; use 'auto' or 'cpu'")
    return "cuda" if asked == "cuda" or (asked == "auto" and found) else "cpu"


def client_worker(setup: Setup, index: int = 0) -> ClientWorker:
    """Does the work of this experiment's clients in this process, the `index`-th of its kind.

    Processes are dealt to the GPUs in turn.
    """
    method: MethodSettings = setup.experiment.method
    device = device_of(setup.experiment)
    if device == "cuda":
        device = f"cuda:{index % torch.cuda.device_count()}"

    def examples(client: int) -> Examples:
        return setup.data.clients[client].train

    def validation(client: int) -> Examples:
        return setup.data.clients[client].validation

    return ClientWorker(
        model=setup.model,
        method=method,
        examples=examples,
        seed=setup.experiment.seed,
        device=device,
        cohorts=cohorts_of(setup.experiment, setup.clients, device),
        validation=validation,
        kept=setup.kept,
    )


def evaluator_of(setup: Setup) -> Evaluator:
    """Tests models of this experiment in this process."""
    return Evaluator(data=setup.data, device=device_of(setup.experiment), kept=setup.kept)


def make_engine(setup: Setup) -> Engine:
    """In this process for one worker, else a pool of `python -m tesserafl.run.worker`."""
    workers = setup.experiment.engine.workers
    if workers == 1:
        return InProcess(worker=client_worker(setup))
    alone = replace(setup.experiment, engine=replace(setup.experiment.engine, workers=1))
    together = setup.experiment.engine.batching != "sequential"
    group = group_of(setup.experiment) if together else 1
    return WorkerPool(
        [sys.executable, "-m", "tesserafl.run.worker"],
        json.dumps(to_json(alone)).encode(),
        size=min(workers, setup.experiment.clients_per_round),
        group=group,
    )
