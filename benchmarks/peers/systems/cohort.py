"""A cohort trained at once in PyTorch: what the vmap, bmm and compiled variants share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from common import Bench, torch_logits

Params = dict[str, torch.Tensor]
Train = Callable[[Params, Any, Any, Any], Params]


def measure(bench: Bench, train: Train, note: str = "") -> None:
    """Play rounds in which `train` does all the clients' work.

    Args:
        bench: the measurement.
        train: (stacked weights [clients, ...], inputs [clients, steps, batch, ...], labels and
            weights of the examples [clients, steps, batch]) -> trained stacked weights.
        note: what a reader of the table must know.
    """
    torch.set_num_threads(bench.threads)
    work = bench.workload
    x_all, y_all = (torch.from_numpy(array) for array in work.padded)
    server = {name: torch.from_numpy(value.copy()) for name, value in work.init.items()}
    draw = np.random.default_rng(0)
    seen: list[int] = []

    def one_round(number: int) -> None:
        nonlocal server
        cohort = work.cohort(number)
        rows, weights = (torch.from_numpy(array) for array in work.batches(cohort, draw))
        clients = torch.tensor(cohort)[:, None, None]
        with torch.no_grad():
            stacked = {
                name: value.expand(len(cohort), *value.shape) for name, value in server.items()
            }
            trained = train(stacked, x_all[clients, rows], y_all[clients, rows], weights)
            shares = torch.from_numpy(work.shares(cohort))
            server = {name: torch.tensordot(shares, value, 1) for name, value in trained.items()}
        seen.append(rows.shape[1])

    bench.play(one_round)
    net = work.net()
    net.load_state_dict(server)
    bench.finish(torch_logits(net, work), sum(seen) / len(seen), note)
