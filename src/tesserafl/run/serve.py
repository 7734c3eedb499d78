"""A run's server over Flower: its SuperLink, the devices that may join, the run itself.

    tessera serve
     |- flower-superlink    on loopback; starts the server app, which plays the run (deployed.py)
     |- nginx               shows devices the SuperLink's fleet path, and nothing else of it
     |- enrolment           registers devices that have a token

All of them end with this process, however it ends. What is needed to go on lies in the run folder.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

import tesserafl.engines.flower
from tesserafl.core.errors import CheckpointError, ConfigError, TesseraError
from tesserafl.run import certs, proxy
from tesserafl.run.children import free_port, program, running, tail_of
from tesserafl.run.deployed import AT_WORK, message_bytes_of
from tesserafl.run.files import read_json, write_json
from tesserafl.run.flower_env import SUPERLINK_FLAGS, environment
from tesserafl.run.follow import Following, num_events
from tesserafl.run.runner import Listener

_LINK = "tessera"
"""Flower's name of our SuperLink."""
_START_SECONDS = 60.0
_PAUSE = 0.5
_CALL_SECONDS = 300.0
"""That a command of Flower's has."""


@dataclass(frozen=True, kw_only=True)
class Link:
    """Where devices reach a server, and who may."""

    keys: Path | None = None
    """folder of keys (tessera certs): TLS, and registered devices alone. None: plain text, and only
    from this machine"""
    port: int = 8443
    """without keys: the port on this machine's loopback"""
    through_proxy: bool = True
    """with keys: nginx listens for devices, and the SuperLink on loopback alone; else the SuperLink
    listens where devices do, on loopback alone"""
    listen: str = "0.0.0.0"
    """with a proxy: the address of this machine on which it listens"""


def serve(folder: Path, link: Link, listener: Listener | None = None) -> dict[str, Any]:
    """Serve the run of a folder that `deployed.begin` wrote, from where it stands, to its end.

    Returns the summary.

    Raises:
        TesseraError: Flower is not installed, a port is taken, or the run failed.
    """
    summary = folder / "summary.json"
    if summary.exists():
        found: dict[str, Any] = read_json(summary)
        return found
    if link.keys is not None:
        link = replace(link, keys=link.keys.absolute())
    values = {name: str(v) if isinstance(v, Path) else v for name, v in asdict(link).items()}
    write_json(folder / "link.json", values)
    home = folder / "flower"
    home.mkdir(parents=True, exist_ok=True, mode=0o700)
    for left in ("error.json", AT_WORK):
        (folder / left).unlink(missing_ok=True)
    with opened(home, link, message_bytes_of(folder)) as (superlink, flower):
        if listener is not None:
            listener({"kind": "open", "text": invitation(link)})
        seen = num_events(folder)
        if seen and listener is not None:
            listener({"kind": "resume", "experiment": read_json(folder / "config.json")})
        Following(
            folder=folder,
            superlink=superlink,
            log=home / "superlink.log",
            flower=flower,
            seen=seen,
            listener=listener,
        ).to_the_end()
    return dict(read_json(summary))


def resume_serving(folder: Path, listener: Listener | None = None) -> dict[str, Any]:
    """Serve a run on that was served before, in the same way.

    Raises:
        CheckpointError: the folder is damaged.
        TesseraError: as `serve`.
    """
    try:
        link = TypeAdapter(Link).validate_python(read_json(folder / "link.json"))
    except ValidationError as error:
        raise CheckpointError(f"{folder / 'link.json'} is damaged: {error}") from error
    return serve(folder, link, listener)


@contextlib.contextmanager
def opened(
    home: Path, link: Link, message_bytes: int
) -> Iterator[tuple[subprocess.Popen[bytes], Flower]]:
    """Flower's server with all that devices reach, for the block.

    `message_bytes`: of tensors in one message, at most.

    Raises:
        TesseraError: Flower is not installed, or a port is taken.
    """
    with contextlib.ExitStack() as stack:
        superlink, address = stack.enter_context(_superlink(home, link))
        flower = Flower(home=home)
        if link.keys is not None:
            for name, key in certs.device_keys(link.keys).items():
                flower.register(name, key)
            stack.enter_context(_doors(link, address, flower, message_bytes))
        yield superlink, flower


@contextlib.contextmanager
def _superlink(home: Path, link: Link) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """Flower's long-running server, ready, and its address."""
    command = [program("flower-superlink"), *SUPERLINK_FLAGS, "--host", "127.0.0.1"]
    if link.keys is None:
        port = link.port
        trust: dict[str, Any] = {"insecure": True}
        command += ["--insecure"]
    else:
        files = certs.server_files(link.keys)
        port = free_port() if link.through_proxy else files.port
        trust = {"root-certificates": str(files.ca.absolute())}
        command += ["--ssl-certfile", str(files.certificate), "--ssl-keyfile", str(files.key)]
        command += ["--ssl-ca-certfile", str(files.ca), "--enable-supernode-auth"]
    address = f"127.0.0.1:{port}"
    with contextlib.closing(socket.socket()) as probe:
        if probe.connect_ex(("127.0.0.1", port)) == 0:
            raise ConfigError(f"port {port} of this machine is taken; end who listens there")
    values = {"superlink": {"default": _LINK, _LINK: {"address": address, **trust}}}
    (home / "config.toml").write_text(_toml(values), encoding="utf-8")
    log = home / "superlink.log"
    with running([*command, "--port", str(port)], environment(home), log) as process:
        until = time.monotonic() + _START_SECONDS
        while not _listens(port):
            if process.poll() is not None or time.monotonic() > until:
                raise TesseraError(f"Flower's SuperLink did not start: {tail_of(log)}")
            time.sleep(_PAUSE)
        yield process, address


def invitation(link: Link) -> str:
    """Where devices may join."""
    if link.keys is None:
        return f"Devices of this machine may join: tessera join 127.0.0.1:{link.port}"
    address = certs.server_files(link.keys).address
    return f"Devices may join at {address}, each with its folder: tessera join FOLDER"


@contextlib.contextmanager
def _doors(link: Link, address: str, flower: Flower, message_bytes: int) -> Iterator[None]:
    """What devices reach: the proxy, and the desk for those with a token."""
    from tesserafl.run.enrolment import Enrolment

    assert link.keys is not None
    files = certs.server_files(link.keys)
    with contextlib.ExitStack() as stack:
        if link.through_proxy:
            settings = proxy.ProxySettings(
                superlink=address, listen=link.listen, message_mib=message_bytes / (1 << 20)
            )
            stack.enter_context(proxy.running(files, settings))
        if (link.keys / "tokens.json").exists():
            host = link.listen if link.through_proxy else "127.0.0.1"
            stack.enter_context(
                Enrolment(
                    link.keys, host=host, port=files.enrol_port, on_registered=flower.register
                )
            )
        yield


@dataclass(frozen=True, kw_only=True)
class Flower:
    """Flower's command line, for our SuperLink."""

    home: Path

    def register(self, name: str, key: Path) -> None:
        """Let the device of a public key join."""
        answer = self._call("supernode", "register", str(key), _LINK, "--name", name)
        if not answer.get("success", False) and "already" not in str(answer):
            raise TesseraError(f"Flower did not register device {name!r}: {answer}")

    def start(self, folder: Path) -> str:
        """Start the server app; returns the run's number."""
        app = self.home / "app"
        shutil.rmtree(app, ignore_errors=True)
        shutil.copytree(Path(tesserafl.engines.flower.__file__).parent / "app", app)
        for cache in app.glob("**/__pycache__"):
            shutil.rmtree(cache)
        config = f"folder={json.dumps(str(folder.absolute()))}"
        answer = self._call("run", str(app), _LINK, "--run-config", config)
        if not answer.get("success", False):
            raise TesseraError(f"Flower did not start the run: {answer}")
        return str(answer["run-id"])

    def status(self, run: str) -> str:
        """Where a run stands, as `running` or `finished:failed`."""
        answer = self._call("ls", _LINK, "--run-id", run)
        runs = answer.get("runs", [])
        return str(runs[0]["status"]) if runs else "unknown"

    def _call(self, *arguments: str) -> dict[str, Any]:
        command = [program("flwr"), *arguments, "--format", "json"]
        try:
            done = subprocess.run(
                command,
                env=environment(self.home),
                capture_output=True,
                text=True,
                timeout=_CALL_SECONDS,
            )
        except subprocess.TimeoutExpired:
            return {"success": False, "error-message": f"no answer within {_CALL_SECONDS:g} s"}
        begin = done.stdout.find("{")
        try:
            answer: dict[str, Any] = json.JSONDecoder().raw_decode(done.stdout[max(begin, 0) :])[0]
        except ValueError:
            said = (done.stdout + done.stderr).strip()[-2000:]
            answer = {"success": False, "error-message": said}
        return answer


def _listens(port: int) -> bool:
    with contextlib.closing(socket.socket()) as probe:
        probe.settimeout(1.0)
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _toml(tables: Mapping[str, Any], path: str = "") -> str:
    """Nested tables of strings and booleans as TOML; JSON writes both the same way."""
    values = [f"{k} = {json.dumps(v)}" for k, v in tables.items() if not isinstance(v, Mapping)]
    text = "\n".join([f"[{path}]", *values, ""]) if path and values else ""
    for key, value in tables.items():
        if isinstance(value, Mapping):
            text += _toml(value, f"{path}.{key}" if path else key)
    return text
