"""Messages come back as they were sent; anything else is a MessageError and nothing worse."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tesserafl.core.errors import MessageError
from tesserafl.core.fit import Training
from tesserafl.core.messages import (
    Client,
    Memory,
    Task,
    Update,
    Wanted,
)
from tesserafl.core.params import Params, sha256
from tesserafl.core.submodel import Index, SubModel, View, index_tensor
from tesserafl.core.wire import (
    decode_task,
    decode_update,
    encode_task,
    encode_update,
    pack,
    task_parts,
    unpack,
)

fast = settings(deadline=None, max_examples=150)

WRAPPED = torch.tensor([6, 7, 0])
SUBMODEL = SubModel(
    {"hidden": 3},
    {
        "layer/weight": View("h.0/weight", (WRAPPED, torch.tensor([4, 1]))),
        "bias": View("h.0/bias", (WRAPPED.clone(),)),  # shares its list with the weight
        "head": View("head", (slice(0, 2), slice(5, 8))),
        "scalar": View("scalar", ()),
    },
)
MIXED: Params = {
    "layer/weight": torch.randn(3, 2),
    "bias": torch.tensor([1.0, -0.0, torch.nan], dtype=torch.bfloat16),
    "head": torch.randn(3, 2, dtype=torch.float64).T,
    "scalar": torch.tensor(3),
}
EXTRA: Params = {"nothing": torch.empty(0, 4), "mask": torch.tensor([True, False])}
MEMORY: Memory = {"count": torch.tensor([2**62])}

TASK = Task(
    round=3,
    client=Client(id=5, num_examples=17, memory_bytes=1 << 40, depth=3),
    submodel=SUBMODEL,
    params=MIXED,
    training=Training(optimiser="adamw", lr=0.1, clip_norm=1.0, epochs=2),
    trainable=frozenset({"head", "bias"}),
    extra=EXTRA,
    options={"tau": 0.5, "path": ["a", {"b": None}], "text": "\u03b8 \U0001f9e9"},
)
UPDATE = Update(
    round=3,
    client=5,
    submodel=SUBMODEL,
    delta=MIXED,
    num_examples=17,
    num_steps=4,
    metrics={"loss": 0.25, "worst": float("inf")},
    extra=EXTRA,
)


def entries(submodel: SubModel) -> dict[str, tuple[str, list[list[int]]]]:
    return {
        name: (view.name, [index_tensor(index).tolist() for index in view.index])
        for name, view in submodel.views.items()
    }


def kinds(submodel: SubModel) -> list[type[Index]]:
    return [type(index) for view in submodel.views.values() for index in view.index]


def test_a_task_comes_back_as_it_was_sent() -> None:
    task, memory = decode_task(encode_task(TASK, MEMORY))
    assert (task.round, task.client, task.training) == (3, TASK.client, TASK.training)
    assert task.options == TASK.options
    assert task.trainable == TASK.trainable and isinstance(task.trainable, frozenset)
    assert task.submodel.sizes == {"hidden": 3}
    assert entries(task.submodel) == entries(SUBMODEL)
    assert kinds(task.submodel) == kinds(SUBMODEL)  # slices stay slices
    assert sha256(task.params) == sha256(MIXED)
    assert sha256(task.extra) == sha256(EXTRA)
    assert sha256(memory) == sha256(MEMORY)


@pytest.mark.parametrize("trainable", [None, frozenset()])
@pytest.mark.parametrize("depth", [None, 0, 7])
def test_what_is_trained_comes_back(trainable: frozenset[str] | None, depth: int | None) -> None:
    """None, the method says so, is something else than nothing at all."""
    sent = replace(TASK, trainable=trainable, client=replace(TASK.client, depth=depth))
    task, _ = decode_task(encode_task(sent, MEMORY))
    assert task.trainable == trainable and (task.trainable is None) == (trainable is None)
    assert task.client == sent.client


def test_what_is_wanted_comes_back() -> None:
    wanted = Wanted(
        deltas=frozenset({"head"}),
        fewer=True,
        extra={"gate": (2, 3), "scale": ()},
        divisors=frozenset({"steps"}),
        exact=True,
    )
    for sent in (wanted, Wanted(), Wanted(deltas=frozenset())):
        task, _ = decode_task(encode_task(replace(TASK, wanted=sent), MEMORY))
        assert task.wanted == sent


def test_a_device_keeps_its_memory() -> None:
    task = replace(TASK, extra=EXTRA)
    decode_update(encode_update(UPDATE, {}), task)
    with pytest.raises(MessageError, match="keeps its own"):
        decode_update(encode_update(UPDATE, MEMORY), task)


def test_a_header_longer_than_its_task_allows_is_not_read() -> None:
    metrics = {f"m{n}": 1.0 for n in range(20_000)}
    data = encode_update(replace(UPDATE, metrics=metrics), {})
    decode_update(data)
    with pytest.raises(MessageError, match="allowed are"):
        decode_update(data, TASK)


def test_keys_that_come_twice_are_refused() -> None:
    for kind, (_, data) in KINDS.items():
        length = int.from_bytes(data[:8], "little")
        text = data[8 : 8 + length].rstrip()
        for twice in (b', "__metadata__": {}', b', "delta/w": {}, "delta/w": {}'):
            header = text[:-1] + twice + b"}"
            must_be_refused(kind, len(header).to_bytes(8, "little") + header + data[8 + length :])


def test_an_error_says_little_of_what_was_sent() -> None:
    body, groups = unpack(KINDS["update"][1])
    for name in ("x" * 100_000, "\x1b[2J\n\ud800"):
        wrong = [
            pack({**body, name: 1}, groups),
            pack({**body, "metrics": {name: []}}, groups),
            pack(body, {**groups, name.replace("\ud800", ""): {"w": torch.ones(1)}}),
        ]
        for data in wrong:
            with pytest.raises(MessageError) as caught:
                decode_update(data)
            assert len(str(caught.value)) < 1500 and str(caught.value).isprintable()
            assert str(caught.value).isascii()


def test_the_order_of_names_to_train_is_no_part_of_a_message() -> None:
    names = [f"name {i}" for i in range(30)]
    tasks = [replace(TASK, trainable=frozenset(order)) for order in (names, names[::-1])]
    assert encode_task(tasks[0], MEMORY) == encode_task(tasks[1], MEMORY)
    header, _ = task_parts(tasks[0], MEMORY)
    assert header["trainable"] == sorted(names)


@pytest.mark.parametrize(
    ("changes", "place"),
    [
        ({"trainable": "head"}, "trainable"),
        ({"trainable": [1]}, "trainable"),
        ({"client": {"depth": -1}}, "client.depth"),
        ({"client": {"depth": 1.5}}, "client.depth"),
    ],
)
def test_what_cannot_be_trained_is_refused(changes: dict[str, Any], place: str) -> None:
    header, groups = task_parts(TASK, MEMORY)
    changed = {k: header[k] | v if isinstance(v, dict) else v for k, v in changes.items()}
    with pytest.raises(MessageError, match=place):
        decode_task(pack(header | changed, groups))


def test_a_message_of_before_there_were_such_names_is_read() -> None:
    header, groups = task_parts(TASK, MEMORY)
    del header["trainable"], header["client"]["depth"]
    task, _ = decode_task(pack(header, groups))
    assert task.trainable is None and task.client.depth is None


def test_an_update_comes_back_as_it_was_sent() -> None:
    update, memory = decode_update(encode_update(UPDATE, MEMORY))
    assert (update.round, update.client) == (3, 5)
    assert (update.num_examples, update.num_steps) == (17, 4)
    assert update.metrics == UPDATE.metrics
    assert entries(update.submodel) == entries(SUBMODEL)
    assert sha256(update.delta) == sha256(MIXED)
    assert sha256(update.extra) == sha256(EXTRA)
    assert sha256(memory) == sha256(MEMORY)


def test_bytes_are_counted_without_the_header() -> None:
    # 6 float32, 3 bfloat16, 6 float64, 1 int64, 2 bool.
    assert TASK.num_bytes == UPDATE.num_bytes == 24 + 6 + 48 + 8 + 2


def test_empty_groups_come_back_empty() -> None:
    body, groups = unpack(pack({"round": 1}, {"params": {}, "memory": {}}))
    assert body == {"round": 1}
    assert groups == {"params": {}, "memory": {}}


def test_packing_the_same_gives_the_same_bytes() -> None:
    assert encode_task(TASK, MEMORY) == encode_task(TASK, MEMORY)


def test_a_tensor_may_be_in_two_groups() -> None:
    # A client that keeps what it sends, or a method that sends a parameter as an extra too.
    tensor = torch.randn(3)
    _, groups = unpack(pack({}, {"delta": {"w": tensor}, "memory": {"w": tensor}}))
    assert torch.equal(groups["delta"]["w"], tensor)
    assert torch.equal(groups["memory"]["w"], tensor)


Kind = tuple[Callable[[bytes], Any], bytes]
KINDS: dict[str, Kind] = {
    "task": (decode_task, encode_task(TASK, MEMORY)),
    "update": (decode_update, encode_update(UPDATE, MEMORY)),
}
each_kind = pytest.mark.parametrize("kind", KINDS)


def assert_decoded_or_refused(kind: str, data: bytes) -> None:
    try:
        KINDS[kind][0](data)
    except MessageError as error:
        assert str(error)


def must_be_refused(kind: str, data: bytes) -> None:
    with pytest.raises(MessageError):
        KINDS[kind][0](data)


@each_kind
@given(data=st.binary(max_size=64))
@fast
def test_garbage_is_refused(kind: str, data: bytes) -> None:
    must_be_refused(kind, data)


@each_kind
def test_every_truncation_is_refused(kind: str) -> None:
    whole = KINDS[kind][1]
    for length in range(0, len(whole), 7):
        must_be_refused(kind, whole[:length])
    must_be_refused(kind, whole[:-1])
    must_be_refused(kind, whole + b"\0")


@each_kind
@given(data=st.data())
@fast
def test_changed_bytes_give_a_message_or_a_message_error(kind: str, data: st.DataObject) -> None:
    mutated = bytearray(KINDS[kind][1])
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(mutated) - 1))
        mutated[place] = data.draw(st.integers(0, 255))
    assert_decoded_or_refused(kind, bytes(mutated))


@each_kind
@pytest.mark.parametrize("length", [0, 1 << 20, (1 << 63) - 1, (1 << 64) - 1])
def test_a_wrong_header_length_is_refused(kind: str, length: int) -> None:
    must_be_refused(kind, length.to_bytes(8, "little") + KINDS[kind][1][8:])


@each_kind
@pytest.mark.parametrize("header", [b"[" * 100_000, b'{"a":' * 100_000, b"1" * 5000, b"\xff{}"])
def test_a_hostile_header_is_refused(kind: str, header: bytes) -> None:
    must_be_refused(kind, len(header).to_bytes(8, "little") + header)


def test_messages_of_the_other_kind_are_refused() -> None:
    must_be_refused("task", KINDS["update"][1])
    must_be_refused("update", KINDS["task"][1])


def with_body(kind: str, change: Callable[[dict[str, Any]], None]) -> bytes:
    """A message whose JSON was changed, with its tensors as they were."""
    body, groups = unpack(KINDS[kind][1])
    body["groups"] = list(groups)
    change(body)
    listed = body.pop("groups", None)
    data = pack(body, groups)
    if listed == list(groups):
        return data
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header["__metadata__"]["tessera"] = json.dumps({**body, "groups": listed})
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


HUGE = 1 << 70
INFINITE = float("inf")
WRONG: dict[str, tuple[str, Callable[[dict[str, Any]], None]]] = {
    "task: round is a word": ("task", lambda b: b.update(round="three")),
    "task: round is infinite": ("task", lambda b: b.update(round=INFINITE)),
    "task: no client": ("task", lambda b: b.pop("client")),
    "task: client is a number": ("task", lambda b: b.update(client=5)),
    "task: client id is a word": ("task", lambda b: b["client"].update(id="5")),
    "task: client of another version": ("task", lambda b: b["client"].update(colour="red")),
    "task: no training": ("task", lambda b: b.pop("training")),
    "task: negative lr": ("task", lambda b: b["training"].update(lr=-1)),
    "task: lr is a word": ("task", lambda b: b["training"].update(lr="fast")),
    "task: unknown optimiser": ("task", lambda b: b["training"].update(optimiser="newton")),
    "task: options are a number": ("task", lambda b: b.update(options=7)),
    "task: no memory": ("task", lambda b: b.update(groups=["params", "extra"])),
    "update: round is infinite": ("update", lambda b: b.update(round=INFINITE)),
    "update: client is a list": ("update", lambda b: b.update(client=[5])),
    "update: examples are a word": ("update", lambda b: b.update(num_examples="many")),
    "update: metrics are a list": ("update", lambda b: b.update(metrics=[1])),
    "update: a metric is a list": ("update", lambda b: b["metrics"].update(loss=[])),
    "update: no steps": ("update", lambda b: b.pop("num_steps")),
    "update: no memory": ("update", lambda b: b.update(groups=["delta", "extra"])),
    "groups are a number": ("update", lambda b: b.update(groups=3)),
    "no groups": ("update", lambda b: b.pop("groups")),
    "no sub-model": ("update", lambda b: b.pop("submodel")),
    "sizes are a list": ("update", lambda b: b["submodel"].update(sizes=[1])),
    "a size is infinite": ("update", lambda b: b["submodel"].update(sizes={"h": INFINITE})),
    "views are a list": ("update", lambda b: b["submodel"].update(views=[])),
    "a list is missing": ("update", lambda b: b["submodel"].update(lists=[])),
    "a list has words": ("update", lambda b: b["submodel"]["lists"].__setitem__(0, ["a"])),
    "a list has fractions": ("update", lambda b: b["submodel"]["lists"].__setitem__(0, [0.5])),
    "a list is a matrix": ("update", lambda b: b["submodel"]["lists"].__setitem__(0, [[0], [1]])),
    "a list is too large": ("update", lambda b: b["submodel"]["lists"].__setitem__(0, [HUGE])),
    "a list is negative": ("update", lambda b: b["submodel"]["lists"].__setitem__(0, [-1, 0, 1])),
    "a list before the first": (
        "update",
        lambda b: b["submodel"]["views"]["bias"].__setitem__(1, [-1]),
    ),
    "a slice runs backwards": (
        "update",
        lambda b: b["submodel"]["views"]["head"].__setitem__(1, [[5, 2], [0, 3]]),
    ),
    "a slice begins before 0": (
        "update",
        lambda b: b["submodel"]["views"]["head"].__setitem__(1, [[-2, 0], [0, 3]]),
    ),
    "a slice is one number": (
        "update",
        lambda b: b["submodel"]["views"]["head"].__setitem__(1, [[1], [0, 3]]),
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_json_that_does_not_describe_a_message_is_refused(what: str) -> None:
    kind, change = WRONG[what]
    must_be_refused(kind, with_body(kind, change))


@each_kind
def test_a_missing_group_is_refused(kind: str) -> None:
    body, groups = unpack(KINDS[kind][1])
    for missing in groups:
        must_be_refused(kind, pack(body, {n: g for n, g in groups.items() if n != missing}))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=4,
)


def replace_somewhere(value: Any, pick: random.Random, new: Any) -> Any:
    """The JSON with one of its parts, at any depth, replaced."""
    if isinstance(value, dict) and value and pick.random() < 0.8:
        key = pick.choice(sorted(value))
        return {**value, key: replace_somewhere(value[key], pick, new)}
    if isinstance(value, list) and value and pick.random() < 0.8:
        place = pick.randrange(len(value))
        changed = replace_somewhere(value[place], pick, new)
        return [*value[:place], changed, *value[place + 1 :]]
    return new


@each_kind
@given(pick=st.randoms(use_true_random=False), new=JSON)
@fast
def test_any_other_json_gives_a_message_or_a_message_error(
    kind: str, pick: random.Random, new: Any
) -> None:
    def change(body: dict[str, Any]) -> None:
        key = pick.choice(sorted(body))
        body[key] = replace_somewhere(body[key], pick, new)

    assert_decoded_or_refused(kind, with_body(kind, change))


def test_tensors_keep_their_order() -> None:
    # A clipped gradient's norm sums over the parameters in order: another order, other bits.
    params = {name: torch.zeros(2) for name in ("z", "a", "m.10", "m.2")}
    _, groups = unpack(pack({}, {"params": params}))
    assert list(groups["params"]) == list(params)
