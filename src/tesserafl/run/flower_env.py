"""The environment of every process of Flower's that we start: quiet, closed and reproducible."""

from __future__ import annotations

import os
import sys
from pathlib import Path

CLOSED = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    # Else a run's dependencies are fetched by `uv sync` and shadow what is installed here.
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "FLWR_TRACING_ENABLED": "0",
}
"""What is set for each process."""

KEPT = (
    "FLWR_LOG_LEVEL",
    "FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE",
    "FLWR_PRIVATE_MAX_CONCURRENT_OBJ_PULLS",
    "FLWR_PRIVATE_MAX_CONCURRENT_OBJ_PUSHES",
    "FLWR_SUPEREXEC_TASK_POLL_INTERVAL",
)
"""Flower's variables that a user may set. All others are dropped: some of them open a gRPC port
beside the proxied one (FLWR_INTERNAL_GRPC_CONTROL_API) or send work elsewhere."""

SPARING = {
    "MALLOC_ARENA_MAX": "2",
    "MALLOC_MMAP_THRESHOLD_": str(1 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 20),
}
"""For a device's node alone, unless a user sets them: glibc then gives large buffers back at once,
where a node that carries messages of tens of MiB would keep several of them. Whoever computes would
pay for that with time. Other C libraries take no notice."""

SUPERLINK_FLAGS = ("--disable-runtime-dependency-installation",)
"""Flags of `flower-superlink`, which installs by default; `flower-supernode` does not, and has no
such flag."""


def environment(home: Path) -> dict[str, str]:
    """The whole environment of such a process: the present one without Flower's variables that are
    not in `KEPT`, and `CLOSED`. `home` is Flower's own folder, one for each of our runs."""
    inherited = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("FLWR_") or name in KEPT
    }
    # Flower starts its own programs by their bare names.
    path = os.pathsep.join([str(Path(sys.executable).parent), inherited.get("PATH", os.defpath)])
    pace = {"FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.2", **inherited}  # a second, else
    return {**pace, **CLOSED, "FLWR_HOME": str(home.absolute()), "PATH": path}
