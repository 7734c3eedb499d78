"""What keeping the states of frozen blocks saves: a round, or a test, without over one with it.

    python benchmarks/frozen.py [--repeats 5] [--active 1 2 4 6] [--out frozen.json]

One client of FedFMSL's first stage, 64 texts of 64 tokens, three epochs, adapters in the top blocks
of an encoder with 6 blocks of 384 (random weights), one thread. "first": nothing is kept yet. Then
a test on the same texts, with adapters in as many top blocks; last, both of a feature adapter.
Medians of interleaved repeats, in processor time, which a busy machine disturbs less.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import replace
from pathlib import Path

import torch

from tesserafl.core import seeds
from tesserafl.core.fit import Training
from tesserafl.core.messages import Client, Task
from tesserafl.core.method import Predictor
from tesserafl.core.model import Model
from tesserafl.data.examples import Examples, FederatedData, Spec
from tesserafl.engines.client import ClientWorker
from tesserafl.engines.kept import Kept
from tesserafl.engines.process import threads
from tesserafl.methods import FedAvg, FedFMSL, MethodSettings
from tesserafl.models import FeatureAdapter, LoRA
from tesserafl.run.evaluate import Evaluator

COUNT, LENGTH = 64, 64
TEXTS = Spec(
    kind="tokens",
    task="text-classification",
    shape=(LENGTH,),
    num_classes=4,
    class_names=("a", "b", "c", "d"),
    vocab_size=1000,
)
ENCODER = LoRA(
    config="bert",
    rank=4,
    alpha=8.0,
    options={
        "hidden_size": 384,
        "num_hidden_layers": 6,
        "num_attention_heads": 12,
        "intermediate_size": 1536,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    },
)
TRAINING = Training(optimiser="adamw", lr=1e-3, batch_size=16, epochs=3)


def main() -> None:
    """Measure, print, and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--active", type=int, nargs="+", default=[1, 2, 4, 6])
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    with threads(1):
        rows = [ratios(active, options.repeats) for active in options.active]
        rows += [of_tests(active, options.repeats) for active in options.active]
        rows += [of_feature_adapter(options.repeats)]
    if options.out:
        options.out.write_text(json.dumps(rows, indent=1) + "\n")


def ratios(active: int, repeats: int) -> dict[str, float]:
    """Processor seconds of a round, and how many times faster it is with the store."""
    method = FedFMSL(schedule="manual", depths=(active,), stage_one=1.0)
    return {"active": float(active), **_rounds(ENCODER.build_model(TEXTS), method, repeats)}


def of_tests(active: int, repeats: int) -> dict[str, float]:
    """Processor seconds of a test, and how many times faster later ones are with the store."""
    first = 6 - active
    targets = (rf".*layer\.[{first}-5]\.attention\.self\.(query|value)",)
    return {"tested": float(active), **_tests(replace(ENCODER, targets=targets), repeats)}


def of_feature_adapter(repeats: int) -> dict[str, float]:
    """Of a round, and of a test, with an attention adapter on features."""
    settings = FeatureAdapter(config="bert", options=ENCODER.options, prompt="")
    found = _rounds(settings.build_model(TEXTS), FedAvg(ratio=(1.0,)), repeats)
    tests = _tests(settings, repeats)
    return found | {f"test_{key}": value for key, value in tests.items()}


def _rounds(model: Model, method: MethodSettings, repeats: int) -> dict[str, float]:
    examples = _examples()
    state = method.init(model, 0, 10)
    client = Client(id=0, num_examples=COUNT)
    (task,) = method.configure(model, state, [client], TRAINING)
    plain, kept = (
        ClientWorker(
            model=model,
            method=method,
            examples=lambda _: examples,
            seed=0,
            kept=Kept(most_bytes=size),
        )
        for size in (0, 1 << 30)
    )
    _seconds(plain, task), _seconds(kept, task)  # builds modules, tries the split out
    found: dict[str, list[float]] = {"without": [], "first": [], "later": []}
    for repeat in range(repeats):
        found["without"].append(_seconds(plain, task))
        anew = replace(task, client=replace(client, id=repeat + 1))
        found["first"].append(_seconds(kept, anew))
        found["later"].append(_seconds(kept, anew))
    medians = {name: statistics.median(seconds) for name, seconds in found.items()}
    row = {
        "seconds": medians["without"],
        "first": medians["without"] / medians["first"],
        "later": medians["without"] / medians["later"],
    }
    print(row, flush=True)
    return row


def _tests(settings: LoRA | FeatureAdapter, repeats: int) -> dict[str, float]:
    model, examples = settings.build_model(TEXTS), _examples()
    predictor = Predictor(model=model, params=model.init(0))
    data = FederatedData(spec=TEXTS, clients=(), test=examples)
    plain, kept = (Evaluator(data=data, kept=Kept(most_bytes=size)) for size in (0, 1 << 30))
    plain.evaluate(predictor, examples), kept.evaluate(predictor, examples)
    found: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeats):
        for each, evaluator in zip(found, (plain, kept), strict=True):
            begun = time.process_time()
            evaluator.evaluate(predictor, examples)
            each.append(time.process_time() - begun)
    without, later = (statistics.median(each) for each in found)
    row = {"seconds": without, "later": without / later}
    print(row, flush=True)
    return row


def _examples() -> Examples:
    draw = seeds.generator(0, "examples")
    tokens = torch.randint(1, 1000, (COUNT, LENGTH), generator=draw).int()
    return Examples(inputs=tokens, labels=torch.randint(0, 4, (COUNT,), generator=draw))


def _seconds(worker: ClientWorker, task: Task) -> float:
    begun = time.process_time()
    worker.work(task, {})
    return time.process_time() - begun


if __name__ == "__main__":
    main()
