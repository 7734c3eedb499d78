"""A device: a resident that does the work, and a SuperNode that keeps the line to the server.

    tessera join
     |- resident            in this process: model, data, memories; on a socket for its owner alone
     `- flower-supernode    fetches messages; for each, a short process asks the resident

The SuperNode is started again whenever it ends. A server that still believes in the last one
refuses it for about a minute.
"""

from __future__ import annotations

import contextlib
import ipaddress
import json
import logging
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Protocol, cast

from tesserafl.core.errors import ConfigError, MessageError
from tesserafl.engines.attendance import Disowned
from tesserafl.engines.orders import Envelope, read_envelope, write_envelope
from tesserafl.run import certs
from tesserafl.run.addresses import check_address, check_name
from tesserafl.run.children import child, end, free_port, program, tail_of
from tesserafl.run.enrol import PREFIX, enrol
from tesserafl.run.files import alone_in
from tesserafl.run.flower_env import SPARING, environment
from tesserafl.run.holding import Local
from tesserafl.run.resident import Resident
from tesserafl.run.sparing import SPARINGLY

_log = logging.getLogger(__name__)

AGAIN_SECONDS = 60.0
"""Between two starts of a SuperNode: a server misses a node after 52 to 54 s (two heartbeats)."""
_PAUSE = 0.5
_IDLE_SECONDS = 1.0
"""That nobody asks for something, until `idle` is called."""


@dataclass(frozen=True, kw_only=True)
class Line:
    """The way to the server."""

    address: str
    """HOST:PORT"""
    keys: certs.DeviceFiles | None
    """None: plain text, to this machine alone"""

    def name_of(self, asked: str) -> str:
        """The device's name: the one that its key was made for, else the asked one.

        Raises:
            ConfigError: there is none, or another was asked for.
        """
        if self.keys is None:
            return check_name(asked or "")
        if asked not in ("", self.keys.name):
            raise ConfigError(
                f"the keys in {self.keys.folder} are {self.keys.name!r}'s, not {asked!r}'s; leave "
                f"--name away"
            )
        return self.keys.name

    def folder_of(self, name: str) -> Path:
        """Where the device keeps what it must, unless told otherwise."""
        return Path(f"{name}-state") if self.keys is None else self.keys.folder / "state"


def line_to(place: str, name: str = "") -> Line:
    """The line to a server: a bundle of `tessera certs`, a token, or HOST:PORT on this machine.

    With a token the device's bundle is made in the folder ./NAME, once.

    Raises:
        ConfigError: it is none of them, or a server elsewhere without keys.
        TrustError: the bundle is damaged, or the token is not good.
    """
    folder = Path(place)
    if place.startswith(PREFIX):
        folder = Path(check_name(name))
        if not (folder / "device.json").exists():
            enrol(place, folder)
    if place.startswith(PREFIX) or folder.is_dir():
        files = certs.device_files(folder)
        return Line(address=files.server, keys=files)
    host = check_address(place).rpartition(":")[0].strip("[]")
    if host != "localhost" and not _is_loopback(host):
        raise ConfigError(
            f"{place} is another machine, and without keys everybody could read along and join; "
            f"make some there with tessera certs, and give the device's folder: tessera join FOLDER"
        )
    return Line(address=place, keys=None)


def join(
    line: Line,
    name: str,
    folder: Path,
    local: Local,
    *,
    memory_mib: float | None = None,
    once: bool = False,
    again_seconds: float = AGAIN_SECONDS,
) -> None:
    """Be a device until a signal ends it, or with `once` until the server says goodbye.

    `folder` is what the device keeps between restarts.

    Raises:
        CheckpointError: another device works in the folder.
        ConfigError: Flower is not installed.
    """
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    command = supernode(line)
    resident = Resident(name=name, folder=folder, local=local, memory_mib=memory_mib)
    with alone_in(folder), listening(resident) as path, stopped_by_signals() as stop:

        def over() -> bool:
            return stop.is_set() or (once and resident.over)

        keep_up([*command, *asking(path)], folder, over, again_seconds)


def supernode(line: Line) -> list[str]:
    """The command that keeps the line to the server; ConfigError if Flower is not installed."""
    command = [
        *SPARINGLY,
        program("flower-supernode"),
        "--superlink",
        line.address,
        "--host",
        "127.0.0.1",
    ]
    if line.keys is None:
        return [*command, "--insecure"]
    command += ["--root-certificates", str(line.keys.ca)]
    return [*command, "--auth-supernode-private-key", str(line.keys.key)]


def asking(resident: Path) -> list[str]:
    """Arguments by which a SuperNode's messages go to the resident that listens there."""
    return ["--node-config", f"resident={json.dumps(str(resident))}"]


def keep_up(
    command: list[str], folder: Path, over: Callable[[], bool], again_seconds: float
) -> None:
    """Start the SuperNode, and again when it has ended."""
    log = folder / "supernode.log"
    while not over():
        begun = time.monotonic()
        port = ["--port", str(free_port())]
        variables = {**SPARING, **environment(folder / "flower")}
        process = child([*command, *port], variables, log)
        try:
            while process.poll() is None and not over():
                time.sleep(_PAUSE)
        finally:
            _end_politely(process)
        if over():
            return
        wait = max(0.0, again_seconds - (time.monotonic() - begun))
        _log.warning("the SuperNode ended; again in %.0f s: %s", wait, tail_of(log, 400))
        until = time.monotonic() + wait
        while time.monotonic() < until and not over():
            time.sleep(_PAUSE)


def _end_politely(process: subprocess.Popen[bytes]) -> None:
    """By an interrupt, on which a SuperNode tells its server: it may come back at once."""
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(10.0)
    end(process)


@contextlib.contextmanager
def listening(resident: Resident) -> Iterator[Path]:
    """Answer who connects to a socket of this user's alone, one after another, in a thread."""
    # Not in the device's folder: the path of a socket has 107 characters at most.
    with tempfile.TemporaryDirectory(prefix="tessera-") as place:
        path = Path(place) / "resident"
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as server:
            server.bind(str(path))
            server.listen(8)
            thread = threading.Thread(target=answer_at, args=(server, resident), daemon=True)
            thread.start()
            yield path
            with contextlib.suppress(OSError):
                server.shutdown(socket.SHUT_RDWR)
            thread.join(5.0)


class Answers(Protocol):
    """Somebody who answers orders: a device's resident, or an edge's."""

    def answer(self, envelope: Envelope) -> Envelope:
        """The answer to an order."""
        ...


def answer_at(
    server: socket.socket, resident: Answers, idle: Callable[[], None] | None = None
) -> None:
    """Answer who connects, one after another, until the socket is closed.

    `idle` is called about once a second while nobody does.
    """
    server.settimeout(None if idle is None else _IDLE_SECONDS)
    while True:
        try:
            connection, _ = server.accept()
        except TimeoutError:
            if idle is not None:
                idle()
            continue
        except OSError:  # closed
            return
        with connection, connection.makefile("rwb") as both:
            pipe = cast(IO[bytes], both)
            try:
                # In a list, so that nobody keeps its parcels while it is answered.
                if orders := [order for order in [read_envelope(pipe)] if order is not None]:
                    write_envelope(pipe, resident.answer(orders.pop()))
            except MessageError as error:
                _log.warning("a message was refused: %s", error)
            except OSError as error:  # who asked was ended; it is asked again
                _log.warning("nobody waits for an answer any more: %s", error)
            except Disowned:
                raise
            except Exception:
                _log.exception("this device failed at a message; the server hears that it crashed")


@contextlib.contextmanager
def stopped_by_signals() -> Iterator[threading.Event]:
    """An event that SIGINT and SIGTERM set."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    kinds = (signal.SIGINT, signal.SIGTERM)
    before = {kind: signal.signal(kind, lambda *_: stop.set()) for kind in kinds}
    try:
        yield stop
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
