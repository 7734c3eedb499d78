"""Bare forward, backward and step of eager PyTorch: no shuffling, no copies, no averaging.

What no system that trains client after client in eager PyTorch can go below.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from common import Bench

bench = Bench("floor", f"torch {torch.__version__}")
torch.set_num_threads(bench.threads)
work = bench.workload
net = work.started_net()
weights = list(net.parameters())
batches = [
    list(zip(x.split(work.batch), y.split(work.batch), strict=True))
    for x, y in zip(*work.tensors(), strict=True)
]
steps = 0


def one_round(number: int) -> None:
    """Train the cohort's batches on one net, again and again."""
    global steps
    for client in work.cohort(number):
        for _ in range(work.epochs):
            for inputs, labels in batches[client]:
                loss = F.cross_entropy(net(inputs), labels)
                gradients = torch.autograd.grad(loss, weights)
                with torch.no_grad():
                    for value, gradient in zip(weights, gradients, strict=True):
                        value.add_(gradient, alpha=-work.lr)
                steps += 1


bench.play(one_round)
bench.finish(steps=steps / bench.total / work.per_round, note="no federated learning: a bound")
