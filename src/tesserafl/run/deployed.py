"""The server's side of a run whose clients are devices elsewhere, whatever post reaches them."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any
from uuid import uuid4

from pydantic import TypeAdapter, ValidationError

from tesserafl.core.errors import CheckpointError, ConfigError, TesseraError
from tesserafl.core.messages import Client
from tesserafl.data import ClientData
from tesserafl.engines.attendance import Post
from tesserafl.engines.edge_orders import EdgeDevice, EdgeProfile
from tesserafl.engines.federation import Federation
from tesserafl.engines.orders import Hello, Profile
from tesserafl.engines.parcels import MOST_BYTES
from tesserafl.engines.remote import Remote
from tesserafl.engines.seam import Engine
from tesserafl.run.begin import first_federation
from tesserafl.run.children import die_with_parent
from tesserafl.run.cloud import cloud
from tesserafl.run.costs import CostTable
from tesserafl.run.edge_seats import EdgeSeats
from tesserafl.run.experiment import Experiment, from_json, to_json, with_absolute_paths
from tesserafl.run.federate import topology_of
from tesserafl.run.files import read_json, write_json
from tesserafl.run.live import Patient, Waiting, live
from tesserafl.run.player import Player, player_of
from tesserafl.run.runner import Listener, play
from tesserafl.run.seats import Seats
from tesserafl.run.setup import Setup, prepare, with_depths

AT_WORK = "server-app.json"
"""A file of the run folder that is there as long as a process plays the run over Flower."""

_MIB = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Deployment:
    """How a run reaches its devices; the run folder holds it as deployment.json."""

    devices: int = 2
    """devices that the first round waits for; data.num_clients, if that is not given"""
    edges: int = 0
    """edges that the first round waits for (tessera edge): devices join them, and not the server.
    0: there are none"""
    own_data: bool = False
    """devices bring data of their own (tessera join --data); else each takes a part of the
    experiment's data (tessera join --client)"""
    wait_seconds: float = 3600.0
    """seconds that the first round waits for devices; then it begins with those that are there"""
    task_seconds: float = 3600.0
    """seconds that a device has for a task, with its transfers; then it counts as expired"""
    under_way: int = 8
    """tasks that are under way at once: their sub-models are in the server's memory"""
    message_bytes: int = MOST_BYTES
    """of tensors in one message; devices need about six times as much for the transport"""
    waiting: Waiting = field(default_factory=Waiting)

    def __post_init__(self) -> None:
        for name in ("devices", "under_way", "message_bytes", "task_seconds"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name} must be positive; got {getattr(self, name)}")
        for name in ("wait_seconds", "edges"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} must be 0 or more; got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class _Deployed:
    """What deployment.json holds."""

    run: str
    """Names the run to its devices, in 32 hexadecimal digits."""
    deployment: Deployment


def begin(experiment: Experiment, deployment: Deployment, folder: Path) -> None:
    """Write a new run's folder, after all was tried that does not need the devices.

    Raises:
        CheckpointError: the folder already holds something.
        TesseraError: the experiment cannot be run on devices.
    """
    if folder.exists() and any(folder.iterdir()):
        raise CheckpointError(
            f"{folder} is not empty; choose another --out, remove it, or continue that run with: "
            f"tessera resume {folder}"
        )
    experiment = for_devices(with_absolute_paths(experiment), deployment)
    setup = prepare(experiment)
    first_federation(setup, elsewhere=True)
    if not deployment.own_data and deployment.devices > len(setup.clients):
        raise ConfigError(
            f"the first round would wait for {deployment.devices} devices, but data.num_clients "
            f"deals out {len(setup.clients)} parts; lower devices, or raise data.num_clients"
        )
    deployed = _Deployed(run=uuid4().hex, deployment=deployment)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "deployment.json", asdict(deployed))
    write_json(folder / "config.json", to_json(setup.experiment))


def is_deployed(folder: Path) -> bool:
    """Whether a run folder is of a run on devices."""
    return (folder / "deployment.json").exists()


def _deployed(folder: Path) -> _Deployed:
    try:
        found = TypeAdapter(_Deployed).validate_python(read_json(folder / "deployment.json"))
    except ValidationError as error:
        raise CheckpointError(f"{folder / 'deployment.json'} is damaged: {error}") from error
    return found


def for_devices(experiment: Experiment, deployment: Deployment) -> Experiment:
    """The experiment as these devices can run it.

    Raises:
        ConfigError: it asks for what only a simulation has.
    """
    if experiment.fleet.is_there:
        raise ConfigError(
            "fleet.* describes simulated devices; leave it away where real ones do the work"
        )
    experiment = _placed(experiment, deployment)
    if experiment.finetune_epochs:
        raise ConfigError(
            "finetune_epochs tests models where clients' data is, and the server has none of it; "
            "set it to 0"
        )
    # Devices train alone, so the server must not plan for groups of them.
    engine = replace(experiment.engine, workers=1, batching="sequential")
    data = experiment.data
    if deployment.own_data:  # what the server has is for its tests, not for the devices
        data = replace(data, num_clients=deployment.devices, partition="iid")
    # A late answer may come rounds after its task: what it began with is kept for one checkpoint.
    # What devices of edges began with is kept for one round of the cloud.
    soon = deployment.edges or not deployment.waiting.for_all
    every = 1 if soon else experiment.checkpoint_every
    return replace(experiment, engine=engine, data=data, checkpoint_every=every)


def _placed(experiment: Experiment, deployment: Deployment) -> Experiment:
    """The experiment, on a star or a tree; raises ConfigError if these devices cannot be that."""
    asked, method = experiment.network.topology, experiment.method
    if deployment.edges:
        refused = {
            f"network.topology {asked!r}": asked not in ("auto", "tree"),
            "waiting.*": not deployment.waiting.for_all,
            "a method whose clients have models of their own": hasattr(method, "personal"),
        }
        if any(refused.values()):
            what = ", ".join(name for name, there in refused.items() if there)
            raise ConfigError(
                f"a run with edges goes without {what}; see docs/howto/edge-tier.md for what is "
                f"not there yet"
            )
        return replace(experiment, network=replace(experiment.network, topology="tree"))
    if asked == "tree" or (asked == "auto" and method.topology == "tree"):
        raise ConfigError(
            "a tree needs edges: say with --edges how many join (docs/howto/edge-tier.md), or set "
            "network.topology to 'star'"
        )
    if topology_of(experiment) != "star":
        raise ConfigError(
            f"network.topology {topology_of(experiment)!r} is simulated: over Flower devices have "
            f"one server, which would do their sums; set network.topology to 'star'"
        )
    return experiment


def serve_over(
    post: Post,
    folder: Path,
    listener: Listener | None = None,
    watch: Callable[[Remote], None] = lambda _: None,
) -> dict[str, Any]:
    """Play the run of a folder on the devices of a post, from its newest checkpoint, to its end.

    Returns the summary, as `run.runner.start`.

    Raises:
        TesseraError: no device came, or the run failed.
    """
    if (folder / "summary.json").exists():
        done: dict[str, Any] = read_json(folder / "summary.json")
        return done
    deployed, experiment = _deployed(folder), from_json(read_json(folder / "config.json"))
    deployment = deployed.deployment
    setup = prepare(experiment)
    path = folder / "devices.json"
    seats: Seats | EdgeSeats
    if deployment.edges:
        clients = None if deployment.own_data else setup.clients
        seats = EdgeSeats(path=path, clients=clients)
    else:
        number = deployment.devices if deployment.own_data else len(setup.clients)
        seats = Seats(path=path, number=number, parts=not deployment.own_data)
    hello = Hello(
        run=deployed.run,
        experiment=to_json(experiment),
        spec=asdict(setup.data.spec),
        parts=not deployment.own_data,
    )
    remote = Remote(
        post=post,
        hello=hello,
        seat=seats.seat,
        seconds=deployment.task_seconds,
        most_bytes=deployment.message_bytes,
        capacity=deployment.under_way,
        expects=EdgeProfile if deployment.edges else Profile,
    )
    watch(remote)
    full = deployment.edges or deployment.devices
    if deployment.own_data and seats.settled:
        full = len(seats.taken)
    remote.gather(full, deployment.wait_seconds)
    remote.renumber(seats.settle())
    if deployment.own_data:
        setup = _with_devices(setup, seats.taken if isinstance(seats, Seats) else seats.devices)

    def player(setup: Setup, engine: Engine, federation: Federation, costs: CostTable) -> Player:
        if isinstance(seats, EdgeSeats):
            return cloud(setup, remote, federation, seats)
        if not deployment.waiting.for_all:
            return live(setup, remote, federation, costs, deployment.waiting)
        synchronous = player_of(setup, engine, federation, costs)
        return Patient(player=synchronous, setup=setup, engine=remote, federation=federation)

    federation = first_federation(setup, elsewhere=True)
    summary = play(setup, federation, folder, remote, listener, player)
    write_json(folder / "wire.json", {"down": remote.bytes_down, "up": remote.bytes_up})
    remote.goodbye()
    return summary


def serve_noted(post: Post, folder: Path) -> None:
    """`serve_over` for a process whose errors nobody sees: they are written into the folder.

    It ends with the process that started it: a run that nobody serves would keep the folder.
    """
    die_with_parent(signal.SIGKILL)
    write_json(folder / AT_WORK, {"process": os.getpid()})
    try:
        serve_over(post, folder)
    except TesseraError as error:
        write_json(folder / "error.json", {"text": str(error)})
        raise
    finally:  # also after the devices heard that the run is over
        (folder / AT_WORK).unlink(missing_ok=True)


def _with_devices(setup: Setup, devices: Mapping[int, Profile | EdgeDevice]) -> Setup:
    """The setup, whose clients are these devices."""
    clients = tuple(
        Client(
            id=client,
            num_examples=profile.num_examples,
            memory_bytes=None if profile.memory_mib is None else int(profile.memory_mib * _MIB),
        )
        for client, profile in sorted(devices.items())
    )
    asked = min(setup.experiment.clients_per_round, len(clients))
    # Of a client's examples the server needs the shape alone, to count costs with.
    stand_in = setup.data.clients[0]
    empty = stand_in.test.take(stand_in.test.labels.new_empty(0))
    shape = ClientData(train=stand_in.train, validation=empty, test=empty)
    data = replace(setup.data, clients=(shape,) * len(clients), elsewhere=True)
    experiment = replace(setup.experiment, clients_per_round=asked)
    return with_depths(replace(setup, experiment=experiment, data=data, clients=clients))
