"""Envelopes: what fits into one, and what is refused of one."""

from __future__ import annotations

import io
import random

import pytest

from tesserafl.core.errors import MessageError
from tesserafl.engines import orders
from tesserafl.engines.edge_orders import Survey
from tesserafl.engines.orders import (
    Answer,
    Bye,
    Envelope,
    Fetch,
    Hello,
    Judge,
    Judged,
    Missing,
    Parcels,
    Profile,
    Refusal,
    Store,
    Stranger,
    Work,
    order_of,
    read_envelope,
    reply_of,
    sealed,
    write_envelope,
)

RUN, NAME = "0123456789abcdef" * 2, "f" * 64
ORDERS = [
    Hello(run=RUN, experiment={"a": 1}, spec={}),
    Store(run=RUN),
    Work(run=RUN, client=3, remembers=None, letter={}, most_bytes=10),
    Fetch(run=RUN, parcels=[NAME]),
    Judge(run=RUN, client=3, remembers=2, letter={}),
    Bye(run=RUN),
    Survey(run=RUN, letter={}, numbers={"a": 3}, heard=[[3, 2]], seconds=60.0),
]
REPLIES = [
    Profile(name="a", client=None, num_examples=1, memory_mib=0.5),
    Missing(parcels=[]),
    Stranger(),
    Refusal(text="no"),
    Answer(letter={}, seconds=0.0),
    Parcels(),
    Judged(accuracy=0.5, share=1.0),
]


def test_orders_and_replies_come_out_as_they_went_in():
    assert [order_of(sealed(order)) for order in ORDERS] == ORDERS
    assert [reply_of(sealed(reply)) for reply in REPLIES] == REPLIES
    assert {order.kind for order in ORDERS} | {reply.kind for reply in REPLIES} == {
        *("hello", "store", "work", "fetch", "judge", "bye", "survey"),
        *("profile", "missing", "stranger", "refusal", "answer", "parcels", "judged"),
    }


def test_an_order_is_no_reply_and_a_reply_no_order():
    for order in ORDERS:
        with pytest.raises(MessageError, match="head is wrong"):
            reply_of(sealed(order))
    for reply in REPLIES:
        with pytest.raises(MessageError, match="head is wrong"):
            order_of(sealed(reply))


@pytest.mark.parametrize(
    "head",
    [
        '{"kind": "store", "run": "../../../etc/cron.d/aaaaaaaaaaaa"}',
        '{"kind": "store", "run": "%s"}' % ("A" * 32),
        '{"kind": "store", "run": "RUN", "more": 1}',
        '{"kind": "fetch", "run": "RUN", "parcels": ["../hello.json"]}',
        '{"kind": "work", "run": "RUN", "client": -1, "remembers": null, "letter": {}, '
        '"most_bytes": 1}',
        '{"kind": "bye", "run": "RUN\\n"}',
        '{"kind": "other"}',
        "[" * 100_000,
        "",
    ],
)
def test_an_order_that_claims_too_much_is_refused(head):
    with pytest.raises(MessageError, match="head is wrong"):
        order_of(Envelope(head=head.replace("RUN", RUN).encode()))


@pytest.mark.parametrize(
    "head",
    [
        '{"kind": "profile", "name": "%s", "client": 0, "num_examples": 1, "memory_mib": 1.0}'
        % ("x" * 201),
        '{"kind": "profile", "name": "x", "client": 0, "num_examples": 0, "memory_mib": 1.0}',
        '{"kind": "profile", "name": "x", "client": 0, "num_examples": 1, "memory_mib": NaN}',
        '{"kind": "profile", "name": "x", "client": 0, "num_examples": 1, "memory_mib": 1e999}',
        '{"kind": "answer", "letter": {}, "seconds": Infinity}',
        '{"kind": "answer", "letter": {}, "seconds": -1.0}',
        '{"kind": "judged", "accuracy": 1.5, "share": null}',
        '{"kind": "judged", "accuracy": NaN, "share": null}',
        '{"kind": "refusal", "text": "%s"}' % ("x" * 10_001),
    ],
)
def test_a_reply_that_claims_too_much_is_refused(head):
    with pytest.raises(MessageError, match="head is wrong"):
        reply_of(Envelope(head=head.encode()))


def test_a_head_is_bounded(monkeypatch):
    monkeypatch.setattr(orders, "_MOST_HEAD_BYTES", 60)
    assert reply_of(sealed(Refusal(text="x" * 20))).text == "x" * 20
    with pytest.raises(MessageError, match="allowed are 60"):
        reply_of(sealed(Refusal(text="x" * 40)))


def test_an_envelope_passes_through_a_pipe():
    envelope = Envelope(head=b"{}", parcels={NAME: b"abc", "0" * 64: b""})
    pipe = io.BytesIO()
    write_envelope(pipe, envelope)
    write_envelope(pipe, Envelope(head=b"next"))
    whole = pipe.getvalue()
    pipe.seek(0)
    assert read_envelope(pipe) == envelope
    assert read_envelope(pipe) == Envelope(head=b"next")
    assert read_envelope(pipe) is None
    for cut in range(len(whole)):  # somebody was killed in the middle of one
        pipe = io.BytesIO(whole[:cut])
        found = [read_envelope(pipe), read_envelope(pipe)]
        assert found in ([None, None], [envelope, None])


def test_other_bytes_in_a_pipe_are_refused():
    pipe = io.BytesIO()
    write_envelope(pipe, Envelope(head=b"{}", parcels={"../hello.json": b"abc"}))
    pipe.seek(0)
    with pytest.raises(MessageError, match="wrongly named"):
        read_envelope(pipe)
    draw = random.Random(1)
    for _ in range(100):
        with pytest.raises(MessageError, match="a frame should begin"):
            read_envelope(io.BytesIO(b"X" + draw.randbytes(100)))
