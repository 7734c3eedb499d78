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

_TEMPLATE = """\
# Written by `tessera certs`: devices reach the fleet path of a SuperLink that listens on loopback.
# Start it as the user that owns the keys:  nginx -p {runtime}/ -c FOLDER/nginx.conf -e stderr
daemon off;
pid {runtime}/nginx.pid;
error_log stderr warn;
worker_processes auto;
events {{ worker_connections 4096; }}

http {{
    access_log off;
    server_tokens off;
    default_type application/octet-stream;
    client_body_temp_path {runtime}/body;
    proxy_temp_path {runtime}/proxy;
    fastcgi_temp_path {runtime}/fastcgi;
    uwsgi_temp_path {runtime}/uwsgi;
    scgi_temp_path {runtime}/scgi;
    limit_conn_zone $binary_remote_addr zone=per_address:10m;

    upstream superlink {{
        server {superlink};
        keepalive 32;
        # Shorter than the 5 s of the SuperLink's server, or requests meet a connection that closes.
        keepalive_timeout 4s;
    }}

    server {{
        listen {listen} ssl;
        ssl_certificate {certificate};
        ssl_certificate_key {key};
        ssl_protocols TLSv1.3;
        ssl_session_tickets off;

        # One object of a message; arrays travel in parts of 5 MiB. Larger is refused unread.
        client_max_body_size {body}m;
        client_header_timeout 15s;
        client_body_timeout 60s;
        send_timeout 60s;
        keepalive_timeout 75s;
        # Many devices may share an address. 503 is tried again by a device, 403 and 429 are not.
        limit_conn per_address 256;
        limit_conn_status 503;
        merge_slashes off;

        # $uri is decoded and normalised, and can only be one of these. Arguments are dropped.
        location ~ ^/v1/fleet/(?:{paths})$ {{
            limit_except POST {{ deny all; }}
            proxy_pass https://superlink$uri;
            proxy_http_version 1.1;
            proxy_set_header Host localhost;
            proxy_set_header Connection "";
            proxy_set_header X-Forwarded-For $remote_addr;
            proxy_set_header X-Forwarded-Proto https;
            proxy_ssl_protocols TLSv1.3;
            proxy_ssl_trusted_certificate {ca};
            proxy_ssl_verify on;
            proxy_ssl_name localhost;
            proxy_connect_timeout 5s;
            proxy_read_timeout 120s;
            # A request is read to its end before the SuperLink hears of it: no slow senders there.
            proxy_request_buffering on;
        }}
        location / {{ return 403; }}
    }}
}}
"""


@dataclass(frozen=True, kw_only=True)
class ProxySettings:
    """How the proxy listens and what it passes on."""

    superlink: str = "127.0.0.1:8000"
    """where Flower's SuperLink listens: loopback, HOST:PORT"""
    listen: str = "0.0.0.0"
    """address of this machine on which devices are served; :: for IPv6"""
    max_body_mib: int = 16
    """largest request that is read, in MiB"""


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
    listen = f"[{settings.listen}]" if ":" in settings.listen else settings.listen
    return _TEMPLATE.format(
        runtime=_quoted(runtime, bare=True),
        superlink=settings.superlink,
        listen=f"{listen}:{files.port}",
        certificate=_quoted(files.certificate),
        key=_quoted(files.key),
        ca=_quoted(files.ca),
        body=settings.max_body_mib,
        paths="|".join(FLEET_PATHS),
    )


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
