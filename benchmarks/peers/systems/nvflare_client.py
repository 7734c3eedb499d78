"""NVFlare's client: one of ten sites, which plays one client of each round's cohort.

The first site also notes when each round begins: the simulator tells nobody when one ends.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import nvflare.client as flare
import torch
import torch.nn.functional as F
from common import cpu_seconds, load, peak_bytes, torch_logits


class Net(torch.nn.Sequential):
    """The workload's net with its starting weights, as NVFlare's server builds it."""

    def __init__(self, file: str) -> None:
        super().__init__(*load(Path(file)).started_net())
        self.file = file


def main(file: str, marks: str, root: int) -> None:
    """Train whatever arrives until nothing does."""
    torch.set_num_threads(1)
    work = load(Path(file))
    inputs, labels = work.tensors()
    net = work.started_net()
    flare.init()
    seat = int(flare.get_site_name().rpartition("-")[2]) - 1
    number = steps = 0
    while flare.is_running():
        message = flare.receive()
        if message is None:
            break
        net.load_state_dict({k: torch.as_tensor(v) for k, v in message.params.items()})
        if seat == 0:
            line = {
                "wall": time.perf_counter(),
                "cpu": cpu_seconds(root),
                "peak": peak_bytes(root),
                "steps": steps,
                "logits": torch_logits(net, work).tolist(),
            }
            with Path(marks).open("a") as out:
                out.write(json.dumps(line) + "\n")
        net.train()
        x, y = (values[work.cohort(number)[seat]] for values in (inputs, labels))
        optimiser = torch.optim.SGD(net.parameters(), lr=work.lr)
        steps = 0
        for _ in range(work.epochs):
            for rows in torch.randperm(len(y)).split(work.batch):
                optimiser.zero_grad()
                F.cross_entropy(net(x[rows]), y[rows]).backward()
                optimiser.step()
                steps += 1
        number += 1
        flare.send(
            flare.FLModel(
                params=net.state_dict(),
                # NVFlare weighs by the steps: these make it the examples.
                meta={"NUM_STEPS_CURRENT_ROUND": len(y)},
            )
        )


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
