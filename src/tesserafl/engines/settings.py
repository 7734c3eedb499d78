"""Who trains clients, where and how: the settings of the embedded engines."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tesserafl.core.errors import ConfigError

Batching = Literal["auto", "sequential", "vmapped", "compiled"]


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """Where and how clients are computed; the number of workers alone never changes bits."""

    kind: Literal["local", "ray"] = "local"
    """who trains clients: processes of this machine, or actors of a Ray cluster that you trust
    (pip install 'tesserafl[ray]')"""
    address: str = "local"
    """of kind ray: local, an instance on this machine for this run alone; auto, the cluster that
    this machine is part of; or HOST:PORT of its head"""
    gpus: float = 0.0
    """of kind ray: the share of a GPU that an actor gets, 1 or less; 0: clients train on the CPU"""
    workers: int = 1
    """processes or actors that train clients; 1 of kind local trains them in the main process. Any
    number, the same bits"""
    threads: int = 1
    """threads of one worker's matrix products; another number may change the last bits"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """where clients train; auto takes a GPU if there is one"""
    batching: Batching = "auto"
    """how clients train: one after another, those of one shape in one vectorised program, or that
    program compiled; auto decides by the model and the length of the run, config.json says how"""
    group: int = 16
    """clients that one vectorised program trains, at most; fewer spread over more workers"""
    cache_mib: int = 1024
    """memory of one process for what frozen layers gave, in training and in tests; 0: nothing is
    kept and no layer skipped"""

    def __post_init__(self) -> None:
        if self.cache_mib < 0:
            raise ConfigError(f"engine.cache_mib must be 0 or more; got {self.cache_mib}")
        for name in ("workers", "threads", "group"):
            if (given := getattr(self, name)) < 1:
                raise ConfigError(f"engine.{name} must be at least 1; got {given}")
        if self.kind == "local" and (self.address != EngineSettings.address or self.gpus):
            raise ConfigError(
                f"engine.address ({self.address!r}) and engine.gpus ({self.gpus:g}) are of engine."
                f"kind 'ray'; set that, or leave them out: engine.device chooses a GPU of this "
                f"machine"
            )
        if not 0.0 <= self.gpus <= 1.0:
            raise ConfigError(
                f"engine.gpus must be in [0, 1]: a client trains on one; got {self.gpus:g}"
            )
        is_gpu = self.gpus > 0
        if self.kind == "ray" and self.device != "auto" and (self.device == "cuda") != is_gpu:
            raise ConfigError(
                f"engine.device {self.device!r} contradicts engine.gpus {self.gpus:g}, which says "
                f"where actors train: on the CPU with 0, else on a GPU; leave engine.device out"
            )
        if "://" in self.address or not self.address:
            raise ConfigError(
                f"engine.address must be 'local', 'auto' or HOST:PORT; got {self.address!r}. Start "
                f"runs on a machine of the cluster: Ray's client (ray://) is not supported"
            )
