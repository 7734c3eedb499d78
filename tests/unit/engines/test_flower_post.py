"""Envelopes as Flower's records, and what becomes of messages in its grid."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("flwr", reason="Flower is not installed: pip install 'tesserafl[flower]'")

from flwr.app import Array, ArrayRecord, ConfigRecord, Error, RecordDict

from tesserafl.core.errors import MessageError
from tesserafl.engines.attendance import Disowned, Undelivered
from tesserafl.engines.flower import client
from tesserafl.engines.flower import post as flower_post
from tesserafl.engines.flower.post import FlowerPost
from tesserafl.engines.flower.records import from_record, to_record
from tesserafl.engines.orders import Envelope, Stranger, sealed

NAME = "a" * 64
ENVELOPE = Envelope(head=b'{"kind": "x"}', parcels={NAME: b"\x00\xff", "b" * 64: b""})


def test_an_envelope_comes_out_of_records_as_it_went_in():
    found = from_record(to_record(ENVELOPE))
    assert found.head == ENVELOPE.head and dict(found.parcels) == dict(ENVELOPE.parcels)


def numpys() -> RecordDict:
    array = Array("uint8", (2,), "numpy.ndarray", b"\x00\x01")
    head = ConfigRecord({"json": b"{}"})
    return RecordDict({"head": head, "parcels": ArrayRecord({NAME: array})})


@pytest.mark.parametrize(
    ("record", "text"),
    [
        (RecordDict(), "holds nothing"),
        (RecordDict({"head": ConfigRecord({"json": b"{}"})}), "no order"),
        (
            RecordDict({"head": ConfigRecord({"json": "text"}), "parcels": ArrayRecord()}),
            "no order",
        ),
        (RecordDict({**to_record(ENVELOPE), "more": ConfigRecord()}), "no order"),
        (numpys(), "is written as 'numpy.ndarray'"),
    ],
)
def test_other_records_are_refused(record, text):
    with pytest.raises(MessageError, match=text):
        from_record(record)


@dataclass
class Sent:
    """In the place of Flower's message, which can be made in a server app's process alone."""

    content: RecordDict
    dst_node_id: int
    message_type: str
    ttl: float = 0.0


@pytest.fixture(autouse=True)
def without_flowers_process(monkeypatch):
    monkeypatch.setattr(flower_post, "Message", Sent)


@dataclass
class Grid:
    """What a test says of its nodes and replies; a call fails as often as it says."""

    replies: list[Any] = field(default_factory=list)
    fails: int = 0
    error: Exception = field(default_factory=lambda: OSError("database is locked"))
    sent: list[Sent] = field(default_factory=list)
    names: list[str | None] = field(default_factory=lambda: ["first"])

    def get_nodes(self):
        self._try()
        return [SimpleNamespace(node_id=5, name="alice"), SimpleNamespace(node_id=6, name=None)]

    def push_messages(self, messages):
        self._try()
        self.sent += messages
        return self.names

    def pull_messages(self, names):
        self._try()
        return [reply for reply in self.replies if reply.metadata.reply_to_message_id in names]

    def _try(self):
        self.fails -= 1
        if self.fails >= 0:
            raise self.error


def reply(name, *, code=None, content=None):
    error = None if code is None else Error(code, "why")
    return SimpleNamespace(
        metadata=SimpleNamespace(reply_to_message_id=name),
        has_error=lambda: error is not None,
        error=error,
        content=content,
    )


def post(grid, waits=None):
    return FlowerPost(grid=grid, pause=(waits if waits is not None else []).append)


def test_nodes_and_the_names_that_vouch_for_them():
    assert post(Grid()).nodes() == {5: "alice", 6: ""}


def test_a_message_goes_to_its_node_for_as_long_as_its_task():
    grid = Grid()
    assert post(grid).push(5, ENVELOPE, 90.0) == "first"
    (message,) = grid.sent
    assert (message.dst_node_id, message.message_type, message.ttl) == (5, "train", 90.0)
    assert from_record(message.content).parcels[NAME] == b"\x00\xff"
    with pytest.raises(Undelivered, match="takes no message for node 5") as found:
        post(Grid(names=[None])).push(5, ENVELOPE, 90.0)
    assert found.value.reason == "offline"


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        *[(1, "crashed"), (2, "crashed"), (3, "expired"), (4, "expired"), (5, "offline")],
        *[(6, "error"), (7, "error"), (8, "crashed"), (99, "error")],
    ],
)
def test_flowers_errors_are_reasons(code, reason):
    ((name, found),) = post(Grid(replies=[reply("m", code=code)])).pull(["m", "n"])
    assert name == "m" and isinstance(found, Undelivered)
    assert (found.reason, str(found)) == (reason, "why")


def test_replies_are_envelopes_and_a_wrong_one_costs_only_itself():
    replies = [reply("m", content=to_record(ENVELOPE)), reply("n", content=numpys())]
    found = dict(post(Grid(replies=replies)).pull(["m", "n", "o"]))
    assert found["m"].head == ENVELOPE.head
    assert found["n"].reason == "error" and "numpy" in str(found["n"])
    assert found.keys() == {"m", "n"}


@pytest.mark.parametrize("call", ["nodes", "push", "pull"])
def test_a_grid_that_does_not_answer_is_asked_again_for_a_minute(call):
    arguments = {"nodes": (), "push": (5, ENVELOPE, 1.0), "pull": (["m"],)}[call]
    waits: list[float] = []
    getattr(post(Grid(fails=7), waits), call)(*arguments)
    assert waits == [0.5, 1, 2, 4, 8, 16, 32]
    with pytest.raises(OSError, match="locked"):
        getattr(post(Grid(fails=8)), call)(*arguments)


def test_a_process_that_flower_has_given_up_asks_no_more():
    """Its token is not good any more; it would not become good by asking."""

    class Refused(Exception):
        response = SimpleNamespace(status_code=401)

    waits: list[float] = []
    with pytest.raises(Disowned, match="Flower refuses this process"):
        post(Grid(fails=1, error=Refused()), waits).pull(["m"])
    assert waits == []


def test_the_client_app_says_who_is_missing(tmp_path):
    with pytest.raises(OSError):
        client.forward(str(tmp_path / "nobody"), sealed(Stranger()))


def test_the_client_app_loads_no_torch():
    """It starts anew for every message: seconds, and memory on the device."""
    code = "import sys, tesserafl.engines.flower.client; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False"]
