"""nginx in front of Flower's SuperLink: devices reach the fleet path and nothing else.

Since flwr 1.41 one port serves devices, runs and users, and whoever holds the authority's
certificate, so every device, could submit a run on it. Therefore the SuperLink listens on loopback
only, and this proxy, with the same certificate, passes on the calls of a registered device, path by
path. A device signs a time and sends it with its key in headers of every request; they pass the
proxy unchanged, so the SuperLink authenticates devices as without it.
"""

from __future__ import annotations

import contextlib
import ipaddress
import math
import os
import re
import shutil
import socket
import ssl
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tesserafl.core.errors import ConfigError
from tesserafl.run.addresses import check_address
from tesserafl.run.certs import ServerFiles
from tesserafl.run.keyfiles import private_folder
from tesserafl.run.nginx import CONFIGURATION, LOCATION

FLEET_PATHS = (
    "activate-node",
    "confirm-message-received",
    "deactivate-node",
    "get-fab",
    "get-run",
    "pull-messages",
    "pull-object",
    "push-messages",
    "push-object",
    "send-node-heartbeat",
)
"""What a registered device calls, below /v1/fleet/ (flwr 1.41.0). `register-node` and
`unregister-node` are of devices without a key and stay closed."""

_PARTS, _REPLIES = "push-object", "push-messages"
"""The calls that bring a reply: its list of parts first, then each part. The list bounds the rest:
a SuperLink takes no part that is not on it, and one reply to a message."""
_SMALL_KIB = 64
"""Largest request of any other kind, which has a few hundred bytes."""
_PART_MIB, _MORE_PARTS = 5, 12
"""Of what Flower makes an array, and parts of a reply that are none of that: its records."""
_LIST_BYTES, _NAME_BYTES = 1024, 96
"""Of a list of parts at most: without its parts, and for each (64 letters and what frames them)."""


@dataclass(frozen=True, kw_only=True)
class ProxySettings:
    """How the proxy listens and what it passes on."""

    superlink: str = "127.0.0.1:8000"
    """where Flower's SuperLink listens: loopback, HOST:PORT"""
    listen: str = "0.0.0.0"
    """address of this machine on which devices are served; :: for IPv6"""
    max_body_mib: int = 16
    """largest request that is read, in MiB: a part of a reply"""
    message_mib: float = 32.0
    """largest message of the run (--message-bytes); a reply has as many parts as that needs"""


def render(files: ServerFiles, runtime: Path, settings: ProxySettings) -> str:
    """The configuration. `runtime`: a folder for nginx's own files, which it may write.

    Raises:
        ConfigError: the SuperLink is not on loopback, an address or a path that nginx cannot take.
    """
    host = check_address(settings.superlink).rpartition(":")[0].strip("[]")
    if host != "localhost" and not (_is_address(host) and ipaddress.ip_address(host).is_loopback):
        raise ConfigError(
            f"superlink: {settings.superlink} given; a SuperLink that others can reach takes runs "
            f"from every device, so it listens on 127.0.0.1, ::1 or localhost"
        )
    if not _is_address(settings.listen):
        raise ConfigError(f"listen: {settings.listen!r} is no IP address")
    if not 6 <= settings.max_body_mib <= 1024:
        raise ConfigError(
            f"max_body_mib: {settings.max_body_mib} given; 6 (a part of 5 MiB and its frame) to "
            f"1024 are allowed"
        )
    if not 0 < settings.message_mib <= 1 << 20:
        raise ConfigError(f"message_mib must be positive; got {settings.message_mib}")
    ca = _quoted(files.ca)
    bodies = {_PARTS: f"{settings.max_body_mib}m", _REPLIES: f"{_list_bytes(settings)}"}
    others = "|".join(path for path in FLEET_PATHS if path not in bodies)
    bodies[others] = f"{_SMALL_KIB}k"
    locations = [LOCATION.format(paths=p, body=size, ca=ca) for p, size in bodies.items()]
    listen = f"[{settings.listen}]" if ":" in settings.listen else settings.listen
    return CONFIGURATION.format(
        runtime=_quoted(runtime, bare=True),
        superlink=settings.superlink,
        listen=f"{listen}:{files.port}",
        certificate=_quoted(files.certificate),
        key=_quoted(files.key),
        locations="".join(locations),
    )


def _list_bytes(settings: ProxySettings) -> int:
    parts = math.ceil(settings.message_mib / _PART_MIB) + _MORE_PARTS
    return _LIST_BYTES + _NAME_BYTES * parts


def write(files: ServerFiles, settings: ProxySettings) -> Path:
    """Write FOLDER/nginx.conf anew, with nginx's own files in FOLDER/nginx; returns its path."""
    runtime = files.folder / "nginx"
    private_folder(runtime)
    path = files.folder / "nginx.conf"
    path.write_text(render(files, runtime, settings), encoding="utf-8")
    return path


def start_command(config: Path) -> list[str]:
    """How nginx is started with the configuration that `write` made, in the foreground."""
    runtime = config.absolute().parent / "nginx"
    return [program() or "nginx", "-p", f"{runtime}/", "-c", str(config.absolute()), "-e", "stderr"]


def program() -> str | None:
    """nginx's path, or None; Debian installs it where users' PATH does not look."""
    return shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/usr/local/sbin")


@contextlib.contextmanager
def running(
    files: ServerFiles, settings: ProxySettings, timeout_seconds: float = 10.0
) -> Iterator[subprocess.Popen[bytes]]:
    """nginx as a child process, serving until the block ends.

    Raises:
        ConfigError: nginx is not installed, or it does not start; its own words are in the message.
    """
    nginx = program()
    if nginx is None:
        raise ConfigError(
            "nginx is not installed; apt-get install nginx-light, or serve on loopback only"
        )
    host = "127.0.0.1" if settings.listen == "0.0.0.0" else settings.listen
    _check_free(settings.listen, files.port)
    with tempfile.TemporaryDirectory(prefix="tessera-proxy-") as name:
        runtime = Path(name)
        runtime.chmod(0o711)  # started by root, nginx works as another user in folders below
        config, log = runtime / "nginx.conf", runtime / "log"
        config.write_text(render(files, runtime, settings), encoding="utf-8")
        with log.open("wb") as told:
            child = subprocess.Popen(
                [nginx, "-p", name, "-c", str(config), "-e", "stderr"],
                stdin=subprocess.DEVNULL,
                stdout=told,
                stderr=told,
            )
        try:
            _await(child, host, files, log, timeout_seconds)
            yield child
        finally:
            child.terminate()
            try:
                child.wait(5)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()


def _check_free(listen: str, port: int) -> None:
    # nginx tries for seconds before it gives up, while another server of ours would answer for it.
    family = socket.AF_INET6 if ":" in listen else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((listen, port))
        except OSError as error:
            raise ConfigError(
                f"port {port} of {listen} cannot be served ({error.strerror}); end the process "
                f"that has it, or choose another port"
            ) from error


def _await(
    child: subprocess.Popen[bytes], host: str, files: ServerFiles, log: Path, seconds: float
) -> None:
    """Until the port answers with our certificate."""
    context = ssl.create_default_context(cafile=files.ca)
    ends = time.monotonic() + seconds
    while True:
        try:
            with (
                socket.create_connection((host, files.port), 1) as plain,
                context.wrap_socket(plain, server_hostname="localhost"),
            ):
                if child.poll() is None:
                    return
        except OSError:
            pass
        if child.poll() is not None or time.monotonic() > ends:
            said = log.read_text(encoding="utf-8", errors="replace").strip()[-2000:]
            raise ConfigError(
                f"nginx did not serve port {files.port} within {seconds:g} s: "
                f"{said or 'it said nothing'}"
            )
        time.sleep(0.05)


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def _quoted(path: Path, bare: bool = False) -> str:
    text = os.fspath(path.absolute())
    pattern = r"[\w/.,+@:-]+" if bare else r"[\w/.,+@: -]+"
    if not re.fullmatch(pattern, text, re.ASCII):
        raise ConfigError(f"{text}: nginx reads some of these characters; choose a plainer folder")
    return text if bare else f'"{text}"'
