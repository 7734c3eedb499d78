"""Flower's client, in a module of its own: Ray's workers import it and keep what it has loaded."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import Workload, load
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

client_app = ClientApp()


@lru_cache
def client_side(file: Path) -> tuple[Workload, Any, Any, Any]:
    """What a worker process keeps: the workload, its tensors, one net."""
    work = load(file)
    return work, *work.tensors(), work.started_net()


@client_app.train()
def train(message: Message, context: Context) -> Message:
    """One client's work."""
    config = message.content["config"]
    torch.set_num_threads(1)
    work, inputs, labels, net = client_side(Path(config["file"]))
    net.load_state_dict(message.content["arrays"].to_torch_state_dict())
    client = int(context.node_config["partition-id"])
    x, y = inputs[client], labels[client]
    optimiser = torch.optim.SGD(net.parameters(), lr=work.lr)
    steps = 0
    for _ in range(work.epochs):
        for rows in torch.randperm(len(y)).split(work.batch):
            optimiser.zero_grad()
            F.cross_entropy(net(x[rows]), y[rows]).backward()
            optimiser.step()
            steps += 1
    content = {
        "arrays": ArrayRecord(net.state_dict()),
        "metrics": MetricRecord({"num-examples": len(y), "steps": steps}),
    }
    return Message(content=RecordDict(content), reply_to=message)
