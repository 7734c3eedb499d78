"""What the engine adds to the clients' own work.

    python benchmarks/overhead.py [--threads 1] [--rounds 7] [--out overhead.json]

Everything is measured in one run, alternating, and reported as the median of ratios:

    engine   a FedAvg round of the embedded engine / a bare PyTorch loop that does the same work
             (same batches, loss and optimiser, a float32 mean) on a CNN, 10 clients a round

Cutting and merging a large model is measured by `sums.py`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from tesserafl.core import seeds
from tesserafl.core.coverage import Coverage
from tesserafl.core.fit import Training
from tesserafl.data.examples import ClientData, Examples, FederatedData, Spec
from tesserafl.engines.client import ClientWorker
from tesserafl.engines.local import InProcess
from tesserafl.engines.process import threads
from tesserafl.methods import FedAvg
from tesserafl.models import CNN
from tesserafl.run.experiment import Experiment
from tesserafl.run.federate import federate
from tesserafl.run.rounds import play_round
from tesserafl.run.setup import Setup, clients_of


def main() -> None:
    """Measure, print, and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    with threads(options.threads):
        results: dict[str, Any] = {"threads": options.threads}
        results["engine"] = engine(options.rounds)
    print(json.dumps(results, indent=1))
    if options.out:
        options.out.write_text(json.dumps(results, indent=1) + "\n")


def engine(rounds: int) -> dict[str, float]:
    """Median seconds of both and the median of their ratios, round by round."""
    setup = _setup()
    worker = ClientWorker(
        model=setup.model,
        method=setup.experiment.method,
        examples=lambda client: setup.data.clients[client].train,
        seed=0,
    )
    local, coverage = InProcess(worker=worker), Coverage(setup.model.shapes)
    costs, bare = setup.costs(), _bare_loop(setup)
    state = setup.experiment.method.init(setup.model, 0, 1000)

    def play() -> object:
        """The same first round, with the same cohort, every time."""
        return play_round(setup, local, federate(setup, state), coverage, costs)

    play()  # warm: modules built, FLOPs counted
    bare(0)
    engine_seconds, bare_seconds = [], []
    for number in range(rounds):
        engine_seconds.append(_seconds(play))
        bare_seconds.append(_seconds(lambda number=number: bare(number)))
    ratios = [a / b for a, b in zip(engine_seconds, bare_seconds, strict=True)]
    return {
        "engine_seconds": statistics.median(engine_seconds),
        "bare_seconds": statistics.median(bare_seconds),
        "ratio": statistics.median(ratios),
    }


def _setup() -> Setup:
    """PEERS' cnn workload in our terms: 100 clients, 96 grey 28 x 28 images each, 5 epochs."""
    draw = seeds.generator(0, "benchmark")
    spec = Spec(
        kind="image",
        task="image-classification",
        shape=(1, 28, 28),
        num_classes=10,
        class_names=tuple("0123456789"),
        vocab_size=0,
        pad_id=0,
    )

    def examples(count: int) -> Examples:
        return Examples(
            inputs=torch.randint(0, 256, (count, 1, 28, 28), dtype=torch.uint8, generator=draw),
            labels=torch.randint(0, 10, (count,), generator=draw),
        )

    data = FederatedData(
        spec=spec,
        clients=tuple(
            ClientData(train=examples(96), validation=examples(0), test=examples(0))
            for _ in range(100)
        ),
        test=examples(10),
    )
    experiment = Experiment(
        model=CNN(channels=(16, 32)),
        method=FedAvg(),
        training=Training(lr=0.05, epochs=5, batch_size=32),
    )
    return Setup(
        experiment=replace(experiment, data=replace(experiment.data, num_clients=100)),
        data=data,
        model=experiment.model.build_model(spec),
        clients=clients_of(experiment, data),
    )


def _bare_loop(setup: Setup) -> Callable[[int], None]:
    """The same round as a researcher would write it tightly: one module, one running mean."""
    training = setup.experiment.training
    with seeds.seeded(0, "init"):
        module = setup.model.module().train()
    weights = [value.detach().clone() for value in module.parameters()]

    def round_of(number: int) -> None:
        total = [torch.zeros_like(weight) for weight in weights]
        cohort = setup.cohort(0)
        examples = sum(client.num_examples for client in cohort)
        for client in cohort:
            with torch.no_grad():
                for value, weight in zip(module.parameters(), weights, strict=True):
                    value.copy_(weight)
            optimiser = torch.optim.SGD(module.parameters(), lr=training.lr)
            train = setup.data.clients[client.id].train
            draw = seeds.generator(0, 0, client.id, "batches")
            for _ in range(training.epochs):
                for rows in torch.randperm(len(train), generator=draw).split(training.batch_size):
                    inputs, labels = train.batch(rows)
                    optimiser.zero_grad()
                    F.cross_entropy(module(inputs).logits, labels).backward()
                    optimiser.step()
            with torch.no_grad():
                for value, mean in zip(module.parameters(), total, strict=True):
                    mean.add_(value, alpha=client.num_examples / examples)
        weights[:] = total

    return round_of


def _seconds(action: Callable[[], object]) -> float:
    begun = time.perf_counter()
    action()
    return time.perf_counter() - begun


if __name__ == "__main__":
    main()
