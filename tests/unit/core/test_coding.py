"""Deltas in fewer bytes: what comes back, how far it is off, and what is no such message."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tesserafl.core import seeds
from tesserafl.core.checks import check_delta
from tesserafl.core.coding import CODINGS, Coded, Coding, coded, coded_bytes, decoded, num_kept
from tesserafl.core.errors import MessageError, UpdateError
from tesserafl.core.fit import Training
from tesserafl.core.messages import Client, Task, Update
from tesserafl.core.params import Params, sha256
from tesserafl.core.submodel import SubModel, View
from tesserafl.core.wire import decode_update, encode_update

DRAW = seeds.generator(0, "coding")
SHAPES = {"w": (6, 4, 3), "b": (5,), "s": ()}
DELTA: Params = {name: torch.randn(shape, generator=DRAW) for name, shape in SHAPES.items()}
MIXED: Params = {**DELTA, "half": torch.ones(3, dtype=torch.bfloat16), "none": torch.empty(0, 2)}
PART = SubModel(
    {"n": 6}, {n: View(n, tuple(slice(0, k) for k in t.shape)) for n, t in MIXED.items()}
)
TASK = Task(
    round=0,
    client=Client(id=0, num_examples=4),
    submodel=PART,
    params=MIXED,
    training=Training(),
)
UPDATE = Update(
    round=0,
    client=0,
    submodel=PART,
    delta=coded(MIXED, "int8"),
    num_examples=4,
    num_steps=1,
    metrics={"loss": 1.0},
)
each_coding = pytest.mark.parametrize("coding", CODINGS)


def test_int8_by_hand() -> None:
    # Rows' largest: 127 and 2.54; scales 1 and 0.02. -3.4 is 3 steps, -1.27 is 63.5: 64.
    delta = {"w": torch.tensor([[127.0, -3.4], [2.54, -1.27], [0.0, 0.0]])}
    sent = coded(delta, "int8")
    assert sent.main["w"].tolist() == [[127, -3], [127, -64], [0, 0]]
    assert sent.codes["w"].tolist() == pytest.approx([1.0, 0.02, 0.0])
    torch.testing.assert_close(sent["w"], torch.tensor([[127.0, -3.0], [2.54, -1.28], [0.0, 0.0]]))


def test_topk_by_hand() -> None:
    # 3 of 8; of the two that are 2 in size the first.
    delta = {"w": torch.tensor([[1.0, -2.0, 5.0, 0.5], [2.0, -7.0, 0.0, 0.1]])}
    sent = coded(delta, "topk", share=0.3)
    assert sent.codes["w"].tolist() == [1, 2, 5] and sent.codes["w"].dtype == torch.int32
    assert sent.main["w"].tolist() == [-2.0, 5.0, -7.0]
    assert sent["w"].tolist() == [[0.0, -2.0, 5.0, 0.0], [0.0, -7.0, 0.0, 0.0]]
    assert [num_kept(100, share) for share in (1e-9, 0.01, 0.07, 0.071, 1.0)] == [1, 1, 7, 8, 100]


@each_coding
@given(
    values=st.lists(st.floats(-256, 256, width=32, allow_subnormal=True), min_size=1, max_size=40),
    columns=st.integers(1, 5),
)
@settings(deadline=None, max_examples=60)
def test_no_entry_is_off_by_more_than_its_form_allows(
    coding: Coding, values: list[float], columns: int
) -> None:
    rows = -(-len(values) // columns)
    padded = torch.tensor(values + [0.0] * (rows * columns - len(values)))
    delta = {"w": padded.reshape(rows, columns)}
    sent = coded(delta, coding, share=0.4)
    off = (sent["w"] - delta["w"]).abs()
    assert sent["w"].dtype == torch.float32 and bool(torch.isfinite(sent["w"]).all())
    assert sent.num_bytes == coded_bytes((rows, columns), coding, 0.4)
    if coding == "bfloat16":
        assert bool((off <= delta["w"].abs() * 2.0**-8 + 2.0**-133).all())
    elif coding == "int8":
        largest = delta["w"].abs().amax(dim=1, keepdim=True)
        assert bool((off <= largest / 127 * 0.5001 + 1e-40).all())
    else:
        kept = sent["w"] != 0
        assert torch.equal(sent["w"][kept], delta["w"][kept])
        if bool(kept.any()) and not bool(kept.all()):
            assert float(delta["w"][~kept].abs().max()) <= float(delta["w"][kept].abs().min())


@each_coding
def test_what_is_sent_comes_back_to_the_bit(coding: Coding) -> None:
    delta = coded(MIXED, coding, share=0.3)
    data = encode_update(replace(UPDATE, delta=delta), {})
    update, _ = decode_update(data, TASK)
    assert isinstance(update.delta, Coded) and update.delta.coding == coding
    assert list(update.delta) == list(MIXED)
    assert sha256(update.delta) == sha256(delta)
    assert update.num_bytes == replace(UPDATE, delta=delta).num_bytes == delta.num_bytes
    plain = {name: tensor for name, tensor in MIXED.items() if name not in DELTA}
    expected = sum(coded_bytes(shape, coding, 0.3) for shape in SHAPES.values())
    assert delta.num_bytes == expected + sum(tensor.nbytes for tensor in plain.values())
    header = int.from_bytes(data[:8], "little")
    assert len(data) == 8 + header + delta.num_bytes  # the message holds what is counted


@each_coding
def test_a_coded_delta_is_read_beside_its_task_alone(coding: Coding) -> None:
    data = encode_update(replace(UPDATE, delta=coded(MIXED, coding)), {})
    with pytest.raises(MessageError, match="beside their task"):
        decode_update(data)


def test_a_plain_delta_replaces_a_coded_one() -> None:
    update = replace(UPDATE, delta={name: 2 * t for name, t in UPDATE.delta.items()})
    assert update.num_bytes == sum(tensor.nbytes for tensor in MIXED.values())
    again, _ = decode_update(encode_update(update, {}), TASK)
    assert sha256(again.delta) == sha256(update.delta)
    with pytest.raises(TypeError, match="one by one"):
        UPDATE.delta["w"] = torch.zeros(1)


def test_few_bytes_do_not_become_a_large_tensor() -> None:
    # A part of 2^40 entries of which one is sent: refused before it is made.
    part = SubModel(PART.sizes, {**PART.views, "b": View("b", (slice(0, 1 << 40),))})
    delta = coded(MIXED, "topk")
    data = encode_update(replace(UPDATE, delta=delta, submodel=part), {})
    with pytest.raises(UpdateError, match="other rows"):
        decode_update(data, TASK)


NAMES = frozenset({"w"})
INT8 = torch.ones(2, 3, dtype=torch.int8)
WRONG: dict[str, tuple[Coding, Params, Params]] = {
    "no scales": ("int8", {"w": INT8}, {}),
    "scales of another": ("int8", {"w": INT8}, {"v": torch.ones(2)}),
    "one scale": ("int8", {"w": INT8}, {"w": torch.ones(1)}),
    "a scale below 0": ("int8", {"w": INT8}, {"w": torch.tensor([1.0, -1.0])}),
    "whole scales": ("int8", {"w": INT8}, {"w": torch.ones(2, dtype=torch.int32)}),
    "no int8": ("int8", {"w": torch.ones(2, 3)}, {"w": torch.ones(2)}),
    "another shape": ("int8", {"w": INT8.T}, {"w": torch.ones(3)}),
    "no bfloat16": ("bfloat16", {"w": torch.ones(2, 3)}, {}),
    "codes": ("bfloat16", {"w": torch.ones(2, 3).bfloat16()}, {"w": torch.ones(2)}),
    "no such name": ("bfloat16", {"v": torch.ones(2, 3).bfloat16()}, {}),
}
for what, places in {
    "a place twice": [1, 1],
    "places that fall": [3, 1],
    "a place below 0": [-1, 2],
    "a place beyond": [1, 6],
    "a place beyond what int32 subtracts": [1, -(1 << 31)],
    "a place too few": [1],
    "no place": [],
}.items():
    numbers = torch.tensor(places, dtype=torch.int32)
    WRONG[what] = ("topk", {"w": torch.ones(2 if places else 0)}, {"w": numbers})
WRONG["long places"] = ("topk", {"w": torch.ones(1)}, {"w": torch.ones(1, dtype=torch.int64)})
WRONG["places in a table"] = (
    "topk",
    {"w": torch.ones(1, 1)},
    {"w": torch.ones(1, 1, dtype=torch.int32)},
)


@pytest.mark.parametrize("what", WRONG)
def test_what_is_no_coded_delta_is_refused(what: str) -> None:
    coding, main, codes = WRONG[what]
    with pytest.raises(MessageError):
        decoded(coding, main, codes, NAMES, {"w": (2, 3)})


@pytest.mark.parametrize("scale", [torch.nan, torch.inf, 1e30])
def test_a_scale_that_blows_up_is_refused_where_deltas_are(scale: float) -> None:
    codes = {"w": torch.tensor([1.0, scale])}
    delta = decoded("int8", {"w": INT8}, codes, NAMES, {"w": (2, 3)})
    part = SubModel({}, {"w": View("w", (slice(0, 2), slice(0, 3)))})
    with pytest.raises(UpdateError, match="reaches"):
        check_delta(part, delta, {"w": torch.zeros(2, 3)})
