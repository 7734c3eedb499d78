"""flgo: its FedAvg server and client, nothing evaluated."""

from __future__ import annotations

import contextlib
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import allow_torchvision  # noqa: F401
import flgo
import flgo_benchmark
import flgo_benchmark.core
import torch
from common import Bench, StepCount, torch_logits
from flgo.algorithm import fedavg
from flgo.benchmark.partition import BasicPartitioner
from flgo.experiment.logger import BasicLogger

bench = Bench("flgo", f"flgo {version('flgo')}")
torch.set_num_threads(bench.threads)
work = bench.workload
count = StepCount()

sys.argv = sys.argv[:1]  # flgo reads options from the command line too


class Given(BasicPartitioner):
    """The workload's own split: client after client."""

    num_clients = work.clients

    def __str__(self) -> str:
        return "given"

    def __call__(self, data: Any) -> list[list[int]]:
        """Rows of each client."""
        rows = iter(range(len(data)))
        return [[next(rows) for _ in range(size)] for size in work.sizes]


class Quiet(BasicLogger):
    """Writes and evaluates nothing."""

    def log_once(self, *_: object, **__: object) -> None:
        """Nothing."""

    def save_output_as_json(self, *_: object, **__: object) -> None:
        """Nothing."""


class ToldFedAvg:
    """flgo's FedAvg with the workload's cohorts."""

    class Server(fedavg.Server):
        """Marks the ends of rounds."""

        def sample(self) -> list[int]:
            """The clients of the round; rounds count from 1."""
            return work.cohort(self.current_round - 1)

        def iterate(self) -> Any:
            """One round."""
            updated = super().iterate()
            bench.tick()
            if self.current_round == bench.warmup:
                count.stop()
            return updated

    Client = fedavg.Client


with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
    task = str(Path(folder) / "task")
    flgo.gen_task_by_(flgo_benchmark, Given(), task)
    runner = flgo.init(
        task,
        ToldFedAvg,
        {
            "num_rounds": bench.total,
            "proportion": work.per_round / work.clients,
            "num_epochs": work.epochs,
            "batch_size": work.batch,
            "learning_rate": work.lr,
            "train_holdout": 0.0,
            "eval_interval": -1,
            "no_log_console": True,
            "no_tqdm": True,
            "torch_num_threads": bench.threads,
            "log_level": "CRITICAL",
        },
        model=flgo.convert_model(lambda: work.started_net(), "net"),
        Logger=Quiet,
    )
    bench.tick()
    runner.run()
bench.finish(torch_logits(runner.model, work), count.steps / bench.warmup / work.per_round)
