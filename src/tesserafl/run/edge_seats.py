"""Which edges a deployed run has, and which clients are below each; kept in the run folder."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from tesserafl.core.errors import CheckpointError, ConfigError
from tesserafl.core.messages import Client
from tesserafl.engines.edge_orders import EdgeDevice, EdgeProfile
from tesserafl.run.files import read_json, write_json
from tesserafl.run.guests import GUESTS, Guests

_PROFILES: TypeAdapter[dict[int, EdgeProfile]] = TypeAdapter(dict[int, EdgeProfile])


@dataclass(kw_only=True)
class EdgeSeats:
    """The seats of edges. Who is below an edge stays the same for the whole run."""

    path: Path
    clients: tuple[Client, ...] | None
    """All of the run; None: devices have data of their own, and are numbered edge by edge."""
    taken: dict[int, EdgeProfile] = field(default_factory=dict)
    """Seat -> its edge."""
    settled: bool = False
    """Whether the rounds have begun."""
    guests: Guests = field(init=False)

    def __post_init__(self) -> None:
        self.guests = Guests(path=self.path.with_name(GUESTS))
        if not self.path.exists():
            return
        try:
            self.taken = _PROFILES.validate_python(read_json(self.path), strict=False)
        except ValidationError as error:
            raise CheckpointError(f"{self.path} is damaged: {error}") from error
        self.settled = True

    @property
    def names(self) -> Mapping[int, str]:
        """Seat -> the edge's name."""
        return {seat: profile.name for seat, profile in self.taken.items()}

    @property
    def below(self) -> Mapping[int, list[int]]:
        """Seat -> the clients below its edge, ascending."""
        return {seat: sorted(self.numbers(seat).values()) for seat, _ in sorted(self.taken.items())}

    @property
    def devices(self) -> Mapping[int, EdgeDevice]:
        """Client -> its device."""
        return {
            device.client: device
            for profile in self.taken.values()
            for device in profile.devices
            if device.client is not None
        }

    def numbers(self, seat: int) -> dict[str, int]:
        """Device -> the client that it is, of all below an edge."""
        devices = self.taken[seat].devices
        return {device.name: device.client for device in devices if device.client is not None}

    def seat(self, voucher: str, profile: EdgeProfile) -> int | str:
        """The seat that an edge takes, or why it has none; see `Seats.seat`."""
        seat = self._seat(voucher, profile)
        if isinstance(seat, str):
            self.guests.tell(profile.name, seat)
            return seat
        if not self.settled:
            self.taken[seat] = profile
        own = ", ".join(device.name for device in profile.devices)
        self.guests.tell(profile.name, f"has joined as an edge, with {own}")
        return seat

    def _seat(self, voucher: str, profile: EdgeProfile) -> int | str:
        if voucher and voucher != profile.name:
            return f"the edge calls itself {profile.name!r}, but its key is {voucher!r}'s"
        known = {name: seat for seat, name in self.names.items()}
        seat = known.get(profile.name, len(self.taken))
        if self.settled and profile.name not in known:
            return f"the run began without edge {profile.name!r}; it may join the next"
        if self.settled and _who(profile) != _who(self.taken[seat], self.clients is None):
            return (
                f"edge {profile.name!r} comes back with other devices than those it began with; "
                f"put them back, or start a new run"
            )
        if self.clients is None or self.settled:
            return seat if profile.devices else f"edge {profile.name!r} has no devices"
        return self._parts(self.clients, seat, profile) or seat

    def _parts(self, clients: tuple[Client, ...], seat: int, profile: EdgeProfile) -> str:
        """Why devices cannot be the parts of the experiment's data that they say; "": they can."""
        told = [device.client for device in profile.devices]
        if not told or len(set(told)) < len(told):
            return f"edge {profile.name!r} has no devices, or two for one client"
        for device in profile.devices:
            if device.client is None or device.client >= len(clients):
                return (
                    f"client {device.client} of edge {profile.name!r} does not exist: the run has "
                    f"{len(clients)}"
                )
            if device.num_examples != (has := clients[device.client].num_examples):
                return (
                    f"client {device.client} of edge {profile.name!r} has {device.num_examples} "
                    f"examples; dealt to it were {has}: give its device the same data"
                )
        for other, taken in self.below.items():
            if other != seat and (both := set(taken).intersection(told)):
                return (
                    f"client {min(both)} is below edge {self.names[other]!r} and below "
                    f"{profile.name!r}; start one of them with another --client"
                )
        return ""

    def settle(self) -> dict[int, int]:
        """End the time of seating; returns old seat -> new: edges are numbered by their names.

        Raises:
            ConfigError: no edge has a seat.
        """
        if not self.taken:
            raise ConfigError("no edge has joined; start some with: tessera edge ADDRESS")
        ordered = sorted(self.taken, key=lambda seat: self.taken[seat].name)
        numbers = {old: new for new, old in enumerate(ordered)}
        taken = {numbers[old]: self.taken[old] for old in ordered}
        if self.clients is None and not self.settled:
            count = itertools.count()
            taken = {
                seat: profile.model_copy(
                    update={
                        "devices": [
                            device.model_copy(update={"client": next(count)})
                            for device in sorted(profile.devices, key=lambda each: each.name)
                        ]
                    }
                )
                for seat, profile in taken.items()
            }
        self.taken = taken
        self.settled = True
        values = {str(seat): self.taken[seat].model_dump() for seat in sorted(self.taken)}
        write_json(self.path, values)
        return numbers


def _who(profile: EdgeProfile, unnumbered: bool = False) -> list[EdgeDevice]:
    """An edge's devices by their names; without the numbers that the cloud gave them."""
    devices = sorted(profile.devices, key=lambda device: device.name)
    return [d.model_copy(update={"client": None}) for d in devices] if unnumbered else devices
