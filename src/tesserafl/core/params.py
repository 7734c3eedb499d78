"""Parameters as plain dictionaries, and the few operations that everything else shares."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tesserafl.core.layout import Shape
from tesserafl.core.stored import Stored

Params = dict[str, Tensor]
"""Parameter name -> tensor. Never changed in place by a hook."""

_LINE = 64
"""Bytes of a cache line, to which torch aligns what it allocates."""


@dataclass(frozen=True, eq=False)
class Packing:
    """Where float32 parameters lie in one flat tensor: each begins at a cache line."""

    shapes: tuple[tuple[str, Shape], ...]

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """The first entry of each parameter."""
        return self._ends[0]

    @property
    def total(self) -> int:
        """Entries of the flat tensor; those between parameters are 0."""
        return self._ends[1]

    @cached_property
    def num_entries(self) -> int:
        """Entries of the parameters themselves."""
        return sum(math.prod(shape) for _, shape in self.shapes)

    @cached_property
    def signature(self) -> tuple[tuple[str, Shape, torch.dtype], ...]:
        """Name, shape and type of each parameter."""
        return tuple((name, shape, torch.float32) for name, shape in self.shapes)

    @cached_property
    def _ends(self) -> tuple[tuple[int, ...], int]:
        starts, end, line = [], 0, _LINE // torch.float32.itemsize
        for _, shape in self.shapes:
            starts.append(end)
            end += -(-math.prod(shape) // line) * line
        return tuple(starts), end

    @cached_property
    def places(self) -> tuple[tuple[str, Shape, Shape, int], ...]:
        """Name, shape, strides and first entry of each parameter."""
        rows = []
        for (name, shape), start in zip(self.shapes, self.starts, strict=True):
            strides = [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]
            rows.append((name, shape, tuple(strides), start))
        return tuple(rows)

    def parts(self, flat: Tensor) -> dict[str, Tensor]:
        """The parameters, as views of the flat tensor."""
        first = flat.storage_offset()
        return {
            name: flat.as_strided(shape, strides, first + start)
            for name, shape, strides, start in self.places
        }


@lru_cache(maxsize=256)
def packing_of(shapes: tuple[tuple[str, Shape], ...]) -> Packing:
    """The packing of these parameters: the same object for equal ones."""
    return Packing(shapes)


class Packed(dict[str, Tensor]):
    """Parameters that are views of one flat tensor, so that one call does for all of them.

    A model of some thousand entries costs calls, not arithmetic. To whoever takes no notice they
    are parameters like any other; but none can be replaced: make a plain `dict` of them first.

    Args:
        flat: float32 [packing.total], 0 between the parameters.
        packing: where each lies.
        parts: the parameters, if somebody has the views already.
    """

    def __init__(
        self, flat: Tensor, packing: Packing, parts: Mapping[str, Tensor] | None = None
    ) -> None:
        super().__init__(packing.parts(flat) if parts is None else parts)
        self.flat, self.packing = flat, packing

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise TypeError("packed parameters cannot be replaced one by one; use dict(params)")

    __setitem__ = __delitem__ = __ior__ = _refuse
    pop = popitem = update = setdefault = clear = _refuse


MOST_PACKED = 1 << 18
"""Parameters of at most this many entries are packed: larger ones cost memory, not calls."""


def packable(params: Mapping[str, Tensor]) -> bool:
    """Whether parameters are worth packing and can be: few entries, float32, on the CPU."""
    if isinstance(params, Packed):
        return True
    entries = 0
    for tensor in params.values():
        entries += tensor.numel()
        if entries > MOST_PACKED or tensor.dtype != torch.float32 or not tensor.is_cpu:
            return False
    return entries > 0


def packing_like(params: Mapping[str, Tensor]) -> Packing:
    """The packing of parameters of these names and shapes, in their order."""
    if isinstance(params, Packed):
        return params.packing
    return packing_of(tuple((name, tuple(tensor.shape)) for name, tensor in params.items()))


def packed_rows(stacks: Params) -> list[Packed]:
    """The parameters of each of several clients, from packable stacks of them [clients, ...].

    They are copied into one tensor [clients, entries].
    """
    packing = packing_of(tuple((name, tuple(t.shape[1:])) for name, t in stacks.items()))
    clients = len(next(iter(stacks.values())))
    table = torch.zeros(clients, packing.total)
    columns = []
    for name, shape, strides, start in packing.places:
        column = table.as_strided((clients, *shape), (packing.total, *strides), start)
        columns.append(column.copy_(stacks[name]).unbind())
    names = list(stacks)
    return [
        Packed(flat, packing, dict(zip(names, parts, strict=True)))
        for flat, *parts in zip(table.unbind(), *columns, strict=True)
    ]


def flat_of(params: Params) -> npt.NDArray[np.float32]:
    """The entries of packable parameters as `packing_like(params)` lays them out."""
    if isinstance(params, Packed):
        shared: npt.NDArray[np.float32] = params.flat.numpy()
        return shared
    packing = packing_like(params)
    flat = np.zeros(packing.total, np.float32)
    for start, tensor in zip(packing.starts, params.values(), strict=True):
        flat[start : start + tensor.numel()] = tensor.detach().numpy().reshape(-1)
    return flat


def subtract(left: Params, right: Params) -> Params:
    """`left - right`, entry by entry; `right` holds the names of `left`, or more."""
    if isinstance(left, Packed) and isinstance(right, Packed) and left.packing is right.packing:
        return Packed(left.flat - right.flat, left.packing)
    if isinstance(right, Stored):
        return {name: right.taken_from(name, tensor) for name, tensor in left.items()}
    return {name: left[name] - right[name] for name in left}


def aligned(tensor: Tensor) -> Tensor:
    """The tensor, or a copy if it does not begin at a cache line.

    A matrix product's bits depend on that, and what was read from a file or a pipe lies anywhere.
    """
    return tensor if tensor.data_ptr() % _LINE == 0 else tensor.clone()


def num_entries(params: Params) -> int:
    """How many numbers the parameters hold."""
    if isinstance(params, Packed):
        return params.packing.num_entries
    return sum(tensor.numel() for tensor in params.values())


def num_bytes(params: Params) -> int:
    """Bytes of the parameters as they would be sent uncompressed."""
    if isinstance(params, Packed):
        return params.packing.num_entries * params.flat.element_size()
    return sum(tensor.numel() * tensor.element_size() for tensor in params.values())


def norm(params: Params) -> float:
    """Euclidean norm over all entries, in double precision."""
    squares = [tensor.double().square().sum() for tensor in params.values()]
    return float(torch.stack(squares).sum().sqrt()) if squares else 0.0


def sha256(params: Params) -> str:
    """A digest of names, types, shapes and bits, independent of the dictionary's order."""
    digest = hashlib.sha256()
    for name in sorted(params):
        tensor = params[name].detach().cpu().contiguous()
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
