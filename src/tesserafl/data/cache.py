"""Decoded tensors on disk, so that images are decoded once and not in every run."""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor

FORMAT = "1"
"""Changes when the decoding does, which puts older files out of use."""


def folder() -> Path:
    """`$TESSERA_CACHE`, else `~/.cache/tesserafl`."""
    given = os.environ.get("TESSERA_CACHE")
    return Path(given) if given else Path.home() / ".cache" / "tesserafl"


def key(files: Sequence[Path], *details: object) -> str:
    """A digest of the files' names, sizes and times, and of how they are decoded."""
    stats = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return hashlib.sha256(repr((FORMAT, stats, details)).encode()).hexdigest()


def cached(key: str, build: Callable[[], Tensor]) -> Tensor:
    """The tensor stored under `key`, or `build()`, which is then stored.

    A damaged file is built again, and where nothing can be written the cache does nothing.
    """
    path = folder() / f"{key}.safetensors"
    found = _read(path)
    if found is not None:
        return found
    built = build().contiguous()
    with contextlib.suppress(OSError):
        _write(path, built)
    return built


def _digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.numpy().data).hexdigest()


def _read(path: Path) -> Tensor | None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            tensor: Tensor = file.get_tensor("data")
            stored = (file.metadata() or {}).get("sha256")
    except (OSError, SafetensorError):
        return None
    return tensor if stored == _digest(tensor) else None


def _write(path: Path, tensor: Tensor) -> None:
    from safetensors.torch import save

    content = save({"data": tensor}, metadata={"sha256": _digest(tensor)})
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
