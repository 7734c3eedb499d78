"""The typed configuration of a run, and its way to JSON and back."""

from __future__ import annotations

import dataclasses
import json
import tomllib
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from tesserafl.core.errors import ConfigError, did_you_mean
from tesserafl.core.fit import Training
from tesserafl.data.settings import DataSettings
from tesserafl.engines.clock import ClockSettings
from tesserafl.engines.fleet import FleetSettings
from tesserafl.engines.network import NetworkSettings
from tesserafl.methods import METHODS, FedBRB, Hwamei, MethodSettings, Tomtit
from tesserafl.models import (
    MLP,
    MODELS,
    FeatureAdapter,
    HuggingFace,
    LoRA,
    ModelSettings,
    Prompts,
)

Batching = Literal["auto", "sequential", "vmapped", "compiled"]


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """Where and how clients are computed; the number of workers alone never changes bits."""

    workers: int = 1
    """processes that train clients; 1 trains them in the main process. Any number, the same bits"""
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


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """Everything that a run depends on; a run folder holds it as config.json."""

    data: DataSettings = field(default_factory=DataSettings)
    model: ModelSettings = field(default_factory=MLP)
    method: MethodSettings = field(default_factory=FedBRB)
    training: Training = field(default_factory=Training)
    engine: EngineSettings = field(default_factory=EngineSettings)
    network: NetworkSettings = field(default_factory=NetworkSettings)
    fleet: FleetSettings = field(default_factory=FleetSettings)
    clock: ClockSettings = field(default_factory=ClockSettings)
    rounds: int = 60
    """communication rounds"""
    clients_per_round: int = 10
    """clients that are asked in a round, drawn without replacement"""
    dropout: float = 0.0
    """probability that a client that was asked does not answer"""
    client_memory_mib: tuple[float, ...] = ()
    """memory for training on the client classes, dealt like method.ratio; empty: what the fleet's
    devices have, or no limit"""
    client_gflops: tuple[float, ...] = ()
    """speed of the client classes in GFLOP/s, dealt like method.ratio; with client_seconds"""
    client_seconds: float | None = None
    """time that a client has for the training of a round; None: no limit. Methods that choose how
    many blocks a client adapts (fedfmsl, fedadapter) keep to it"""
    seed: int = 0
    """the seed of everything: partition, initialisation, participation, batches, schedules"""
    finetune_epochs: int = 0
    """epochs for which every client with test examples of its own (data.test) trains the final
    model before it is tested there; 0: the clients' tests are of the global model alone"""
    evaluate_every: int = 5
    """rounds between evaluations of the global model; the last round is always evaluated"""
    checkpoint_every: int = 5
    """rounds between checkpoints; the last round always has one"""

    def __post_init__(self) -> None:
        for name in ("rounds", "clients_per_round", "evaluate_every", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1; got {getattr(self, name)}")
        if self.finetune_epochs < 0:
            raise ConfigError(f"finetune_epochs must be 0 or more; got {self.finetune_epochs}")
        if not 0.0 <= self.dropout < 1.0:
            raise ConfigError(f"dropout must be in [0, 1); got {self.dropout}")
        if self.client_seconds is not None and not self.client_seconds > 0:
            raise ConfigError(f"client_seconds must be positive; got {self.client_seconds}")
        if (self.client_seconds is None) != (not self.client_gflops):
            raise ConfigError(
                "client_seconds and client_gflops go together: a time, and how fast clients are; "
                f"got {self.client_seconds} and {list(self.client_gflops)}"
            )
        if not all(speed > 0 for speed in self.client_gflops):
            raise ConfigError(f"client_gflops must be positive; got {list(self.client_gflops)}")
        if not self.fleet.is_there and self.clock != ClockSettings():
            raise ConfigError(
                "settings of the clock need devices whose time they measure; add fleet.profiles or "
                "fleet.file"
            )
        if self.engine.cache_mib < 0:
            raise ConfigError(f"engine.cache_mib must be 0 or more; got {self.engine.cache_mib}")
        for name in ("workers", "threads", "group"):
            if getattr(self.engine, name) < 1:
                raise ConfigError(
                    f"engine.{name} must be at least 1; got {getattr(self.engine, name)}"
                )


REGISTRIES: dict[str, Mapping[str, type[Any]]] = {"method": METHODS, "model": MODELS}
"""Settings whose class is chosen by name."""


def with_absolute_paths(experiment: Experiment) -> Experiment:
    """The experiment, with folders that exist written so that they are found from anywhere."""
    data, model, network = experiment.data, experiment.model, experiment.network
    if data.path is not None:
        data = dataclasses.replace(data, path=data.path.absolute())
    if data.tokenizer is not None:
        data = dataclasses.replace(data, tokenizer=data.tokenizer.absolute())
    if (
        isinstance(model, HuggingFace | LoRA | Prompts | FeatureAdapter)
        and Path(model.config).is_dir()
    ):
        model = dataclasses.replace(model, config=str(Path(model.config).absolute()))
    if isinstance(model, LoRA | Prompts | FeatureAdapter) and model.adapter is not None:
        model = dataclasses.replace(model, adapter=model.adapter.absolute())
    if network.file is not None:
        network = dataclasses.replace(network, file=network.file.absolute())
    fleet = experiment.fleet
    if fleet.file is not None:
        fleet = dataclasses.replace(fleet, file=fleet.file.absolute())
    method = experiment.method
    if isinstance(method, Tomtit | Hwamei) and method.policy is not None:
        method = dataclasses.replace(method, policy=method.policy.absolute())
    return dataclasses.replace(
        experiment, data=data, model=model, method=method, network=network, fleet=fleet
    )


def name_of(section: str, settings: object) -> str:
    """The registered name of a method's or model's settings."""
    for name, kind in REGISTRIES[section].items():
        if type(settings) is kind:
            return name
    raise ConfigError(f"{type(settings).__name__} is not a registered {section}")


def to_json(experiment: Experiment) -> dict[str, Any]:
    """Plain values that `from_json` turns back into an equal experiment."""
    plain: dict[str, Any] = {}
    for spec in dataclasses.fields(experiment):
        value = getattr(experiment, spec.name)
        if spec.name in REGISTRIES:
            value = {"name": name_of(spec.name, value), **_plain(value)}
        elif dataclasses.is_dataclass(value):
            value = _plain(value)
        plain[spec.name] = list(value) if isinstance(value, tuple) else value
    return plain


def from_json(values: Mapping[str, Any], base: Experiment | None = None) -> Experiment:
    """An experiment from plain values; what is not named keeps the base's value.

    Without a base a method or model that is named has all of its own defaults.

    Raises:
        ConfigError: an unknown key (the nearest is suggested) or a value of the wrong kind.
    """
    if not isinstance(values, Mapping):
        raise ConfigError(f"an experiment is a table of settings; got {type(values).__name__}")
    is_alone, base = base is None, base or Experiment()
    changes: dict[str, Any] = {}
    for key, value in _known(values, Experiment, "").items():
        current = getattr(base, key)
        if key in REGISTRIES:
            changes[key] = _choose(key, value, None if is_alone else current, current)
        elif dataclasses.is_dataclass(current):
            changes[key] = _replace(current, value, key)
        else:
            changes[key] = _validated(Experiment, key, value, key)
    return dataclasses.replace(base, **changes)


def from_file(path: Path) -> Experiment:
    """An experiment from a TOML file, or from the config.json of a run folder.

    Raises:
        ConfigError: the file is missing, not TOML or JSON, or holds an unknown setting.
    """
    try:
        text = path.read_text(encoding="utf-8")
        values = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"{path} is not valid {path.suffix[1:].upper()}: {error}") from error
    return from_json(values)


def choose(section: str, name: str, current: Any) -> Any:
    """Default settings of the method or model `name`; fields that `current` shares are kept.

    None: nothing is.
    """
    registry = REGISTRIES[section]
    if not isinstance(name, str) or name not in registry:
        raise ConfigError(f"unknown {section} {name!r}; {did_you_mean(str(name), registry)}")
    kind = registry[name]
    if type(current) is kind:
        return current
    shared = {"ratio"} & {spec.name for spec in dataclasses.fields(kind)}
    return kind(**{n: getattr(current, n) for n in shared if hasattr(current, n)})


def _choose(section: str, value: Any, kept: Any, default: Any) -> Any:
    if isinstance(value, str):
        return choose(section, value, kept)
    if not isinstance(value, Mapping):
        raise ConfigError(f"{section} must be a table with a name; got {value!r}")
    rest = {key: item for key, item in value.items() if key != "name"}
    chosen = choose(section, value["name"], kept) if "name" in value else default
    return _replace(chosen, rest, section)


def _replace(current: Any, values: Any, path: str) -> Any:
    if not isinstance(values, Mapping):
        raise ConfigError(f"{path} must be a table of settings; got {values!r}")
    known = _known(values, type(current), f"{path}.")
    changes = {k: _validated(type(current), k, v, f"{path}.{k}") for k, v in known.items()}
    return dataclasses.replace(current, **changes)


def _known(values: Mapping[str, Any], kind: type, prefix: str) -> Mapping[str, Any]:
    names = {spec.name for spec in dataclasses.fields(kind)}
    for key in values:
        if key not in names:
            raise ConfigError(f"unknown setting {prefix}{key!s}; {did_you_mean(str(key), names)}")
    return values


def _validated(kind: type, name: str, value: Any, path: str) -> Any:
    expected = typing.get_type_hints(kind)[name]
    try:
        return TypeAdapter(expected).validate_python(value)
    except ValidationError as error:
        problem = error.errors()[0]
        raise ConfigError(f"{path} = {value!r} is not allowed: {problem['msg']}") from error


def _plain(settings: Any) -> dict[str, Any]:
    plain: dict[str, Any] = {}
    for spec in dataclasses.fields(settings):
        value = getattr(settings, spec.name)
        if isinstance(value, Path):
            value = str(value)
        plain[spec.name] = list(value) if isinstance(value, tuple) else value
    return plain
