"""Seconds of a round, and bytes on the wire, on each engine.

    python benchmarks/engines.py [--models quickstart 1 50 500] [--engines ...] [--rounds 9]
                                 [--repeats 3] [--clients 4] [--out engines.json]

    quickstart   the named experiment as it is: many short clients
    1, 50, 500   a perceptron of so many MiB of parameters, FedAvg, `--clients` clients a round, one
                 step each: copies decide

All engines are started, then play the same rounds in turn, so that a machine that others use is
shared fairly; the first rounds do not count. `times` is the median over rounds of the ratio to the
first engine of the same turn. `start` is from an experiment that is loaded to workers that are
ready. `wire` is the bytes that leave and reach the server over the bytes of the parameters that are
meant. A model is a process of its own, `--repeats` times. An engine joins by one entry in ENGINES.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tesserafl.core.coverage import Coverage
from tesserafl.core.fit import Training
from tesserafl.core.messages import Task
from tesserafl.core.params import num_bytes
from tesserafl.core.wire import encode_task, encode_update
from tesserafl.data import DataSettings
from tesserafl.engines.process import threads
from tesserafl.engines.seam import Engine
from tesserafl.experiments.quickstart import quickstart
from tesserafl.methods import FedAvg
from tesserafl.models import MLP
from tesserafl.run.begin import first_federation
from tesserafl.run.experiment import Experiment
from tesserafl.run.player import Player, player_of
from tesserafl.run.setup import Setup, client_worker, make_engine, prepare

WARMUP = 2
LATER = 10_000
"""Rounds that the experiment plans: more than are played."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One engine to measure."""

    begin: Callable[[Setup], Engine]
    wire: Callable[[Setup], float] | None = None
    """Bytes both ways over the bytes meant; None: nothing leaves the machine's memory."""


def embedded(**settings: Any) -> Callable[[Setup], Engine]:
    """An engine that `make_engine` makes for these settings."""

    def begin(setup: Setup) -> Engine:
        engine = replace(setup.experiment.engine, **settings)
        return make_engine(replace(setup, experiment=replace(setup.experiment, engine=engine)))

    return begin


def as_messages(setup: Setup) -> float:
    """Of the first client, whose task and update are encoded as they would be for a cluster."""
    federation = first_federation(setup)
    task: Task = next(federation.tasks(setup.cohort(0), setup.experiment.training))
    update, memory = client_worker(setup).work(task, {})
    sent = len(encode_task(task, {})) + len(encode_update(update, memory))
    return sent / (num_bytes(task.params) + num_bytes(update.delta))


ENGINES: dict[str, Entry] = {
    "local 1": Entry(begin=embedded(workers=1)),
    "local 2": Entry(begin=embedded(workers=2)),
    "ray 2": Entry(begin=embedded(kind="ray", workers=2), wire=as_messages),
}


def main() -> None:
    """Measure every engine with every model, print, and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--models", nargs="+", default=["quickstart", "1", "50"])
    parser.add_argument("--engines", nargs="+", choices=list(ENGINES), default=list(ENGINES))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--here", action="store_true", help="one model, in this process")
    options = parser.parse_args()
    if options.here:
        rows = measured(options.models[0], options.engines, options.rounds, options.clients)
        print(json.dumps(rows))
        return
    table = []
    for model in options.models:
        repeats = [_apart(model, options) for _ in range(options.repeats)]
        for rows in zip(*repeats, strict=True):
            table.append(_row(rows))
            print(json.dumps(table[-1]), flush=True)
    if options.out:
        options.out.write_text(json.dumps(table, indent=1) + "\n")


def measured(model: str, names: Sequence[str], rounds: int, clients: int) -> list[dict[str, Any]]:
    """Engines with one model: seconds of each one's start and of each round that counts."""
    setup = prepare(experiment_of(model, clients))
    starts: list[float] = []
    players: list[Player] = []
    turns: list[list[float]] = []
    coverage = Coverage(setup.model.shapes)
    with threads(1), contextlib.ExitStack() as stack:
        for name in names:
            begun = time.perf_counter()
            engine = stack.enter_context(contextlib.closing(ENGINES[name].begin(setup)))
            starts.append(time.perf_counter() - begun)
            players.append(player_of(setup, engine, first_federation(setup), setup.costs()))
        for _ in range(WARMUP + rounds):
            turns.append([_seconds(player, coverage) for player in players])
    seconds = list(zip(*turns[WARMUP:], strict=True))
    return [
        {
            "model": model,
            "engine": name,
            "start_seconds": start,
            "round_seconds": own,
            "ratios": [mine / bar for mine, bar in zip(own, seconds[0], strict=True)],
            "wire": wire and wire(setup),
        }
        for name, start, own, wire in zip(
            names, starts, seconds, [ENGINES[name].wire for name in names], strict=True
        )
    ]


def _seconds(player: Player, coverage: Coverage) -> float:
    begun = time.perf_counter()
    player.play(coverage)
    return time.perf_counter() - begun


def experiment_of(model: str, clients: int) -> Experiment:
    """What is run; a number is a size in MiB."""
    if model == "quickstart":
        return replace(quickstart(), rounds=LATER, engine=_one_by_one(quickstart()))
    width = math.isqrt(int(float(model) * (1 << 20)) // 4)
    experiment = Experiment(
        data=DataSettings(num_clients=clients, partition="iid"),
        model=MLP(hidden=(width, width)),
        method=FedAvg(),
        training=Training(steps=1, lr=0.001),
        rounds=LATER,
        clients_per_round=clients,
    )
    return replace(experiment, engine=_one_by_one(experiment))


def _one_by_one(experiment: Experiment) -> Any:
    return replace(experiment.engine, batching="sequential")


def _row(repeats: Sequence[dict[str, Any]]) -> dict[str, Any]:
    rounds = [statistics.median(each["round_seconds"]) for each in repeats]
    ratios = [statistics.median(each["ratios"]) for each in repeats]
    return {
        "model": repeats[0]["model"],
        "engine": repeats[0]["engine"],
        "start_seconds": round(statistics.median(each["start_seconds"] for each in repeats), 2),
        "round_ms": round(1000 * statistics.median(rounds), 2),
        "times": round(statistics.median(ratios), 3),
        "times_of_repeats": [round(ratio, 3) for ratio in ratios],
        "wire": repeats[0]["wire"],
    }


def _apart(model: str, options: argparse.Namespace) -> Any:
    command = [sys.executable, __file__, "--here", "--models", model, "--engines"]
    command += [*options.engines, "--rounds", str(options.rounds), "--clients"]
    done = subprocess.run([*command, str(options.clients)], check=True, stdout=subprocess.PIPE)
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
