"""Parameters that lie on a disk."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch

from tesserafl.core.errors import MessageError
from tesserafl.core.params import subtract
from tesserafl.core.stored import Place, Stored


def stored(params: dict[str, torch.Tensor], pieces: int = 1) -> Stored:
    def read(name: str, number: int) -> torch.Tensor:
        length = -(-params[name].numel() // pieces)
        return params[name].reshape(-1)[number * length : (number + 1) * length]

    return Stored(
        {
            name: Place(
                shape=tuple(tensor.shape),
                dtype=tensor.dtype,
                pieces=[partial(read, name, number) for number in range(pieces)],
            )
            for name, tensor in params.items()
        }
    )


@pytest.fixture
def params() -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(3)
    return {
        "b": torch.randn(7, 5, generator=draw),
        "a": torch.randn(11, generator=draw),
        "half": torch.randn(6, 2, generator=draw).bfloat16(),
        "empty": torch.zeros(0, 3),
    }


@pytest.mark.parametrize("pieces", [1, 3])
def test_they_are_parameters_like_any_other(params, pieces):
    lazy = stored(params, pieces)
    made = {
        "dict": dict(lazy),
        "unpacked": {**lazy},
        "items": {name: tensor for name, tensor in lazy.items()},
        "values": dict(zip(lazy, lazy.values(), strict=True)),
        "or": lazy | {},
        "ror": {} | lazy,
        "copy": lazy.copy(),
        "copied": copy.copy(lazy),
        "deeply": copy.deepcopy(lazy),
        "get": {name: lazy.get(name) for name in lazy},
        "keys": dict(zip(lazy.keys(), (lazy[name] for name in lazy), strict=True)),
    }
    for how, found in made.items():
        assert list(found) == list(params), how
        for name, tensor in params.items():
            assert found[name].dtype == tensor.dtype, how
            assert torch.equal(found[name], tensor), how
    assert lazy == lazy and lazy != stored(params, pieces)
    assert len(lazy) == 4 and "a" in lazy and "c" not in lazy
    assert lazy.get("c") is None
    with pytest.raises(KeyError):
        lazy["c"]
    assert torch.equal((lazy | {"a": torch.ones(2)})["a"], torch.ones(2))


@pytest.mark.parametrize("pieces", [1, 3])
def test_what_is_read_is_the_readers_own(params, pieces):
    lazy = stored(params, pieces)
    lazy["b"].zero_()
    assert torch.equal(lazy["b"], params["b"])


def test_none_can_be_replaced(params):
    lazy = stored(params)
    for change in (
        lambda: lazy.__setitem__("a", torch.zeros(1)),
        lambda: lazy.update(a=torch.zeros(1)),
        lambda: lazy.pop("a"),
        lambda: lazy.clear(),
    ):
        with pytest.raises(TypeError, match="dict"):
            change()


@pytest.mark.parametrize("pieces", [1, 4])
def test_a_change_has_the_bits_of_a_subtraction(params, pieces):
    trained = {name: tensor * 3 + 1 for name, tensor in params.items()}
    trained["b"] = trained["b"].t().contiguous().t()  # not in the order of its entries
    change = subtract(trained, stored(params, pieces))
    expected = subtract(trained, params)
    assert list(change) == list(expected)
    for name, tensor in expected.items():
        assert change[name].dtype == tensor.dtype and torch.equal(change[name], tensor)


def test_bfloat16_is_read_as_it_is_decoded(params):
    lazy = stored(params, 2).in_float32(["half"])
    assert torch.equal(lazy["half"], params["half"].float())
    assert torch.equal(lazy["a"], params["a"])
    for name in ("a", "none"):
        with pytest.raises(MessageError, match="bfloat16"):
            stored(params).in_float32([name])
