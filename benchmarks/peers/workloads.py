"""The workloads, written as .npz files so that every system reads the same bytes.

    python benchmarks/peers/workloads.py FOLDER [mlp cnn big]

| name | data of a client                  | net                                        | steps |
|------|-----------------------------------|--------------------------------------------|-------|
| mlp  | 17-18 scikit-learn digits         | 64-200-10                                  | 5     |
| cnn  | 96 synthetic 1 x 28 x 28 images   | conv 5x5 16, pool, conv 5x5 32, pool, 10   | 15    |
| big  | 32 synthetic vectors of 784       | 784-2560-2560-10 (8.6 M parameters)        | 1     |

All: 100 clients, 10 a round, SGD without momentum, lr 0.05, batches of 32. A file also holds the
weights to start from: with equal clients in equal order, what two systems train can be compared.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import numpy as np

Arrays = dict[str, Any]

CLIENTS, PER_ROUND, BATCH, LR = 100, 10, 32, 0.05

# Parameters by the names of torch's nn.Sequential, in its layout: outputs first.
SHAPES: dict[str, dict[str, tuple[int, ...]]] = {
    "mlp": {"0.weight": (200, 64), "0.bias": (200,), "2.weight": (10, 200), "2.bias": (10,)},
    "cnn": {
        "0.weight": (16, 1, 5, 5),
        "0.bias": (16,),
        "3.weight": (32, 16, 5, 5),
        "3.bias": (32,),
        "7.weight": (10, 32 * 7 * 7),
        "7.bias": (10,),
    },
    "big": {
        "0.weight": (2560, 784),
        "0.bias": (2560,),
        "2.weight": (2560, 2560),
        "2.bias": (2560,),
        "4.weight": (10, 2560),
        "4.bias": (10,),
    },
}
EPOCHS = {"mlp": 5, "cnn": 5, "big": 1}


def write(name: str, folder: Path) -> Path:
    """Write a workload's file and return its path."""
    draw = np.random.default_rng(7)
    x, y, sizes = _digits(draw) if name == "mlp" else _synthetic(name, draw)
    path = folder / f"{name}.npz"
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(
        path,
        name=name,
        x=x,  # float32 [n, ...], client after client
        y=y,  # int64 [n]
        sizes=sizes,  # int64 [clients]
        epochs=EPOCHS[name],
        batch=BATCH,
        lr=LR,
        per_round=PER_ROUND,
        **{f"init/{key}": value for key, value in _init(SHAPES[name], draw).items()},
    )
    return path


def _digits(draw: np.random.Generator) -> tuple[Any, Any, Any]:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    order = draw.permutation(len(bunch.target))
    x = (bunch.data[order] / 8.0 - 1.0).astype(np.float32)
    sizes = np.array([len(part) for part in np.array_split(order, CLIENTS)])
    return x, bunch.target[order].astype(np.int64), sizes


def _synthetic(name: str, draw: np.random.Generator) -> tuple[Any, Any, Any]:
    """A prototype of each class plus noise: with random labels nothing would be learned."""
    shape, each = ((1, 28, 28), 96) if name == "cnn" else ((784,), 32)
    y = draw.integers(0, 10, CLIENTS * each)
    prototypes = draw.standard_normal((10, *shape), dtype=np.float32)
    x = 0.3 * prototypes[y] + draw.standard_normal((len(y), *shape), dtype=np.float32)
    return x, y.astype(np.int64), np.full(CLIENTS, each)


def _init(shapes: dict[str, tuple[int, ...]], draw: np.random.Generator) -> Arrays:
    """Uniform within 1/sqrt(fan-in), as torch initialises linear and convolutional layers."""
    values: Arrays = {}
    for name, shape in shapes.items():
        fan_in = math.prod(shapes[name.replace("bias", "weight")][1:])
        values[name] = draw.uniform(-1, 1, shape).astype(np.float32) / np.float32(fan_in**0.5)
    return values


def main() -> None:
    """Write the named workloads."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("folder", type=Path)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(SHAPES)}")
    options = parser.parse_args()
    for name in options.names or SHAPES:
        print(write(name, options.folder))


if __name__ == "__main__":
    main()
