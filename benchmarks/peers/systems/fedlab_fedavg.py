"""FedLab: StandalonePipeline with the FedAvg handler and the serial SGD trainer."""

from __future__ import annotations

import logging
from importlib.metadata import version

import allow_torchvision  # noqa: F401
import torch
from common import Batches, Bench, StepCount, torch_logits
from fedlab.contrib.algorithm.fedavg import FedAvgSerialClientTrainer, FedAvgServerHandler
from fedlab.contrib.dataset.basic_dataset import FedDataset
from fedlab.core.standalone import StandalonePipeline

logging.disable(logging.CRITICAL)
bench = Bench("fedlab", f"fedlab {version('fedlab')}")
torch.set_num_threads(bench.threads)
work = bench.workload
count = StepCount()


class Clients(FedDataset):
    """The workload's clients."""

    def __init__(self) -> None:
        self.loaders = [Batches(x, y, work.batch) for x, y in zip(*work.tensors(), strict=True)]

    def get_dataloader(self, id: int, batch_size: int, mode: str = "train") -> Batches:
        """A client's batches."""
        return self.loaders[id]


class Handler(FedAvgServerHandler):
    """FedLab's server with the workload's cohorts."""

    def sample_clients(self) -> list[int]:
        """The clients of the round."""
        return work.cohort(self.round)


class Rounds(StandalonePipeline):
    """FedLab calls `evaluate` at the end of every round."""

    def evaluate(self) -> None:
        """Mark the end of the round."""
        bench.tick()
        if self.handler.round == bench.warmup:
            count.stop()


handler = Handler(work.started_net(), bench.total, work.per_round / work.clients)
trainer = FedAvgSerialClientTrainer(work.started_net(), work.clients)
trainer.setup_dataset(Clients())
trainer.setup_optim(work.epochs, work.batch, work.lr)
pipeline = Rounds(handler, trainer)
bench.tick()
pipeline.main()
bench.finish(
    torch_logits(handler.model, work),
    count.steps / bench.warmup / work.per_round,
    note="its FedAvg takes the unweighted mean",
)
