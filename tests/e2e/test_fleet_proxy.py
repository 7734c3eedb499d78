"""Devices reach Flower's fleet path through nginx and nothing else; real processes, TLS, keys."""

from __future__ import annotations

import contextlib
import http.client
import importlib.util
import json
import socket
import ssl
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from flower_processes import Link, free_port, superlink, supernode, until

from tesserafl.core.errors import ConfigError
from tesserafl.run import certs, proxy
from tesserafl.run.certs import ServerFiles, device_files, server_files

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("flwr") is None, reason="Flower is not installed (extra `flower`)"
    ),
    pytest.mark.skipif(proxy.program() is None, reason="nginx is not installed (nginx-light)"),
]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> ServerFiles:
    folder = tmp_path_factory.mktemp("proxied") / "keys"
    certs.create(folder, hosts=["127.0.0.1"], devices=["known", "unknown"], port=free_port())
    return server_files(folder)


@pytest.fixture(scope="module")
def link(files: ServerFiles, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Link]:
    with superlink(files, tmp_path_factory.mktemp("link")) as link:
        settings = proxy.ProxySettings(superlink=f"127.0.0.1:{link.port}", listen="127.0.0.1")
        with proxy.running(files, settings):
            yield link


def ask(
    files: ServerFiles, port: int, path: str, body: bytes = b"", method: str = "POST"
) -> tuple[int, bytes]:
    """The status and body, for one who holds the authority's certificate and no key."""
    context = ssl.create_default_context(cafile=files.ca)
    connection = http.client.HTTPSConnection("127.0.0.1", port, context=context, timeout=30)
    try:
        headers = {"content-type": "application/protobuf", "accept": "application/protobuf"}
        connection.putrequest(method, path, skip_accept_encoding=True)
        for name, value in headers.items():
            connection.putheader(name, value)
        connection.putheader("content-length", str(len(body)))
        connection.endheaders(body)
        answer = connection.getresponse()
        return answer.status, answer.read(100_000)
    finally:
        connection.close()


APP = """
import os
import time
from pathlib import Path

import numpy
from flwr.app import Array, ArrayRecord, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

client = ClientApp()
server = ServerApp()

@client.train()
def train(message, context):
    given = message.content["sent"]["a"].numpy()
    return Message(RecordDict({"back": ArrayRecord({"a": Array(given * 2)})}), reply_to=message)

@server.main()
def main(grid, context):
    sent = numpy.arange(2**21, dtype=numpy.float32)  # 8 MiB: two parts
    content = RecordDict({"sent": ArrayRecord({"a": Array(sent)})})
    (node,) = grid.get_node_ids()
    (asked,) = grid.push_messages([Message(content, node, "train", ttl=100.0)])
    while not (answers := list(grid.pull_messages([asked]))):
        time.sleep(0.1)
    assert not answers[0].has_error(), answers[0].error
    assert (answers[0].content["back"]["a"].numpy() == sent * 2).all()
    (Path(os.environ["FLWR_HOME"]) / "whole").touch()
"""
PROJECT = """
[project]
name = "echo"
version = "1.0.0"
dependencies = ["flwr"]
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"
[tool.flwr.app]
publisher = "tests"
[tool.flwr.app.components]
serverapp = "echo:server"
clientapp = "echo:client"
"""


@pytest.mark.slow
def test_a_registered_device_joins_and_works_and_another_is_refused(
    files: ServerFiles, link: Link, tmp_path: Path
) -> None:
    known, unknown = (device_files(files.folder / "devices" / n) for n in ("known", "unknown"))
    link.register(known)
    app = tmp_path / "app"
    app.mkdir()
    (app / "echo.py").write_text(APP)
    (app / "pyproject.toml").write_text(PROJECT)
    with (
        supernode(known, files.address, tmp_path) as (child, log),
        supernode(unknown, files.address, tmp_path) as (other, log_of_other),
    ):
        until(lambda: "Activated node_id" in link.said(), 60, log.read_text)
        done = link.flwr("run", str(app), "direct")
        assert done.returncode == 0, done.stdout + done.stderr
        until((link.home / "whole").exists, 120, lambda: log.read_text() + link.said())
        assert child.poll() is None
        until(lambda: other.poll() is not None, 60, log_of_other.read_text)
        assert other.returncode != 0
        listed = json.loads(link.flwr("supernode", "list", "direct", "--format", "json").stdout)
        assert [node["status"] for node in listed["nodes"]] == ["online"]


def test_users_and_runs_are_for_this_machine_alone(files: ServerFiles, link: Link) -> None:
    # What flwr 1.41 leaves open to everybody who holds the authority's certificate (no key):
    assert ask(files, link.port, "/v1/control/list-runs")[0] == 200
    direct, proxied = link.flwr("ls", "direct"), link.flwr("ls", "proxied")
    assert direct.returncode == 0, direct.stderr
    assert proxied.returncode != 0 and "403" in proxied.stdout + proxied.stderr
    before = link.said()
    for path in ("control/list-runs", "control/start-run", "control/register-node"):
        assert ask(files, files.port, f"/v1/{path}")[0] == 403
    for path in ("runtime/acquire-task", "runtime/pull-messages", "fleet/register-node"):
        assert ask(files, files.port, f"/v1/{path}")[0] == 403
    for path in ("/", "/docs", "/openapi.json", "/health", "/v1/fleet/", "/v1/fleet/get-run/x"):
        assert ask(files, files.port, path, method="GET")[0] == 403
    assert ask(files, files.port, "/v1/fleet/get-run", method="GET")[0] == 403
    assert link.said() == before  # the SuperLink heard of none of it


@pytest.mark.parametrize(
    "path",
    [
        "/v1/fleet/../control/list-runs",
        "/v1/fleet/%2e%2e/control/list-runs",
        "/v1/fleet/..%2fcontrol%2flist-runs",
        "//v1/control/list-runs",
        "/v1//control/list-runs",
        "/v1/fleet/get-run/../../control/list-runs",
        "/v1/control/list-runs?/v1/fleet/get-run",
        "/v1/control/list-runs;/v1/fleet/get-run",
        "/v1/control/list-runs%23/../../fleet/get-run",
        "/v1/control/list-runs%0a/v1/fleet/get-run",
        "/v1/fleet/get-run%00/../../control/list-runs",
        "/V1/CONTROL/list-runs",
        "https://127.0.0.1/v1/control/list-runs",
    ],
)
def test_no_spelling_of_a_path_leads_past_the_proxy(
    files: ServerFiles, link: Link, path: str
) -> None:
    before = link.said().count("/v1/control/")
    assert ask(files, files.port, path)[0] in (400, 401, 403)
    assert link.said().count("/v1/control/") == before


def test_fleet_calls_are_passed_on_and_ask_for_a_key(files: ServerFiles, link: Link) -> None:
    for path in proxy.FLEET_PATHS:
        status, body = ask(files, files.port, f"/v1/fleet/{path}")
        assert status == 401, (path, status, body)  # the SuperLink's word, not the proxy's
        assert b"SuperNode authentication" in body


def test_two_requests_in_one_are_refused(files: ServerFiles, link: Link) -> None:
    # Request smuggling: what a proxy takes for a body the server takes for a second request.
    hidden = b"POST /v1/control/list-runs HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n"
    head = (
        b"POST /v1/fleet/get-run HTTP/1.1\r\nHost: x\r\nContent-Type: application/protobuf\r\n"
        b"Content-Length: %d\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" % (5 + len(hidden))
    )
    before = link.said().count("/v1/control/list-runs")
    context = ssl.create_default_context(cafile=files.ca)
    with (
        socket.create_connection(("127.0.0.1", files.port), 10) as plain,
        context.wrap_socket(plain, server_hostname="127.0.0.1") as secured,
    ):
        secured.sendall(head + hidden)
        secured.settimeout(5)
        answer = secured.recv(65536)
    assert b" 200 " not in answer.split(b"\r\n")[0]
    assert link.said().count("/v1/control/list-runs") == before


def test_a_body_of_a_part_passes_and_a_larger_one_does_not(files: ServerFiles, link: Link) -> None:
    part = bytes(5 * 2**20 + 4096)
    assert ask(files, files.port, "/v1/fleet/push-object", part)[0] in (400, 401)
    assert ask(files, files.port, "/v1/fleet/push-object", bytes(17 * 2**20))[0] == 413


def test_a_list_of_parts_bounds_what_a_reply_may_be(files: ServerFiles, link: Link) -> None:
    # A SuperLink takes no part that is not on the list, so this is all that a device can make it
    # hold. 32 MiB are 7 arrays and some records, of less than 96 bytes on the list each.
    assert ask(files, files.port, "/v1/fleet/push-messages", bytes(12 * 96))[0] in (400, 401)
    assert ask(files, files.port, "/v1/fleet/push-messages", bytes(4 * 2**10))[0] == 413
    for path in proxy.FLEET_PATHS:
        if path not in ("push-object", "push-messages"):
            assert ask(files, files.port, f"/v1/fleet/{path}", bytes(65 * 2**10))[0] == 413


def test_old_tls_is_refused(files: ServerFiles, link: Link) -> None:
    context = ssl.create_default_context(cafile=files.ca)
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    with (
        socket.create_connection(("127.0.0.1", files.port), 10) as plain,
        pytest.raises(ssl.SSLError),
    ):
        context.wrap_socket(plain, server_hostname="127.0.0.1")


def test_a_superlink_of_another_authority_gets_nothing(
    files: ServerFiles, link: Link, tmp_path: Path
) -> None:
    # Whoever takes the SuperLink's port on this machine does not get devices' calls.
    certs.create(tmp_path / "keys", hosts=["127.0.0.1"], port=free_port())
    other = server_files(tmp_path / "keys")
    settings = proxy.ProxySettings(superlink=f"127.0.0.1:{link.port}", listen="127.0.0.1")
    with proxy.running(other, settings):
        assert ask(other, other.port, "/v1/fleet/get-run")[0] == 502
    with (
        pytest.raises(ConfigError, match=f"port {files.port} of 127.0.0.1 cannot be served"),
        proxy.running(files, settings),
    ):
        pass


@pytest.mark.slow
def test_a_device_outlives_its_server_behind_the_proxy(tmp_path: Path) -> None:
    # While the server is away nginx answers 502, which a device takes for a reason to try again.
    certs.create(tmp_path / "keys", hosts=["127.0.0.1"], devices=["known"], port=free_port())
    files, port, database = server_files(tmp_path / "keys"), free_port(), tmp_path / "link.db"
    device = device_files(tmp_path / "keys/devices/known")
    settings = proxy.ProxySettings(superlink=f"127.0.0.1:{port}", listen="127.0.0.1")
    with proxy.running(files, settings), contextlib.ExitStack() as stack:
        with superlink(files, tmp_path / "first", port, database) as link:
            link.register(device)
            child, log = stack.enter_context(supernode(device, files.address, tmp_path))
            until(lambda: "Activated node_id" in link.said(), 60, log.read_text)
        time.sleep(10)
        assert ask(files, files.port, "/v1/fleet/get-run")[0] == 502
        with superlink(files, tmp_path / "second", port, database) as link:
            until(lambda: "Connection successful" in log.read_text(), 120, log.read_text)
            assert child.poll() is None
            assert "activate-node" not in link.said()  # it went on, it did not join anew
