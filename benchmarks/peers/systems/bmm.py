"""The perceptron's forward and backward pass as batched matrix products, written by hand."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from cohort import Params, measure
from common import Bench

bench = Bench("bmm", f"torch {torch.__version__}")
lr = bench.workload.lr


def train(params: Params, x: Any, y: Any, weights: Any) -> Params:
    """All steps of all clients; the weights [clients, out, in] are changed in place."""
    w1, b1, w2, b2 = (value.clone() for value in params.values())
    targets = F.one_hot(y, w2.shape[1]).to(x.dtype)  # [clients, steps, batch, classes]
    for step in range(x.shape[1]):
        inputs = x[:, step]
        hidden = torch.baddbmm(b1[:, None], inputs, w1.mT).relu_()
        slope = torch.baddbmm(b2[:, None], hidden, w2.mT).softmax(-1)
        slope.sub_(targets[:, step]).mul_(weights[:, step, :, None])
        below = torch.bmm(slope, w2).mul_(hidden > 0)
        w2.baddbmm_(slope.mT, hidden, alpha=-lr)
        b2.sub_(slope.sum(1), alpha=lr)
        w1.baddbmm_(below.mT, inputs, alpha=-lr)
        b1.sub_(below.sum(1), alpha=lr)
    return dict(zip(params, (w1, b1, w2, b2), strict=True))


measure(bench, train)
