"""A learnt policy: an actor, the coordinates of models that it sees, and its file.

    policy.safetensors    the actor's parameters, the basis
    policy.json           what it was learnt for, and the digest of the tensors

The JSON is written last, so a policy without it never happened.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from tesserafl.core.errors import CheckpointError, ConfigError
from tesserafl.core.params import Params
from tesserafl.core.submodel import SubModel

TENSORS, HEADER = "policy.safetensors", "policy.json"
_SCALE = "scale"

_Count = Annotated[int, Field(ge=1)]


class _Header(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    format: Literal[2]
    method: str
    options: dict[str, bool | _Count]
    edges: list[str]
    components: Annotated[int, Field(ge=0)]
    shapes: dict[str, list[_Count]]
    tensors_sha256: str


@dataclass(frozen=True, kw_only=True)
class Basis:
    """Coordinates of models: their principal components after a warm-up, with fixed signs."""

    mean: Params
    components: Params
    """Of each parameter, [components, *its shape]."""
    scale: float
    """What a model differs from the mean by along the first component, root mean square."""

    @property
    def num_components(self) -> int:
        """Coordinates of a model."""
        return len(next(iter(self.components.values())))

    def model(self, params: Params) -> tuple[float, ...]:
        """Of a global model's parameters, in units of the scale."""
        total = torch.zeros(self.num_components, dtype=torch.float64)
        for name, axes in self._rows.items():
            total += _along(axes, params[name] - self.mean[name])
        return tuple((total / self.scale).tolist())

    def change(self, delta: Params, submodel: SubModel) -> tuple[float, ...]:
        """Of a change of a part of the model, which is 0 elsewhere; in units of the scale."""
        total = torch.zeros(self.num_components, dtype=torch.float64)
        for name, change in delta.items():
            view = submodel.views[name]
            axes = self.components[view.name]
            if view.is_all(tuple(axes.shape[1:])):
                rows = self._rows[view.name]
            else:
                rows = torch.stack([view.read(axis) for axis in axes]).flatten(1).double()
            total += _along(rows, change)
        return tuple((total / self.scale).tolist())

    @cached_property
    def _rows(self) -> Params:
        """Of each parameter, [components, entries], as sums take them: used for every device."""
        return {name: axes.flatten(1).double() for name, axes in self.components.items()}


def _along(rows: Tensor, value: Tensor) -> Tensor:
    return rows @ value.detach().cpu().flatten().double()


def fit_basis(models: Sequence[Params], most: int) -> Basis:
    """The first principal components of some models, `most` at most.

    Models that differ in fewer directions have fewer. A component's sign is that of its largest
    entry, which is positive.

    Args:
        models: of the cloud and the edges, about a warm-up (Hwamei, Section 3.2).
        most: components.

    Raises:
        ConfigError: there is nothing in which the models differ.
    """
    first = {name: models[0][name] for name in sorted(models[0])}  # in a file they are sorted
    rows = torch.stack([torch.cat([m[name].flatten().double() for name in first]) for m in models])
    mean = rows.mean(dim=0)
    _, values, axes = torch.linalg.svd(rows - mean, full_matrices=False)
    kept = [n for n in range(min(most, len(values))) if values[n] > 1e-6 * rows.norm()]
    if not kept:
        raise ConfigError(
            f"the {len(models)} models of the warm-up do not differ, so there is nothing to tell "
            f"them apart by; let devices train in the first round, at two edges or more"
        )
    chosen = axes[kept]
    largest = chosen.abs().argmax(dim=1, keepdim=True)
    chosen = chosen * chosen.gather(1, largest).sign()
    sizes = [tensor.numel() for tensor in first.values()]
    return Basis(
        mean={
            name: part.float().view(first[name].shape)
            for name, part in zip(first, torch.split(mean, sizes), strict=True)
        },
        components={
            name: part.float().reshape(len(kept), *first[name].shape)
            for name, part in zip(first, torch.split(chosen, sizes, dim=1), strict=True)
        },
        scale=float(values[0]) / len(models) ** 0.5,
    )


@dataclass(frozen=True, kw_only=True)
class Policy:
    """What decides on periods, and what it was learnt for."""

    method: str
    """Registered name."""
    options: Mapping[str, int]
    """Settings of the method that its decisions depend on."""
    edges: tuple[str, ...]
    """Of the tree that it was learnt on."""
    actor: Params
    basis: Basis

    def check(self, method: str, options: Mapping[str, int], shapes: Mapping[str, Any]) -> None:
        """Raise unless the policy was learnt for these settings.

        Args:
            method: the name of the method that asks for it.
            options: its settings.
            shapes: of the model's parameters.

        Raises:
            ConfigError: it was learnt for others.
        """
        if self.method != method:
            raise ConfigError(
                f"the policy was learnt for method {self.method!r}, the run's is {method!r}; learn "
                f"one with: tessera learn"
            )
        for name, value in options.items():
            if (learnt := self.options.get(name)) != value:
                raise ConfigError(
                    f"method.{name} is {value}, and the policy was learnt for {learnt}; set it to "
                    f"that, or learn another policy"
                )
        own = {name: tuple(tensor.shape) for name, tensor in self.basis.mean.items()}
        given = {name: tuple(shape) for name, shape in shapes.items()}
        if own != given:
            wrong = [name for name in sorted(own | given) if own.get(name) != given.get(name)]
            raise ConfigError(
                f"the policy was learnt for another model: {wrong[0]!r} has the shape "
                f"{given.get(wrong[0])} here and {own.get(wrong[0])} there; learn another policy"
            )


def policy_files(policy: Policy) -> tuple[bytes, bytes]:
    """What its files hold: the tensors, the JSON."""
    tensors = {_SCALE: torch.tensor(policy.basis.scale, dtype=torch.float64)}
    for group, params in (
        ("actor", policy.actor),
        ("mean", policy.basis.mean),
        ("components", policy.basis.components),
    ):
        tensors |= {f"{group}/{n}": t.detach().clone().contiguous() for n, t in params.items()}
    data = save(tensors)
    header = {
        "format": 2,
        "method": policy.method,
        "options": dict(policy.options),
        "edges": list(policy.edges),
        "components": policy.basis.num_components,
        "shapes": {name: list(t.shape) for name, t in policy.actor.items()},
        "tensors_sha256": hashlib.sha256(data).hexdigest(),
    }
    return data, (json.dumps(header, indent=1) + "\n").encode()


def read_policy(folder: Path) -> Policy:
    """The policy in a folder.

    Raises:
        CheckpointError: it is missing, incomplete or damaged.
    """
    way_out = "Learn it anew with: tessera learn"
    try:
        header = _Header.model_validate_json((folder / HEADER).read_bytes())
        data = (folder / TENSORS).read_bytes()
    except OSError as error:
        raise CheckpointError(
            f"{folder} holds no policy: {error.filename}: {error.strerror}. {way_out}"
        ) from error
    except ValidationError as error:
        problem = error.errors()[0]
        place = ".".join(map(str, problem["loc"]))
        raise CheckpointError(
            f"{folder / HEADER} is damaged: {place}: {problem['msg']}. {way_out}"
        ) from error
    if hashlib.sha256(data).hexdigest() != header.tensors_sha256:
        raise CheckpointError(
            f"{folder / TENSORS} does not match the digest in {HEADER}: it is damaged, or of "
            f"another policy. {way_out}"
        )
    try:
        tensors = load(data)
        policy = Policy(
            method=header.method,
            options=header.options,
            edges=tuple(header.edges),
            actor=_group("actor", tensors),
            basis=Basis(
                mean=_group("mean", tensors),
                components=_group("components", tensors),
                scale=float(tensors[_SCALE]),
            ),
        )
        _check_sizes(policy, header)
    except (SafetensorError, KeyError, ValueError, StopIteration) as error:
        raise CheckpointError(f"{folder / TENSORS} is damaged: {error}. {way_out}") from error
    return policy


def _group(group: str, tensors: Params) -> Params:
    begin = f"{group}/"
    return {n.removeprefix(begin): t for n, t in sorted(tensors.items()) if n.startswith(begin)}


def _check_sizes(policy: Policy, header: _Header) -> None:
    basis, found = policy.basis, {n: list(t.shape) for n, t in policy.actor.items()}
    if found != header.shapes:
        raise ValueError(f"the actor has {found}, {HEADER} says {header.shapes}")
    expected = {n: [header.components, *t.shape] for n, t in basis.mean.items()}
    if {n: list(t.shape) for n, t in basis.components.items()} != expected:
        raise ValueError(f"the components' shapes are not those of {header.components} models")
    everything = [*policy.actor.values(), *basis.mean.values(), *basis.components.values()]
    if not all(bool(torch.isfinite(tensor).all()) for tensor in everything):
        raise ValueError("a number is not finite")
    if not basis.scale > 0:
        raise ValueError(f"the scale is {basis.scale}")
