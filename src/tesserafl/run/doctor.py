"""What this machine and installation can do, and what is wrong with them."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that was looked at."""

    what: str
    found: str
    good: bool = True


_NEEDED = (
    "torch",
    "numpy",
    "safetensors",
    "tyro",
    "pydantic",
    "rich",
    "matplotlib",
    "scikit-learn",
    "datasets",
    "flwr-datasets",
)
_OPTIONAL = {
    "transformers": "Hugging Face models (pip install 'tesserafl[huggingface]')",
    "ray": "clients in a cluster, engine.kind ray (pip install 'tesserafl[ray]')",
    "numba": "compiled sums of large models (pip install 'tesserafl[fast]')",
    "flwr": "servers and devices on many machines (pip install 'tesserafl[flower]')",
}


def examine() -> Iterator[Finding]:
    """Look at Python, packages, processors, devices and disk."""
    yield Finding(
        what="python",
        found=f"{sys.version.split()[0]} (3.11 or newer is needed)",
        good=sys.version_info >= (3, 11),
    )
    for package in _NEEDED:
        version = _version(package)
        yield Finding(what=package, found=version or "missing", good=version is not None)
    for package, use in _OPTIONAL.items():
        yield Finding(what=package, found=_version(package) or f"not installed; for {use}")
    yield Finding(what="processors", found=f"{os.cpu_count()}; clients use engine.threads each")
    if torch.cuda.is_available():
        names = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
        yield Finding(what="gpu", found=names)
    else:
        yield Finding(what="gpu", found="none; clients train on the processor")
    compiler = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    yield Finding(
        what="compiler",
        found=compiler or "none; for engine.batching compiled on a processor",
    )
    threads = os.environ.get("OMP_NUM_THREADS")
    yield Finding(
        what="OMP_NUM_THREADS",
        found=threads or "not set; fine, every worker limits its own threads",
    )
    free = shutil.disk_usage(Path.cwd()).free
    yield Finding(what="disk", found=f"{free / 1e9:.1f} GB free here", good=free > 1e9)
    yield Finding(
        what="folder",
        found=f"{Path.cwd()} is {'' if os.access(Path.cwd(), os.W_OK) else 'not '}writable",
        good=os.access(Path.cwd(), os.W_OK),
    )


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
