"""pfl-research: FederatedAveraging on its SimulatedBackend, one process."""

from __future__ import annotations

import itertools
from importlib.metadata import version
from typing import Any

import torch
import torch.nn.functional as F
from common import Bench, StepCount, torch_logits
from pfl.aggregate.simulate import SimulatedBackend
from pfl.aggregate.weighting import WeightByDatapoints
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.dataset import Dataset
from pfl.data.federated_dataset import FederatedDataset
from pfl.hyperparam.base import NNTrainHyperParams
from pfl.metrics import Metrics
from pfl.model.pytorch import PyTorchModel

bench = Bench("pfl_research", f"pfl {version('pfl')}")
torch.set_num_threads(bench.threads)
work = bench.workload
count = StepCount()


class Net(torch.nn.Module):
    """The workload's net with the two functions that pfl asks for."""

    def __init__(self) -> None:
        super().__init__()
        self.net = work.started_net()

    def forward(self, x: Any) -> Any:
        """Logits."""
        return self.net(x)

    def loss(self, x: Any, y: Any, **_: object) -> Any:
        """Mean cross-entropy."""
        return F.cross_entropy(self(x), y)

    def metrics(self, x: Any, y: Any, **_: object) -> dict[str, Any]:
        """Nothing is evaluated."""
        return {}


class Rounds(TrainingProcessCallback):
    """Marks the ends of rounds."""

    def on_train_begin(self, *, model: Any) -> Metrics:
        """The first round begins."""
        bench.tick()
        return Metrics()

    def after_central_iteration(
        self, aggregate_metrics: Any, model: Any, *, central_iteration: int
    ) -> tuple[bool, Metrics]:
        """A round is over; the steps of the warm-up were counted."""
        bench.tick()
        if central_iteration + 1 == bench.warmup:
            count.stop()
        return False, Metrics()


# Datasets are made once: pfl keeps a dataset's batches, and it does not shuffle.
datasets = [
    Dataset([x, y], user_id=str(client))
    for client, (x, y) in enumerate(zip(*work.tensors()))  # noqa: B905
]
order = itertools.chain.from_iterable(work.cohort(number) for number in itertools.count())
backend = SimulatedBackend(
    training_data=FederatedDataset(datasets.__getitem__, lambda: next(order)),
    val_data=FederatedDataset(datasets.__getitem__, lambda: 0),
    postprocessors=[WeightByDatapoints()],
)
net = Net()
model = PyTorchModel(
    model=net,
    local_optimizer_create=torch.optim.SGD,
    central_optimizer=torch.optim.SGD(net.parameters(), lr=1.0),
)
FederatedAveraging().run(
    algorithm_params=NNAlgorithmParams(
        central_num_iterations=bench.total,
        evaluation_frequency=bench.total + 1,  # round 0 is always evaluated: it is warm-up
        train_cohort_size=work.per_round,
        val_cohort_size=0,
    ),
    backend=backend,
    model=model,
    model_train_params=NNTrainHyperParams(
        local_num_epochs=work.epochs, local_learning_rate=work.lr, local_batch_size=work.batch
    ),
    callbacks=[Rounds()],
    send_metrics_to_platform=False,
)
bench.finish(
    torch_logits(net.net, work),
    # Each round's one step more is the server's.
    (count.steps / bench.warmup - 1) / work.per_round,
    note="does not shuffle; keeps each client's batches",
)
