"""A run with workers, or one that is cut off and resumed, against the undisturbed one."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tesserafl.run.experiment import Experiment
from tesserafl.run.runner import resume, start


class Cut(Exception):
    """Stands for a power cut in the middle of a run."""


KEPT = ("state_sha256", "loss", "accuracy", "bytes_up", "coverage")
"""What of a summary no disturbance may change."""


def cut_off(experiment: Experiment, folder: Path, rounds: int) -> dict[str, Any]:
    """The undisturbed run's summary; one that is cut off after so many rounds must lead to it."""
    plain = start(experiment, folder / "plain")
    seen = []

    def cut(event: dict[str, object]) -> None:
        seen.append(event["kind"])
        if seen.count("round") == rounds:
            raise Cut

    with pytest.raises(Cut):
        start(experiment, folder / "cut", cut)
    same(resume(folder / "cut"), plain)
    return plain


def with_workers(experiment: Experiment, folder: Path) -> dict[str, Any]:
    """The summary of a run with two workers; one process must lead to it too."""
    two = replace(experiment, engine=replace(experiment.engine, workers=2))
    workers = start(two, folder / "workers")
    same(start(experiment, folder / "plain"), workers)
    return workers


def same(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    for key in KEPT:
        assert found[key] == wanted[key], key
