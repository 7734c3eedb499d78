"""What a run folder tells: its configuration and what happened so far."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tesserafl.core.errors import CheckpointError
from tesserafl.run.events import read_events
from tesserafl.run.files import read_json

Cost = Literal["rounds", "bytes", "flops", "virtual_seconds", "joules"]
COSTS: tuple[Cost, ...] = ("rounds", "bytes", "flops", "virtual_seconds", "joules")
"""What accuracy is held against: rounds, bytes down and up, the clients' FLOPs, and of runs with a
fleet its virtual time and energy; cumulative."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """What a run folder tells, finished or not."""

    folder: Path
    config: Mapping[str, Any]
    start: Mapping[str, Any]
    rounds: Sequence[Mapping[str, Any]]
    evaluations: Sequence[Mapping[str, Any]]
    finish: Mapping[str, Any] | None

    @property
    def outcome(self) -> dict[str, Any]:
        """The summary of a finished run; what is known so far of another, None where nothing is."""
        last: Mapping[str, Any] = self.rounds[-1] if self.rounds else {}
        tested: Mapping[str, Any] = self.evaluations[-1] if self.evaluations else {}
        entries = [row["entries"] for event in self.rounds for row in event["clients"]]
        return {
            "accuracy": tested.get("accuracy"),
            "accuracy_untrained_zeroed": None,
            "loss": tested.get("loss"),
            "params_full": self.start.get("params_full"),
            "params_largest_client": max(entries, default=None),
            "rounds": last.get("round", 0),
            **{k: last.get(k) for k in ("coverage", "bytes_down", "bytes_up", "flops", "seconds")},
            **{k: last[k] for k in ("virtual_seconds", "joules") if k in last},
            **(self.finish or {}),
        }

    @property
    def costs(self) -> list[Cost]:
        """The costs that the run counts."""
        known = self.rounds[-1] if self.rounds else {}
        return [c for c in COSTS if c in ("rounds", "bytes", "flops") or c in known]

    def curve(self, cost: Cost) -> tuple[list[float], list[float]]:
        """(cumulative cost, accuracy) of every evaluation."""
        spent: dict[Cost, Callable[[Mapping[str, Any]], float]] = {
            "rounds": lambda event: event["round"],
            "bytes": lambda event: event["bytes_down"] + event["bytes_up"],
        }
        if cost in spent:
            across = [spent[cost](event) for event in self.evaluations]
        else:
            across = [event[cost] for event in self.evaluations]
        return across, [event["accuracy"] for event in self.evaluations]


def read_record(folder: Path) -> Record:
    """Read config.json and events.jsonl; CheckpointError if the folder is not a run."""
    config = read_json(folder / "config.json")
    kinds: dict[str, list[dict[str, Any]]] = {}
    for event in read_events(folder / "events.jsonl"):
        kinds.setdefault(event["kind"], []).append(event)
    return Record(
        folder=folder,
        config=config,
        start=kinds.get("start", [{}])[-1],
        rounds=kinds.get("round", []),
        evaluations=kinds.get("evaluate", []),
        finish=kinds["finish"][-1] if "finish" in kinds else None,
    )


def run_folders(folders: Sequence[Path]) -> list[Path]:
    """The run folders among `folders`, and those directly inside the others; each once.

    Raises:
        CheckpointError: a folder is not a run and holds none.
    """
    found: dict[Path, Path] = {}
    for folder in folders:
        runs = [run for run in (folder, *sorted(folder.glob("*/"))) if _is_run(run)]
        if not runs:
            raise CheckpointError(
                f"{folder} is not a run folder (config.json and events.jsonl) and holds none; "
                f"give the --out of a run, or the folder of a study"
            )
        found.update({run.resolve(): run for run in runs})
    if not found:
        raise CheckpointError("no run was given; name at least one run folder")
    return list(found.values())


def _is_run(folder: Path) -> bool:
    return all((folder / name).exists() for name in ("config.json", "events.jsonl"))
