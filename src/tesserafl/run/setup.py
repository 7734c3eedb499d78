"""From an experiment to the things that run: data, model, clients, and an engine to train them."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch

from tesserafl import __version__
from tesserafl.core import seeds
from tesserafl.core.errors import ConfigError
from tesserafl.core.fit import Training
from tesserafl.core.messages import Client
from tesserafl.core.model import Model
from tesserafl.data import load
from tesserafl.data.examples import Examples, FederatedData
from tesserafl.engines.client import ClientWorker
from tesserafl.engines.cluster import Actors, Share
from tesserafl.engines.fleet_file import fleet_of
from tesserafl.engines.kept import Kept, nothing_kept
from tesserafl.engines.local import InProcess
from tesserafl.engines.pool import WorkerPool, Workers
from tesserafl.engines.processes import Processes
from tesserafl.engines.seam import Engine
from tesserafl.engines.settings import EngineSettings
from tesserafl.methods import MethodSettings
from tesserafl.run.batching import choose, cohorts_of, group_of
from tesserafl.run.costs import CostTable, with_depth
from tesserafl.run.evaluate import Evaluator
from tesserafl.run.experiment import Experiment, from_json, to_json

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

    def training_at(self, round: int, rounds: int) -> Training:
        """How clients train in a round, of so many."""
        training = self.experiment.training
        return replace(training, lr=training.lr_at(round, rounds))

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
    """The device that this process computes on; ConfigError if it is not there.

    Clients train on it too, unless they train in actors: a cluster's GPUs need not be here.
    """
    asked, found = experiment.engine.device, torch.cuda.is_available()
    if experiment.engine.kind == "ray" and asked == "cuda":
        asked = "auto"
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
        compression=setup.experiment.compression,
    )


def evaluator_of(setup: Setup) -> Evaluator:
    """Tests models of this experiment in this process."""
    return Evaluator(data=setup.data, device=device_of(setup.experiment), kept=setup.kept)


def make_engine(setup: Setup) -> Engine:
    """In this process for one worker, else a pool of processes or of actors.

    Raises:
        ConfigError: the cluster that is asked for is not there, or too small.
    """
    experiment, engine = setup.experiment, setup.experiment.engine
    if engine.kind == "local" and engine.workers == 1:
        return InProcess(worker=client_worker(setup))
    size = min(engine.workers, experiment.clients_per_round)
    alone = replace(engine, kind="local", workers=1, address=EngineSettings.address, gpus=0.0)
    if engine.kind == "ray":
        alone = replace(alone, device="cuda" if engine.gpus else "cpu")
    hello = json.dumps(to_json(replace(experiment, engine=alone))).encode()
    workers: Workers
    if engine.kind == "ray":
        share = Share(threads=engine.threads, gpus=engine.gpus)
        shared = shared_by_all(setup)
        workers = Actors(engine.address, loaded, hello, size=size, share=share, shared=shared)
    else:
        workers = Processes([sys.executable, "-m", "tesserafl.run.worker"], hello, size)
    group = 1 if engine.batching == "sequential" else group_of(experiment)
    return WorkerPool(workers=workers, group=group)


def loaded(hello: bytes) -> tuple[ClientWorker, Mapping[str, str]]:
    """What an actor begins with: who does clients' work, and what all machines must share."""
    setup = prepare(from_json(json.loads(hello)))
    return client_worker(setup), shared_by_all(setup)


def shared_by_all(setup: Setup) -> dict[str, str]:
    """What would change results if it were another on another machine, as far as is quickly told.

    The examples are told by their numbers: digests of all data would cost a pass over them.
    """
    counts = json.dumps([client.num_examples for client in setup.clients]).encode()
    return {
        "the version of tesserafl": __version__,
        "the version of torch": torch.__version__.split("+")[0],  # of any build: CPU, CUDA
        "the digest of the clients' numbers of examples": hashlib.sha256(counts).hexdigest()[:12],
    }
