"""What flgo asks of a benchmark: a generator, a pipe and a calculator."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from common import Batches, load
from flgo.benchmark.toolkits.cv.classification import (
    FromDatasetGenerator,
    FromDatasetPipe,
    GeneralCalculator,
)
from torch.utils.data import TensorDataset

work = load(Path(sys.argv[1]))
train_data = TensorDataset(torch.from_numpy(work.arrays["x"]), torch.from_numpy(work.arrays["y"]))
test_data = TensorDataset(*(torch.from_numpy(array[:10]) for array in work.check_set))


class TaskGenerator(FromDatasetGenerator):
    """Hands the data to flgo's partitioner."""

    def __init__(self) -> None:
        super().__init__("flgo_benchmark", train_data=train_data, test_data=test_data)


class TaskPipe(FromDatasetPipe):
    """Hands the data to flgo's clients."""

    class TaskDataset(FromDatasetPipe.TaskDataset):
        """A client's rows, with what later PyTorch asks of a subset."""

        def __getitems__(self, rows: list[int]) -> list[Any]:
            return [self[row] for row in rows]

    def __init__(self, task_path: str) -> None:
        super().__init__(task_path, train_data=train_data, test_data=test_data)


class TaskCalculator(GeneralCalculator):
    """flgo's classifier; its DataLoader would fetch example by example."""

    def get_dataloader(self, dataset: Any, batch_size: int = 64, **_: object) -> Batches:
        """A client's batches."""
        rows = torch.tensor(dataset.indices)
        x, y = train_data.tensors
        return Batches(x[rows], y[rows], int(batch_size))
