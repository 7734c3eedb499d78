"""Messages in parcels."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load

from tesserafl.core.errors import MessageError
from tesserafl.core.stored import Stored
from tesserafl.engines.incoming import Later, read_letter
from tesserafl.engines.parcels import Letter, Outgoing, letter_of, sha256

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int8, torch.bool)


def _parts():
    draw = torch.Generator().manual_seed(1)
    params = {
        "first.weight": torch.randn(40, 30, generator=draw),
        "first.bias": torch.randn(40, generator=draw),
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 4),
        "turned": torch.randn(30, 40, generator=draw).t(),
        "half": torch.randn(7, 3, generator=draw).to(torch.bfloat16),
    }
    return {"round": 3, "options": {"a": [1, 2.5]}}, {"params": params, "extra": {}}


def _through(parts, most):
    outgoing = Outgoing(parts=parts, most_bytes=most)
    parcels = {}
    for number, note in enumerate(outgoing.letter.parcels):
        parcels[note.sha256] = outgoing.parcel(number)
    letter = letter_of(json.loads(outgoing.letter.model_dump_json()))
    return letter, parcels


@pytest.mark.parametrize("most", [7, 64, 1000, 1 << 20])
def test_a_message_comes_out_as_it_went_in(most):
    parts = _parts()
    letter, parcels = _through(parts, most)
    header, groups = read_letter(letter, parcels.__getitem__)
    assert header == parts[0]
    assert list(groups) == ["params", "extra"]
    assert list(groups["params"]) == list(parts[1]["params"])  # in their order
    for name, tensor in parts[1]["params"].items():
        found = groups["params"][name]
        assert found.dtype == tensor.dtype and found.shape == tensor.shape
        assert torch.equal(found, tensor)


@pytest.mark.parametrize("most", [7, 64, 1 << 20])
def test_what_stays_where_the_parcels_lie_is_read_later(most):
    header, groups = _parts()
    groups["extra"] = {"first.bias": torch.arange(50.0)}
    letter, parcels = _through((header, groups), most)
    asked = []

    def read(name, key):
        asked.append(key)
        return load(parcels[name])[key]

    later = Later(groups=frozenset({"params", "memory"}), read=read)
    found = read_letter(letter, parcels.__getitem__, later)[1]
    assert isinstance(found["params"], Stored) and not isinstance(found["extra"], Stored)
    assert not asked and list(found) == ["params", "extra"]
    for group, params in groups.items():
        assert list(found[group]) == list(params)
        for name, tensor in params.items():
            value = found[group][name]
            assert value.dtype == tensor.dtype and torch.equal(value, tensor)


def test_what_is_read_later_is_checked_at_once():
    letter, parcels = _through(_parts(), 1000)
    later = Later(groups=frozenset({"params"}), read=lambda name, key: load(parcels[name])[key])
    values = letter.model_dump()
    values["entries"][0]["dtype"] = "int32"
    with pytest.raises(MessageError, match="float32"):
        read_letter(letter_of(values), parcels.__getitem__, later)
    lacking = Letter(**{**letter.model_dump(), "parcels": letter.model_dump()["parcels"][:-1]})
    with pytest.raises(MessageError, match="pieces"):
        read_letter(lacking, parcels.__getitem__, later)


@settings(max_examples=60, deadline=None)
@given(
    shapes=st.lists(st.lists(st.integers(0, 5), max_size=3), max_size=5),
    kinds=st.lists(st.sampled_from(_DTYPES), min_size=5, max_size=5),
    most=st.integers(1, 200),
)
def test_any_tensors_come_out_as_they_went_in(shapes, kinds, most):
    params = {
        f"t{n}": (torch.arange(max(1, torch.Size(s).numel()))[: torch.Size(s).numel()])
        .reshape(s)
        .to(kind)
        for n, (s, kind) in enumerate(zip(shapes, kinds, strict=False))
    }
    letter, parcels = _through(({}, {"g": params}), most)
    _, groups = read_letter(letter, parcels.__getitem__)
    assert all(torch.equal(groups["g"][name], tensor) for name, tensor in params.items())


def test_a_parcel_is_bounded_and_the_rest_is_small():
    header, groups = _parts()
    most = 512
    letter, parcels = _through((header, groups), most)
    assert len(parcels) > 10
    assert all(len(data) <= most + 100 * 16 for data in parcels.values())
    large = {"w": torch.randn(1 << 20)}
    letter, parcels = _through(({}, {"g": large}), 1 << 20)
    size = sum(map(len, parcels.values())) + len(letter.model_dump_json())
    assert size < 1.001 * large["w"].nbytes


def test_equal_tensors_give_equal_parcels():
    header, groups = _parts()
    one, _ = _through((header, groups), 512)
    other = {**groups["params"], "half": groups["params"]["half"] + 1}
    two, _ = _through((header, {"params": other, "extra": {}}), 512)
    same = [a.sha256 == b.sha256 for a, b in zip(one.parcels, two.parcels, strict=True)]
    assert same[:-1] == [True] * (len(same) - 1) and not same[-1]
    assert one.digest != two.digest


def _letter():
    letter, parcels = _through(_parts(), 512)
    return letter.model_dump(), parcels


def _refused(values, parcels, text):
    with pytest.raises(MessageError, match=text):
        read_letter(letter_of(values), parcels.__getitem__)


def test_a_damaged_parcel_is_refused():
    values, parcels = _letter()
    first = values["parcels"][0]["sha256"]
    parcels[first] = parcels[first][:-1] + b"x"
    _refused(values, parcels, "was damaged on its way")
    parcels[first] = parcels[first][:-1]
    _refused(values, parcels, "was damaged on its way")


def test_bytes_that_are_no_safetensors_are_refused():
    values, parcels = _letter()
    junk = b"\xff" * values["parcels"][0]["bytes"]
    values["parcels"][0]["sha256"] = sha256(junk)
    parcels[sha256(junk)] = junk
    _refused(values, parcels, "no safetensors")


def test_a_claim_beyond_the_parcels_is_refused_before_memory_is_taken():
    values, parcels = _letter()
    values["entries"][0]["shape"] = [1 << 40]
    _refused(values, parcels, "claims")
    values["entries"][0]["shape"] = [1 << 47, 1 << 47]
    _refused(values, parcels, "claims")


def test_a_shape_of_many_dimensions_is_refused_before_it_is_multiplied():
    values, parcels = _letter()
    values["entries"][0]["shape"] = [(1 << 47)] * 400
    _refused(values, parcels, "a letter is wrong")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda v: v["entries"].append(v["entries"][0]), "names a tensor twice"),
        (lambda v: v["groups"].append("params"), "names a group twice"),
        (lambda v: v["entries"][0].update(group="other"), "no group"),
        (lambda v: v["entries"][0].update(dtype="float8"), "allowed: float64"),
        (lambda v: v["entries"][0].update(dtype="int32"), "its letter says int32"),
        (lambda v: v["entries"][0].update(shape=[40, 29]), "entries; expected are"),
        (lambda v: v["entries"].pop(), "of which its letter knows nothing"),
        (lambda v: v["parcels"].pop(), "claims|pieces; expected are"),
        (lambda v: v["parcels"].append(v["parcels"][0]), "lies in two parcels"),
        (lambda v: v["parcels"][0].update(sha256="../../etc/passwd"), "pattern"),
        (lambda v: v["parcels"][0].update(bytes=-1), "greater than or equal"),
        (lambda v: v.update(extra=1), "Extra inputs"),
        (lambda v: v.pop("entries"), "Field required"),
    ],
)
def test_a_letter_that_contradicts_itself_is_refused(change, text):
    values, parcels = _letter()
    change(values)
    _refused(values, parcels, text)


def test_what_is_no_letter_is_refused():
    for value in (None, 3, [], {"header": 1}):
        with pytest.raises(MessageError, match="a letter is wrong"):
            letter_of(value)
    assert isinstance(letter_of(_letter()[0]), Letter)
