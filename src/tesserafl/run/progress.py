"""Progress of a run: a live bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from tesserafl.run.events import Event

_WAYS = {
    "sequential": "one after another (engine.batching sequential)",
    "vmapped": "many in one program (engine.batching vmapped)",
    "compiled": "many in one program, compiled (engine.batching compiled)",
}
_LINES = 10
"""Plain lines in a run, about."""


class Progress:
    """Listens to events; a context manager that owns the terminal's last lines."""

    def __init__(self) -> None:
        self._live = sys.stdout.isatty()
        self._bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeRemainingColumn(),
            console=Console(),
            transient=True,
            disable=not self._live,
        )
        self._task: Any = None
        self._label, self._rounds, self._accuracy, self._begun = "rounds", 1, "", time.monotonic()

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def announce(self, label: str, number: int, total: int) -> None:
        """A study's next row begins."""
        self._label = f"{number}/{total} {label}"
        if not self._live:
            print(f"[{self._label}]", flush=True)

    def listen(self, event: Event) -> None:
        """Show an event of the run under way."""
        if event["kind"] in ("start", "resume"):
            self._begin(int(event["experiment"]["rounds"]))
            batching = event["experiment"]["engine"]["batching"]
            self._bar.console.print(f"clients train {_WAYS[batching]}", highlight=False)
        elif event["kind"] == "evaluate":
            self._accuracy = f"accuracy {event['accuracy']:.4f}  "
        elif event["kind"] == "round":
            self._round(event)
        elif event["kind"] in ("open", "guest"):  # of runs on devices
            who = f"{event['device']}: " if "device" in event else ""
            self._bar.console.print(f"{who}{event['text']}", highlight=False, markup=False)

    def _begin(self, rounds: int) -> None:
        self._rounds, self._accuracy, self._begun = rounds, "", time.monotonic()
        if self._task is not None:
            self._bar.remove_task(self._task)
        self._task = self._bar.add_task(self._label, total=rounds, note="")

    def _round(self, event: Event) -> None:
        done = int(event["round"])
        megabytes = (event["bytes_down"] + event["bytes_up"]) / 1e6
        note = f"{self._accuracy}{megabytes:.1f} MB"
        if self._live:
            self._bar.update(self._task, completed=done, note=note)
        elif done == self._rounds or done % max(1, self._rounds // _LINES) == 0:
            seconds = time.monotonic() - self._begun
            loss = "-" if event["loss"] is None else f"{event['loss']:.4f}"
            print(f"round {done}/{self._rounds}  loss {loss}  {note}  {seconds:.0f} s", flush=True)
