"""What the agents of a tree see: times and energies relative to the fleet's, and few coordinates of
models.

Everything is of the round before. Ratios come as logarithms, coordinates through asinh: no number
grows with the size of the fleet, the model or the job.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tesserafl.core.decisions import Times
from tesserafl.core.messages import Client
from tesserafl.core.method import State
from tesserafl.core.policy import Policy
from tesserafl.core.schedule import Report, Seen, Situation

_MOST = 4.0
"""Logarithms of ratios are not larger: e^4 is 55."""
_NUM_GLOBAL, _NUM_ROW, _NUM_EDGE = 3, 9, 3


def context_size(components: int) -> int:
    """Features of everything but the devices (Tomtit)."""
    return components + _NUM_GLOBAL + _NUM_EDGE


def row_size(components: int) -> int:
    """Features of a device (Tomtit)."""
    return components + _NUM_ROW


def matrix_size(components: int, edges: int) -> int:
    """Entries of Hwamei's state matrix."""
    return (edges + 1) * (components + 3)


def seconds_of_step(seen: Seen) -> float:
    """A device's seconds for a step."""
    return seen.compute_seconds / seen.steps


@dataclass(frozen=True, kw_only=True)
class Scene:
    """What the cloud tells all edges."""

    place: tuple[float, ...]
    """Coordinates of its model."""
    progress: tuple[float, ...]
    """k / K, T_re / T, A."""
    left_seconds: float
    step_seconds: float
    """Of the fleet's devices, for a step, in the geometric mean."""
    step_joules: float
    """Likewise."""
    average_seconds: float
    """Of the edges, for an average of theirs."""


def scene_of(policy: Policy, state: State, seen: Situation) -> Scene:
    """The global information before a round."""
    devices = [device for report in seen.reports.values() for device in report.devices]
    share, left = 1.0, math.inf
    if seen.horizon is not None:
        left = seen.horizon - seen.seconds
        share = left / seen.horizon
    return Scene(
        place=_squeezed(policy.basis.model(state.params)),
        progress=(seen.round / state.rounds, share, seen.accuracy or 0.0),
        left_seconds=left,
        step_seconds=_mean(map(seconds_of_step, devices)),
        step_joules=_mean(device.joules / device.steps for device in devices),
        average_seconds=_mean(report.seconds / report.rounds for report in seen.reports.values()),
    )


def context_of(scene: Scene, report: Report | None) -> Tensor:
    """What an edge knows beside its devices, [features]: the scene, its own times and energy."""
    own = (0.0,) * _NUM_EDGE
    if report is not None:
        energy = sum(device.joules for device in report.devices)
        steps = sum(device.steps for device in report.devices)
        own = (
            _ratio(report.seconds / report.rounds, scene.average_seconds),
            _in_units(report.link_seconds, scene.average_seconds),
            _ratio(energy / max(1, steps), scene.step_joules),
        )
    return torch.tensor([*scene.place, *scene.progress, *own])


def rows_of(
    scene: Scene,
    clients: Sequence[Client],
    report: Report | None,
    components: int,
    most: int,
    share: Callable[[Client], tuple[float, float]],
) -> Tensor:
    """An edge's devices, [devices, features].

    Args:
        scene: the global information.
        clients: the edge's, in the order of the rows.
        report: the edge's; None: nothing was measured.
        components: coordinates of a change.
        most: steps of a device, at most.
        share: of the width and of the adapted blocks, that a client trains.
    """
    known = {} if report is None else {device.client: device for device in report.devices}
    examples = sum(client.num_examples for client in clients) / len(clients)
    changes = _mean(device.change for device in known.values())
    rows = []
    for client in clients:
        size = (_ratio(client.num_examples, examples), *share(client))
        device = known.get(client.id)
        if device is None:
            rows.append([0.0] * (_NUM_ROW - 3) + [*size] + [0.0] * components)
            continue
        row = [
            1.0,
            _ratio(seconds_of_step(device), scene.step_seconds),
            _in_units(device.link_seconds, scene.step_seconds),
            _ratio(device.joules / device.steps, scene.step_joules),
            device.steps / most,
            _ratio(device.change, changes),
            *size,
        ]
        rows.append(row + list(_squeezed(device.sketch or (0.0,) * components)))
    return torch.tensor(rows)


def times_of(
    scene: Scene, edge: str, clients: Sequence[Client], report: Report | None, first: int
) -> Times:
    """What work at an edge would take; a device that was not seen is as fast as the others."""
    known = {} if report is None else {device.client: device for device in report.devices}
    steps = {c: seconds_of_step(device) for c, device in known.items()}
    links = {c: device.link_seconds for c, device in known.items()}

    def of(values: Mapping[int, float]) -> Tensor:
        mean = sum(values.values()) / max(1, len(values))
        each = [values.get(client.id, mean) for client in clients]
        return torch.tensor(each, dtype=torch.float64)

    return Times(
        edge=edge,
        first=first,
        clients=tuple(client.id for client in clients),
        step_seconds=of(steps),
        link_seconds=of(links),
        backhaul_seconds=0.0 if report is None else report.link_seconds,
        left_seconds=scene.left_seconds,
    )


def matrix_of(policy: Policy, scene: Scene, seen: Situation) -> Tensor:
    """Hwamei's state, [edges + 1, components + 3] (Section 3.2).

    The first row is the cloud's: its model, and k, T_re, A. The others are the edges': their
    models, T^SGD, T^ec, E. A row of zeros is an edge's of which nothing was measured.
    """
    components = policy.basis.num_components
    mean = _mean(report.joules for report in seen.reports.values())
    rows = [[*scene.place, *scene.progress]]
    for edge in policy.edges:
        report = seen.reports.get(edge)
        if report is None:
            rows.append([0.0] * (components + 3))
            continue
        place = _squeezed(report.sketch or (0.0,) * components)
        times = (
            _ratio(report.seconds / report.rounds, scene.average_seconds),
            _in_units(report.link_seconds, scene.average_seconds),
            _ratio(report.joules, mean),
        )
        rows.append([*place, *times])
    return torch.tensor(rows)


def overview(self: object, policy: Policy, state: State, seen: Situation) -> Tensor:
    """The global state that critics see: the rows of Hwamei's matrix one after another."""
    return matrix_of(policy, scene_of(policy, state, seen), seen).flatten()


def no_rows() -> Tensor:
    """Of an agent that sees no devices, [0, 0]."""
    return torch.zeros(0, 0)


def _mean(values: Iterable[float]) -> float:
    """The geometric mean of those that are positive; 0 if none is."""
    logs = [math.log(value) for value in values if value > 0]
    return math.exp(sum(logs) / len(logs)) if logs else 0.0


def _ratio(value: float, mean: float) -> float:
    if value <= 0 or mean <= 0:
        return 0.0
    return min(max(math.log(value / mean), -_MOST), _MOST)


def _in_units(value: float, unit: float) -> float:
    return math.log1p(value / unit) if unit > 0 else 0.0


def _squeezed(values: Sequence[float]) -> tuple[float, ...]:
    return tuple(math.asinh(value) for value in values)
