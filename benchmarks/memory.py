"""What a round holds in memory: with very many clients, and with a model much larger than theirs.

    python benchmarks/memory.py [--rounds 5] [--out memory.json]

    many     10,000 clients, 1,000 a round, FedAvg on a perceptron: resident memory after each round
    adapters 4, 16 and 64 clients that fine-tune one encoder of 22.7 M parameters by FedIT: resident
             memory after two rounds, with and without what frozen blocks gave being kept
    server   HeteroFL with clients of 1/8 on a perceptron of 50 M parameters: the peak over that of
             an idle process, against 2 x the model (4 bytes an entry) + the sums (8 bytes)

Each part has a process of its own. "server" includes the one client that is trained at a time.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tesserafl.core import seeds
from tesserafl.core.coverage import Coverage
from tesserafl.core.fit import Training
from tesserafl.data.examples import ClientData, Examples, FederatedData, Spec
from tesserafl.engines.process import threads
from tesserafl.engines.settings import EngineSettings
from tesserafl.methods import FedAvg, FedIT, HeteroFL
from tesserafl.models import MLP, LoRA
from tesserafl.models.huggingface import Option
from tesserafl.run.experiment import Experiment
from tesserafl.run.federate import federate
from tesserafl.run.rounds import play_round
from tesserafl.run.setup import Setup, clients_of, make_engine

MIB = 1 << 20
ENCODER: dict[str, Option] = {
    "hidden_size": 384,
    "num_hidden_layers": 6,
    "num_attention_heads": 12,
    "intermediate_size": 1536,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
"""A small sentence encoder's sizes."""


def main() -> None:
    """Measure both parts, print, and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--part", choices=list(PARTS), default=None)
    options = parser.parse_args()
    if options.part is not None:
        print(json.dumps(PARTS[options.part](options.rounds)))
        return
    results = {part: _apart(part, options.rounds) for part in PARTS}
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


def adapters(clients: int, cache_mib: int) -> dict[str, Any]:
    """Resident MiB before any client trained and after two rounds of all."""
    length = 32
    experiment = Experiment(
        model=LoRA(config="bert", options=ENCODER, rank=4, alpha=8.0),
        method=FedIT(),
        training=Training(optimiser="adamw", lr=1e-3, batch_size=8),
        engine=EngineSettings(batching="sequential", cache_mib=cache_mib),
        clients_per_round=clients,
    )
    draw = seeds.generator(0, "benchmark")
    tokens = torch.randint(1, 30_000, (clients * 8, length), generator=draw).int()
    spec = Spec(
        kind="tokens",
        task="text-classification",
        shape=(length,),
        num_classes=2,
        class_names=("bad", "good"),
        vocab_size=30_522,
    )
    setup = _setup_of(experiment, spec, tokens, torch.arange(clients * 8) % 2, 8)
    setup.model.init(0)  # loads the encoder
    before = _resident()
    resident, _ = _play(setup, 2)
    return {"clients": clients, "frozen_mib": 4 * 22.7e6 / MIB, "before": before, "after": resident}


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
    spec = Spec(kind="vector", task="vector-classification", shape=(64,), num_classes=10)
    return _setup_of(experiment, spec, inputs, labels, each)


def _setup_of(
    experiment: Experiment, spec: Spec, inputs: Tensor, labels: Tensor, each: int
) -> Setup:
    """Clients that hold so many examples each, one after another."""
    nothing = Examples(inputs=inputs[:0], labels=labels[:0])
    data = FederatedData(
        spec=spec,
        clients=tuple(
            ClientData(
                train=Examples(inputs=inputs[i : i + each], labels=labels[i : i + each]),
                validation=nothing,
                test=nothing,
            )
            for i in range(0, len(inputs), each)
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


PARTS: dict[str, Callable[[int], dict[str, Any]]] = {
    "many": many,
    "server": server,
    **{f"adapters-{n}": lambda _, n=n: adapters(n, 1024) for n in (4, 16, 64)},
    **{f"adapters-{n}-uncached": lambda _, n=n: adapters(n, 0) for n in (4, 16, 64)},
}

if __name__ == "__main__":
    main()
