"""A tight PyTorch loop: one net, weights copied in, a running mean of what comes out."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from common import Bench, torch_logits

bench = Bench("loop", f"torch {torch.__version__}")
torch.set_num_threads(bench.threads)
work = bench.workload
net = work.started_net()
values = list(net.parameters())
server = [value.detach().clone() for value in values]
means = [torch.empty_like(value) for value in server]
inputs, labels = work.tensors()
steps = 0


def one_round(number: int) -> None:
    """FedAvg of the round's cohort."""
    global steps
    cohort = work.cohort(number)
    for position, (client, share) in enumerate(
        zip(cohort, work.shares(cohort).tolist(), strict=True)
    ):
        with torch.no_grad():
            for value, start in zip(values, server, strict=True):
                value.copy_(start)
        x, y = inputs[client], labels[client]
        for _ in range(work.epochs):
            for rows in torch.randperm(len(y)).split(work.batch):
                loss = F.cross_entropy(net(x[rows]), y[rows])
                gradients = torch.autograd.grad(loss, values)
                with torch.no_grad():
                    for value, gradient in zip(values, gradients, strict=True):
                        value.add_(gradient, alpha=-work.lr)
                steps += 1
        with torch.no_grad():
            for mean, value in zip(means, values, strict=True):
                if position == 0:
                    torch.mul(value, share, out=mean)
                else:
                    mean.add_(value, alpha=share)
    for start, mean in zip(server, means, strict=True):
        start.copy_(mean)


bench.play(one_round)
with torch.no_grad():
    for value, start in zip(values, server, strict=True):
        value.copy_(start)
bench.finish(torch_logits(net, work), steps / bench.total / work.per_round)
