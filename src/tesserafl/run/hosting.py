"""What an edge holds of a run: its model, who is below it, and how to reach them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tesserafl.core.errors import TesseraError
from tesserafl.core.schedule import Sketch
from tesserafl.engines.attendance import Post
from tesserafl.engines.edge_orders import EdgeDevice, Waits
from tesserafl.engines.orders import Hello, Profile
from tesserafl.engines.parcels import MOST_BYTES
from tesserafl.engines.remote import Remote
from tesserafl.run.costs import CostTable
from tesserafl.run.enough import Sent, Working
from tesserafl.run.holding import Local, setup_without_data
from tesserafl.run.overtime import Overtime
from tesserafl.run.seats import Seats
from tesserafl.run.setup import Setup


@dataclass(frozen=True, kw_only=True)
class Hosting:
    """How an edge serves its devices."""

    devices: int = 2
    """devices that the edge waits for before it tells the cloud who is below it"""
    wait_seconds: float = 600.0
    """seconds that it waits for them; then it begins with those that are there"""
    task_seconds: float = 3600.0
    """seconds that a device has for a task, with its transfers; less, if the cloud has less
    patience with the edge"""
    under_way: int = 8
    """tasks that are under way at once: their sub-models are in the edge's memory"""
    message_bytes: int = MOST_BYTES
    """of tensors in one message to a device"""


@dataclass(kw_only=True)
class Hosted:
    """A run of a cloud, at one of its edges."""

    setup: Setup
    """Without clients and data."""
    remote: Remote
    seats: Seats
    costs: CostTable
    sketch: Sketch | None
    overtime: Overtime
    numbers: dict[str, int] = field(default_factory=dict)
    """Device -> the client that the cloud calls it."""
    late: dict[int, Sent] = field(default_factory=dict)
    """Client -> what it was asked, of those that are at work yet."""

    def settle(self, hosting: Hosting) -> list[EdgeDevice]:
        """Who is below the edge; the first time it waits for them."""
        if not self.seats.settled:
            self.remote.gather(hosting.devices, hosting.wait_seconds)
            self.remote.gather_any(range(self.seats.number))
            self.remote.renumber(self.seats.settle())
        return [
            EdgeDevice(
                name=profile.name,
                client=profile.client,
                num_examples=profile.num_examples,
                memory_mib=profile.memory_mib,
            )
            for _, profile in sorted(self.seats.taken.items())
        ]

    def begin(self, numbers: Mapping[str, int], heard: Iterable[Sequence[int]]) -> None:
        """Take the cloud's numbers of the devices, and what it knows of their memories.

        Raises:
            TesseraError: they are other devices than it was told of.
        """
        if numbers.keys() != {profile.name for profile in self.seats.taken.values()}:
            raise TesseraError("the cloud asks other devices than it was told of")
        old = {profile.name: client for client, profile in self.seats.taken.items()}
        old |= self.numbers
        self.remote.renumber({old[name]: client for name, client in numbers.items()})
        self.numbers.update(numbers)
        known = {client: round for client, round in heard}
        self.remote.heard, self.remote.keeps = dict(known), known

    def give(self, seconds: float) -> None:
        """What devices are asked from now on has so much time."""
        self.remote.until = self.remote.clock() + seconds

    def working(self, waits: Waits | None) -> Working | None:
        """The devices, as those that are not all waited for; None: they are."""
        if waits is None:
            return None
        return Working(
            setup=self.setup,
            engine=self.remote,
            costs=self.costs,
            banks=waits.banks,
            tasks=self.late,
        )


def hosted(
    hello: Hello, name: str, folder: Path, post: Post, hosting: Hosting, local: Local
) -> Hosted:
    """What an edge of this name begins to hold of a run; what is on its disk already stays.

    Raises:
        TesseraError: it is no experiment, or its model is not on this machine.
    """
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    setup = setup_without_data(local, hello.experiment, hello.spec)
    number = setup.experiment.data.num_clients if hello.parts else hosting.devices
    seats = Seats(path=folder / "devices.json", number=number, parts=hello.parts)
    numbers: dict[str, int] = {}
    remote = Remote(
        post=post,
        hello=hello,
        seat=_seating(name, seats, numbers),
        seconds=hosting.task_seconds,
        most_bytes=hosting.message_bytes,
        capacity=hosting.under_way,
    )
    sketch = getattr(setup.experiment.method, "sketch", None)
    overtime = Overtime(folder=folder / "late")
    return Hosted(
        setup=setup,
        remote=remote,
        seats=seats,
        costs=setup.costs(),
        sketch=sketch and sketch(setup.model),
        overtime=overtime,
        numbers=numbers,
        late=overtime.read(),
    )


def _seating(
    name: str, seats: Seats, numbers: Mapping[str, int]
) -> Callable[[str, Profile], int | str]:
    """Gives devices their seats, under the cloud's numbers once there are some."""

    def seat(voucher: str, profile: Profile) -> int | str:
        known = {sitting.name for sitting in seats.taken.values()}
        if seats.settled and profile.name not in known:
            return (
                f"edge {name!r} has told the cloud who is below it; {profile.name!r} may join its "
                f"next run"
            )
        client = seats.seat(voucher, profile)
        return client if isinstance(client, str) else numbers.get(profile.name, client)

    return seat
