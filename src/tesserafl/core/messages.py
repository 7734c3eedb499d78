"""What goes down to a client and what comes up: tensors and JSON, never pickle.

A message is one safetensors buffer. Its tensors carry the group they belong to in their name, and
its header carries the JSON. Decoding validates before anything is used.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from tesserafl.core.errors import ConfigError, MessageError
from tesserafl.core.fit import Training
from tesserafl.core.params import Params, num_bytes
from tesserafl.core.submodel import Index, SubModel, View

Options = Mapping[str, Any]
"""Plain JSON values."""

Memory = dict[str, Tensor]
"""What a client keeps on its own device between rounds."""


@dataclass(frozen=True, kw_only=True)
class Client:
    """What the server knows of a device."""

    id: int
    """0, 1, 2, ..."""
    num_examples: int
    """training examples that the client says it has"""
    memory_bytes: int | None = None
    """what training may take at its peak; None: unlimited"""


@dataclass(frozen=True, kw_only=True)
class Task:
    """One client's part of one round."""

    round: int
    client: Client
    submodel: SubModel
    params: Params
    """The sub-model's parameters, cut from the global model."""
    training: Training
    extra: Params = field(default_factory=dict)
    """Further tensors that the method sends."""
    options: Options = field(default_factory=dict)
    """Further values that the method sends."""

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensors that go down."""
        return num_bytes(self.params) + num_bytes(self.extra)


@dataclass(frozen=True, kw_only=True)
class Update:
    """What a client answers."""

    round: int
    client: int
    submodel: SubModel
    """Where the deltas lie; may hold fewer rows than the task's."""
    delta: Params
    """Trained minus received parameters."""
    num_examples: int
    num_steps: int
    metrics: Mapping[str, float]
    extra: Params = field(default_factory=dict)
    """Further tensors that the method reports."""

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensors that come up."""
        return num_bytes(self.delta) + num_bytes(self.extra)


def pack(header: Mapping[str, Any], groups: Mapping[str, Params]) -> bytes:
    """One safetensors buffer with JSON in its header; `groups` are told apart by name."""
    tensors = {
        f"{group}/{name}": tensor.detach().contiguous()
        for group, params in groups.items()
        for name, tensor in params.items()
    }
    body = json.dumps({"groups": list(groups), **header}, allow_nan=True)
    return save(tensors, metadata={"tessera": body})


def unpack(data: bytes) -> tuple[dict[str, Any], dict[str, Params]]:
    """The JSON and the tensor groups of a buffer.

    Raises:
        MessageError: the bytes are not a message of ours.
    """
    try:
        length = int.from_bytes(data[:8], "little")
        if length > len(data) - 8:
            raise ValueError("its header is longer than the message")
        header = json.loads(data[8 : 8 + length])
        body = json.loads(header["__metadata__"]["tessera"])
        groups: dict[str, Params] = {str(group): {} for group in body.pop("groups")}
        for key, tensor in load(data).items():
            group, _, name = key.partition("/")
            groups[group][name] = tensor
    except (ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise MessageError(f"{len(data)} bytes are not a TesseraFL message: {error}") from error
    return body, groups


def encode_task(task: Task, memory: Memory) -> bytes:
    """A task with the client's memory, for an engine whose clients are other processes."""
    header = {
        "round": task.round,
        "client": asdict(task.client),
        "submodel": _submodel_to_json(task.submodel),
        "training": asdict(task.training),
        "options": dict(task.options),
    }
    return pack(header, {"params": task.params, "extra": task.extra, "memory": memory})


def decode_task(data: bytes) -> tuple[Task, Memory]:
    """The inverse of `encode_task`; raises MessageError."""
    header, groups = unpack(data)
    try:
        task = Task(
            round=int(header["round"]),
            client=Client(**header["client"]),
            submodel=_submodel_from_json(header["submodel"]),
            params=groups["params"],
            training=Training(**header["training"]),
            extra=groups["extra"],
            options=header["options"],
        )
    except (KeyError, TypeError, ConfigError) as error:
        raise MessageError(f"a task message is incomplete or wrong: {error!r}") from error
    return task, groups["memory"]


def encode_update(update: Update, memory: Memory) -> bytes:
    """An update with the client's new memory."""
    header = {
        "round": update.round,
        "client": update.client,
        "submodel": _submodel_to_json(update.submodel),
        "num_examples": update.num_examples,
        "num_steps": update.num_steps,
        "metrics": dict(update.metrics),
    }
    return pack(header, {"delta": update.delta, "extra": update.extra, "memory": memory})


def decode_update(data: bytes) -> tuple[Update, Memory]:
    """The inverse of `encode_update`; raises MessageError."""
    header, groups = unpack(data)
    try:
        update = Update(
            round=int(header["round"]),
            client=int(header["client"]),
            submodel=_submodel_from_json(header["submodel"]),
            delta=groups["delta"],
            num_examples=int(header["num_examples"]),
            num_steps=int(header["num_steps"]),
            metrics={str(k): float(v) for k, v in header["metrics"].items()},
            extra=groups["extra"],
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise MessageError(f"an update message is incomplete or wrong: {error!r}") from error
    return update, groups["memory"]


def _submodel_to_json(submodel: SubModel) -> dict[str, Any]:
    # Many views share an index list: each is written once and referred to by its number.
    lists: list[list[int]] = []
    numbers: dict[bytes, int] = {}

    def written(index: Index) -> list[int] | int:
        if isinstance(index, slice):
            return [index.start, index.stop]
        key = index.numpy().tobytes()
        if key not in numbers:
            numbers[key] = len(lists)
            lists.append(index.tolist())
        return numbers[key]

    views = {
        name: [view.name, [written(index) for index in view.index]]
        for name, view in submodel.views.items()
    }
    return {"sizes": dict(submodel.sizes), "views": views, "lists": lists}


def _submodel_from_json(data: Mapping[str, Any]) -> SubModel:
    try:
        lists = [torch.tensor(entries, dtype=torch.int64) for entries in data["lists"]]
        views = {}
        for small, (large, written) in data["views"].items():
            index = tuple(
                lists[item] if isinstance(item, int) else slice(int(item[0]), int(item[1]))
                for item in written
            )
            views[str(small)] = View(str(large), index)
        return SubModel({str(k): int(v) for k, v in data["sizes"].items()}, views)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise MessageError(f"a sub-model description is wrong: {error!r}") from error
