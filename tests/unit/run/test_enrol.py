"""Join tokens and the enrolment server, over real TLS on loopback."""

from __future__ import annotations

import contextlib
import http.client
import json
import random
import shutil
import socket
import ssl
import stat
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from tesserafl.core.errors import ConfigError, TesseraError, TrustError
from tesserafl.run import certs, enrolment, signing, tokens
from tesserafl.run.enrol import Token, create_token, enrol, read_token
from tesserafl.run.enrolment import Enrolment

pytest.importorskip("cryptography", reason="keys need the extra `flower`")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("enrol") / "keys"
    certs.create(folder, hosts=["127.0.0.1"], enrol_port=free_port())
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made, tmp_path / "keys")
    return tmp_path / "keys"


@pytest.fixture
def told() -> list[tuple[str, str]]:
    return []


@pytest.fixture
def served(folder: Path, told: list[tuple[str, str]]) -> Iterator[Enrolment]:
    with Enrolment(
        folder, "127.0.0.1", None, lambda name, path: told.append((name, path.read_text()))
    ) as server:
        yield server


def ask(
    folder: Path,
    method: str,
    path: str,
    body: bytes | None = None,
    headers: dict[str, str] | None = None,
) -> tuple[int, bytes]:
    files = certs.server_files(folder)
    context = ssl.create_default_context(cafile=files.ca)
    connection = http.client.HTTPSConnection(
        "127.0.0.1", files.enrol_port, context=context, timeout=10
    )
    with contextlib.closing(connection):
        connection.request(method, path, body, headers or {})
        answer = connection.getresponse()
        return answer.status, answer.read()


def shown(secret: str, public: bytes) -> bytes:
    return json.dumps({"secret": secret, "public_key": public.decode().strip()}).encode()


def test_a_device_with_a_token_needs_no_files(
    folder: Path, served: Enrolment, told: list[tuple[str, str]], tmp_path: Path
) -> None:
    token = create_token(folder, "alice")
    assert len(token) < 130 and token.split() == [token]
    files = enrol(f" {token}\n", tmp_path / "device")
    assert (files.name, files.server) == ("alice", "127.0.0.1:8443")
    assert files.ca.read_bytes() == (folder / "ca.crt").read_bytes()
    assert told == [("alice", files.public.read_text())]
    assert certs.device_keys(folder)["alice"].read_bytes() == files.public.read_bytes()
    assert stat.S_IMODE(files.key.stat().st_mode) == 0o600
    # The private key was made on the device and is nowhere on the server.
    middle = files.key.read_bytes().splitlines()[3]
    assert not [p for p in folder.rglob("*") if p.is_file() and middle in p.read_bytes()]
    with pytest.raises(TrustError, match="belongs to a device already"):
        enrol(token, tmp_path / "device")


def test_a_token_is_of_the_first_key(
    folder: Path, served: Enrolment, told: list[tuple[str, str]], tmp_path: Path
) -> None:
    token = create_token(folder, "alice")
    enrol(token, tmp_path / "first")
    with pytest.raises(TrustError, match="refuses the token: used already by another key"):
        enrol(token, tmp_path / "second")
    assert len(told) == 1
    # The same key may ask again: its answer was lost. The device is registered once.
    (tmp_path / "first/device.json").unlink()
    assert enrol(token, tmp_path / "first").name == "alice"
    assert len(told) == 1


def test_a_failure_to_register_is_tried_again(folder: Path, tmp_path: Path) -> None:
    calls: list[str] = []

    def register(name: str, path: Path) -> None:
        calls.append(name)
        if len(calls) == 1:
            raise RuntimeError("secret detail of the server")

    token = create_token(folder, "alice")
    with Enrolment(folder, "127.0.0.1", None, register):
        with pytest.raises(ConfigError, match="could not register the key; try again") as caught:
            enrol(token, tmp_path / "device")
        assert "detail" not in str(caught.value)
        assert enrol(token, tmp_path / "device").name == "alice"
    assert calls == ["alice", "alice"]


def test_of_two_at_once_one_gets_the_name(
    folder: Path, served: Enrolment, told: list[tuple[str, str]], tmp_path: Path
) -> None:
    token = create_token(folder, "alice")
    outcomes: list[str] = []

    def join(number: int) -> None:
        try:
            outcomes.append(enrol(token, tmp_path / str(number)).name)
        except TrustError as error:
            outcomes.append("refused" if "another key" in str(error) else str(error))

    all_at_once([partial(join, number) for number in range(6)])
    assert sorted(outcomes) == ["alice"] + ["refused"] * 5
    assert len(told) == 1


def all_at_once(works: list[Callable[[], object]]) -> None:
    threads = [threading.Thread(target=work) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_no_token_is_lost_when_many_are_made_at_once(folder: Path) -> None:
    names = [f"device-{number}" for number in range(12)]
    all_at_once([partial(create_token, folder, name) for name in names])
    assert set(json.loads((folder / "tokens.json").read_text())["tokens"]) == set(names)


def test_devices_are_registered_one_at_a_time(folder: Path, tmp_path: Path) -> None:
    inside, most = [0], [0]

    def register(name: str, path: Path) -> None:
        inside[0] += 1
        most[0] = max(most[0], inside[0])
        time.sleep(0.2)
        inside[0] -= 1

    made = {name: create_token(folder, name) for name in ("a", "b", "c")}
    with Enrolment(folder, "127.0.0.1", None, register):
        all_at_once([partial(enrol, token, tmp_path / name) for name, token in made.items()])
    assert set(certs.device_keys(folder)) == {"a", "b", "c"} and most == [1]


def test_secrets_are_not_kept_and_expire(
    folder: Path, served: Enrolment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = create_token(folder, "alice", days=1)
    kept = (folder / "tokens.json").read_text()
    secret = read_token(token).secret
    assert secret.hex() not in kept and token not in kept
    now = time.time()
    monkeypatch.setattr(tokens.time, "time", lambda: now + 86401)
    with pytest.raises(TrustError, match="unknown or expired"):
        enrol(token, tmp_path / "device")
    monkeypatch.undo()
    assert enrol(token, tmp_path / "device").name == "alice"


def test_a_new_token_of_a_name_ends_the_old_one(
    folder: Path, served: Enrolment, tmp_path: Path
) -> None:
    old, new = create_token(folder, "alice"), create_token(folder, "alice")
    other = create_token(folder, "bob")
    with pytest.raises(TrustError, match="unknown or expired"):
        enrol(old, tmp_path / "old")
    assert enrol(other, tmp_path / "bob").name == "bob"
    assert enrol(new, tmp_path / "new").name == "alice"
    with pytest.raises(TrustError, match="has a key already"):
        create_token(folder, "alice")
    for days in (0, -1, 366, float("nan")):
        with pytest.raises(ConfigError, match="days"):
            create_token(folder, "carol", days)


def test_another_server_gets_neither_the_secret_nor_a_device(folder: Path, tmp_path: Path) -> None:
    # Somebody in between: right address, own authority.
    port = certs.server_files(folder).enrol_port
    certs.create(tmp_path / "evil", hosts=["127.0.0.1"], enrol_port=port)
    token = create_token(folder, "alice")
    heard: list[enrolment.Request] = []
    evil = Enrolment(tmp_path / "evil", "127.0.0.1", None, lambda name, path: None)
    evil.register = heard.append  # type: ignore[method-assign,assignment]
    with evil, pytest.raises(TrustError, match="shows another authority than the token's"):
        enrol(token, tmp_path / "device")
    # A cleverer one shows our authority's certificate, which is no secret, but not its key.
    authority = (folder / "ca.crt").read_bytes()
    evil = Enrolment(tmp_path / "evil", "127.0.0.1", None, lambda name, path: None)
    evil.register = heard.append  # type: ignore[method-assign,assignment]
    evil.certificate = lambda: authority  # type: ignore[method-assign]
    with evil, pytest.raises(TrustError, match="cannot show that it is the token's server"):
        enrol(token, tmp_path / "device")
    assert heard == [] and not (tmp_path / "device/device.json").exists()


def test_a_certificate_for_another_host_is_refused(folder: Path, tmp_path: Path) -> None:
    # The authority signed it, but for another server: here the address in the token is changed.
    files = certs.server_files(folder)
    (folder / "server.crt").unlink()
    signed = signing.server_certificate(
        (folder / "ca.key").read_bytes(),
        files.ca.read_bytes(),
        files.key.read_bytes(),
        ["elsewhere.example.org"],
        30,
    )
    files.certificate.write_bytes(signed)
    token = create_token(folder, "alice")
    with (
        Enrolment(folder, "127.0.0.1", None, lambda name, path: None),
        pytest.raises(TrustError, match="cannot show that it is the token's server"),
    ):
        enrol(token, tmp_path / "device")


def test_a_damaged_token_is_noticed_before_anything_is_sent() -> None:
    token = Token(address="lab:8444", fingerprint=bytes(range(32)), secret=b"s" * 16).text()
    assert read_token(token) == Token(
        address="lab:8444", fingerprint=bytes(range(32)), secret=b"s" * 16
    )
    for position in range(9, len(token)):
        other = "A" if token[position] != "A" else "B"
        with pytest.raises(TesseraError):
            read_token(token[:position] + other + token[position + 1 :])
    for bad in ("", "tessera1-", token[:-1], token[9:], "tessera2-" + token[9:], token + "\u00e9"):
        with pytest.raises(TrustError, match="token"):
            read_token(bad)


def test_no_server_is_an_error_that_says_so(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"does not answer.*firewall"):
        enrol(create_token(folder, "alice"), tmp_path / "device")


def test_malformed_requests_are_refused_and_harm_nobody(
    folder: Path, served: Enrolment, told: list[tuple[str, str]], tmp_path: Path
) -> None:
    token = create_token(folder, "alice")
    secret = read_token(token).secret.hex()
    _, public = signing.device_pair("x")
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    others = [
        kind.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
        for kind in (ed25519.Ed25519PrivateKey.generate(), ec.generate_private_key(ec.SECP256R1()))
    ]
    refused = {
        400: [
            b"",
            b"{",
            b"[]",
            b"null",
            b'{"secret": 1, "public_key": 2}',
            b"\xff\xfe",
            shown(secret, public)[:-1] + b', "name": "bob"}',
        ],
        403: [
            shown("zz", public),
            shown("00" * 16, public),
            shown(secret + "00", public),
            shown(secret, b"ssh-rsa AAAA"),
            shown(secret, public + public),
            shown(secret, b""),
            *(shown(secret, other) for other in others),
        ],
        413: [b"x" * 2049],
    }
    for status, bodies in refused.items():
        for body in bodies:
            assert ask(folder, "POST", "/v1/enrol", body)[0] == status, body
    assert ask(folder, "POST", "/v1/enrol/", shown(secret, public))[0] == 404
    assert ask(folder, "GET", "/v1/../tokens.json")[0] == 404
    assert ask(folder, "PUT", "/v1/enrol", b"x")[0] == 501
    chunked = {"Transfer-Encoding": "chunked", "Content-Length": "5"}
    assert ask(folder, "POST", "/v1/enrol", b"0\r\n\r\n", chunked)[0] == 411
    assert not told and not certs.device_keys(folder)
    assert enrol(token, tmp_path / "device").name == "alice"  # the token is still good


def test_garbage_ends_nothing(folder: Path, served: Enrolment, tmp_path: Path) -> None:
    files = certs.server_files(folder)
    context = ssl.create_default_context(cafile=files.ca)
    threads = threading.active_count()
    draws = random.Random(0)
    for number in range(60):
        raw = draws.randbytes(draws.choice([1, 100, 5000]))
        text = b"POST /v1/enrol HTTP/1.1\r\nContent-Length: " + raw[:20] + b"\r\n\r\n" + raw
        sent = draws.choice([raw, text, b"GET /v1/ca.crt\r\n\r\n", b"X" * 70000, b"A: b\r\n" * 200])
        with contextlib.suppress(OSError):
            plain = socket.create_connection(("127.0.0.1", files.enrol_port), 0.3)
            secured = number % 2
            with context.wrap_socket(plain, server_hostname="127.0.0.1") if secured else plain as s:
                s.sendall(sent)
                if draws.random() < 0.5:
                    s.recv(100)
    ends = time.monotonic() + 10
    while threading.active_count() > threads and time.monotonic() < ends:
        time.sleep(0.05)
    assert threading.active_count() <= threads  # no place stays taken
    token = create_token(folder, "alice")
    served._pace._counts.clear()
    assert enrol(token, tmp_path / "device").name == "alice"


def test_silent_and_slow_peers_stop_nobody(
    folder: Path, told: list[tuple[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = create_token(folder, "alice")
    files = certs.server_files(folder)
    context = ssl.create_default_context(cafile=files.ca)

    def connected(stack: contextlib.ExitStack) -> socket.socket:
        address = ("127.0.0.1", files.enrol_port)
        return stack.enter_context(socket.create_connection(address))

    with Enrolment(folder, "127.0.0.1", None, lambda name, path: None):
        monkeypatch.setattr(enrolment, "REQUEST_SECONDS", 300.0)
        with contextlib.ExitStack() as stack:
            silent = [connected(stack) for _ in range(enrolment.CONNECTIONS - 1)]
            assert enrol(token, tmp_path / "device").name == "alice"
            for peer in silent:  # it did not wait for the others' end
                peer.setblocking(False)
                with pytest.raises(BlockingIOError):
                    peer.recv(1)
        monkeypatch.setattr(enrolment, "REQUEST_SECONDS", 3.0)
        with contextlib.ExitStack() as stack:
            peer = connected(stack)
            peer.settimeout(60)
            assert peer.recv(1) == b""
            # One byte now and then keeps no place: the time is of the request, not of a byte.
            slow = context.wrap_socket(connected(stack), server_hostname="127.0.0.1")
            with stack.enter_context(slow), pytest.raises(OSError):
                for _ in range(600):
                    slow.sendall(b"G")
                    time.sleep(0.1)


def test_a_device_finds_a_place_that_is_free_in_a_moment(
    folder: Path, told: list[tuple[str, str]], tmp_path: Path
) -> None:
    token = create_token(folder, "alice")
    with Enrolment(folder, "127.0.0.1", None, lambda name, path: None) as served:
        for _ in range(enrolment.CONNECTIONS):
            served._slots.acquire()
        freed = [threading.Timer(0.2, served._slots.release) for _ in range(enrolment.CONNECTIONS)]
        for timer in freed:
            timer.start()
        assert enrol(token, tmp_path / "device").name == "alice"


def test_an_address_that_asks_too_often_waits(
    folder: Path, served: Enrolment, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(enrolment, "PER_MINUTE_OF_ADDRESS", 3)
    statuses = [ask(folder, "GET", "/v1/ca.crt")[0] for _ in range(5)]
    # At most one minute ends in between.
    assert statuses.count(429) >= 1 and statuses[:1] == [200]
    monkeypatch.setattr(enrolment.time, "monotonic", lambda: 1e9)
    assert ask(folder, "GET", "/v1/ca.crt")[0] == 200


def test_a_taken_port_is_an_error_that_says_so(folder: Path, served: Enrolment) -> None:
    with (
        pytest.raises(ConfigError, match="cannot have port"),
        Enrolment(folder, "127.0.0.1", None, lambda name, path: None),
    ):
        pass
    assert ask(folder, "GET", "/v1/ca.crt") == (200, (folder / "ca.crt").read_bytes())
