"""The enrolment server: HTTPS on a port of its own, where a token is exchanged for a registration.

Small on purpose: two paths, one request a connection, every size, time and number bounded. It runs
in threads beside whatever serves the devices that have joined.
"""

from __future__ import annotations

import contextlib
import json
import socket
import ssl
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from types import TracebackType
from typing import Any

from pydantic import ValidationError

from tesserafl.core.errors import ConfigError, TrustError
from tesserafl.run import signing
from tesserafl.run.certs import device_keys, server_files
from tesserafl.run.enrol import CERTIFICATE_PATH, ENROL_PATH, Accepted, Request
from tesserafl.run.keyfiles import private_folder, write_new
from tesserafl.run.tokens import take_token

BODY_BYTES = 2048
"""Longest request that is read; a key and a secret are about 300 bytes."""
CONNECTIONS = 16
"""Served at once; more are closed unanswered."""
PATIENCE_SECONDS = 0.5
"""How long a connection waits for a place. A device makes two, one after the other, and the first
one's place is free only a moment after the device has its answer."""
REQUEST_SECONDS = 15.0
"""From the first byte of a connection to the last of its request."""
PER_MINUTE_OF_ADDRESS = 60
"""Requests of one address, two for a device that enrols; further ones are answered with 429."""
PER_MINUTE = 1000
"""Connections of all addresses; further ones are closed unanswered."""

OnRegistered = Callable[[str, Path], None]
"""Called with a device's name and the path of its public key, before the device is told that it may
join. If it raises, which it should tell its user itself, the device is asked to try again, and then
it is called again."""


class Enrolment:
    """The server as a context: it answers while the block runs.

    `port`: that of server.json where None. `on_registered` is called for keys that come while it
    runs, one at a time; those in `certs.device_keys` before it began are the caller's to register.

    Raises, on entry:
        TrustError: the folder's server files are missing or unusable.
        ConfigError: the port cannot be had.
    """

    def __init__(
        self, folder: Path, host: str, port: int | None, on_registered: OnRegistered
    ) -> None:
        self._folder, self._host, self._port = folder, host, port
        self._on_registered = on_registered
        self._one_at_a_time = threading.Lock()
        self._slots = threading.BoundedSemaphore(CONNECTIONS)
        self._pace = _Pace()
        self._stopped = threading.Event()
        self._open: set[socket.socket] = set()

    def __enter__(self) -> Enrolment:
        self._files = server_files(self._folder)
        self._registered = set(device_keys(self._folder))
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.minimum_version = ssl.TLSVersion.TLSv1_3
        self._context.load_cert_chain(self._files.certificate, self._files.key)
        port = self._files.enrol_port if self._port is None else self._port
        family = socket.AF_INET6 if ":" in self._host else socket.AF_INET
        try:
            self._listening = socket.create_server((self._host, port), family=family)
        except OSError as error:
            raise ConfigError(
                f"the enrolment server cannot have port {port} of {self._host} "
                f"({error.strerror}); end the process that has it, or choose another port"
            ) from error
        self._listening.settimeout(0.2)
        self._accepting = threading.Thread(target=self._accept, name="enrolment", daemon=True)
        self._accepting.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stopped.set()
        self._accepting.join()
        self._listening.close()
        for guard in list(self._open):
            _cut(guard)
        for _ in range(CONNECTIONS):  # until the last has let go
            self._slots.acquire(timeout=REQUEST_SECONDS)

    def register(self, request: Request) -> Accepted:
        """Exchange a request for a name.

        Raises:
            TrustError: the token or the key is refused.
        """
        try:
            secret = bytes.fromhex(request.secret)
        except ValueError:
            raise TrustError("a secret that is not hexadecimal") from None
        public = signing.public_line(request.public_key.encode("utf-8", "replace"), "")
        with self._one_at_a_time:
            name = take_token(self._folder, secret, public.decode("ascii").strip())
            line = signing.public_line(public, name)
            bundle = self._folder / "devices" / name
            private_folder(bundle)
            path = bundle / "device.pub"
            if not path.exists():
                write_new(path, line, 0o644)
            elif path.read_bytes() != line:
                raise TrustError(f"a device called {name} has another key; ask for another name")
            if name not in self._registered:
                self._on_registered(name, path)
                self._registered.add(name)
        return Accepted(name=name, server=self._files.address)

    def certificate(self) -> bytes:
        """The authority's certificate, PEM."""
        return self._files.ca.read_bytes()

    def busy(self, address: str) -> bool:
        """Whether this address has asked too often."""
        return self._pace.too_fast(address)

    def _accept(self) -> None:
        while not self._stopped.is_set():
            try:
                connection, (address, *_) = self._listening.accept()
            except TimeoutError:
                continue
            except OSError:
                time.sleep(0.1)  # out of descriptors, or the peer has gone already
                continue
            if not self._pace.in_all() or not self._slots.acquire(timeout=PATIENCE_SECONDS):
                connection.close()
                continue
            thread = threading.Thread(target=self._serve, args=(connection, address), daemon=True)
            try:
                thread.start()
            except RuntimeError:  # the machine has no thread left
                connection.close()
                self._slots.release()

    def _serve(self, connection: socket.socket, address: str) -> None:
        # The handshake is here, not where connections are accepted: a silent peer stops nobody.
        try:
            with connection, _deadline(connection, self._open) as deadline:
                connection.settimeout(REQUEST_SECONDS)
                secured = self._context.wrap_socket(connection, server_side=True)
                with secured:
                    seen: Any = (self, deadline)
                    _Handler(secured, address, seen)
                    _linger(secured)
        except (OSError, ValueError):
            pass  # whatever a peer may send or not send
        finally:
            self._slots.release()


class _Handler(BaseHTTPRequestHandler):
    """One request. `server` is the pair of the Enrolment and the connection's timer."""

    server_version = "enrolment"
    sys_version = ""
    server: Any

    def do_GET(self) -> None:
        enrolment, _ = self.server
        if self._asks_too_often(enrolment):
            return
        if self.path != CERTIFICATE_PATH:
            self._answer(404, {"error": "no such path"})
            return
        self._send(200, "application/x-pem-file", enrolment.certificate())

    def do_POST(self) -> None:
        enrolment, deadline = self.server
        if self._asks_too_often(enrolment):
            return
        length = self.headers.get("Content-Length", "")
        if self.path != ENROL_PATH:
            self._answer(404, {"error": "no such path"})
        elif not (length.isascii() and length.isdigit()) or "Transfer-Encoding" in self.headers:
            self._answer(411, {"error": "Content-Length is needed"})
        elif len(length) > 6 or int(length) > BODY_BYTES:
            self._answer(413, {"error": f"at most {BODY_BYTES} bytes are read"})
        else:
            data = self.rfile.read(int(length))
            deadline.cancel()  # registering may take longer than a request may
            self._register(enrolment, data)

    def _register(self, enrolment: Enrolment, data: bytes) -> None:
        try:
            accepted = enrolment.register(Request.model_validate_json(data))
        except ValidationError:
            self._answer(400, {"error": "not a request of ours"})
        except TrustError as error:
            self._answer(403, {"error": str(error)})
        except Exception:  # of on_registered, which tells its user; this server goes on
            self._answer(503, {"error": "the server could not register the key"})
        else:
            self._answer(200, accepted.model_dump())

    def _asks_too_often(self, enrolment: Enrolment) -> bool:
        too_often = enrolment.busy(str(self.client_address))
        if too_often:
            self._answer(429, {"error": "too many requests"})
        return too_often

    def _answer(self, status: int, value: dict[str, str]) -> None:
        self._send(status, "application/json", json.dumps(value).encode())

    def _send(self, status: int, kind: str, data: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        """Silence: a flood of requests must not fill the server's log."""


class _Pace:
    """Counts of the present minute. One lock, so that no two threads see the same last place."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._minute = 0
        self._counts: Counter[str] = Counter()

    def too_fast(self, address: str) -> bool:
        return not self._counted(f"of {address}", PER_MINUTE_OF_ADDRESS)

    def in_all(self) -> bool:
        return self._counted("all", PER_MINUTE)

    def _counted(self, what: str, limit: int) -> bool:
        with self._lock:
            minute = int(time.monotonic() // 60)
            if minute != self._minute:
                self._minute = minute
                self._counts.clear()
            self._counts[what] += 1
            return self._counts[what] <= limit


@contextlib.contextmanager
def _deadline(connection: socket.socket, opened: set[socket.socket]) -> Iterator[threading.Timer]:
    """A timer that cuts the connection, through a second handle as TLS takes over the first."""
    guard = connection.dup()
    opened.add(guard)
    timer = threading.Timer(REQUEST_SECONDS, _cut, (guard,))
    timer.daemon = True
    timer.start()
    try:
        yield timer
    finally:
        timer.cancel()
        opened.discard(guard)
        guard.close()


def _linger(connection: ssl.SSLSocket) -> None:
    # Closing with bytes unread resets the connection, and the peer might miss why it was refused.
    connection.settimeout(1.0)
    connection.shutdown(socket.SHUT_WR)
    left = 16 * BODY_BYTES
    while left > 0 and (data := connection.recv(4096)):
        left -= len(data)


def _cut(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
