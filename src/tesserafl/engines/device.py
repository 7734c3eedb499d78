"""What a device is, and what work costs it in virtual seconds and joules.

    seconds of training   FLOPs / (FLOP/s x (1 - load)), the load switching under it
    seconds on a link     latency + bytes / bandwidth, each way for itself
    joules                watts of what it does x seconds: computing, on the radio, waiting

Load and presence follow from the seed, the device and the time alone, whoever asks and in whatever
order: two methods that are compared meet the same world.
"""

from __future__ import annotations

import math
from array import array
from bisect import bisect_right
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np

from tesserafl.core import seeds
from tesserafl.core.errors import ConfigError

FOREVER = math.inf
_STAYS = 64
"""Stays of a chain that are drawn together; where the next lot begins, the state is drawn anew."""


@dataclass(frozen=True, kw_only=True)
class Link:
    """A way to whom one reports, with its bandwidth each way."""

    up_mbps: float
    """megabits a second towards the server"""
    down_mbps: float
    """megabits a second from the server"""
    latency_ms: float = 0.0
    """milliseconds of one way, whatever the size"""

    def __post_init__(self) -> None:
        for name in ("up_mbps", "down_mbps"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"a link's {name} must be positive; got {getattr(self, name)}")
        if not self.latency_ms >= 0:
            raise ConfigError(f"a link's latency_ms must be 0 or more; got {self.latency_ms}")

    def seconds_up(self, num_bytes: float) -> float:
        """Time of a message to the server."""
        return self.latency_ms / 1e3 + num_bytes * 8 / (self.up_mbps * 1e6)

    def seconds_down(self, num_bytes: float) -> float:
        """Time of a message from the server."""
        return self.latency_ms / 1e3 + num_bytes * 8 / (self.down_mbps * 1e6)


INSTANT = Link(up_mbps=math.inf, down_mbps=math.inf)
"""A link that takes no time."""


@dataclass(frozen=True, kw_only=True)
class Chain:
    """A number that switches as a Markov chain in continuous time.

    It stays at a value for an exponentially distributed time and then jumps to any of the others
    alike, so its share of the time is in proportion to its mean stay.
    """

    values: tuple[float, ...]
    mean_seconds: tuple[float, ...]
    """mean stay at each of the values"""

    def __post_init__(self) -> None:
        if not self.values or len(self.values) != len(self.mean_seconds):
            raise ConfigError(
                f"a chain needs a mean stay for each of its values; got {len(self.values)} values "
                f"and {len(self.mean_seconds)} stays"
            )
        if len(self.values) > 256:
            raise ConfigError(f"a chain has at most 256 values; got {len(self.values)}")
        if not all(0 < stay < FOREVER for stay in self.mean_seconds):
            raise ConfigError(f"mean stays are positive seconds; got {list(self.mean_seconds)}")

    def at(self, seconds: float, seed: int, device: int, name: str) -> tuple[float, float]:
        """The value at a time of 0 or more, and until when it stays."""
        if len(self.values) == 1:
            return self.values[0], FOREVER
        block = self._block_seconds
        number = int(seconds // block)
        ends, states = _lot(self, seed, device, name, number)
        position = bisect_right(ends, seconds - number * block)
        if position == len(ends):  # by rounding: the next block begins
            number, position = number + 1, 0
            ends, states = _lot(self, seed, device, name, number)
        until = number * block + ends[position]
        # However short a stay is, time goes on.
        return self.values[states[position]], max(until, math.nextafter(seconds, FOREVER))

    @cached_property
    def _block_seconds(self) -> float:
        return _STAYS * sum(self.mean_seconds) / len(self.mean_seconds)


@lru_cache(maxsize=1 << 15)
def _lot(
    chain: Chain, seed: int, device: int, name: str, number: int
) -> tuple[array[float], bytes]:
    """The stays of one block: their ends, counted from its beginning, and their states."""
    draw = seeds.numpy_generator(seed, device, name, number)
    means, count, block = np.array(chain.mean_seconds), len(chain.values), chain._block_seconds
    shares = (means / means.sum()).cumsum()
    first = int((shares / shares[-1]).searchsorted(draw.random(), side="right"))
    stays, states = np.empty(0), np.array([first])
    while stays.sum() < block:
        jumps = draw.integers(1, count, size=_STAYS)
        states = np.concatenate((states, (states[-1] + jumps.cumsum()) % count))
        more = draw.exponential(means[states[len(stays) : -1]])
        stays = np.concatenate((stays, more))
    ends = stays.cumsum()
    kept = int(ends.searchsorted(block)) + 1
    ends = np.minimum(ends[:kept], block)
    return array("d", ends.tobytes()), states[:kept].astype(np.uint8).tobytes()


class Piece(NamedTuple):
    """A stretch of a device's time."""

    kind: str
    """download, compute, upload or wait"""
    start: float
    end: float
    """virtual seconds"""


@dataclass(frozen=True, kw_only=True)
class Device:
    """The hardware of one client; see `profiles` for real classes."""

    profile: str = "custom"
    """name of its class"""
    gflops: float
    """sustained GFLOP/s of training, in float32"""
    memory_mib: float | None = None
    """memory for training; None: no limit"""
    link: Link = INSTANT
    """its way to whom it reports"""
    idle_watts: float = 0.0
    """drawn while it waits"""
    busy_watts: float = 0.0
    """drawn while it computes"""
    radio_watts: float = 0.0
    """drawn while it sends or receives"""
    load: Chain = field(default=Chain(values=(0.0,), mean_seconds=(1.0,)))
    """share of its speed that other programs take"""
    online: Chain = field(default=Chain(values=(1.0,), mean_seconds=(1.0,)))
    """1 while it can be reached, else 0"""
    joins_seconds: float = 0.0
    """when it comes"""
    leaves_seconds: float | None = None
    """when it goes for good; None: never"""

    def __post_init__(self) -> None:
        if not self.gflops > 0:
            raise ConfigError(f"a device's gflops must be positive; got {self.gflops}")
        for name in ("idle_watts", "busy_watts", "radio_watts", "joins_seconds"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"a device's {name} must be 0 or more; got {getattr(self, name)}")
        if not all(0 <= level < 1 for level in self.load.values):
            raise ConfigError(
                f"a load is the share of the speed that is gone, in [0, 1); got "
                f"{list(self.load.values)}"
            )
        if self.leaves_seconds is not None and not self.leaves_seconds > self.joins_seconds:
            raise ConfigError(
                f"a device leaves after it joins; got joins_seconds {self.joins_seconds} and "
                f"leaves_seconds {self.leaves_seconds}"
            )


@dataclass(frozen=True, kw_only=True)
class Placed:
    """A device in a run's world: its traces follow from the seed and its number."""

    device: Device
    id: int
    seed: int
    beyond: tuple[Link, ...] = ()
    """links of the edges that its messages pass on their way, where nobody averages"""

    def seconds_down(self, num_bytes: float) -> float:
        """Time of a message from its server."""
        return sum(link.seconds_down(num_bytes) for link in (self.device.link, *self.beyond))

    def seconds_up(self, num_bytes: float) -> float:
        """Time of a message to its server."""
        return sum(link.seconds_up(num_bytes) for link in (self.device.link, *self.beyond))

    def compute_until(self, start: float, flops: float) -> float:
        """When work that begins at `start` is done."""
        now, left = start, flops / (self.device.gflops * 1e9)
        while True:
            load, until = self.device.load.at(now, self.seed, self.id, "load")
            takes = left / (1.0 - load)
            if now + takes <= until:
                return now + takes
            left -= (until - now) * (1.0 - load)
            now = until

    def online_until(self, seconds: float) -> float:
        """Until when it can be reached without a break; `seconds` itself if it cannot now."""
        device = self.device
        gone = FOREVER if device.leaves_seconds is None else device.leaves_seconds
        if not device.joins_seconds <= seconds < gone:
            return seconds
        now = seconds
        while now < gone:
            value, until = device.online.at(now, self.seed, self.id, "online")
            if not value:
                return now
            now = until
        return gone

    def online_from(self, seconds: float) -> float:
        """The first moment, from `seconds` on, at which it can be reached; infinite: never."""
        device = self.device
        gone = FOREVER if device.leaves_seconds is None else device.leaves_seconds
        now = max(seconds, device.joins_seconds)
        while now < gone:
            value, until = device.online.at(now, self.seed, self.id, "online")
            if value:
                return now
            now = until
        return FOREVER
