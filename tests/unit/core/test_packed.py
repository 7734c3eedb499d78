"""Packed parameters are parameters like any other, to the bit, and cannot go stale."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from tesserafl.core.errors import UpdateError
from tesserafl.core.exactsum import ExactSum
from tesserafl.core.params import (
    Packed,
    Params,
    flat_of,
    num_bytes,
    num_entries,
    packable,
    packed_rows,
    packing_like,
    sha256,
    subtract,
)
from tesserafl.core.submodel import SubModel, View, merge, whole

SHAPES = {"w": (7, 5), "b": (7,), "scale": (), "v": (2, 3, 3)}
SIZES = {"w": 1}


def plain(seed: int) -> Params:
    draw = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=draw) for name, shape in SHAPES.items()}


def packed(params: Params) -> Packed:
    (row,) = packed_rows({name: tensor[None] for name, tensor in params.items()})
    return row


def test_packed_parameters_are_the_same_parameters() -> None:
    given = plain(0)
    row = packed(given)
    assert list(row) == list(given) and sha256(row) == sha256(given)
    assert num_entries(row) == num_entries(given) and num_bytes(row) == num_bytes(given)
    assert packing_like(row) is packing_like(given)
    assert all(tensor.data_ptr() % 64 == 0 for tensor in row.values())
    assert (flat_of(row) == flat_of(given)).all()


def test_rows_of_a_stack_are_its_clients() -> None:
    clients = [plain(seed) for seed in range(3)]
    stacks = {name: torch.stack([client[name] for client in clients]) for name in SHAPES}
    assert [sha256(row) for row in packed_rows(stacks)] == [sha256(client) for client in clients]


def test_difference_of_packed_has_the_bits_of_the_plain_one() -> None:
    left, right = plain(0), plain(1)
    difference = subtract(packed(left), packed(right))
    assert isinstance(difference, Packed)
    assert sha256(difference) == sha256(subtract(left, right))
    assert sha256(subtract(packed(left), right)) == sha256(difference)


@pytest.mark.parametrize(
    "change",
    [
        lambda row: row.__setitem__("w", torch.zeros(7, 5)),
        lambda row: row.pop("w"),
        lambda row: row.update(w=torch.zeros(7, 5)),
        lambda row: row.setdefault("new", torch.zeros(1)),
        lambda row: row.clear(),
    ],
)
def test_none_can_be_replaced_alone(change: Callable[[Packed], object]) -> None:
    with pytest.raises(TypeError, match="dict"):
        change(packed(plain(0)))


def test_only_few_entries_of_float32_are_packed() -> None:
    assert packable(plain(0))
    assert not packable({"w": torch.zeros(1 << 19)})
    assert not packable({"w": torch.zeros(3, dtype=torch.float64)})
    assert not packable({})


@pytest.mark.parametrize("pack", [True, False])
@pytest.mark.parametrize("cut_too", [True, False])
def test_sums_do_not_depend_on_packing_order_or_company(pack: bool, cut_too: bool) -> None:
    """Whole and cut sub-models in turn, against one exact sum per entry."""
    params, everything = plain(9), whole(SIZES, SHAPES)
    window = SubModel(
        SIZES, {"w": View("w", (torch.tensor([6, 0]), slice(1, 4))), "b": View("b", (slice(2, 4),))}
    )
    deltas = []
    for client in range(6):
        submodel = window if cut_too and client % 2 else everything
        delta = {
            name: tensor
            for name, tensor in (
                (name, view.read(plain(client)[name])) for name, view in submodel.views.items()
            )
        }
        deltas.append((submodel, packed(delta) if pack else delta, client + 1))
    hashes = set()
    for order in (deltas, deltas[::-1], deltas[::2] + deltas[1::2]):
        total = ExactSum(max_weight=21)
        for submodel, delta, weight in order:
            total.fold(submodel, delta, weight, params)
        hashes.add(sha256(merge(params, total)))
    alone = ExactSum(max_weight=21)
    for submodel, delta, weight in deltas:
        part = ExactSum(max_weight=21)
        part.fold(submodel, dict(delta), weight, params)
        alone.merge(part)
    assert hashes == {sha256({**params, **dict(alone.finished(params))})}


def test_a_bad_packed_delta_adds_nothing() -> None:
    params, everything = plain(9), whole(SIZES, SHAPES)
    total = ExactSum(max_weight=3)
    total.fold(everything, packed(plain(0)), 1, params)
    bad = packed(plain(1))
    bad["b"][3] = float("nan")
    with pytest.raises(UpdateError, match="'b'"):
        total.fold(everything, bad, 1, params)
    expected = ExactSum(max_weight=3)
    expected.fold(everything, plain(0), 1, params)
    assert total.weight == 1
    assert sha256(merge(params, total)) == sha256(merge(params, expected))
