"""One stream of what happened: events.jsonl, a JSON object a line, each with a `kind`.

start     the experiment, clients and their data, the model's size
round     participation, mean loss, bytes, FLOPs, seconds, coverage, per-client rows
evaluate  accuracy and loss of the global model after a round
finish    the summary that `--json` prints
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tesserafl.core.errors import CheckpointError

Event = Mapping[str, Any]


class EventLog:
    """Appends events to a file; `cut` drops what came after a checkpoint."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("ab")

    @property
    def num_bytes(self) -> int:
        """Length of the file so far."""
        return self._file.tell()

    def write(self, event: Event) -> None:
        """Append one event and hand it to the operating system."""
        try:
            self._file.write(json.dumps(event).encode() + b"\n")
            self._file.flush()
        except OSError as error:
            raise CheckpointError(
                f"{self._path} could not be written ({error.strerror or error}). Make room, then "
                f"continue with: tessera resume {self._path.parent}"
            ) from error

    def sync(self) -> None:
        """Make everything written so far durable."""
        os.fsync(self._file.fileno())

    def cut(self, num_bytes: int) -> None:
        """Forget everything after the first `num_bytes`."""
        if num_bytes > self._path.stat().st_size:
            raise CheckpointError(
                f"{self._path} has {self._path.stat().st_size} bytes, the checkpoint was written "
                f"after {num_bytes}; put the whole file back, or run again into another folder"
            )
        self._file.truncate(num_bytes)
        self._file.seek(0, os.SEEK_END)

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_events(path: Path) -> list[dict[str, Any]]:
    """All complete events of a file; a torn last line is left out."""
    if not path.exists():
        raise CheckpointError(f"{path} does not exist; is {path.parent} a run folder?")
    events = []
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, 1):
        try:
            if line.strip():
                events.append(json.loads(line))
        except ValueError as error:
            if number < len(lines) - 1:
                raise CheckpointError(f"{path}, line {number}, is damaged: {error}") from error
    return events
