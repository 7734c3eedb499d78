"""What a round holds in memory: with very many clients, and with a model much larger than theirs.

    python benchmarks/memory.py [--rounds 5] [--out memory.json]

    many     10,000 clients, 1,000 a round, FedAvg on a perceptron: resident memory after each round
    server   HeteroFL with clients of 1/8 on a perceptron of 50 M parameters: the peak over that of
             an idle process, against 2 x the model (4 bytes an entry) + the sums (8 bytes)

Each part has a process of its own. "server" includes the one client that is trained at a time, and
the coverage counts (4 bytes an entry).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from tesserafl.core import seeds
from tesserafl.core.fit import Training
from tesserafl.core.submodel import Coverage
from tesserafl.data.examples import ClientData, Examples, FederatedData, Spec
from tesserafl.engines.process import threads
from tesserafl.methods import FedAvg, HeteroFL
from tesserafl.models import MLP
from tesserafl.run.experiment import EngineSettings, Experiment
from tesserafl.run.federate import federate
from tesserafl.run.rounds import play_round
from tesserafl.run.setup import Setup, clients_of, make_engine

MIB = 1 << 20


def main() -> None:
    """Measure both parts, print, and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--part", choices=("many", "server"), default=None)
    options = parser.parse_args()
    if options.part is not None:
        print(json.dumps({"many": many, "server": server}[options.part](options.rounds)))
        return
    results = {part: _apart(part, options.rounds) for part in ("many", "server")}
    print(json.dumps(results, indent=1))
    if options.out:
        options.out.write_text(json.dumps(results, indent=1) + "\n")


def many(rounds: int) -> dict[str, Any]:
    """Resident MiB after each round; seconds of each."""
    experiment = Experiment(
        model=MLP(hidden=(64,)),
        method=FedAvg(),
        training=Training(lr=0.05, batch_size=16),
        engine=EngineSettings(batching="vmapped", group=50),
        clients_per_round=1000,
    )
    resident, seconds = _play(_setup(experiment, clients=10_000, each=10), rounds)
    return {"resident_mib": resident, "seconds": seconds}


def server(rounds: int) -> dict[str, Any]:
    """The peak of a round over an idle process, in bytes per entry of the model."""
    experiment = Experiment(
        model=MLP(hidden=(7000, 7000)),
        method=HeteroFL(ratio=(0.125,)),
        training=Training(lr=0.05, batch_size=16),
        engine=EngineSettings(batching="sequential"),
        clients_per_round=20,
    )
    setup = _setup(experiment, clients=40, each=10)
    entries = setup.model.num_entries
    idle = _resident()
    _play(setup, rounds)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024.0
    return {
        "parameters": entries,
        "idle_mib": idle,
        "peak_mib": peak,
        "bytes_per_entry": (peak - idle) * MIB / entries,
        "allowed_bytes_per_entry": 16,
    }


def _play(setup: Setup, rounds: int) -> tuple[list[float], list[float]]:
    resident, seconds = [], []
    with threads(1), contextlib.closing(make_engine(setup)) as engine:
        federation = federate(setup, setup.experiment.method.init(setup.model, 0, rounds))
        coverage, costs = Coverage(setup.model.shapes), setup.costs()
        for _ in range(rounds):
            notes = play_round(setup, engine, federation, coverage, costs)
            resident.append(_resident())
            seconds.append(notes.seconds)
    return resident, seconds


def _setup(experiment: Experiment, clients: int, each: int) -> Setup:
    draw = seeds.generator(0, "benchmark")
    inputs = torch.randn(clients * each, 64, generator=draw)
    labels = torch.randint(0, 10, (clients * each,), generator=draw)
    nothing = Examples(inputs=inputs[:0], labels=labels[:0])
    data = FederatedData(
        spec=Spec(kind="vector", task="vector-classification", shape=(64,), num_classes=10),
        clients=tuple(
            ClientData(
                train=Examples(inputs=inputs[i : i + each], labels=labels[i : i + each]),
                validation=nothing,
                test=nothing,
            )
            for i in range(0, clients * each, each)
        ),
        test=nothing,
    )
    return Setup(
        experiment=experiment,
        data=data,
        model=experiment.model.build_model(data.spec),
        clients=clients_of(experiment, data),
    )


def _resident() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / MIB


def _apart(part: str, rounds: int) -> Any:
    command = [sys.executable, __file__, "--part", part, "--rounds", str(rounds)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE)
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
