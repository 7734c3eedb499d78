"""What the contrastive loss costs a client: time and FLOPs of a round with it over those without.

    python benchmarks/contrast.py [--repeats 7] [--epochs 1 2 5] [--out contrast.json]

    cached    features of the two frozen sub-models are computed once a round and looked up
    computed  they are computed for every batch, as they must be where images are augmented
              (the round without contrast augments too)

One client, a CNN cut to 1/4, 320 images, one thread; medians of interleaved repeats. Predicted:
5/3 computed; 1 + 2/(3 E) cached, with E epochs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from tesserafl.core import seeds
from tesserafl.core.fit import Training
from tesserafl.core.messages import Client, Memory, Task
from tesserafl.data.examples import Examples, Spec
from tesserafl.engines.client import ClientWorker
from tesserafl.engines.process import threads
from tesserafl.methods import MSfusion
from tesserafl.models import CNN
from tesserafl.models.costs import costs_of

IMAGES = Spec(kind="image", task="image-classification", shape=(1, 28, 28), num_classes=10)
COUNT = 320


def main() -> None:
    """Measure, print, and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--epochs", type=int, nargs="+", default=[1, 2, 5])
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    rows = []
    with threads(1):
        for epochs in options.epochs:
            for way in ("cached", "computed"):
                rows.append(ratio(epochs, way == "computed", options.repeats) | {"way": way})
                print(rows[-1])
    if options.out:
        options.out.write_text(json.dumps(rows, indent=1) + "\n")


def ratio(epochs: int, augment: bool, repeats: int) -> dict[str, float]:
    """Seconds and FLOPs of a round with contrast over those without."""
    draw = seeds.generator(0, "examples")
    images = torch.randint(0, 256, (COUNT, 1, 28, 28), generator=draw).to(torch.uint8)
    examples = Examples(inputs=images, labels=torch.randint(0, 10, (COUNT,), generator=draw))
    training = Training(lr=0.05, momentum=0.9, epochs=epochs, batch_size=32, augment=augment)
    rounds: dict[float, Callable[[], float]] = {}
    for contrast in (0.0, 0.1):
        rounds[contrast] = _round(contrast, training, examples)
    seconds: dict[float, list[float]] = {0.0: [], 0.1: []}
    passes = 0.0
    for _ in range(repeats):
        for contrast, play in rounds.items():
            begun = time.perf_counter()
            passes = max(passes, play())
            seconds[contrast].append(time.perf_counter() - begun)
    model = CNN(channels=(32, 64, 128)).build_model(IMAGES)
    small = model.slice({axis: range(model.units(axis) // 4) for axis in model.cuttable})
    costs = costs_of(model, small, training, *examples.batch(torch.arange(32)))
    plain = costs.flops_per_example * COUNT * epochs
    return {
        "epochs": epochs,
        "time": statistics.median(seconds[0.1]) / statistics.median(seconds[0.0]),
        "flops": 1.0 + costs.forward_flops_per_example * passes / plain,
    }


def _round(contrast: float, training: Training, examples: Examples) -> Callable[[], float]:
    """Plays a client's second round; gives its forward passes through frozen sub-models."""
    model = CNN(channels=(32, 64, 128)).build_model(IMAGES)
    method = MSfusion(ratio=(0.25,), contrast=contrast)
    worker = ClientWorker(model=model, method=method, examples=lambda client: examples, seed=0)
    client = Client(id=0, num_examples=COUNT)
    state = method.init(model, 0, 10)

    def task(round: int) -> Task:
        return next(iter(method.configure(model, replace(state, round=round), [client], training)))

    memory: Memory = worker.work(task(0), {})[1]

    def play() -> float:
        update, _ = worker.work(task(1), memory)
        return update.metrics.get("reference_examples", 0.0)

    play()
    return play


if __name__ == "__main__":
    main()
