"""How fast an experiment's rounds are on this machine, for every way to train its clients.

Every way gets a process of its own, started like a run's, so that start-up counts and the peak of
memory is its own. Started as `python -m tesserafl.run.bench` for one of them.
"""

from __future__ import annotations

import contextlib
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import get_args

from rich.table import Table

from tesserafl.core.coverage import Coverage
from tesserafl.core.errors import TesseraError
from tesserafl.engines.process import threads
from tesserafl.engines.settings import Batching
from tesserafl.run.experiment import Experiment, from_json, to_json
from tesserafl.run.federate import federate
from tesserafl.run.first import first_state
from tesserafl.run.rounds import play_round
from tesserafl.run.setup import make_engine, prepare

WARM_ROUNDS = 3
"""Rounds before the timed ones, in which modules are built and programs traced."""


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Of one way to train clients."""

    batching: Batching
    start_seconds: float = 0.0
    """From the start of the process to the end of the warm rounds."""
    round_ms: float = 0.0
    """Median milliseconds of a round, without evaluation and checkpoints."""
    steps_per_second: float = 0.0
    """Optimiser steps of all clients together."""
    peak_mib: float = 0.0
    """Largest resident memory of the process."""
    failure: str | None = None
    """Why it could not be measured."""


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What was measured, and what a run of this experiment would choose."""

    rounds: int
    chosen: Batching
    timings: tuple[Timing, ...]

    def pays_after(self, timing: Timing) -> int | None:
        """Rounds after which a way has caught up with training one after another; None: never."""
        slow = next(t for t in self.timings if t.batching == "sequential")
        saved = slow.round_ms - timing.round_ms
        if timing is slow or timing.failure or saved <= 0:
            return None
        late = timing.start_seconds - slow.start_seconds
        return max(1, round(1000.0 * late / saved))


def bench(experiment: Experiment, rounds: int) -> Bench:
    """Measure `rounds` rounds of every way to train clients.

    Raises:
        TesseraError: the experiment cannot run at all.
    """
    chosen = prepare(experiment).experiment.engine.batching
    ways: tuple[Batching, ...] = tuple(way for way in get_args(Batching) if way != "auto")
    timings = tuple(_apart(experiment, way, rounds) for way in ways)
    return Bench(rounds=rounds, chosen=chosen, timings=timings)


def described(result: Bench) -> Iterator[str | Table]:
    """The result for a terminal."""
    table = Table("batching", "ms a round", "steps a second", "start s", "peak MiB", "pays after")
    for timing in result.timings:
        if timing.failure is not None:
            table.add_row(timing.batching, "-", "-", "-", "-", timing.failure)
            continue
        after = result.pays_after(timing)
        table.add_row(
            timing.batching,
            f"{timing.round_ms:.2f}",
            f"{timing.steps_per_second:,.0f}",
            f"{timing.start_seconds:.1f}",
            f"{timing.peak_mib:.0f}",
            "-" if after is None else f"{after:,} rounds",
        )
    yield table
    yield f"A run of this experiment with engine.batching auto is trained {result.chosen}."


def _apart(experiment: Experiment, batching: Batching, rounds: int) -> Timing:
    engine = replace(experiment.engine, batching=batching, workers=1)
    request = {
        "experiment": to_json(replace(experiment, engine=engine)),
        "rounds": rounds,
        "begun": time.time(),
    }
    done = subprocess.run(
        [sys.executable, "-m", __name__],
        input=json.dumps(request).encode(),
        capture_output=True,
        check=False,
    )
    if done.returncode:
        lines = done.stderr.decode(errors="replace").strip().splitlines() or ["it was killed"]
        return Timing(batching=batching, failure=lines[-1].removeprefix("error: "))
    return Timing(batching=batching, **json.loads(done.stdout.splitlines()[-1]))


def _measure(experiment: Experiment, rounds: int, begun: float) -> dict[str, float]:
    with threads(experiment.engine.threads):
        setup = prepare(experiment)
        costs = setup.costs()
        state = first_state(experiment, setup.model, setup.data, rounds + WARM_ROUNDS)
        coverage = Coverage({name: tuple(value.shape) for name, value in state.params.items()})
        federation = federate(setup, state)
        seconds: list[float] = []
        steps = 0
        with contextlib.closing(make_engine(setup)) as engine:
            for number in range(rounds + WARM_ROUNDS):
                if number == WARM_ROUNDS:
                    start = time.time() - begun
                notes = play_round(setup, engine, federation, coverage, costs)
                if number >= WARM_ROUNDS:
                    seconds.append(notes.seconds)
                    steps += sum(row["steps"] for row in notes.clients)
    return {
        "start_seconds": start,
        "round_ms": 1000.0 * statistics.median(seconds),
        "steps_per_second": steps / sum(seconds),
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024.0,
    }


def main() -> None:
    """Measure what standard input asks for; the last line of the output is JSON."""
    request = json.loads(sys.stdin.read())
    experiment = from_json(request["experiment"])
    try:
        print(json.dumps(_measure(experiment, request["rounds"], request["begun"])))
    except TesseraError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
