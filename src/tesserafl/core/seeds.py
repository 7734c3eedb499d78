"""The one place where randomness starts.

Every draw is named by what it is for, never by when it happens, so that the order of arrival,
the number of workers and a resume cannot change it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def derive(seed: int, *keys: int | str) -> int:
    """A 63-bit seed that depends on `seed` and on every key, in order."""
    text = repr((int(seed), *keys)).encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "big") >> 1


def generator(seed: int, *keys: int | str) -> torch.Generator:
    """A CPU generator for one purpose: `generator(seed, round, client, "batches")`."""
    return torch.Generator().manual_seed(derive(seed, *keys))


def numpy_generator(seed: int, *keys: int | str) -> np.random.Generator:
    """The same for NumPy, where many short draws are wanted."""
    return np.random.Generator(np.random.Philox(key=derive(seed, *keys)))


@contextmanager
def seeded(seed: int, *keys: int | str) -> Iterator[None]:
    """Torch's global generators hold this purpose's seed inside the block and are restored after.

    For code that draws from them and cannot be handed a generator: initialisers and dropout.
    """
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    with torch.random.fork_rng(devices=devices):
        # Not torch.manual_seed: it queues a call, with a traceback, for every absent device.
        torch.default_generator.manual_seed(derive(seed, *keys))
        if devices:
            torch.cuda.manual_seed_all(derive(seed, *keys))
        yield
