"""A fleet file: TOML with the edges and the devices of a run; see docs/howto/fleets.md.

Everything that it does not know is refused, so that no misspelt setting is lost.
"""

from __future__ import annotations

import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tesserafl.core.errors import ConfigError
from tesserafl.engines.device import Device, Link, Placed
from tesserafl.engines.fleet import (
    CLOUD,
    Edge,
    Fleet,
    FleetSettings,
    check_known,
    generated,
    loads,
    presence,
)
from tesserafl.engines.profiles import LINKS, PROFILES

_Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
_FORMS = ("str", "_LinkTable")
"""How pydantic calls the two ways to write a link."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid")


class _LinkTable(_Part):
    up_mbps: _Positive
    down_mbps: _Positive
    latency_ms: Annotated[float, Field(ge=0)] = 0.0


class _LoadTable(_Part):
    levels: list[float]
    minutes: _Positive = 5.0


class _OnlineTable(_Part):
    share: float
    minutes: _Positive = 60.0


class _EdgeTable(_Part):
    name: str
    parent: str = CLOUD
    link: str | _LinkTable = "fibre"


class _DeviceTable(_Part):
    profile: str | None = None
    count: Annotated[int, Field(ge=1)] = 1
    edge: str = CLOUD
    gflops: _Positive | None = None
    memory_mib: _Positive | None = None
    link: str | _LinkTable | None = None
    idle_watts: float | None = None
    busy_watts: float | None = None
    radio_watts: float | None = None
    load: _LoadTable | None = None
    online: _OnlineTable | None = None
    joins_hours: float | None = None
    leaves_hours: float | None = None


class _File(_Part):
    edges: list[_EdgeTable] = []
    devices: list[_DeviceTable]


def fleet_of(settings: FleetSettings, clients: int, seed: int) -> Fleet:
    """The fleet of a run with so many clients.

    Raises:
        ConfigError: the file is missing or wrong, or has another number of devices.
    """
    if settings.file is None:
        return generated(settings, clients, seed)
    return _read(settings.file, clients, seed)


def names_edges(path: Path) -> bool:
    """Whether a fleet file has edges.

    Raises:
        ConfigError: it is missing or wrong.
    """
    return bool(_table(path).edges)


def _read(path: Path, clients: int, seed: int) -> Fleet:
    table = _table(path)
    try:
        fleet = _from_tables(table, seed)
    except ConfigError as error:
        raise ConfigError(f"fleet {path}: {error}") from error
    if len(fleet.devices) != clients:
        raise ConfigError(
            f"fleet {path} has {len(fleet.devices)} devices, the run has {clients} clients; set "
            f"data.num_clients to {len(fleet.devices)}, or change the counts in the file"
        )
    return fleet


def _table(path: Path) -> _File:
    try:
        return _File.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise ConfigError(f"fleet {path} cannot be read: {error.strerror}") from error
    except ValidationError as error:
        # Of a link that is no name and no table either, the deepest problem is the table's.
        problem = max(error.errors(), key=lambda each: len(each["loc"]))
        place = ".".join(str(part) for part in problem["loc"] if part not in _FORMS)
        raise ConfigError(f"fleet {path}: {place}: {problem['msg']}") from error
    except ValueError as error:
        raise ConfigError(f"fleet {path} is not valid TOML: {error}") from error


def _from_tables(table: _File, seed: int) -> Fleet:
    devices: list[Placed] = []
    homes: list[str] = []
    for entry in table.devices:
        device = _from_table(entry)
        for _ in range(entry.count):
            devices.append(Placed(device=device, id=len(devices), seed=seed))
            homes.append(entry.edge)
    edges = tuple(Edge(name=e.name, parent=e.parent, link=_link(e.link)) for e in table.edges)
    return Fleet(devices=tuple(devices), edges=edges, homes=tuple(homes))


def _from_table(entry: _DeviceTable) -> Device:
    if entry.profile is not None:
        check_known(entry.profile, PROFILES, "devices.profile")
        device = PROFILES[entry.profile]
    elif entry.gflops is None:
        raise ConfigError("a device needs a profile, or gflops of its own")
    else:
        device = Device(gflops=entry.gflops)
    names = ("gflops", "memory_mib", "idle_watts", "busy_watts", "radio_watts")
    given = {name: value for name in names if (value := getattr(entry, name)) is not None}
    if entry.link is not None:
        given["link"] = _link(entry.link)
    if entry.load is not None:
        given["load"] = loads(entry.load.levels, entry.load.minutes)
    if entry.online is not None:
        given["online"] = presence(entry.online.share, entry.online.minutes)
    if entry.joins_hours is not None:
        given["joins_seconds"] = 3600 * entry.joins_hours
    if entry.leaves_hours is not None:
        given["leaves_seconds"] = 3600 * entry.leaves_hours
    return replace(device, **given)


def _link(given: str | _LinkTable) -> Link:
    if isinstance(given, str):
        check_known(given, LINKS, "link")
        return LINKS[given]
    return Link(**given.model_dump())
