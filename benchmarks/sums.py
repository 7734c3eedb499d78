"""What it costs to cut a cohort's sub-models out of a large model and to average their deltas.

    python benchmarks/sums.py [--threads 1] [--repeats 5] [--models gpt2 resnet18] [--out sums.json]

Ten clients: four hold 1/4 of the width, three 1/2, three all of it. In one run, alternating:

    ours       cut, fold, merge: windows that wrap, exact sums in int64, each delta checked
    slices     float32 in plain PyTorch, prefix windows: a copy of each slice; then
               acc[slice] += w x delta, count[slice] += w; then a division. No wraps, no checks
    gathers    float32, windows as ours, as public code of rolling methods writes it:
               param[torch.meshgrid(...)] to cut, the same to add to acc and count
    copy       copying as many bytes as the sub-models hold, once, into memory that is already there

Extract is the time of all cuts, aggregate that of everything after training. Everything starts from
fresh memory in each repetition, in all of them but `copy`. Medians; ratios are medians over
repetitions of ratios within one.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from tesserafl.core.exactsum import ExactSum
from tesserafl.core.kernels import compiled_for
from tesserafl.core.model import Model
from tesserafl.core.params import Params
from tesserafl.core.submodel import SubModel, cut, index_tensor, merge
from tesserafl.data.examples import Spec
from tesserafl.engines.process import threads
from tesserafl.models import HuggingFace, ResNet

WIDTHS = (0.25,) * 4 + (0.5,) * 3 + (1.0,) * 3
RATIOS_SHOWN = (("ours", "slices"), ("ours", "copy"), ("gathers", "ours"))

Times = tuple[float, float]
"""Milliseconds of extract and of aggregate."""
Part = dict[str, Any]
"""Parameter -> what selects the part of it."""


def main() -> None:
    """Measure, print, and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--threads", type=int, choices=(1, 2), default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--gather-repeats", type=int, default=1, help="of the slowest; may be 0")
    parser.add_argument("--models", nargs="+", choices=tuple(MODELS), default=list(MODELS))
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    results: dict[str, Any] = {"threads": options.threads, "repeats": options.repeats}
    with threads(options.threads):
        for name in options.models:
            results[name] = measure(MODELS[name](), options.repeats, options.gather_repeats)
            show(name, results[name])
    if options.out:
        options.out.write_text(json.dumps(results, indent=1) + "\n")


def measure(model: Model, repeats: int, gather_repeats: int) -> dict[str, Any]:
    """All contestants on one model."""
    params = model.init(0)
    rolled = [window(model, ratio, 3 * client + 1) for client, ratio in enumerate(WIDTHS)]
    prefixes = [window(model, ratio, 0) for ratio in WIDTHS]
    slices: list[Part] = [{v.name: v.index for v in s.views.values()} for s in prefixes]
    meshes: list[Part] = [
        {v.name: tuple(index_tensor(i) for i in v.index) for v in s.views.values()} for s in rolled
    ]
    entries = sum(submodel.num_entries for submodel in rolled)
    source, target = torch.ones(entries), torch.ones(entries)
    contestants: dict[str, Callable[[], Times]] = {
        "ours": lambda: ours(params, rolled),
        "slices": lambda: plain(params, slices, lambda part: part),
        "gathers": lambda: plain(params, meshes, lambda part: torch.meshgrid(part, indexing="ij")),
        "copy": lambda: (_ms(lambda: target.copy_(source)),) * 2,
    }
    times: dict[str, list[Times]] = {name: [] for name in contestants}
    ours(params, rolled)  # warm: compiled code loaded
    for number in range(repeats):
        for name, contestant in contestants.items():
            if name != "gathers" or number < gather_repeats:
                gc.collect()
                times[name].append(contestant())
    return {
        "parameters": model.num_entries,
        "entries_moved": entries,
        "compiled": compiled_for(params),
        "milliseconds": {
            name: {
                "extract": statistics.median(extract for extract, _ in pairs),
                "aggregate": statistics.median(aggregate for _, aggregate in pairs),
                "both": statistics.median(map(sum, pairs)),
            }
            for name, pairs in times.items()
            if pairs
        },
        **{
            f"{over}_over_{under}": _ratios(times[over], times[under])
            for over, under in RATIOS_SHOWN
            if times[over]
        },
    }


def ours(params: Params, submodels: Sequence[SubModel]) -> Times:
    """The product's own path; a client's part stands for its delta."""
    extract = aggregate = 0.0
    total = ExactSum(max_weight=2 * len(submodels))
    for submodel in submodels:
        begun = time.perf_counter()
        part = cut(params, submodel)
        extract += 1e3 * (time.perf_counter() - begun)
        begun = time.perf_counter()
        total.fold(submodel, part, 2, params)
        aggregate += 1e3 * (time.perf_counter() - begun)
    return extract, aggregate + _ms(lambda: merge(params, total))


def plain(params: Params, parts: Sequence[Part], places: Callable[[Any], Any]) -> Times:
    """Float32 sums and counts; `places` makes of a part what a tensor is indexed with."""
    extract = aggregate = 0.0
    begun = time.perf_counter()
    sums = {name: torch.zeros_like(tensor) for name, tensor in params.items()}
    counts = {name: torch.zeros_like(tensor) for name, tensor in params.items()}
    aggregate += 1e3 * (time.perf_counter() - begun)
    for part in parts:
        begun = time.perf_counter()
        small = {name: params[name][places(index)].clone() for name, index in part.items()}
        extract += 1e3 * (time.perf_counter() - begun)
        begun = time.perf_counter()
        for name, index in part.items():
            sums[name][places(index)] += 2.0 * small[name]
            counts[name][places(index)] += 2.0
        aggregate += 1e3 * (time.perf_counter() - begun)

    def divide() -> Params:
        return {n: old + sums[n] / counts[n].clamp(min=1.0) for n, old in params.items()}

    return extract, aggregate + _ms(divide)


def window(model: Model, ratio: float, start: int) -> SubModel:
    """Units start, start + 1, ... of every axis, cyclic, ascending."""
    keep = {}
    for axis in model.cuttable:
        units = model.units(axis)
        keep[axis] = sorted((units - start + unit) % units for unit in range(round(units * ratio)))
    return model.slice(keep)


def gpt2() -> Model:
    """GPT-2 small, 124 M parameters."""
    spec = Spec(
        kind="tokens",
        task="causal-lm",
        shape=(64,),
        num_classes=50257,
        class_names=(),
        vocab_size=50257,
        pad_id=50256,
    )
    return HuggingFace(config="gpt2").build_model(spec)


def resnet18() -> Model:
    """ResNet-18 for 32 x 32 images, 11 M parameters."""
    spec = Spec(
        kind="image",
        task="image-classification",
        shape=(3, 32, 32),
        num_classes=10,
        class_names=tuple("0123456789"),
        vocab_size=0,
        pad_id=0,
    )
    return ResNet().build_model(spec)


MODELS: dict[str, Callable[[], Model]] = {"gpt2": gpt2, "resnet18": resnet18}


def show(name: str, result: dict[str, Any]) -> None:
    """A plain table."""
    compiled = "compiled" if result["compiled"] else "eager"
    print(
        f"{name}: {result['parameters']:,} parameters, {result['entries_moved']:,} cut, {compiled}"
    )
    print(f"  {'ms':10}{'extract':>10}{'aggregate':>10}{'both':>10}")
    for contestant, row in result["milliseconds"].items():
        print(f"  {contestant:10}" + "".join(f"{value:10.1f}" for value in row.values()))
    for over, under in RATIOS_SHOWN:
        ratio = result.get(f"{over}_over_{under}", {})
        print(f"  {over} / {under}: " + ", ".join(f"{k} {v:.2f}" for k, v in ratio.items()))


def _ratios(over: Sequence[Times], under: Sequence[Times]) -> dict[str, float]:
    def median(of: Callable[[Times], float]) -> float:
        return statistics.median(of(a) / of(b) for a, b in zip(over, under, strict=False))

    parts: dict[str, Callable[[Times], float]] = {
        "extract": lambda pair: pair[0],
        "aggregate": lambda pair: pair[1],
        "both": sum,
    }
    return {name: median(of) for name, of in parts.items()}


def _ms(action: Callable[[], object]) -> float:
    begun = time.perf_counter()
    action()
    return 1e3 * (time.perf_counter() - begun)


if __name__ == "__main__":
    main()
