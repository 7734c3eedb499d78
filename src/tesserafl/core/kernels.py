"""The four loops over entries: read, add a number, add in fixed point, finish a mean.

Each in two forms with equal bits. Compiled (numba, optional) walks a view's layout once, at the
speed of memory. Eager is plain PyTorch, for any type and device, a block of rows at a time.

Loading compiled code takes about half a second. It is used for models of at least `MIN_ENTRIES`
entries, a rule that looks at nothing else, and for contiguous float32 and float64 on the CPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from types import ModuleType
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tesserafl.core.layout import Ints, Layout, Weighted
from tesserafl.core.params import Params, num_entries

T = TypeVar("T")

MIN_ENTRIES = 1 << 20
"""Smallest model for which compiled code is loaded; below, a round's sums take milliseconds."""

BLOCK = 1 << 18
"""Entries that an eager loop converts at once: its temporaries stay in the processor's cache."""

_HUGE = 1 << 22
"""Bytes from which NumPy asks the system for huge pages."""

_ALIGNMENT = 64
_LARGEST_OF_FLOAT32 = 127
_TYPES = (torch.float32, torch.float64)


@cache
def _load() -> ModuleType | None:
    try:
        from tesserafl.core import _compiled
    except ImportError:
        return None
    return _compiled


def compiled_for(tensors: Params) -> bool:
    """Whether compiled loops are used for a model with these tensors."""
    return compiled_for_entries(num_entries(tensors))


def compiled_for_entries(entries: int) -> bool:
    """Whether compiled loops are used for a model of so many entries."""
    return entries >= MIN_ENTRIES and _load() is not None


def takes(*tensors: Tensor) -> bool:
    """Whether the compiled loops can read these."""
    return all(t.is_cpu and t.dtype in _TYPES and t.is_contiguous() for t in tensors)


def empty(shape: Sequence[int], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A contiguous tensor of its own on `like`'s device, not filled."""
    return _allocated(torch.empty, np.empty, shape, like, dtype or like.dtype)


def zeros(shape: Sequence[int], like: Tensor, dtype: torch.dtype) -> Tensor:
    """A contiguous tensor of zeros on `like`'s device."""
    return _allocated(torch.zeros, np.zeros, shape, like, dtype)


def read(large: Tensor, layout: Layout, shape: Sequence[int]) -> Tensor:
    """A fresh tensor of `shape` with the entries of the layout. Compiled."""
    small = empty(shape, large)
    call, arrays = _code().read, (_flat(large), _flat(small), *layout)
    _by_rows(len(layout.rows), small.numel(), partial(call, *arrays))
    return small


def add_number(large: Tensor, layout: Layout, number: int) -> None:
    """The layout's entries of an integer tensor += number, in place. Compiled."""
    array = _flat(large)
    call, given = _code().add_number, (array, array.dtype.type(number), *layout)
    _by_rows(len(layout.rows), layout.entries, partial(call, *given))


def add_fixed(
    sums: Tensor, layout: Layout, small: Tensor, scale: int, weight: int, bound: float
) -> bool:
    """The layout's entries of `sums` += weight x round(small x 2^scale). Compiled.

    False if entries were beyond the bound or not finite. These add nothing, so the same call with
    -weight takes back exactly what was added.
    """
    call, given = (
        _code().add_fixed,
        (_flat(sums), _flat(small), 2.0**scale, bound, weight, *layout),
    )
    bad = _by_rows(len(layout.rows), small.numel(), partial(call, *given))
    return not any(bad)


def to_fixed(small: Tensor, scale: int, weight: int) -> Tensor:
    """weight x round(small x 2^scale), int64. Eager; makes one more tensor of as many doubles."""
    exact = small.detach().to(torch.float64, copy=True)
    return exact.mul_(2.0**scale).round_().to(torch.int64).mul_(weight)


def fixed(flat: npt.NDArray[np.float32], scale: int, weight: int) -> Ints:
    """weight x round(flat x 2^scale), for few entries: NumPy costs less per call than PyTorch.

    Exact in float32 too: a power of two changes the exponent alone, and entries are below
    2^(62 - scale).
    """
    kind = np.float32 if scale <= _LARGEST_OF_FLOAT32 else np.float64
    exact = np.multiply(flat, kind(2.0**scale), dtype=kind)
    result: Ints = np.rint(exact, out=exact).astype(np.int64)
    result *= weight
    return result


def finish(old: Tensor, sums: Tensor, scale: int, weights: Iterable[Weighted]) -> Tensor:
    """old + (sums x 2^-scale) / weight per entry, in double precision; of `old`'s type. Compiled.

    Args:
        old: any shape.
        sums: int64, of that shape, contiguous, 0 where the weight is.
        scale: the sums' grid is 2^-scale.
        weights: of all entries.
    """
    new = empty(old.shape, old)
    call, arrays = _code().finish, (_flat(old), _flat(sums), _flat(new), 2.0**-scale)
    for block in weights:
        entries = len(block.rows) * block.row_length
        _by_rows(len(block.rows), entries, partial(call, *arrays, *block))
    return new


def mean_added(
    old: npt.NDArray[np.float32], sums: Ints, scale: int, weight: int
) -> npt.NDArray[Any]:
    """old + (sums x 2^-scale) / weight, for few entries of one weight."""
    mean: npt.NDArray[Any] = sums * 2.0**-scale
    mean /= weight
    mean += old
    return mean


Piece = tuple[int, int, Ints]
"""First entry, last + 1, and an int64 weight for each of them, or one for all."""


def finish_eagerly(old: Tensor, sums: Tensor, scale: int, weights: Iterable[Piece]) -> Tensor:
    """As `finish`, for any type and device, piece by piece."""
    new, grid = empty(old.shape, old), 2.0**-scale
    if takes(old):  # NumPy does the same at less cost per call, which small models are made of
        with np.errstate(all="ignore"):
            there, of_old, of_sums = _flat(new), _flat(old), _flat(sums)
            for low, high, weight in weights:
                exact = of_sums[low:high] * grid
                exact /= np.maximum(weight, 1)
                exact += of_old[low:high]
                there[low:high] = exact
        return new
    flat_old, flat_sums, flat_new = old.detach().reshape(-1), sums.view(-1), new.view(-1)
    for low, high, weight in weights:
        mean = flat_sums[low:high].double().mul_(grid)
        mean.div_(torch.from_numpy(np.maximum(weight, 1)).to(old.device))
        flat_new[low:high] = mean.add_(flat_old[low:high])
    return new


def expanded(weights: Iterable[Weighted]) -> Iterator[Piece]:
    """The weights of all entries, in pieces of about a block."""
    for block in weights:
        end = block.first + len(block.rows) * block.row_length
        if block.table.size == 1:
            for low in range(block.first, end, BLOCK):
                yield low, min(low + BLOCK, end), block.table[0, 0]
            continue
        step = max(1, BLOCK // max(1, block.row_length))
        classes = np.repeat(block.runs, block.lengths)
        for row in range(0, len(block.rows), step):
            places = np.ix_(block.rows[row : row + step], block.planes, classes)
            piece = block.table[places].reshape(-1)
            low = block.first + row * block.row_length
            yield low, low + len(piece), piece


def _allocated(
    of_torch: Callable[..., Tensor],
    of_numpy: Callable[..., npt.NDArray[np.uint8]],
    shape: Sequence[int],
    like: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    size = math.prod(shape) * dtype.itemsize
    if size < _HUGE or like.device.type != "cpu":
        return of_torch(tuple(shape), dtype=dtype, device=like.device)
    # PyTorch takes 4 KiB pages, whose first touch costs as much as the work on them. NumPy asks for
    # pages of 2 MiB. Aligned as PyTorch aligns, lest a matrix product take another path.
    raw = of_numpy(size + _ALIGNMENT, dtype=np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return torch.from_numpy(raw[start : start + size]).view(dtype).view(tuple(shape))


def _by_rows(rows: int, entries: int, call: Callable[[int, int], T]) -> list[T]:
    """`call(low, high)` over all rows, divided among as many threads as PyTorch may use."""
    parts = max(1, min(torch.get_num_threads(), rows, entries // BLOCK))
    if parts == 1:
        return [call(0, rows)]
    bounds = [rows * part // parts for part in range(parts + 1)]
    return list(_pool(parts).map(call, bounds[:-1], bounds[1:]))


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="tesserafl-sums")


def _code() -> ModuleType:
    code = _load()
    assert code is not None  # callers asked `compiled_for`
    return code


def _flat(tensor: Tensor) -> npt.NDArray[Any]:
    array: npt.NDArray[Any] = tensor.detach().view(-1).numpy()
    return array
