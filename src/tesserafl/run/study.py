"""A study: several experiments that are run one after another and compared.

FOLDER/study.json       the rows: label -> configuration
FOLDER/LABEL/           one run folder a row
FOLDER/comparison.html  the table and plots
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from tesserafl.core.errors import CheckpointError, ConfigError
from tesserafl.run.begin import first_federation
from tesserafl.run.compare import compare
from tesserafl.run.experiment import Experiment, from_json, to_json, with_absolute_paths
from tesserafl.run.files import read_json, write_atomic, write_json
from tesserafl.run.runner import Listener, resume, start
from tesserafl.run.setup import Setup, prepare, with_depths

Rows = Mapping[str, Experiment]
Announce = Callable[[str, int, int], None]
"""Called with a row's label, its number from 1 and how many there are, before it runs."""


def repeated(rows: Rows, repeats: int) -> dict[str, Experiment]:
    """Every row with `repeats` seeds, counted up from its own."""
    if repeats < 1:
        raise ConfigError(f"--repeats must be at least 1; got {repeats}")
    if repeats == 1:
        return dict(rows)
    return {
        f"{label}-seed{experiment.seed + k}": replace(experiment, seed=experiment.seed + k)
        for label, experiment in rows.items()
        for k in range(repeats)
    }


def start_study(
    rows: Rows, folder: Path, announce: Announce, listener: Listener | None = None
) -> dict[str, Any]:
    """Run all rows into a new or empty folder; returns `{"run", "rows": [summaries]}`."""
    if folder.exists() and any(folder.iterdir()):
        raise CheckpointError(
            f"{folder} is not empty; choose another --out, remove it, or continue with: "
            f"tessera resume {folder}"
        )
    rows = {label: with_absolute_paths(row) for label, row in rows.items()}
    _check(rows)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "study.json", {label: to_json(row) for label, row in rows.items()})
    return _play(rows, folder, announce, listener)


def resume_study(
    folder: Path, announce: Announce, listener: Listener | None = None
) -> dict[str, Any]:
    """Run what is missing of a study."""
    rows = {label: from_json(row) for label, row in read_json(folder / "study.json").items()}
    return _play(rows, folder, announce, listener)


def is_study(folder: Path) -> bool:
    """Whether a folder holds a study rather than a run."""
    return (folder / "study.json").exists()


def _check(rows: Rows) -> None:
    """Begin every row without training: a bad one is refused before the first has cost anything."""
    setups: dict[tuple[object, ...], Setup] = {}
    for row in rows.values():
        key = (row.data, repr(row.model), row.seed, row.clients_per_round, row.client_memory_mib)
        if key not in setups:
            setups.clear()  # rows of one data set follow each other; more would fill the memory
            setups[key] = prepare(row)
        first_federation(with_depths(replace(setups[key], experiment=row)))


def _play(
    rows: Rows, folder: Path, announce: Announce, listener: Listener | None
) -> dict[str, Any]:
    summaries: list[dict[str, Any]] = []
    for number, (label, row) in enumerate(rows.items(), 1):
        announce(label, number, len(rows))
        place = folder / label
        begun = (place / "config.json").exists()
        summary = resume(place, listener) if begun else start(row, place, listener)
        summaries.append({"row": label, "seed": row.seed, **summary})
    comparison = compare([folder])
    comparison.write_page(folder / "comparison.html")
    write_atomic(folder / "comparison.md", (comparison.as_markdown() + "\n").encode())
    summary = {"run": str(folder), "rows": summaries}
    write_json(folder / "summary.json", summary)
    return summary
