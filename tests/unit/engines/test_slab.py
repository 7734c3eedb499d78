"""Memory that two processes share: what goes in comes out, and nothing else is a message."""

import os

import pytest
import torch

from tesserafl.core.errors import MessageError
from tesserafl.engines.slab import Slab


def test_what_goes_in_comes_out_for_another_holder() -> None:
    writer = Slab()
    reader = Slab(os.dup(writer.descriptor))
    groups = {
        "delta": {
            "z": torch.randn(3, 5).t(),  # not contiguous
            "a": torch.arange(7, dtype=torch.int64),
            "half": torch.randn(3).bfloat16(),
            "none": torch.empty(0, 4),
            "flag": torch.tensor([True, False]),
            "one": torch.tensor(2.5),
        },
        "memory": {},
    }
    places = [writer.put({"round": number}, groups) for number in range(3)]
    for number, place in enumerate(places):
        body, got = reader.get(*place)
        assert body == {"round": number}
        assert [list(params) for params in got.values()] == [list(groups["delta"]), []]
        for name, tensor in groups["delta"].items():
            assert got["delta"][name].dtype == tensor.dtype
            assert torch.equal(got["delta"][name], tensor)


def test_tensors_begin_at_cache_lines() -> None:
    slab = Slab()
    tensors = {"odd": torch.zeros(3), "b": torch.zeros(5, dtype=torch.int64), "c": torch.zeros(1)}
    for _ in range(2):
        _, got = slab.get(*slab.put({}, {"params": tensors}))
        assert all(tensor.data_ptr() % 64 == 0 for tensor in got["params"].values())


def test_it_grows_under_views_and_is_used_again() -> None:
    slab = Slab()
    first = slab.get(*slab.put({}, {"p": {"w": torch.ones(1000)}}))[1]["p"]["w"]
    second = slab.get(*slab.put({}, {"p": {"w": torch.full((2_000_000,), 2.0)}}))[1]["p"]["w"]
    assert float(first.sum()) == 1000.0
    assert float(second.sum()) == 4_000_000.0
    size = os.fstat(slab.descriptor).st_size
    for _ in range(5):
        slab.start_over()
        slab.put({}, {"p": {"w": torch.ones(1_000_000)}})
    assert os.fstat(slab.descriptor).st_size == size


@pytest.mark.parametrize("place", [(0, 64), (64, 10), (0, 1 << 12)])
def test_what_is_no_message_is_refused(place: tuple[int, int]) -> None:
    with pytest.raises(MessageError, match="no message"):
        Slab().get(*place)


def test_a_tensor_that_reaches_beyond_its_message_is_refused() -> None:
    slab = Slab()
    start, length = slab.put({}, {"p": {"w": torch.ones(100)}})
    with pytest.raises(MessageError, match="outside"):
        slab.get(start, length - 64)
