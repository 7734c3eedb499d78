"""Small perceptrons as pure functions over named tensors, for actors and critics."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from tesserafl.core import seeds
from tesserafl.core.params import Params


def first_layers(name: str, sizes: Sequence[int], last: float, seed: int) -> Params:
    """Layers from sizes[0] inputs to sizes[-1] outputs, `NAME.0.matrix`, `NAME.0.shift`, ...

    Args:
        name: of the perceptron.
        sizes: of its inputs, hidden layers and outputs.
        last: factor on the last layer's matrix; small, so that all options begin as good as equal.
        seed: of the draw.
    """
    params: Params = {}
    for number, (inputs, outputs) in enumerate(pairwise(sizes)):
        draw = seeds.generator(seed, name, number, "layer")
        scale = last if number == len(sizes) - 2 else 1.0
        matrix = torch.randn(outputs, inputs, generator=draw)
        params[f"{name}.{number}.matrix"] = matrix * (scale / inputs**0.5)
        params[f"{name}.{number}.shift"] = torch.zeros(outputs)
    return params


def through(params: Params, name: str, inputs: Tensor) -> Tensor:
    """The perceptron's outputs [..., outputs] for inputs [..., inputs]; tanh between its layers."""
    number = 0
    while f"{name}.{number}.matrix" in params:
        if number:
            inputs = torch.tanh(inputs)
        layer = f"{name}.{number}"
        inputs = F.linear(inputs, params[f"{layer}.matrix"], params[f"{layer}.shift"])
        number += 1
    return inputs
