"""How a run reaches its devices, and what an experiment must be for them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from tesserafl.core.errors import ConfigError
from tesserafl.engines.parcels import MOST_BYTES
from tesserafl.run.experiment import Experiment
from tesserafl.run.federate import topology_of
from tesserafl.run.live import Waiting


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


def _check_peers(experiment: Experiment, deployment: Deployment) -> None:
    network = experiment.network
    if network.loss or network.delay or network.failure:
        raise ConfigError(
            f"network.loss, delay and failure are simulated, and peers on devices have real links; "
            f"set them to 0 (they are {network.loss}, {network.delay} and {network.failure})"
        )
    if not deployment.waiting.for_all:
        raise ConfigError(
            "waiting.* is for a server that sums; peers wait task_seconds for each other: leave "
            "it away"
        )


def as_tree(experiment: Experiment) -> Experiment:
    """The experiment on edges that are machines; raises ConfigError if it is for no tree."""
    asked = experiment.network.topology
    if asked not in ("auto", "tree"):
        raise ConfigError(
            f"a run with edges is a tree, and network.topology is {asked!r}: leave it away, or "
            f"leave --edges away"
        )
    return replace(experiment, network=replace(experiment.network, topology="tree"))


def _placed(experiment: Experiment, deployment: Deployment) -> Experiment:
    """The experiment, on a star or a tree; raises ConfigError if these devices cannot be that."""
    asked, method = experiment.network.topology, experiment.method
    if deployment.edges:
        return as_tree(experiment)
    if asked == "tree" or (asked == "auto" and method.topology == "tree"):
        raise ConfigError(
            "a tree needs edges: say with --edges how many join (docs/howto/edge-tier.md), or set "
            "network.topology to 'star'"
        )
    if topology_of(experiment) == "peers":
        _check_peers(experiment, deployment)
    return experiment
