"""Messages as bytes: tensors and JSON, never pickle.

A message is one safetensors buffer. Its tensors carry the group they belong to in their name, its
header carries the JSON. Everything is validated before anything is used; whatever is wrong with the
bytes is a MessageError.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tesserafl.core.answers import check_part, most_header_bytes
from tesserafl.core.buffers import pack as pack
from tesserafl.core.buffers import shown
from tesserafl.core.buffers import unpack as unpack
from tesserafl.core.coding import Coding, coded_groups, decoded
from tesserafl.core.errors import ConfigError, MessageError
from tesserafl.core.fit import Training
from tesserafl.core.messages import Client, Memory, Task, Update, Wanted
from tesserafl.core.params import Params
from tesserafl.core.places import PartHeader, part_from_json, part_to_json
from tesserafl.core.stored import Stored
from tesserafl.core.submodel import SubModel

_Natural = Annotated[int, Field(ge=0, lt=1 << 62)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class _Client(_Strict):
    id: _Natural
    num_examples: _Natural
    memory_bytes: _Natural | None
    depth: _Natural | None = None
    mixing: _Natural = 1


class _Wanted(_Strict):
    deltas: list[str] | None = None
    fewer: bool = False
    extra: dict[str, list[_Natural]] = {}
    divisors: list[str] = []
    exact: bool = False


class _Coded(_Strict):
    coding: Coding
    names: list[str]


class _Task(_Strict):
    round: _Natural
    client: _Client
    submodel: PartHeader
    training: dict[str, Any]
    trainable: list[str] | None = None
    options: dict[str, Any]
    wanted: _Wanted = _Wanted()
    coded: _Coded | None = None


class _Update(_Strict):
    round: _Natural
    client: _Natural
    submodel: PartHeader
    num_examples: _Natural
    num_steps: _Natural
    metrics: dict[str, float]
    coded: _Coded | None = None


Parts = tuple[dict[str, Any], dict[str, Params]]
"""A message taken apart: plain JSON values, and groups of tensors."""


def encode_task(task: Task, memory: Memory) -> bytes:
    """A task with the client's memory, for an engine whose clients are other processes."""
    return pack(*task_parts(task, memory))


def task_parts(task: Task, memory: Memory) -> Parts:
    """What `encode_task` packs."""
    header: dict[str, Any] = {
        "round": task.round,
        "client": asdict(task.client),
        "submodel": part_to_json(task.submodel),
        "training": asdict(task.training),
        "trainable": None if task.trainable is None else sorted(task.trainable),
        "options": dict(task.options),
        "wanted": {
            "deltas": None if task.wanted.deltas is None else sorted(task.wanted.deltas),
            "fewer": task.wanted.fewer,
            "extra": {name: list(shape) for name, shape in task.wanted.extra.items()},
            "divisors": sorted(task.wanted.divisors),
            "exact": task.wanted.exact,
        },
    }
    groups = {"params": task.params, "extra": dict(task.extra), "memory": memory}
    return header, groups | coded_groups(task.params, "params", header)


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
    submodel = part_from_json(header.submodel)
    task = Task(
        round=header.round,
        client=Client(**header.client.model_dump()),
        submodel=submodel,
        params=_decoded(header.coded, groups, "params", submodel),
        training=training,
        trainable=None if header.trainable is None else frozenset(header.trainable),
        extra=_group(groups, "extra"),
        options=header.options,
        wanted=_wanted_from_json(header.wanted),
    )
    return task, _group(groups, "memory")


def encode_update(update: Update, memory: Memory) -> bytes:
    """An update with the client's new memory."""
    return pack(*update_parts(update, memory))


def update_parts(update: Update, memory: Memory) -> Parts:
    """What `encode_update` packs."""
    header: dict[str, Any] = {
        "round": update.round,
        "client": update.client,
        "submodel": part_to_json(update.submodel),
        "num_examples": update.num_examples,
        "num_steps": update.num_steps,
        "metrics": dict(update.metrics),
    }
    groups = {"delta": update.delta, "extra": dict(update.extra), "memory": memory}
    return header, groups | coded_groups(update.delta, "delta", header)


def decode_update(data: bytes, task: Task | None = None) -> tuple[Update, Memory]:
    """The inverse of `encode_update`, for bytes that anybody may have written.

    Args:
        data: the message.
        task: what it answers. It bounds what the bytes may claim, so whoever receives from devices
            gives it; coded deltas cannot be read without. Devices keep their memory: then there is
            none. Whether the update may be summed is for `core.answers.check_update` to say.

    Raises:
        MessageError: the bytes are no update.
        UpdateError: its coded deltas are not of the task's sub-model.
    """
    update, memory = update_of(
        *unpack(data, None if task is None else most_header_bytes(task)), task
    )
    if task is not None and memory:
        raise MessageError(
            f"an update holds {len(memory)} tensors of its client's memory; a device keeps its own"
        )
    return update, memory


def update_of(
    body: dict[str, Any], groups: dict[str, Params], task: Task | None = None
) -> tuple[Update, Memory]:
    """The inverse of `update_parts`; see `decode_update`."""
    header = _validated(_Update, body)
    allowed = {"delta", "extra", "memory"} | ({"codes"} if header.coded else set())
    if not groups.keys() <= allowed:
        raise MessageError(
            f"an update holds tensors of the group {shown(min(groups.keys() - allowed))}; allowed "
            f"are {', '.join(sorted(allowed))}"
        )
    submodel = part_from_json(header.submodel)
    if header.coded is not None:
        if task is None:
            raise MessageError("coded deltas can be read beside their task only")
        check_part(task, submodel)  # before anything is made that is as large as it claims to be
    update = Update(
        round=header.round,
        client=header.client,
        submodel=submodel,
        delta=_decoded(header.coded, groups, "delta", submodel),
        num_examples=header.num_examples,
        num_steps=header.num_steps,
        metrics=header.metrics,
        extra=_group(groups, "extra"),
    )
    return update, _group(groups, "memory")


def _decoded(
    how: _Coded | None, groups: Mapping[str, Params], group: str, submodel: SubModel
) -> Params:
    main = _group(groups, group)
    if how is None:
        return main
    if isinstance(main, Stored) and how.coding == "bfloat16" and not groups.get("codes"):
        return main.in_float32(how.names)
    shapes = {name: view.shape for name, view in submodel.views.items()}
    return decoded(how.coding, main, _group(groups, "codes"), frozenset(how.names), shapes)


_Header = TypeVar("_Header", bound=BaseModel)


def _validated(kind: type[_Header], body: dict[str, Any]) -> _Header:
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise MessageError(
            f"a message's header is wrong: {shown(place)}: {shown(first['msg'])}"
        ) from error
    except RecursionError as error:
        raise MessageError("a message's header is nested too deeply") from error


def _group(groups: Mapping[str, Params], name: str) -> Params:
    if name not in groups:
        raise MessageError(f"a message lacks its tensors {name!r}")
    return groups[name]


def _wanted_from_json(header: _Wanted) -> Wanted:
    return Wanted(
        deltas=None if header.deltas is None else frozenset(header.deltas),
        fewer=header.fewer,
        extra={name: tuple(shape) for name, shape in header.extra.items()},
        divisors=frozenset(header.divisors),
        exact=header.exact,
    )
