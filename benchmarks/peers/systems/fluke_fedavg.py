"""fluke: its CentralizedFL with the plain server and client, nothing evaluated."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import allow_torchvision  # noqa: F401
import torch
from common import Bench, StepCount, torch_logits
from fluke import DDict, FlukeENV
from fluke.algorithms import CentralizedFL
from fluke.client import Client
from fluke.config import OptimizerConfigurator
from fluke.data import FastDataLoader
from fluke.server import Server
from fluke.utils import FederationObserver

bench = Bench("fluke", f"fluke {version('fluke-fl')}")
torch.set_num_threads(bench.threads)
work = bench.workload
count = StepCount()
env = FlukeENV()
env.set_device("cpu")
env.set_inmemory(True)
env.set_eval_cfg(locals=False, server=False, pre_fit=False, post_fit=False)


class ToldServer(Server):
    """fluke's server with the workload's cohorts."""

    number = 0

    def get_eligible_clients(self, eligible_perc: float) -> list[Client]:
        """The clients of the round."""
        self.number += 1
        return [self.clients[client] for client in work.cohort(self.number - 1)]


class Rounds(FederationObserver):
    """Marks the ends of rounds."""

    def end_round(self, round: int) -> None:
        """Rounds count from 1."""
        bench.tick()
        if round == bench.warmup:
            count.stop()
        if round == bench.total:
            self.logits: Any = torch_logits(server.model, work)


clients = [
    Client(
        index=client,
        train_set=FastDataLoader(x, y, num_labels=10, batch_size=work.batch, shuffle=True),
        test_set=None,
        optimizer_cfg=OptimizerConfigurator(DDict(name="SGD", lr=work.lr)),
        loss_fn=torch.nn.CrossEntropyLoss(),
        local_epochs=work.epochs,
        # Clients of FedAvg keep nothing: by default each would keep its own model for good.
        persistency=False,
    )
    for client, (x, y) in enumerate(zip(*work.tensors(), strict=True))
]
server = ToldServer(work.started_net(), None, clients, weighted=True)
federation = CentralizedFL(work.clients, None, {}, clients=clients, server=server)
observer = Rounds()
federation.set_callbacks(observer)
bench.tick()
federation.run(bench.total, work.per_round / work.clients, finalize=False)
bench.finish(observer.logits, count.steps / bench.warmup / work.per_round)
