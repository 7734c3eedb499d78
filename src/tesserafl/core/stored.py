"""Parameters that are not in memory: for a device that cannot hold them twice."""

from __future__ import annotations

import math
from collections.abc import Callable, ItemsView, Iterable, Iterator, Mapping, Sequence, ValuesView
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor

from tesserafl.core.errors import MessageError
from tesserafl.core.layout import Shape


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a parameter lies that is not in memory."""

    shape: Shape
    dtype: torch.dtype
    pieces: Sequence[Callable[[], Tensor]]
    """Read its entries in their order, piece after piece."""


class Stored(dict[str, Tensor]):
    """Parameters that lie on a disk and are read anew whenever they are asked for.

    What is read is the reader's own and may be written to, so who trains them needs no second copy.
    To whoever takes no notice they are parameters like any other; but none can be replaced: make a
    plain `dict` of them first, which reads all.
    """

    def __init__(self, places: Mapping[str, Place]) -> None:
        super().__init__(dict.fromkeys(places, torch.empty(0)))  # their names, in this order
        self._places = dict(places)

    def __getitem__(self, name: str) -> Tensor:
        place = self._places[name]
        whole = torch.empty(math.prod(place.shape), dtype=place.dtype)
        for start, piece in self._read(name):
            whole[start : start + piece.numel()] = piece
        return whole.reshape(place.shape)

    def __iter__(self) -> Iterator[str]:  # without it `dict(params)` would not ask for the values
        return iter(self._places)

    def get(self, name: str, default: Any = None) -> Any:
        """As of a dict."""
        try:
            return self[name]
        except KeyError:
            return default

    def items(self) -> ItemsView[str, Tensor]:  # type: ignore[override]
        """As of a dict, read one at a time."""
        return ItemsView(self)

    def values(self) -> ValuesView[Tensor]:  # type: ignore[override]
        """As of a dict, read one at a time."""
        return ValuesView(self)

    def copy(self) -> dict[str, Tensor]:
        """A plain dict: all of them, read."""
        return dict(self)

    def __copy__(self) -> dict[str, Tensor]:
        return dict(self)

    def __deepcopy__(self, memo: object) -> dict[str, Tensor]:
        return dict(self)  # what is read is nobody else's

    def __eq__(self, other: object) -> bool:
        return self is other  # values are not compared: tensors have no one truth

    def __ne__(self, other: object) -> bool:
        return self is not other

    __hash__ = None

    def __repr__(self) -> str:
        return f"Stored({', '.join(self)})"

    def __or__(self, other: Any) -> Any:
        return {**self, **other}

    def __ror__(self, other: Any) -> Any:
        return {**other, **self}

    def in_float32(self, names: Iterable[str]) -> Stored:
        """The same parameters; those of these names, which lie in bfloat16, are read as float32.

        Raises:
            MessageError: one of them is not there, or of another type.
        """
        places = dict(self._places)
        for name in names:
            if name not in places or places[name].dtype != torch.bfloat16:
                raise MessageError(f"{name[:40]!r} was to be sent in bfloat16, and was not")
            pieces = [partial(_widened, read) for read in places[name].pieces]
            places[name] = replace(places[name], dtype=torch.float32, pieces=pieces)
        return Stored(places)

    def taken_from(self, name: str, left: Tensor) -> Tensor:
        """`left - self[name]`, of which no more than one piece is in memory."""
        if left.shape != self._places[name].shape:
            return left - self[name]  # whatever that gives
        change, flat = torch.empty(left.numel(), dtype=left.dtype), left.reshape(-1)
        for start, piece in self._read(name):
            part = slice(start, start + piece.numel())
            torch.sub(flat[part], piece, out=change[part])
        return change.reshape(left.shape)

    def _read(self, name: str) -> Iterator[tuple[int, Tensor]]:
        start = 0
        for read in self._places[name].pieces:
            piece = read().reshape(-1)
            yield start, piece
            start += piece.numel()

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise TypeError("stored parameters cannot be replaced one by one; use dict(params)")

    __setitem__ = __delitem__ = __ior__ = _refuse
    pop = popitem = update = setdefault = clear = _refuse


def _widened(read: Callable[[], Tensor]) -> Tensor:
    return read().float()
