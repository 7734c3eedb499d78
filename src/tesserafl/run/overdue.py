"""Clients below edges that are at work on what they were asked in a round before, at the cloud."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from tesserafl.core.messages import Task
from tesserafl.core.params import Params
from tesserafl.core.wire import task_of, task_parts

Overdue = Mapping[int, Task | None]
"""Client -> its task, of methods that look at each update by itself; None: of others."""
_KINDS = ("params", "extra")


def without_values(task: Task) -> Task:
    """What an answer to a task is looked at beside: of its tensors that is the types alone."""
    params = {name: tensor.new_empty(0) for name, tensor in task.params.items()}
    extra = {name: tensor.new_empty(0) for name, tensor in task.extra.items()}
    return replace(task, params=params, extra=extra)


def overdue_parts(overdue: Overdue) -> tuple[dict[str, Any], dict[str, Params]]:
    """Plain values and groups of tensors, for a checkpoint."""
    values, tensors = dict[str, Any](), dict[str, Params]()
    for client, task in overdue.items():
        values[str(client)] = None
        if task is not None:
            values[str(client)], groups = task_parts(task, {})
            tensors |= {_group(client, kind): groups[kind] for kind in _KINDS}
    return values, tensors


def overdue_of(values: Mapping[str, Any], tensors: Mapping[str, Params]) -> dict[int, Task | None]:
    """The inverse of `overdue_parts`."""
    found: dict[int, Task | None] = {}
    for name, header in values.items():
        client = int(name)
        groups = {kind: tensors.get(_group(client, kind), {}) for kind in _KINDS}
        found[client] = header and task_of(header, {**groups, "memory": {}})[0]
    return found


def _group(client: int, kind: str) -> str:
    return f"late-{client}-{kind}"
