"""The commands' own options, and the way from arguments to an experiment."""

from __future__ import annotations

from dataclasses import dataclass, field, make_dataclass, replace
from pathlib import Path
from typing import Annotated, Generic, NamedTuple, TypeVar

import tyro

from tesserafl.core.errors import ConfigError, did_you_mean
from tesserafl.data import DataSettings
from tesserafl.experiments import EXPERIMENTS, Named
from tesserafl.models import HuggingFace, LoRA
from tesserafl.run.experiment import REGISTRIES, Experiment, choose, from_file
from tesserafl.run.holding import Local
from tesserafl.run.hosting import Hosting
from tesserafl.run.learn import LearnSettings
from tesserafl.run.on_devices import Deployment
from tesserafl.run.serve import Link


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Options of the command itself."""

    out: Path | None = None
    """the run folder; default runs/NAME, runs/NAME-2, ..."""
    json: bool = False
    """print the summary as one JSON object on the last line"""
    repeats: int = 1
    """run with this many seeds, counted up from --seed"""


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """Options of the command itself."""

    out: Path | None = None
    """the run folder; default runs/NAME, runs/NAME-2, ..."""
    json: bool = False
    """print the summary as one JSON object on the last line"""
    link: Annotated[Link, tyro.conf.arg(name="")] = field(default_factory=Link)
    deployment: Annotated[Deployment, tyro.conf.arg(name="")] = field(default_factory=Deployment)


@dataclass(frozen=True, kw_only=True)
class AssembleOptions:
    """Put together a model of which every peer of a lean run kept a part."""

    parts: tyro.conf.Positional[tuple[Path, ...]]
    """the folders that the peers wrote when the run was over (model-... in what they keep)"""
    out: Path = Path("model")
    """where the model is written"""
    json: bool = False
    """print what it is as one JSON object"""


@dataclass(frozen=True, kw_only=True)
class JoinOptions:
    """Be a device of a run that `tessera serve` serves."""

    place: tyro.conf.Positional[str]
    """this device's folder of keys (tessera certs), a token (tessera token; with --name), or
    HOST:PORT of a server on this machine"""
    local: Annotated[Local, tyro.conf.arg(name="")] = field(default_factory=Local)
    name: str = ""
    """name of the device; its folder of keys has one"""
    folder: Path | None = None
    """what the device keeps between restarts; default: `state` in its folder of keys, or
    ./NAME-state"""
    memory_mib: float | None = None
    """memory that training may take here; told to the server"""
    once: bool = False
    """end when the server says that the run is over; else wait for the next"""


@dataclass(frozen=True, kw_only=True)
class EdgeOptions:
    """Be an edge of a run that `tessera serve --edges` serves, and serve devices of your own."""

    place: tyro.conf.Positional[str]
    """this edge's folder of keys (tessera certs of the cloud), a token (tessera token; with
    --name), or HOST:PORT of a cloud on this machine"""
    link: Annotated[Link, tyro.conf.arg(name="")] = field(default_factory=Link)
    hosting: Annotated[Hosting, tyro.conf.arg(name="")] = field(default_factory=Hosting)
    name: str = ""
    """name of the edge; its folder of keys has one"""
    folder: Path | None = None
    """what the edge keeps between restarts; default: `state` in its folder of keys, or
    ./NAME-state"""
    model: Path | None = None
    """folder with the pre-trained model that the experiment names; None: the experiment's path"""
    once: bool = False
    """end when the cloud says that the run is over; else wait for the next"""


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """Options of the command itself."""

    edges: bool = False
    """the clients are below edges that are machines (tessera serve --edges); simulated edges are
    fleet.edges"""
    json: bool = False
    """print the plan as one JSON object"""


@dataclass(frozen=True, kw_only=True)
class BenchOptions:
    """Options of the command itself."""

    timed: int = 30
    """rounds that are timed, for each way"""
    json: bool = False
    """print what was measured as one JSON object"""


@dataclass(frozen=True, kw_only=True)
class LearnOptions:
    """Options of the command itself."""

    out: Path | None = None
    """the policy's folder; default runs/NAME-policy, runs/NAME-policy-2, ..."""
    json: bool = False
    """print the result as one JSON object on the last line"""
    learning: Annotated[LearnSettings, tyro.conf.arg(name="")] = field(
        default_factory=LearnSettings
    )


@dataclass(frozen=True)
class ResumeOptions:
    """Continue a run or a study."""

    run: tyro.conf.Positional[Path]
    """the run folder"""
    json: bool = False
    """print the summary as one JSON object on the last line"""


@dataclass(frozen=True)
class ReportOptions:
    """Write a report anew."""

    run: tyro.conf.Positional[Path]
    """the run folder"""


@dataclass(frozen=True)
class CompareOptions:
    """A command on several run folders."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """run folders, or folders of run folders"""
    out: Path | None = None
    """write the table and plots as one HTML page"""
    json: bool = False
    """print the rows as one JSON object"""


_Options = TypeVar("_Options")


class Configured(NamedTuple, Generic[_Options]):
    """What the arguments ask for."""

    name: str
    named: Named
    options: _Options
    experiment: Experiment
    asked: frozenset[str]
    """Settings that were given as flags, for instance `method.ratio`."""


def configured(command: str, args: list[str], options: _Options) -> Configured[_Options]:
    """The experiment that the arguments name, with their overrides; `options` are the command's.

    Raises:
        ConfigError: an unknown experiment, file, setting or value. Flags that no setting has end
            the process with 2 and the nearest flag.
    """
    if not args or args[0].startswith("-"):
        raise ConfigError(
            f"tessera {command} needs an experiment ({', '.join(EXPERIMENTS)}) or a TOML file; "
            f"see tessera --help"
        )
    name, rest = args[0], args[1:]
    if name.endswith((".toml", ".json")):
        base = from_file(Path(name))
        name, named = (
            Path(name).stem,
            Named(base=lambda data: base, about=f"The experiment in {args[0]}."),
        )
    elif name in EXPERIMENTS:
        named = EXPERIMENTS[name]
    else:
        raise ConfigError(f"unknown experiment {name!r}; {did_you_mean(name, EXPERIMENTS)}")
    experiment = named.base(_data_settings(rest))
    asked = frozenset(
        argument[2:].partition("=")[0].replace("-", "_")
        for argument in rest
        if argument.startswith("--")
    )
    if "model.config" in asked and isinstance(experiment.model, HuggingFace | LoRA):
        # The options are of the family that the experiment would have taken.
        experiment = replace(experiment, model=replace(experiment.model, options={}))
    for section in REGISTRIES:
        chosen = _taken(rest, section)
        if chosen is not None:
            current = getattr(experiment, section)
            experiment = replace(experiment, **{section: choose(section, chosen, current)})
    unprefixed = tyro.conf.arg(name="")
    everything = make_dataclass(
        "Everything",
        [
            ("options", Annotated[type(options), unprefixed]),
            ("experiment", Annotated[Experiment, unprefixed]),
        ],
    )
    parsed = tyro.cli(
        everything,
        args=rest,
        default=everything(options, experiment),
        prog=f"tessera {command} {name}",
        description=f"{named.summary}\n\nChoose others with --method NAME, --model NAME.",
        config=(tyro.conf.AvoidSubcommands,),
    )
    return Configured(name, named, parsed.options, parsed.experiment, asked)


def _data_settings(args: list[str]) -> DataSettings | None:
    """The `--data.*` arguments alone, if they name other data than the packaged: an experiment's
    size and model depend on it."""
    if not any(argument.startswith(("--data.path", "--data.source")) for argument in args):
        return None
    own, inside = [], False
    for argument in args:
        if argument.startswith("--"):
            inside = argument.startswith("--data.")
        if inside:
            own.append(argument.replace("--data.", "--", 1))
    return tyro.cli(DataSettings, args=own)


def _taken(args: list[str], flag: str) -> str | None:
    """Remove `--flag value` or `--flag=value` from the arguments; the value, or None."""
    for position, argument in enumerate(args):
        if argument == f"--{flag}" and position + 1 < len(args):
            value = args[position + 1]
            del args[position : position + 2]
            return value
        if argument.startswith(f"--{flag}="):
            return args.pop(position).partition("=")[2]
    return None
