"""TesseraFL's own round, as a run plays it: cut, train, fold, and the round's line in events.jsonl.

Rounds go through `run.rounds.play_round` and the engine that `run.setup.make_engine` chooses; the
workloads' nets are no registered models, so `run.runner.start` cannot build them. Evaluation and
checkpoints are left out, as for every other system. `--batching` overrides how clients are trained:
by default the engine's own rule decides, as it would for a long run. What it starts for that falls
into the warm-up, as for the other systems that compile.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import get_args

import numpy as np
import torch
from common import Bench, Workload, torch_logits

from tesserafl.core.axes import probe
from tesserafl.core.coverage import Coverage
from tesserafl.core.fit import Training
from tesserafl.core.messages import Client
from tesserafl.core.model import Model
from tesserafl.data.examples import ClientData, Examples, FederatedData, Spec
from tesserafl.engines.process import threads
from tesserafl.engines.settings import Batching, EngineSettings
from tesserafl.methods import FedAvg
from tesserafl.models import MLP
from tesserafl.run.batching import choose
from tesserafl.run.events import EventLog
from tesserafl.run.experiment import Experiment
from tesserafl.run.federate import federate
from tesserafl.run.rounds import play_round
from tesserafl.run.setup import Setup, clients_of, make_engine

LONG_RUN = 20_000  # rounds that the engine is told of, to decide how clients are trained


class Told(Setup):
    """A setup whose cohorts are the workload's, so that every system trains the same clients."""

    work: Workload

    def cohort(self, round: int) -> list[Client]:
        """The clients that are asked in a round."""
        return [self.clients[client] for client in self.work.cohort(round)]


def setup_of(bench: Bench, batching: Batching) -> Setup:
    """The workload in TesseraFL's terms."""
    work = bench.workload
    image = work.name == "cnn"
    spec = Spec(
        kind="image" if image else "vector",
        task="image-classification" if image else "vector-classification",
        shape=work.x[0].shape[1:],
        num_classes=10,
        class_names=tuple("0123456789"),
    )
    inputs, labels = work.tensors()
    nothing = Examples(inputs=inputs[0][:0], labels=labels[0][:0])
    data = FederatedData(
        spec=spec,
        clients=tuple(
            ClientData(train=Examples(inputs=x, labels=y), validation=nothing, test=nothing)
            for x, y in zip(inputs, labels, strict=True)
        ),
        test=nothing,
    )
    experiment = Experiment(
        model=MLP(),  # stands for the net below
        method=FedAvg(),
        training=Training(lr=work.lr, epochs=work.epochs, batch_size=work.batch),
        engine=EngineSettings(threads=bench.threads, device="cpu", batching=batching),
        rounds=LONG_RUN,
        clients_per_round=work.per_round,
    )
    model, clients = model_of(work), clients_of(experiment, data)
    chosen = choose(experiment, model, data, clients)
    setup = Told(
        experiment=replace(experiment, engine=replace(experiment.engine, batching=chosen)),
        data=data,
        model=model,
        clients=clients,
    )
    object.__setattr__(setup, "work", work)
    return setup


def model_of(work: Workload) -> Model:
    """The workload's net, with its axes probed and its starting weights."""
    return probe(
        lambda sizes: work.net(dict(sizes)),
        work.net_sizes,
        lambda: torch.randn(3, *work.x[0].shape[1:]),
        outputs=("classes",),
        pretrained=lambda: {
            name: torch.from_numpy(np.array(value)) for name, value in work.init.items()
        },
    )


def main() -> None:
    """Play the rounds."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--batching", default="auto", choices=get_args(Batching))
    options, sys.argv[1:] = parser.parse_known_args()
    name = "tessera" if options.batching == "auto" else f"tessera_{options.batching}"
    bench = Bench(name, f"tesserafl {version('tesserafl')}")
    setup = setup_of(bench, options.batching)
    with (
        threads(bench.threads),
        tempfile.TemporaryDirectory() as folder,
        contextlib.closing(make_engine(setup)) as engine,
        contextlib.closing(EventLog(Path(folder) / "events.jsonl")) as log,
    ):
        federation = federate(setup, setup.experiment.method.init(setup.model, 0, LONG_RUN))
        coverage, costs = Coverage(setup.model.shapes), setup.costs()
        steps: list[int] = []

        def one_round(number: int) -> None:
            notes = play_round(setup, engine, federation, coverage, costs)
            log.write(
                {
                    "kind": "round",
                    "round": federation.round,
                    "asked": len(notes.clients) + len(notes.failures),
                    "answered": len(notes.clients),
                    "loss": notes.loss,
                    "coverage": coverage.share,
                    **notes.amounts,
                    "clients": sorted(notes.clients, key=lambda row: int(row["client"])),
                    "failures": notes.failures,
                }
            )
            steps.extend(int(row["steps"]) for row in notes.clients)

        bench.play(one_round)
        net = bench.workload.net()
        net.load_state_dict(dict(federation.assembled().params))
        assert len(steps) == bench.total * bench.workload.per_round, "a client did not answer"
        note = f"clients are trained {setup.experiment.engine.batching}"
        bench.finish(torch_logits(net, bench.workload), sum(steps) / len(steps), note)


if __name__ == "__main__":
    main()
