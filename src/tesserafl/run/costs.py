"""What clients' tasks cost in one experiment, and how much of a model a client can train."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch

from tesserafl.core.errors import CapacityError
from tesserafl.core.messages import Client, Task
from tesserafl.core.model import Model
from tesserafl.core.submodel import SubModel
from tesserafl.data.examples import FederatedData
from tesserafl.engines.batches import num_seen
from tesserafl.models.costs import Costs, costs_of
from tesserafl.run.experiment import Experiment


@dataclass(kw_only=True)
class CostTable:
    """Costs of tasks, counted once per shape."""

    experiment: Experiment
    model: Model
    data: FederatedData
    _known: dict[object, Costs] = field(default_factory=dict)

    def of(self, task: Task) -> Costs:
        """Costs of one training step of this task on a full batch."""
        return self.of_part(task.submodel, task.trainable)

    def of_part(self, submodel: SubModel, trainable: frozenset[str] | None) -> Costs:
        """Costs of one training step on a full batch, where only these names are trained."""
        key = (submodel.shape, trainable)
        if key not in self._known:
            training, train = self.experiment.training, self.data.clients[0].train
            rows = torch.arange(training.batch_size) % len(train)
            costs = costs_of(self.model, submodel, training, *train.batch(rows), trainable)
            # Frozen sub-models that the method's loss looks at lie beside the one that is trained.
            beside = getattr(self.experiment.method, "num_references", 0)
            peak = costs.peak_bytes + beside * costs.bytes_each_way
            self._known[key] = replace(costs, peak_bytes=peak)
        return self._known[key]

    @property
    def largest_client(self) -> int:
        """Parameters of the largest sub-model seen so far."""
        return max((costs.num_entries for costs in self._known.values()), default=0)


def with_depth(client: Client, costs: CostTable) -> Client:
    """The client, with the most blocks whose adapters it can train in its memory and its time.

    Only for methods that choose how many: those with `trained_in(model, blocks)`, which names what
    is trained with so many active blocks; their `caps` count too.

    Raises:
        CapacityError: not even those of one block.
    """
    experiment, model = costs.experiment, costs.model
    trained_in = getattr(experiment.method, "trained_in", None)
    gflops, seconds = experiment.client_gflops, experiment.client_seconds
    most = max((d.blocks for d in model.depths.values() if d.last is not None), default=0)
    if trained_in is None or not most:
        return replace(client, depth=None)
    caps = getattr(experiment.method, "caps", ())
    least = min(most, caps[client.id % len(caps)]) if caps else most
    if client.memory_bytes is None and seconds is None:
        return replace(client, depth=least if caps else None)
    looked_at = getattr(experiment.method, "num_references", 0)
    for blocks in range(least, 0, -1):
        cost = costs.of_part(model.whole(), trained_in(model, blocks))
        trained = num_seen(client.num_examples, experiment.training) * cost.flops_per_example
        seen = client.num_examples * looked_at
        work = trained + seen * cost.forward_flops_per_example
        if client.memory_bytes is not None and cost.peak_bytes > client.memory_bytes:
            continue
        if seconds is None or work <= seconds * 1e9 * gflops[client.id % len(gflops)]:
            return replace(client, depth=blocks)
    raise CapacityError(
        f"client {client.id} can train not even the adapters of one block: that takes "
        f"{cost.peak_bytes / 2**20:.2f} MiB and {work / 1e9:.3g} GFLOP a round; raise "
        f"client_memory_mib or client_seconds, or lower training.batch_size"
    )
