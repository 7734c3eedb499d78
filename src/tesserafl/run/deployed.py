"""The server's side of a run whose clients are devices elsewhere, whatever post reaches them."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from uuid import uuid4

from pydantic import TypeAdapter, ValidationError

from tesserafl.core.errors import CheckpointError, ConfigError, TesseraError
from tesserafl.data import ClientData
from tesserafl.engines.attendance import Disowned, Post
from tesserafl.engines.edge_orders import EdgeDevice, EdgeProfile
from tesserafl.engines.federation import Federation
from tesserafl.engines.orders import Hello, Profile
from tesserafl.engines.remote import Remote
from tesserafl.engines.seam import Engine
from tesserafl.run.begin import first_federation, first_peers
from tesserafl.run.carrying import carry
from tesserafl.run.children import die_with_parent
from tesserafl.run.cloud import cloud
from tesserafl.run.costs import CostTable
from tesserafl.run.edge_seats import EdgeSeats
from tesserafl.run.experiment import Experiment, from_json, to_json, with_absolute_paths
from tesserafl.run.federate import topology_of
from tesserafl.run.files import read_json, write_json
from tesserafl.run.live import Patient, live
from tesserafl.run.on_devices import Deployment, for_devices
from tesserafl.run.player import Player, player_of
from tesserafl.run.room import Room, client_of
from tesserafl.run.runner import Listener, play
from tesserafl.run.seats import Seats
from tesserafl.run.setup import Setup, prepare, with_depths

AT_WORK = "server-app.json"
"""A file of the run folder that is there as long as a process plays the run over Flower."""


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
    if topology_of(experiment) == "peers":
        first_peers(setup)
    else:
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


def message_bytes_of(folder: Path) -> int:
    """Bytes of tensors in one message of a run, at most."""
    return _deployed(folder).deployment.message_bytes


def _deployed(folder: Path) -> _Deployed:
    try:
        found = TypeAdapter(_Deployed).validate_python(read_json(folder / "deployment.json"))
    except ValidationError as error:
        raise CheckpointError(f"{folder / 'deployment.json'} is damaged: {error}") from error
    return found


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
        if deployment.own_data:
            room = Room(setup=setup)
            seats.lacks, seats.deals = room.lacks, room.deals
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
    remote.gather(full, deployment.wait_seconds, lambda: len(getattr(seats, "short", ())))
    remote.renumber(seats.settle())
    if deployment.own_data:
        setup = _with_devices(setup, seats.taken if isinstance(seats, Seats) else seats.devices)

    if topology_of(experiment) == "peers":
        summary = carry(setup, remote, folder, listener)
        write_json(folder / "wire.json", {"down": remote.bytes_down, "up": remote.bytes_up})
        remote.goodbye()
        return summary

    federation = first_federation(setup, elsewhere=True)
    tree = None
    if isinstance(seats, EdgeSeats):
        tree = cloud(setup, remote, federation, seats, deployment.waiting)

    def player(setup: Setup, engine: Engine, federation: Federation, costs: CostTable) -> Player:
        if tree is not None:
            return tree
        if not deployment.waiting.for_all:
            return live(setup, remote, federation, costs, deployment.waiting)
        synchronous = player_of(setup, engine, federation, costs)
        return Patient(player=synchronous, setup=setup, engine=remote, federation=federation)

    judge = remote.judge if tree is None else tree.judge
    summary = play(setup, federation, folder, remote, listener, player, judge)
    write_json(folder / "wire.json", {"down": remote.bytes_down, "up": remote.bytes_up})
    remote.goodbye()
    return summary


def serve_noted(post: Post, folder: Path) -> None:
    """`serve_over` for a process whose errors nobody sees: they are written into the folder.

    It ends with the process that started it: a run that nobody serves would keep the folder. Of a
    process that Flower ends or disowns nothing is written: whoever serves may begin it again.
    """
    die_with_parent(signal.SIGKILL)
    write_json(folder / AT_WORK, {"process": os.getpid()})
    try:
        serve_over(post, folder)
    except Disowned:
        raise
    except Exception as error:
        text = str(error)
        if not isinstance(error, TesseraError):
            text = (
                f"the run's process failed: {error!r:.2000}; {folder}/flower/superlink.log has "
                f"more\nTo go on: tessera resume {folder}"
            )
        write_json(folder / "error.json", {"text": text})
        raise
    finally:  # also after the devices heard that the run is over
        (folder / AT_WORK).unlink(missing_ok=True)


def _with_devices(setup: Setup, devices: Mapping[int, Profile | EdgeDevice]) -> Setup:
    """The setup, whose clients are these devices."""
    clients = tuple(client_of(client, profile) for client, profile in sorted(devices.items()))
    asked = min(setup.experiment.clients_per_round, len(clients))
    # Of a client's examples the server needs the shape alone, to count costs with.
    stand_in = setup.data.clients[0]
    empty = stand_in.test.take(stand_in.test.labels.new_empty(0))
    shape = ClientData(train=stand_in.train, validation=empty, test=empty)
    data = replace(setup.data, clients=(shape,) * len(clients), elsewhere=True)
    experiment = replace(setup.experiment, clients_per_round=asked)
    return with_depths(replace(setup, experiment=experiment, data=data, clients=clients))
