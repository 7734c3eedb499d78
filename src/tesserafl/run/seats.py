"""Which device is which client of a deployed run; kept in the run folder, so a resume knows it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from tesserafl.core.errors import CheckpointError, ConfigError
from tesserafl.engines.orders import Profile
from tesserafl.run.files import read_json, write_json
from tesserafl.run.guests import GUESTS, Guests

_PROFILES: TypeAdapter[dict[int, Profile]] = TypeAdapter(dict[int, Profile])


@dataclass(kw_only=True)
class Seats:
    """The seats of a run. A device is known by its name, and keeps its seat for the whole run."""

    path: Path
    number: int
    """of seats"""
    parts: bool
    """Devices take parts of the experiment's data, and say which; else they have their own."""
    lacks: Callable[[int, Profile], str | None] = lambda number, profile: None
    """Why a device with data of its own cannot be the client of a number; None: it can."""
    deals: int = 1
    """Clients whose numbers differ by so many are dealt alike."""
    taken: dict[int, Profile] = field(default_factory=dict)
    """Client -> its device."""
    short: dict[str, str] = field(default_factory=dict)
    """Name of a device that cannot be a client of this run -> what it lacks."""
    settled: bool = False
    """Whether the rounds have begun: clients' numbers do not change any more."""
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

    def seat(self, voucher: str, profile: Profile) -> int | str:
        """The client that a device is, or why it is none.

        `voucher` is the name that its key was registered with; "": it has none. What a device is
        told is written beside the seats, once, for who watches the run.
        """
        client = self._seat(voucher, profile)
        text = client if isinstance(client, str) else f"has joined, as client {client}"
        self.guests.tell(profile.name, text)
        return client

    def _seat(self, voucher: str, profile: Profile) -> int | str:
        if voucher and voucher != profile.name:
            return f"the device calls itself {profile.name!r}, but its key is {voucher!r}'s"
        client = self._asked(profile)
        if isinstance(client, str):
            return client
        for other, profile_there in self.taken.items():
            if profile_there.name == profile.name and other != client:
                return f"the device {profile.name!r} is client {other} of this run"
        sitting = self.taken.get(client)
        if sitting is not None and sitting.name != profile.name:
            return (
                f"client {client} is the device {sitting.name!r}; start {profile.name!r} with "
                f"another --client"
            )
        if sitting is not None and self.settled and sitting.num_examples != profile.num_examples:
            return (
                f"device {profile.name!r} joined with {sitting.num_examples} examples and came "
                f"back with {profile.num_examples}; updates are weighted by that: give it the "
                f"data of before, or start a new run"
            )
        self.taken[client] = profile
        if self.settled and sitting is None:  # who comes late has a seat after a restart too
            self.save()
        return client

    def settle(self) -> dict[int, int | str]:
        """End the time of seating; returns old number -> new, or why the device has none any more.

        Devices with data of their own are numbered by their names: who came first must not matter.
        One that has not the memory for what its number is dealt loses its seat.

        Raises:
            ConfigError: no device has a seat.
        """
        found: dict[int, int | str] = {client: client for client in self.taken}
        if not self.parts and not self.settled:
            new = 0
            for old in sorted(self.taken, key=lambda client: self.taken[client].name):
                found[old] = self.lacks(new, self.taken[old]) or new
                new += isinstance(found[old], int)
        for old, why in found.items():
            if isinstance(why, str):
                self.short[self.taken[old].name] = why
                self.guests.tell(self.taken.pop(old).name, why)
        if not self.taken and self.short:
            name, why = min(self.short.items())
            raise ConfigError(f"no device that has joined can take part; {name!r}: {why}")
        if not self.taken:
            raise ConfigError("no device has joined; start some with: tessera join ADDRESS")
        numbers = {old: new for old, new in found.items() if isinstance(new, int)}
        self.taken = {numbers[old]: profile for old, profile in self.taken.items()}
        self.settled = True
        if not self.parts:
            self.number = len(self.taken)
        self.save()
        return found

    def save(self) -> None:
        """Write who sits where."""
        values = {str(c): self.taken[c].model_dump() for c in sorted(self.taken)}
        write_json(self.path, values)

    def _asked(self, profile: Profile) -> int | str:
        if self.parts:
            if profile.client is None:
                return (
                    "this run deals out its own data: start the device with --client and the "
                    "number of its part"
                )
            if profile.client >= self.number:
                return f"client {profile.client} does not exist: the run has {self.number} clients"
            return profile.client
        if profile.client is not None:
            return "devices of this run bring their own data: leave --client away"
        for client, sitting in self.taken.items():
            if sitting.name == profile.name:
                return client
        if self.settled or len(self.taken) >= self.number:
            return f"all {self.number} seats are taken; this device may join the next run"
        # Which number it will have is not known yet.
        why = [self.lacks(number, profile) for number in range(self.deals)]
        self.short.pop(profile.name, None)
        if all(why):
            self.short[profile.name] = str(why[-1])
            return self.short[profile.name]
        return len(self.taken)
