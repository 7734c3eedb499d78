"""Virtual time: how a server waits, and a queue of events, taken in the order they happen in.

Events of one moment come in the order of their keys, so that a run is the same whoever put them in
first. Nothing can happen before what has happened.
"""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass, field, fields
from typing import Generic, Literal, TypeVar

from tesserafl.core.errors import ConfigError, TesseraError

Event = TypeVar("Event")


@dataclass(kw_only=True)
class EventQueue(Generic[Event]):
    """What will happen, by time and then by key."""

    now: float = 0.0
    """virtual seconds: the time of the event that was taken last"""
    taken: int = 0
    """Events so far."""
    _heap: list[tuple[float, int, Event]] = field(default_factory=list)
    _keys: set[int] = field(default_factory=set)

    def __len__(self) -> int:
        return len(self._heap)

    def put(self, seconds: float, key: int, event: Event) -> None:
        """Let something happen; of all that wait, no two have one key.

        Raises:
            TesseraError: it would happen in the past or never, or the key is taken.
        """
        if not self.now <= seconds < math.inf:
            raise TesseraError(
                f"an event at {seconds} s cannot be put into a queue whose time is {self.now} s"
            )
        if key in self._keys:
            raise TesseraError(f"an event with key {key} waits already")
        self._keys.add(key)
        heapq.heappush(self._heap, (seconds, key, event))

    def next_time(self) -> float:
        """When the next event happens; infinite: there is none."""
        return self._heap[0][0] if self._heap else math.inf

    def take(self) -> Event:
        """The next event; its time is now."""
        seconds, key, event = heapq.heappop(self._heap)
        self._keys.remove(key)
        self.now = seconds
        self.taken += 1
        return event

    def wait_until(self, seconds: float) -> None:
        """Let time pass up to a moment before which nothing happens.

        Raises:
            TesseraError: something would have happened, or it lies in the past.
        """
        if not self.now <= seconds <= self.next_time():
            raise TesseraError(
                f"time cannot be set to {seconds} s: now is {self.now} s, the next event comes at "
                f"{self.next_time()} s"
            )
        self.now = seconds

    def waiting(self) -> list[tuple[float, int, Event]]:
        """All that will happen, in order."""
        return sorted(self._heap, key=lambda entry: entry[:2])


@dataclass(frozen=True, kw_only=True)
class ClockSettings:
    """How a server waits for devices; of runs with a fleet alone."""

    mode: Literal["synchronous", "semi-synchronous", "asynchronous"] = "synchronous"
    """synchronous: a round ends when the last device has answered or failed; semi-synchronous: at
    its quorum or its deadline; asynchronous: no rounds, a new model for every full buffer"""
    quorum: float = 1.0
    """semi-synchronous: share of clients_per_round whose answers end a round"""
    deadline_seconds: float | None = None
    """semi-synchronous: virtual seconds after which a round ends; None: it has no deadline"""
    over_selection: float = 0.0
    """semi-synchronous: share of clients_per_round that is asked beyond it"""
    late: Literal["bank", "refuse"] = "bank"
    """semi-synchronous: whether an answer that comes after its round counts in a later one"""
    buffer: int | None = None
    """asynchronous: answers that make a new model; None: clients_per_round"""
    concurrency: int | None = None
    """asynchronous: devices that work at any time; None: clients_per_round"""
    horizon_seconds: float | None = None
    """virtual seconds after which no further round begins; None: all rounds are played"""

    def __post_init__(self) -> None:
        semi = ("quorum", "deadline_seconds", "over_selection", "late")
        owners = {
            "semi-synchronous": semi,
            "asynchronous": ("buffer", "concurrency"),
        }
        plain = {spec.name: spec.default for spec in fields(self)}
        for mode, names in owners.items():
            for name in names:
                if self.mode != mode and getattr(self, name) != plain[name]:
                    raise ConfigError(
                        f"clock.{name} is for clock.mode {mode!r}; the mode is {self.mode!r}"
                    )
        if (
            self.mode == "semi-synchronous"
            and self.quorum == 1.0
            and (self.deadline_seconds is None and self.over_selection == 0.0)
        ):
            raise ConfigError(
                "a semi-synchronous round ends at a quorum or a deadline; set clock.quorum below "
                "1, clock.over_selection or clock.deadline_seconds"
            )
        if not 0.0 < self.quorum <= 1.0:
            raise ConfigError(f"clock.quorum is a share, in (0, 1]; got {self.quorum}")
        if not 0.0 <= self.over_selection < math.inf:
            raise ConfigError(f"clock.over_selection must be 0 or more; got {self.over_selection}")
        for name in ("deadline_seconds", "horizon_seconds", "buffer", "concurrency"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigError(f"clock.{name} must be positive; got {value}")
