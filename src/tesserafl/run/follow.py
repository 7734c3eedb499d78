"""A run that Flower plays in a process of its own: what it tells, and what is done if it is lost.

Flower gives a process 30 s to say that it is there, and 60 s between two signs of life. On a
machine that is too busy for that it starts the process again and again, or ends a run that does
nothing wrong. Nothing is lost by that: a run goes on from its newest checkpoint.
"""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from tesserafl.core.errors import CheckpointError, TesseraError
from tesserafl.run.children import tail_of
from tesserafl.run.deployed import AT_WORK
from tesserafl.run.files import alone_in, read_json
from tesserafl.run.guests import GUESTS
from tesserafl.run.runner import Listener

_PAUSE = 0.5
_LOOK_SECONDS = 15.0
"""Between two questions to Flower how the run stands; each starts a process."""
_BYE_SECONDS = 60.0
"""That devices have to hear that the run is over."""
_SLOW_SECONDS, _MOST_SECONDS = 60.0, 900.0
"""Until somebody is told that the run's process has not begun; until that is an error."""
_END_SECONDS = 120.0
"""That the process of a run that is over for Flower has to end."""
_MOST_LOSSES = 3
"""Of a run's process without a round in between, after which the run is not begun again."""


class Runs(Protocol):
    """What Flower is asked."""

    def start(self, folder: Path) -> str:
        """Start the server app; returns the run's number."""
        ...

    def status(self, run: str) -> str:
        """Where a run stands, as `running` or `finished:failed`."""
        ...


@dataclass(kw_only=True)
class Following:
    """Passes on what the run of a folder tells, until it ends and its devices know."""

    folder: Path
    superlink: subprocess.Popen[bytes]
    log: Path
    """of the SuperLink and the processes that it starts"""
    flower: Runs
    seen: int
    """Events that were passed on before."""
    listener: Listener | None = None
    clock: Callable[[], float] = time.monotonic
    _run: str = ""
    _begun: float = 0.0
    """When the run's process was asked for."""
    _told: float = 0.0
    """When somebody was last told that it is not there."""
    _losses: int = 0
    """Of the run's process, since it told something new."""
    _most: int = 0
    """Events that there have been: a run that goes on tells some again."""
    _guests: int = 0

    def to_the_end(self) -> None:
        """Start the run's process, and again if Flower loses it.

        Raises:
            TesseraError: the run failed, or could not be kept going; says how to go on.
        """
        self._guests, self._most = len(_lines(self.folder / GUESTS)), self.seen
        self._begin()
        looked, over = self.clock(), None
        while True:
            self._pass_on()
            if (self.folder / "summary.json").exists():
                over = over or self.clock()
                if not self._at_work or self.clock() - over > _BYE_SECONDS:
                    self._pass_on()
                    return
            elif (self.folder / "error.json").exists():
                raise TesseraError(str(read_json(self.folder / "error.json")["text"]))
            elif self.superlink.poll() is not None:
                raise self._ended("Flower's SuperLink ended")
            elif self.clock() - looked > _LOOK_SECONDS:
                self._look()
                looked = self.clock()
            time.sleep(_PAUSE)

    @property
    def _at_work(self) -> bool:
        return (self.folder / AT_WORK).exists()

    def _begin(self) -> None:
        self._run = self.flower.start(self.folder)
        self._begun = self._told = self.clock()

    def _look(self) -> None:
        """Ask Flower how the run stands."""
        status = self.flower.status(self._run)
        if (self.folder / "summary.json").exists() or (self.folder / "error.json").exists():
            return  # it ended in between
        if status.startswith("finished"):
            self._lost(status)
        elif not self._at_work:
            self._not_there(status)

    def _not_there(self, status: str) -> None:
        """The run's process has not begun yet."""
        now, waited = self.clock(), self.clock() - self._begun
        text = (
            f"after {waited:.0f} s Flower has not got the run's process to work (its status: "
            f"{status}). It gives a process 30 s to start and then starts it anew: is this machine "
            f"too busy?"
        )
        if waited > _MOST_SECONDS:
            raise self._ended(text)
        if now - self._told > _SLOW_SECONDS:
            self._told = now
            self._tell(f"{text} Waiting.")

    def _lost(self, status: str) -> None:
        """Begin again where the run stands, unless that is of no use."""
        if status.endswith("stopped"):
            raise self._ended("the run was stopped by Flower's command")
        self._losses += 1
        if self._losses > _MOST_LOSSES:
            raise self._ended(
                f"Flower lost the run's process {self._losses} times without a round in between "
                f"({status})"
            )
        self._wait_for_its_end()
        self._tell(f"Flower lost the run's process ({status}); the run goes on where it was")
        (self.folder / AT_WORK).unlink(missing_ok=True)
        self._begin()

    def _wait_for_its_end(self) -> None:
        """A process that Flower has given up may still be at work."""
        until = self.clock() + _END_SECONDS
        while True:
            try:
                with alone_in(self.folder):
                    return
            except CheckpointError:
                if self.clock() > until:
                    raise self._ended(
                        "Flower lost the run's process, but it does not end"
                    ) from None
            time.sleep(_PAUSE)

    def _ended(self, text: str) -> TesseraError:
        said = tail_of(self.log)
        return TesseraError(f"{text}: {said}\nTo go on: tessera resume {self.folder}")

    def _tell(self, text: str) -> None:
        if self.listener is not None:
            self.listener({"kind": "open", "text": text})

    def _pass_on(self) -> None:
        """What was written since: who came, and the run's events."""
        guests = _lines(self.folder / GUESTS)
        events = _lines(self.folder / "events.jsonl")
        if len(events) > self._most:
            self._losses, self._most = 0, len(events)
        if self.listener is not None:
            for line in guests[self._guests :]:
                self.listener({"kind": "guest", **json.loads(line)})
            for line in events[self.seen :]:
                self.listener(json.loads(line))
        self._guests, self.seen = len(guests), len(events)


def _lines(path: Path) -> list[bytes]:
    """The whole lines of a file that another process writes."""
    return path.read_bytes().split(b"\n")[:-1] if path.exists() else []


def num_events(folder: Path) -> int:
    """Events that a run has told."""
    return len(_lines(folder / "events.jsonl"))
