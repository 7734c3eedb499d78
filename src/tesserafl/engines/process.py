"""What a process that trains clients sets for itself: threads, repeatable kernels, its memory."""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections.abc import Iterator
from functools import cache

import torch

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""Parameters of glibc's `mallopt` (malloc.h)."""
_LARGEST_KEPT = 32 << 20
"""Bytes: the largest threshold that glibc takes."""


@contextlib.contextmanager
def threads(number: int) -> Iterator[None]:
    """Torch computes with this many threads inside the block; bits depend on it.

    On a GPU, convolutions and matrix products take kernels that repeat their bits. For good, the
    process keeps memory that was freed.
    """
    _keep_freed_memory()
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@cache
def _keep_freed_memory() -> None:
    """Have freed memory used again instead of given back to the system, where that is glibc.

    Every client's gradients, weights and update are as large as the last one's. By default glibc
    asks the system for them anew, which clears every page: a fifth of a round of a large model.
    Tensors above the limit, mostly the server's own, are still given back: they would fragment it.
    """
    if sys.platform != "linux":
        return
    with contextlib.suppress(OSError, AttributeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_MMAP_THRESHOLD, _LARGEST_KEPT)
        mallopt(_TRIM_THRESHOLD, 2**31 - 1)
