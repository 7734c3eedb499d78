"""Processes of other programs that live as long as this one."""

from __future__ import annotations

import contextlib
import ctypes
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from tesserafl.core.errors import ConfigError

_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


def die_with_parent(how: signal.Signals = signal.SIGTERM) -> None:
    """Have this process ended when its parent ends, also by SIGKILL. Linux alone has that."""
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, how)


def give_back_memory() -> None:
    """Hand freed memory to the system, which the C library else keeps; glibc alone has that."""
    trim = getattr(_LIBC, "malloc_trim", None)
    if trim is not None:
        trim(0)


def program(name: str) -> str:
    """The path of a program that was installed with this Python.

    Raises:
        ConfigError: it is not there.
    """
    found = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    if found is None:
        raise ConfigError(
            f"{name} is not installed; devices are reached over Flower: "
            f"pip install 'tesserafl[flower]'"
        )
    return found


def child(
    command: Sequence[str], environment: Mapping[str, str], log: Path
) -> subprocess.Popen[bytes]:
    """Start a process that writes to a log, and ends when this one does."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as told:
        return subprocess.Popen(
            command,
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=told,
            stderr=told,
            preexec_fn=die_with_parent,
        )


@contextlib.contextmanager
def running(
    command: Sequence[str], environment: Mapping[str, str], log: Path
) -> Iterator[subprocess.Popen[bytes]]:
    """A child that is ended with the block."""
    process = child(command, environment, log)
    try:
        yield process
    finally:
        end(process)


def end(process: subprocess.Popen[bytes], seconds: float = 10.0) -> None:
    """Ask a process to end, and end it if it does not."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def free_port(host: str = "127.0.0.1") -> int:
    """A port on which nobody listens just now."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        port: int = probe.getsockname()[1]
        return port


def tail_of(log: Path, most: int = 2000) -> str:
    """The end of what a process wrote."""
    if not log.exists():
        return ""
    return log.read_text(encoding="utf-8", errors="replace").strip()[-most:]
