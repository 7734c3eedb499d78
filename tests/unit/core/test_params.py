"""Plain operations on parameters, and the digest that tells whether two runs agree."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tesserafl.core.params import Params, norm, num_bytes, num_entries, sha256, subtract


def small() -> Params:
    return {"a": torch.tensor([[1.0, 2.0]]), "b": torch.tensor([3.0], dtype=torch.bfloat16)}


def test_subtract_takes_the_right_from_the_left() -> None:
    difference = subtract({"w": torch.tensor([5.0, 1.0])}, {"w": torch.tensor([2.0, 4.0])})
    assert difference["w"].tolist() == [3.0, -3.0]


def test_entries_and_bytes_are_counted_over_all_tensors() -> None:
    assert num_entries(small()) == 3
    assert num_bytes(small()) == 2 * 4 + 1 * 2


def test_norm_is_euclidean_over_everything_in_double_precision() -> None:
    assert norm({"a": torch.tensor([3.0]), "b": torch.tensor([[4.0]])}) == 5.0
    assert norm({}) == 0.0
    # 1e30 squared is infinite in float32.
    assert norm({"a": torch.tensor([1e30])}) == pytest.approx(1e30)


def test_digest_does_not_depend_on_order_or_memory_layout() -> None:
    params = small()
    assert sha256(dict(reversed(params.items()))) == sha256(params)
    matrix = torch.arange(6.0).reshape(2, 3)
    assert sha256({"m": matrix.T.contiguous().T}) == sha256({"m": matrix})


@pytest.mark.parametrize(
    "changed",
    [
        {"a": torch.tensor([[1.0, 2.0]]), "c": torch.tensor([3.0], dtype=torch.bfloat16)},
        {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([3.0], dtype=torch.bfloat16)},
        {"a": torch.tensor([[1.0, 2.0]]), "b": torch.tensor([3.0], dtype=torch.float16)},
        {"a": torch.tensor([[1.0, 2.0 + 2**-22]]), "b": torch.tensor([3.0], dtype=torch.bfloat16)},
        {"a": torch.tensor([[1.0, 2.0]])},
    ],
    ids=["name", "shape", "type", "last bit", "missing"],
)
def test_digest_depends_on_names_shapes_types_and_every_bit(changed: Params) -> None:
    assert sha256(changed) != sha256(small())


@pytest.mark.parametrize("tensor", [torch.tensor(1.5), torch.empty(0, 3), torch.tensor([0, -1])])
def test_digest_takes_scalars_empty_tensors_and_integers(tensor: Tensor) -> None:
    assert sha256({"t": tensor}) == sha256({"t": tensor.clone()})


def test_digest_tells_zeros_of_different_sign_apart() -> None:
    assert sha256({"z": torch.tensor([0.0])}) != sha256({"z": torch.tensor([-0.0])})
