"""Flower's own processes with TLS and node authentication, for tests."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tesserafl.run.certs import DeviceFiles, ServerFiles
from tesserafl.run.flower_env import SUPERLINK_FLAGS, environment

BIN = Path(sys.executable).parent


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def process(command: list[str], folder: Path, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A child whose words go to `log`; it and its children end with the block."""
    env = environment(folder)
    env["PATH"] = f"{BIN}:{env['PATH']}"
    with log.open("wb") as told:
        child = subprocess.Popen(
            command, stdout=told, stderr=told, stdin=subprocess.DEVNULL, env=env, cwd=folder
        )
    try:
        yield child
    finally:
        child.terminate()
        try:
            child.wait(10)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def until(condition: Callable[[], bool], seconds: float, what: Callable[[], str]) -> None:
    ends = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < ends, what()
        time.sleep(0.1)


@dataclass(frozen=True)
class Link:
    """A SuperLink on loopback and how Flower's command reaches it."""

    port: int
    home: Path
    log: Path

    def flwr(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(BIN / "flwr"), *arguments],
            env=environment(self.home),
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
        )

    def register(self, device: DeviceFiles) -> None:
        done = self.flwr("supernode", "register", str(device.public), "direct")
        assert done.returncode == 0, done.stdout + done.stderr

    def said(self) -> str:
        return self.log.read_text(errors="replace")


@contextlib.contextmanager
def superlink(
    files: ServerFiles, folder: Path, port: int | None = None, database: Path | None = None
) -> Iterator[Link]:
    """Connections `direct` (loopback) and `proxied` (as devices come) are known to `flwr`."""
    link = Link(port or free_port(), folder / "home", folder / "superlink.log")
    link.home.mkdir(parents=True)
    (link.home / "config.toml").write_text(
        f'[superlink]\ndefault = "direct"\n'
        f'[superlink.direct]\naddress = "127.0.0.1:{link.port}"\n'
        f'root-certificates = "{files.ca}"\n'
        f'[superlink.proxied]\naddress = "127.0.0.1:{files.port}"\n'
        f'root-certificates = "{files.ca}"\n'
    )
    command = [str(BIN / "flower-superlink"), "--host", "127.0.0.1", "--port", str(link.port)]
    command += ["--ssl-certfile", str(files.certificate), "--ssl-keyfile", str(files.key)]
    command += ["--ssl-ca-certfile", str(files.ca), "--enable-supernode-auth", *SUPERLINK_FLAGS]
    command += ["--database", str(database)] if database else []
    with process(command, link.home, link.log) as child:

        def up() -> bool:
            assert child.poll() is None, link.said()
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", link.port)):
                return True
            return False

        until(up, 60, link.said)
        yield link


@contextlib.contextmanager
def supernode(
    device: DeviceFiles, address: str, folder: Path
) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    home = folder / f"node-{device.name}"
    home.mkdir()
    command = [str(BIN / "flower-supernode"), "--superlink", address]
    command += ["--root-certificates", str(device.ca)]
    command += ["--auth-supernode-private-key", str(device.key)]
    command += ["--host", "127.0.0.1", "--port", str(free_port())]
    log = home / "log"
    with process(command, home, log) as child:
        yield child, log
