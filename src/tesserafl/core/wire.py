"""Messages as bytes: tensors and JSON, never pickle.

A message is one safetensors buffer. Its tensors carry the group they belong to in their name, its
header carries the JSON. Everything is validated before anything is used; whatever is wrong with the
bytes is a MessageError.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Annotated, Any, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load, save

from tesserafl.core.errors import ConfigError, MessageError
from tesserafl.core.fit import Training
from tesserafl.core.messages import Client, Memory, Task, Update
from tesserafl.core.params import Params
from tesserafl.core.submodel import Index, SubModel, View

_Natural = Annotated[int, Field(ge=0, lt=1 << 62)]
_Entries = Annotated[list[_Natural], Field(min_length=1)]
_Slice = Annotated[list[_Natural], Field(min_length=2, max_length=2)]


# JSON has lists where we have pairs.
_View = Annotated[tuple[str, list[_Slice | _Natural]], Field(strict=False)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class _SubModel(_Strict):
    sizes: dict[str, _Natural]
    lists: list[_Entries]
    views: dict[str, _View]


class _Client(_Strict):
    id: _Natural
    num_examples: _Natural
    memory_bytes: _Natural | None
    depth: _Natural | None = None
    mixing: _Natural = 1


class _Task(_Strict):
    round: _Natural
    client: _Client
    submodel: _SubModel
    training: dict[str, Any]
    trainable: list[str] | None = None
    options: dict[str, Any]


class _Update(_Strict):
    round: _Natural
    client: _Natural
    submodel: _SubModel
    num_examples: _Natural
    num_steps: _Natural
    metrics: dict[str, float]


def pack(header: Mapping[str, Any], groups: Mapping[str, Params]) -> bytes:
    """One safetensors buffer with JSON in its header; `groups` are told apart by name."""
    seen: set[int] = set()
    tensors = {}
    for group, params in groups.items():
        for name, tensor in params.items():
            plain = tensor.detach().contiguous()
            if plain.untyped_storage().data_ptr() in seen:
                plain = plain.clone()  # safetensors refuses two names for one storage
            seen.add(plain.untyped_storage().data_ptr())
            tensors[f"{group}/{name}"] = plain
    # With their order: safetensors has one of its own, and a gradient norm depends on it.
    names = {group: list(params) for group, params in groups.items()}
    return save(tensors, metadata={"tessera": json.dumps({"groups": names, **header})})


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
        tensors = load(data)
        groups: dict[str, Params] = {
            str(group): {str(name): tensors.pop(f"{group}/{name}") for name in names}
            for group, names in body.pop("groups").items()
        }
        if tensors:
            raise ValueError(f"it holds tensors of no group: {', '.join(sorted(tensors))}")
    except (
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        RecursionError,
        OverflowError,
        SafetensorError,
    ) as error:
        raise MessageError(f"{len(data)} bytes are not a TesseraFL message: {error}") from error
    return body, groups


Parts = tuple[dict[str, Any], dict[str, Params]]
"""A message taken apart: plain JSON values, and groups of tensors."""


def encode_task(task: Task, memory: Memory) -> bytes:
    """A task with the client's memory, for an engine whose clients are other processes."""
    return pack(*task_parts(task, memory))


def task_parts(task: Task, memory: Memory) -> Parts:
    """What `encode_task` packs."""
    header = {
        "round": task.round,
        "client": asdict(task.client),
        "submodel": _submodel_to_json(task.submodel),
        "training": asdict(task.training),
        "trainable": None if task.trainable is None else sorted(task.trainable),
        "options": dict(task.options),
    }
    return header, {"params": task.params, "extra": dict(task.extra), "memory": memory}


def decode_task(data: bytes) -> tuple[Task, Memory]:
    """The inverse of `encode_task`; raises MessageError."""
    return task_of(*unpack(data))


def task_of(body: dict[str, Any], groups: dict[str, Params]) -> tuple[Task, Memory]:
    """The inverse of `task_parts`; raises MessageError."""
    header = _validated(_Task, body)
    try:
        training = Training(**header.training)
    except (TypeError, ConfigError) as error:
        raise MessageError(f"a task's training settings are wrong: {error}") from error
    task = Task(
        round=header.round,
        client=Client(**header.client.model_dump()),
        submodel=_submodel_from_json(header.submodel),
        params=_group(groups, "params"),
        training=training,
        trainable=None if header.trainable is None else frozenset(header.trainable),
        extra=_group(groups, "extra"),
        options=header.options,
    )
    return task, _group(groups, "memory")


def encode_update(update: Update, memory: Memory) -> bytes:
    """An update with the client's new memory."""
    return pack(*update_parts(update, memory))


def update_parts(update: Update, memory: Memory) -> Parts:
    """What `encode_update` packs."""
    header = {
        "round": update.round,
        "client": update.client,
        "submodel": _submodel_to_json(update.submodel),
        "num_examples": update.num_examples,
        "num_steps": update.num_steps,
        "metrics": dict(update.metrics),
    }
    return header, {"delta": update.delta, "extra": dict(update.extra), "memory": memory}


def decode_update(data: bytes) -> tuple[Update, Memory]:
    """The inverse of `encode_update`; raises MessageError."""
    return update_of(*unpack(data))


def update_of(body: dict[str, Any], groups: dict[str, Params]) -> tuple[Update, Memory]:
    """The inverse of `update_parts`; raises MessageError."""
    header = _validated(_Update, body)
    update = Update(
        round=header.round,
        client=header.client,
        submodel=_submodel_from_json(header.submodel),
        delta=_group(groups, "delta"),
        num_examples=header.num_examples,
        num_steps=header.num_steps,
        metrics=header.metrics,
        extra=_group(groups, "extra"),
    )
    return update, _group(groups, "memory")


_Header = TypeVar("_Header", bound=BaseModel)


def _validated(kind: type[_Header], body: dict[str, Any]) -> _Header:
    try:
        return kind.model_validate(body)
    except (ValidationError, RecursionError) as error:
        raise MessageError(f"a message's header is wrong: {error}") from error


def _group(groups: Mapping[str, Params], name: str) -> Params:
    if name not in groups:
        raise MessageError(f"a message lacks its tensors {name!r}; it has {', '.join(groups)}")
    return groups[name]


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


def _submodel_from_json(data: _SubModel) -> SubModel:
    lists = [torch.tensor(entries, dtype=torch.int64) for entries in data.lists]
    views = {}
    for small, (large, written) in data.views.items():
        index: list[Index] = []
        for item in written:
            if isinstance(item, int):
                if item >= len(lists):
                    raise MessageError(
                        f"sub-model entry {small!r} refers to list {item} of {len(lists)}"
                    )
                index.append(lists[item])
            elif item[0] > item[1]:
                raise MessageError(
                    f"sub-model entry {small!r} has a slice {item} that runs backwards"
                )
            else:
                index.append(slice(item[0], item[1]))
        views[small] = View(large, tuple(index))
    return SubModel(data.sizes, views)
