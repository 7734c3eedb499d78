"""A run with workers, and one that is cut off and resumed, against the undisturbed one."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tesserafl.run.experiment import Experiment
from tesserafl.run.runner import resume, start


class Cut(Exception):
    """Stands for a power cut in the middle of a run."""


def undisturbed(experiment: Experiment, folder: Path, rounds: int) -> dict[str, Any]:
    """The run's summary; two workers, and a cut after so many rounds, must have led to it too."""
    plain = start(experiment, folder / "plain")
    two = replace(experiment, engine=replace(experiment.engine, workers=2))
    workers = start(two, folder / "workers")
    seen = []

    def cut_off(event: dict[str, object]) -> None:
        seen.append(event["kind"])
        if seen.count("round") == rounds:
            raise Cut

    with pytest.raises(Cut):
        start(experiment, folder / "cut", cut_off)
    for other in (workers, resume(folder / "cut")):
        for key in ("state_sha256", "loss", "accuracy", "bytes_up", "coverage"):
            assert other[key] == plain[key], key
    return plain
