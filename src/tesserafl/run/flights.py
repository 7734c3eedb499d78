"""Clients' work in virtual time: when it ends, what it costs, and whether it comes to an end."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from tesserafl.core.messages import Task, Update
from tesserafl.core.params import Params
from tesserafl.core.submodel import SubModel
from tesserafl.core.wire import Parts, update_of, update_parts
from tesserafl.engines.batches import num_seen
from tesserafl.engines.device import Device, Piece
from tesserafl.engines.federation import Traffic
from tesserafl.engines.fleet import Fleet
from tesserafl.engines.seam import Engine
from tesserafl.run.costs import CostTable
from tesserafl.run.rounds import Notes, answers
from tesserafl.run.setup import Setup

LATE = "came after its round had ended"
"""Why an answer does not count, of which nothing else is wrong."""


@dataclass(frozen=True, kw_only=True)
class Flight:
    """One client's work on one task, from the moment it was sent to the moment it ended."""

    client: int
    round: int
    """Of the model that it began with."""
    pieces: tuple[Piece, ...]
    bytes_down: int
    bytes_up: int
    update: Update | None
    """None: it failed, or what came of it was passed on."""
    row: dict[str, Any]
    """What is noted of it: of an answer what `Notes.clients` has, of a failure what `failures`."""
    trained: SubModel | None
    """What it trained; None: it failed."""

    @property
    def start(self) -> float:
        """When it was sent."""
        return self.pieces[0].start

    @property
    def ends(self) -> float:
        """When its answer is there, or its failure shows."""
        return self.pieces[-1].end

    @property
    def took_time(self) -> bool:
        """Whether its device took the task at all, if that takes time."""
        return self.ends > self.start

    @property
    def answered(self) -> bool:
        """Whether it came to its end."""
        return self.trained is not None

    def joules(self, device: Device) -> float:
        """What it costs the device."""
        return sum(joules_of(piece, device) for piece in self.pieces)

    def seconds(self, *kinds: str) -> float:
        """Time of its pieces of these kinds."""
        return sum(piece.end - piece.start for piece in self.pieces if piece.kind in kinds)

    def note_in(self, notes: Notes, device: Device, **more: Any) -> None:
        """Add what it was and took to a round's notes."""
        joules = self.joules(device)
        row = {
            **self.row,
            "bytes_down": self.bytes_down,
            "bytes_up": self.bytes_up,
            "joules": joules,
            "pieces": [list(piece) for piece in self.pieces],
            **more,
        }
        if self.trained is None:
            notes.failures.append(row)
        else:
            notes.clients.append(row)
            notes.trained.append(self.trained)
        notes.joules += joules
        before = notes.traffic.get(self.client, Traffic(0, 0))
        notes.traffic[self.client] = Traffic(
            before.sent + self.bytes_up, before.received + self.bytes_down
        )

    def lasting(self) -> Flight:
        """The flight, whose update's tensors nobody else writes to."""
        if self.update is None:
            return self
        delta = {name: tensor.clone() for name, tensor in self.update.delta.items()}
        extra = {name: tensor.clone() for name, tensor in self.update.extra.items()}
        return replace(self, update=replace(self.update, delta=delta, extra=extra))

    def refused(self) -> Flight:
        """The flight, as one whose answer came too late to count."""
        if not self.answered:
            return self
        row = {"client": self.client, "reason": "expired", "text": LATE}
        return replace(self, update=None, trained=None, row=row)

    def waiting_since(self, moment: float) -> Flight:
        """The flight of a device that waited for its task."""
        if moment >= self.start:
            return self
        return replace(self, pieces=(Piece("wait", moment, self.start), *self.pieces))

    def waiting_until(self, moment: float) -> Flight:
        """The flight of a device that waits for the others afterwards."""
        if moment <= self.ends:
            return self
        return replace(self, pieces=(*self.pieces, Piece("wait", self.ends, moment)))

    def without_update(self) -> Flight:
        """The flight, its tensors let go."""
        return replace(self, update=None)


def joules_of(piece: Piece, device: Device) -> float:
    """What a stretch of time costs a device."""
    watts = {"compute": device.busy_watts, "wait": device.idle_watts}
    return watts.get(piece.kind, device.radio_watts) * (piece.end - piece.start)


def fly(
    setup: Setup,
    engine: Engine,
    fleet: Fleet,
    tasks: Iterable[Task],
    starts: Mapping[int, float],
    large: Params,
    costs: CostTable,
) -> Iterator[Flight]:
    """Send tasks to their devices; each one's flight, in the order of the training.

    Args:
        setup: of the run.
        engine: trains.
        fleet: the devices.
        tasks: one for each device, at most.
        starts: client -> when it is sent its task.
        large: the model's parameters, read for shapes.
        costs: of tasks.

    A device that goes offline while it receives or computes trains nothing. One that goes offline
    while it sends has trained, and nobody hears of it. Work that is refused took its time.
    """
    notes, lost = Notes(), list[Flight]()
    sent: dict[int, tuple[Task, Piece, Piece]] = {}

    def reached() -> Iterator[Task]:
        for task in tasks:
            placed = fleet.devices[task.client.id]
            start = starts[task.client.id]
            down = Piece("download", start, start + placed.seconds_down(task.num_bytes))
            seen = num_seen(task.client.num_examples, task.training)
            flops = costs.of(task).flops_per_example * seen
            work = Piece("compute", down.end, placed.compute_until(down.end, flops))
            gone = placed.online_until(start)
            if gone < work.end:
                pieces = _until(gone, [down, work])
                lost.append(_failed(task, pieces, "offline", "went offline at its work"))
            else:
                sent[task.client.id] = (task, down, work)
                yield task

    for update in answers(setup, engine, reached(), large, costs, notes):
        row, trained = notes.clients.pop(), notes.trained.pop()
        task, down, _ = sent.pop(update.client)
        placed = fleet.devices[update.client]
        done = placed.compute_until(down.end, row["flops"])
        ends = done + placed.seconds_up(update.num_bytes)
        pieces = (down, Piece("compute", down.end, done), Piece("upload", done, ends))
        gone = placed.online_until(down.start)
        if gone < ends:
            lost.append(
                _failed(task, _until(gone, pieces), "offline", "went offline while it sent")
            )
            continue
        yield Flight(
            client=update.client,
            round=task.round,
            pieces=pieces,
            bytes_down=task.num_bytes,
            bytes_up=update.num_bytes,
            update=update,
            row=row,
            trained=trained,
        )
        del update  # its memory serves the next client
    yield from lost
    for note in notes.failures:  # it did not take the task, or what it did was refused
        task, down, work = sent.pop(note["client"])
        none = (down._replace(end=down.start),)
        taken = none if note["reason"] == "offline" else (down, work)
        yield _failed(task, taken, note["reason"], note["text"])


UPDATE_GROUPS = ("delta", "extra", "memory")
"""Groups of tensors of a flight that holds an update."""


def flight_parts(flight: Flight) -> Parts:
    """A flight as plain JSON values and groups of tensors, for a checkpoint."""
    update: dict[str, Any] | None = None
    groups: dict[str, Params] = {}
    if flight.update is not None:
        update, groups = update_parts(flight.update, {})
    header = {
        "client": flight.client,
        "round": flight.round,
        "pieces": [list(piece) for piece in flight.pieces],
        "bytes_down": flight.bytes_down,
        "bytes_up": flight.bytes_up,
        "row": flight.row,
        "trained": None if flight.trained is None else list(flight.trained.views),
        "update": update,
    }
    return header, groups


def flight_of(header: Mapping[str, Any], groups: Mapping[str, Params]) -> Flight:
    """The inverse of `flight_parts`."""
    update, trained = None, None
    if header["update"] is not None:
        update, _ = update_of(header["update"], dict(groups))
        views = {name: update.submodel.views[name] for name in header["trained"]}
        trained = SubModel(update.submodel.sizes, views)
    return Flight(
        client=header["client"],
        round=header["round"],
        pieces=tuple(Piece(*piece) for piece in header["pieces"]),
        bytes_down=header["bytes_down"],
        bytes_up=header["bytes_up"],
        update=update,
        row=header["row"],
        trained=trained,
    )


def flights_parts(flights: Iterable[Flight]) -> tuple[list[dict[str, Any]], dict[str, Params]]:
    """Flights for a checkpoint: their headers, and groups of tensors whose names begin `clock-`."""
    headers, tensors = list[dict[str, Any]](), dict[str, Params]()
    for number, flight in enumerate(flights):
        header, groups = flight_parts(flight)
        headers.append(header)
        tensors |= {f"clock-{number}-{name}": group for name, group in groups.items()}
    return headers, tensors


def flights_of(headers: Iterable[Mapping[str, Any]], tensors: Mapping[str, Params]) -> list[Flight]:
    """The inverse of `flights_parts`."""
    return [
        flight_of(header, {n: tensors[f"clock-{number}-{n}"] for n in UPDATE_GROUPS})
        if header["update"] is not None
        else flight_of(header, {})
        for number, header in enumerate(headers)
    ]


def _failed(task: Task, pieces: tuple[Piece, ...], reason: str, text: str) -> Flight:
    return Flight(
        client=task.client.id,
        round=task.round,
        pieces=pieces,
        bytes_down=task.num_bytes if pieces[-1].end > pieces[0].start else 0,
        bytes_up=0,
        update=None,
        row={"client": task.client.id, "reason": reason, "text": text},
        trained=None,
    )


def _until(moment: float, pieces: Iterable[Piece]) -> tuple[Piece, ...]:
    """The pieces, cut off at a moment that is not before their beginning."""
    return tuple(
        piece if piece.end <= moment else piece._replace(end=moment)
        for piece in pieces
        if piece.start <= moment
    )
