"""torch.func.vmap of a client's gradient over the cohort, eager."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from cohort import Params, measure
from common import Bench
from torch.func import functional_call, grad, vmap

bench = Bench("vmap", f"torch {torch.__version__}")
net = bench.workload.net()


def loss_of(params: Params, x: Any, y: Any, weights: Any) -> Any:
    """Mean cross-entropy over the examples that are real."""
    return (
        F.cross_entropy(functional_call(net, params, (x,)), y, reduction="none") * weights
    ).sum()


slopes_of = vmap(grad(loss_of))


def train(params: Params, x: Any, y: Any, weights: Any) -> Params:
    """All steps of all clients."""
    for step in range(x.shape[1]):
        slopes = slopes_of(params, x[:, step], y[:, step], weights[:, step])
        params = {
            name: torch.sub(value, slopes[name], alpha=bench.workload.lr)
            for name, value in params.items()
        }
    return params


measure(bench, train)
