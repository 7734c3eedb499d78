"""An edge: a device to the cloud, and a server to devices of its own.

    tessera edge
     |- flower-supernode    fetches the cloud's messages; for each, a short process asks the socket
     |- flower-superlink    for the edge's devices; starts the server app, whose grid reaches them
     |   `- server app      listens on the socket: the edge's resident (run/edge.py)
     `- nginx, enrolment    as beside any server (run/serve.py)

All of them end with this process, however it ends. What is needed to go on lies in its folder.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import signal
import socket
import subprocess
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from tesserafl.core.errors import CheckpointError, TesseraError
from tesserafl.engines.attendance import Disowned, Post
from tesserafl.run.children import die_with_parent, tail_of
from tesserafl.run.edge import EdgeResident
from tesserafl.run.files import alone_in, read_json, write_json
from tesserafl.run.guests import GUESTS
from tesserafl.run.holding import Local
from tesserafl.run.hosting import Hosting
from tesserafl.run.join import (
    AGAIN_SECONDS,
    Line,
    answer_at,
    asking,
    keep_up,
    stopped_by_signals,
    supernode,
)
from tesserafl.run.serve import Flower, Link, invitation, opened

_log = logging.getLogger(__name__)

_EDGE, _OVER, _ERROR = "edge.json", "over.json", "error.json"
_APP = "app.lock"
"""Held by the server app as long as it is there, whatever it ends of."""
_MOST_LOSSES = 5
"""Of the server app, after which the edge gives up."""
_START_SECONDS = 120.0
_PAUSE = 0.5


@dataclass(frozen=True, kw_only=True)
class _Edge:
    """What edge.json tells the server app."""

    name: str
    socket: str
    """Where it listens."""
    hosting: Hosting
    local: Local


def host(
    line: Line,
    name: str,
    folder: Path,
    link: Link,
    hosting: Hosting,
    local: Local,
    *,
    once: bool = False,
    again_seconds: float = AGAIN_SECONDS,
) -> None:
    """Be an edge until a signal ends it, or with `once` until the cloud says goodbye.

    Args:
        line: to the cloud.
        name: of the edge.
        folder: what it keeps between restarts.
        link: where its devices reach it.
        hosting: how it serves them.
        local: where a pre-trained model lies on this machine.
        once: whether to end with the run.
        again_seconds: between two starts of the SuperNode.

    Raises:
        CheckpointError: another process works in the folder.
        TesseraError: Flower is not installed, a port is taken, or the server app failed.
    """
    folder = folder.absolute()
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    command = supernode(line)
    with alone_in(folder), contextlib.ExitStack() as stack:
        stop = stack.enter_context(stopped_by_signals())
        for left in (_OVER, _ERROR):
            (folder / left).unlink(missing_ok=True)
        # Not in the folder: the path of a socket has 107 characters at most.
        place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tessera-")))
        edge = _Edge(name=name, socket=str(place / "edge"), hosting=hosting, local=local)
        write_json(folder / _EDGE, TypeAdapter(_Edge).dump_python(edge, mode="json"))
        home = folder / "below"
        home.mkdir(exist_ok=True, mode=0o700)
        superlink, flower = stack.enter_context(opened(home, link, hosting.message_bytes))
        _log.info("%s", invitation(link))
        flower.start(folder)
        watched = _Watched(folder=folder, superlink=superlink, flower=flower)
        until = time.monotonic() + _START_SECONDS
        while not Path(edge.socket).exists():
            watched.look()
            if stop.is_set():
                return
            if time.monotonic() > until:
                raise TesseraError(f"the server app did not start: {tail_of(home / _LOG)}")
            time.sleep(_PAUSE)

        def over() -> bool:
            watched.look()
            return stop.is_set() or (once and (folder / _OVER).exists())

        keep_up([*command, *asking(Path(edge.socket))], folder, over, again_seconds)


_LOG = "superlink.log"


@dataclass(kw_only=True)
class _Watched:
    """The server app and its SuperLink, seen from outside."""

    folder: Path
    superlink: subprocess.Popen[bytes]
    flower: Flower
    told: int = 0
    losses: int = 0
    there: bool = False
    """Whether the server app was there when it was looked at last."""

    def look(self) -> None:
        """Say who has come; raise TesseraError if the server app is at its end."""
        if (self.folder / _ERROR).exists():
            raise TesseraError(str(read_json(self.folder / _ERROR)["text"]))
        if self.superlink.poll() is not None:
            log = self.folder / "below" / _LOG
            raise TesseraError(f"Flower's SuperLink ended: {tail_of(log)}")
        self._keep_app()
        lines = [
            line
            for book in sorted(self.folder.glob(f"*/{GUESTS}"))
            for line in book.read_bytes().split(b"\n")[:-1]
        ]
        for line in lines[self.told :]:
            guest = json.loads(line)
            _log.info("%s %s", guest["device"], guest["text"])
        self.told = len(lines)

    def _keep_app(self) -> None:
        """Start the server app again if Flower has lost it."""
        was, self.there = self.there, _is_held(self.folder / _APP)
        if not was or self.there:
            return
        self.losses += 1
        if self.losses > _MOST_LOSSES:
            log = self.folder / "below" / _LOG
            raise TesseraError(f"the server app ends again and again: {tail_of(log)}")
        _log.warning("the server app has ended; it is started again")
        self.flower.start(self.folder)


def _is_held(lock: Path) -> bool:
    """Whether a process holds a lock."""
    if not lock.exists():
        return False
    with lock.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def is_edge(folder: Path) -> bool:
    """Whether a folder is an edge's."""
    return (folder / _EDGE).exists()


def edge_noted(post: Post, folder: Path) -> None:
    """Be an edge's server app: answer the cloud until its process is ended.

    Errors are written into the folder, since nobody sees this process.
    """
    die_with_parent(signal.SIGKILL)
    try:
        values = read_json(folder / _EDGE)
        try:
            edge = TypeAdapter(_Edge).validate_python(values)
        except ValidationError as error:
            raise CheckpointError(f"{folder / _EDGE} is damaged: {error}") from error
        resident = EdgeResident(
            name=edge.name, folder=folder, post=post, hosting=edge.hosting, local=edge.local
        )
        with (
            (folder / _APP).open("wb") as lock,
            socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as server,
        ):
            fcntl.flock(lock, fcntl.LOCK_EX)  # after the one before has ended
            Path(edge.socket).unlink(missing_ok=True)
            server.bind(edge.socket)
            server.listen(8)
            answer_at(server, _Noting(resident=resident, folder=folder), resident.idle)
    except Disowned:  # another process is started for the edge
        raise
    except (TesseraError, OSError) as error:
        write_json(folder / _ERROR, {"text": str(error)})
        raise


@dataclass(kw_only=True)
class _Noting:
    """A resident whose end of a run shows in the folder."""

    resident: EdgeResident
    folder: Path

    def answer(self, envelope: Any) -> Any:
        """The resident's answer."""
        before, answer = self.resident.over, self.resident.answer(envelope)
        if self.resident.over and not before:
            write_json(self.folder / _OVER, asdict(self.resident.hosting))
        elif before and not self.resident.over:
            (self.folder / _OVER).unlink(missing_ok=True)
        return answer
