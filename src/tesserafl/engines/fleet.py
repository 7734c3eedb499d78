"""Who stands where, with which hardware: the devices of a run and the edges they report to.

    cloud -- edge -- device        a tree of any depth; without edges every device reports to the
          -- device                cloud

It comes from a file (TOML) or from a few settings; see docs/howto/fleets.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from tesserafl.core.errors import ConfigError, did_you_mean
from tesserafl.engines.device import Chain, Device, Link, Placed
from tesserafl.engines.profiles import LINKS, PROFILES

CLOUD = "cloud"
"""Name of the root."""


@dataclass(frozen=True, kw_only=True)
class FleetSettings:
    """The devices that clients are, in virtual time; without any, a run has no clock."""

    file: Path | None = None
    """a fleet file (TOML); the other settings of the fleet are then not used"""
    profiles: tuple[str, ...] = ()
    """device classes, dealt to the clients in turn: raspberry-pi-4, phone, laptop, ..."""
    link: str | None = None
    """link class of all devices; None: what their profile has"""
    edges: int = 0
    """edges between devices and cloud, each with an equal part of the clients; 0: none"""
    clustered: bool = False
    """whether an edge has devices of one class, as far as it goes, instead of all classes alike"""
    backhauls: tuple[str, ...] = ("fibre",)
    """link classes of the edges, dealt in turn"""
    load: tuple[float, ...] = ()
    """shares of their speed that other programs take, between which devices switch at random;
    empty: nothing else runs"""
    load_minutes: float = 5.0
    """mean time that a load lasts"""
    online: float = 1.0
    """share of the time in which a device can be reached"""
    online_minutes: float = 60.0
    """mean time that a device stays online"""

    def __post_init__(self) -> None:
        given = {spec.name for spec in fields(self) if getattr(self, spec.name) != spec.default}
        if self.file is not None and given != {"file"}:
            raise ConfigError(
                "fleet.file says all about a fleet; leave the other settings of fleet away"
            )
        for name in self.profiles:
            check_known(name, PROFILES, "fleet.profiles")
        for name in (*self.backhauls, *([] if self.link is None else [self.link])):
            check_known(name, LINKS, "fleet.link and fleet.backhauls")
        if self.edges < 0:
            raise ConfigError(f"fleet.edges must be 0 or more; got {self.edges}")
        if not self.backhauls:
            raise ConfigError("fleet.backhauls needs at least one link class")
        if given and not self.is_there:
            raise ConfigError(
                "settings of a fleet need devices: add fleet.profiles (see docs/howto/fleets.md) "
                "or fleet.file"
            )
        loads(self.load, self.load_minutes)
        presence(self.online, self.online_minutes)

    @property
    def is_there(self) -> bool:
        """Whether clients are devices, so that the run has a clock."""
        return self.file is not None or bool(self.profiles)


@dataclass(frozen=True, kw_only=True)
class Edge:
    """A node between the cloud and devices."""

    name: str
    parent: str = CLOUD
    """whom it reports to"""
    link: Link
    """its way there"""


@dataclass(frozen=True, kw_only=True)
class Fleet:
    """All devices and edges of a run."""

    devices: tuple[Placed, ...]
    """Client i is the i-th."""
    edges: tuple[Edge, ...] = ()
    homes: tuple[str, ...]
    """Of each device, whom it reports to."""

    def __post_init__(self) -> None:
        names = [edge.name for edge in self.edges]
        for name in names:
            if names.count(name) > 1 or name == CLOUD:
                raise ConfigError(f"two nodes of the fleet are called {name!r}; rename one")
        for child, parent in [
            *((f"edge {edge.name!r}", edge.parent) for edge in self.edges),
            *((f"device {number}", home) for number, home in enumerate(self.homes)),
        ]:
            if parent not in (CLOUD, *names):
                raise ConfigError(
                    f"{child} reports to {parent!r}, which the fleet does not have; "
                    f"{did_you_mean(parent, [CLOUD, *names])}"
                )
        for edge in self.edges:
            seen, node = {edge.name}, edge.parent
            while node != CLOUD:
                if node in seen:
                    over = self.edge(node).parent
                    way = "" if over == node else f", over {over!r}"
                    raise ConfigError(
                        f"edge {node!r} reports to itself{way}; every way must end at {CLOUD!r}"
                    )
                seen.add(node)
                node = self.edge(node).parent

    def flat(self) -> Fleet:
        """The same devices without edges, whose links their messages pass one after another."""
        devices = []
        for placed, home in zip(self.devices, self.homes, strict=True):
            beyond: list[Link] = []
            while home != CLOUD:
                edge = self.edge(home)
                beyond.append(edge.link)
                home = edge.parent
            devices.append(replace(placed, beyond=tuple(beyond)))
        return Fleet(devices=tuple(devices), homes=(CLOUD,) * len(devices))

    def edge(self, name: str) -> Edge:
        """The edge of a name."""
        return next(edge for edge in self.edges if edge.name == name)

    def edges_of(self, name: str) -> list[Edge]:
        """The edges that report to a node, in their order."""
        return [edge for edge in self.edges if edge.parent == name]

    def clients_of(self, name: str) -> list[int]:
        """The clients that report to a node themselves, ascending."""
        return [client for client, home in enumerate(self.homes) if home == name]

    def below(self, name: str) -> list[int]:
        """The clients that report to a node themselves or over edges, ascending."""
        own = self.clients_of(name)
        return sorted(own + [c for edge in self.edges_of(name) for c in self.below(edge.name)])


def generated(settings: FleetSettings, clients: int, seed: int) -> Fleet:
    """The fleet that settings without a file describe, for so many clients.

    Raises:
        ConfigError: there are more edges than clients.
    """
    edges = tuple(
        Edge(name=f"edge-{n}", link=LINKS[settings.backhauls[n % len(settings.backhauls)]])
        for n in range(settings.edges)
    )
    if settings.edges > clients:
        raise ConfigError(
            f"fleet.edges is {settings.edges}, but there are only {clients} clients to report to "
            f"them; lower it"
        )
    kinds = [settings.profiles[number % len(settings.profiles)] for number in range(clients)]
    if settings.clustered:
        order = sorted(range(clients), key=lambda c: (c % len(settings.profiles), c))
    else:
        order = list(range(clients))
    homes = [CLOUD] * clients
    for place, client in enumerate(order):
        if edges:
            homes[client] = edges[place * len(edges) // clients].name
    return Fleet(
        devices=tuple(
            Placed(device=_device(PROFILES[kind], settings), id=number, seed=seed)
            for number, kind in enumerate(kinds)
        ),
        edges=edges,
        homes=tuple(homes),
    )


def _device(device: Device, settings: FleetSettings) -> Device:
    load = loads(settings.load, settings.load_minutes)
    online = presence(settings.online, settings.online_minutes)
    link = device.link if settings.link is None else LINKS[settings.link]
    return replace(device, load=load, online=online, link=link)


def loads(levels: Sequence[float], minutes: float) -> Chain:
    """How the load of a device switches between levels; ConfigError if one is impossible."""
    values = tuple(levels) or (0.0,)
    if not all(0 <= level < 1 for level in values):
        raise ConfigError(f"a load is a share of the speed, in [0, 1); got {list(values)}")
    if not minutes > 0:
        raise ConfigError(f"a load lasts a positive number of minutes; got {minutes}")
    return Chain(values=values, mean_seconds=(60.0 * minutes,) * len(values))


def presence(share: float, minutes: float) -> Chain:
    """How a device comes and goes; ConfigError if the share of the time is impossible."""
    if not 0 < share <= 1:
        raise ConfigError(f"the share of the time online is in (0, 1]; got {share}")
    if not minutes > 0:
        raise ConfigError(f"a device stays online for a positive number of minutes; got {minutes}")
    if share == 1:
        return Chain(values=(1.0,), mean_seconds=(60.0 * minutes,))
    away = 60.0 * minutes * (1 - share) / share
    return Chain(values=(1.0, 0.0), mean_seconds=(60.0 * minutes, away))


def check_known(name: str, table: Mapping[str, Any], where: str) -> None:
    """Raise ConfigError unless a table has the name."""
    if name not in table:
        raise ConfigError(f"{where} names {name!r}; {did_you_mean(name, table)}")
