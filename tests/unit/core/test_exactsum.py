"""Sums in integers: equal bits in any order, a stated error, refusals that change nothing."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tesserafl.core.checks import MAX_ENTRY, check_delta
from tesserafl.core.errors import UpdateError
from tesserafl.core.exactsum import ExactSum
from tesserafl.core.params import Params, sha256
from tesserafl.core.submodel import SubModel, View

LARGE = {"w": torch.zeros(4, 3), "b": torch.zeros(4)}
# Three overlapping parts: a slice, a window that wraps, and the bias alone.
PARTS = (
    SubModel({}, {"w": View("w", (slice(0, 2), slice(0, 3))), "b": View("b", (slice(0, 2),))}),
    SubModel({}, {"w": View("w", (torch.tensor([3, 0]), torch.tensor([2, 0])))}),
    SubModel({}, {"b": View("b", (torch.tensor([2, 1, 3]),))}),
)
fast = settings(deadline=None, max_examples=50)

Piece = tuple[SubModel, Params, int]


@st.composite
def pieces(draw: st.DrawFn) -> Piece:
    submodel = draw(st.sampled_from(PARTS))
    draws = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    spread = draw(st.sampled_from([1e-6, 1.0, 20.0]))
    delta = {
        name: (torch.randn(view.shape, generator=draws) * spread).clamp(-MAX_ENTRY, MAX_ENTRY)
        for name, view in submodel.views.items()
    }
    return submodel, delta, draw(st.integers(1, 1000))


def bits(total: ExactSum) -> str:
    """Everything that a sum gives: integers, means, weights."""
    means = {name: (mean, weights) for name, mean, weights in total.means(LARGE)}
    return sha256(
        {f"sum {name}": tensor for name, tensor in total.sums.items()}
        | {f"mean {name}": mean for name, (mean, _) in means.items()}
        | {f"weights {name}": weights for name, (_, weights) in means.items()}
        | {"weight": torch.tensor(total.weight)}
    )


def folded(parts: list[Piece], max_weight: int = 1 << 20) -> ExactSum:
    total = ExactSum(max_weight=max_weight)
    for submodel, delta, weight in parts:
        total.fold(submodel, delta, weight, LARGE)
    return total


@given(st.lists(pieces(), min_size=1, max_size=6), st.randoms(use_true_random=False))
@fast
def test_the_order_of_updates_does_not_change_a_bit(parts: list[Piece], random: object) -> None:
    shuffled = list(parts)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert bits(folded(shuffled)) == bits(folded(parts)) == bits(folded(parts))


@given(st.lists(pieces(), min_size=2, max_size=6), st.data())
@fast
def test_any_tree_of_sub_sums_gives_the_same_bits(parts: list[Piece], data: st.DataObject) -> None:
    sums = [folded([part]) for part in parts]
    while len(sums) > 1:
        left = sums.pop(data.draw(st.integers(0, len(sums) - 1)))
        right = sums.pop(data.draw(st.integers(0, len(sums) - 1)))
        before = bits(right)
        left.merge(right)
        assert bits(right) == before  # an edge's own sum stays its own
        sums.append(left)
    assert bits(sums[0]) == bits(folded(parts))


@given(st.lists(pieces(), min_size=1, max_size=5))
@fast
def test_the_mean_is_off_by_less_than_the_grid(parts: list[Piece]) -> None:
    total = folded(parts, max_weight=1 << 20)
    for name, mean, weights in total.means(LARGE):
        sums = {entry: Fraction(0) for entry in range(LARGE[name].numel())}
        counts = dict.fromkeys(sums, 0)
        number = torch.arange(LARGE[name].numel()).reshape(LARGE[name].shape)
        for submodel, delta, weight in parts:
            if name in delta:
                entries = submodel.views[name].read(number).reshape(-1).tolist()
                for entry, value in zip(entries, delta[name].reshape(-1).tolist(), strict=True):
                    sums[entry] += weight * Fraction(value)
                    counts[entry] += weight
        assert weights.reshape(-1).tolist() == list(counts.values())
        for entry, value in enumerate(mean.reshape(-1).tolist()):
            exact = sums[entry] / max(1, counts[entry])
            assert abs(Fraction(value) - exact) < Fraction(1, 1 << total.scale)


@pytest.mark.parametrize("max_weight", [1, 2, 3, 1000, 2**20 - 1, 2**20, 2**40 + 1])
@pytest.mark.parametrize("max_entry", [2.0**-30, 1.0, 3.7, 255.9, MAX_ENTRY])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_declared_bounds_fit_in_62_bits(max_weight: int, max_entry: float, sign: float) -> None:
    submodel = SubModel({}, {"b": View("b", (slice(0, 4),))})

    def fold(total: ExactSum, weight: int) -> None:
        delta = {"b": torch.full((4,), sign * max_entry, dtype=torch.float64)}
        total.fold(submodel, delta, weight, LARGE)

    in_one, in_two = ExactSum(max_weight, max_entry), ExactSum(max_weight, max_entry)
    fold(in_one, max_weight)
    if max_weight > 1:
        fold(in_two, max_weight - 1)
        fold(in_two, 1)
        assert torch.equal(in_one.sums["b"], in_two.sums["b"])
    # Python's integers do not overflow.
    exact = round(Fraction(sign * max_entry) * Fraction(2) ** in_one.scale) * max_weight
    assert abs(exact) < 2**62
    assert in_one.sums["b"].tolist() == [exact] * 4
    _, mean, _ = next(in_one.means(LARGE))
    assert float(mean[0]) == pytest.approx(sign * max_entry, abs=2.0**-in_one.scale, rel=2**-52)


def bad(**changed: Tensor) -> Params:
    return {"w": torch.ones(2, 3), "b": torch.ones(2)} | changed


REFUSED: dict[str, tuple[Params, object]] = {
    "NaN": (bad(b=torch.tensor([0.0, torch.nan])), 1),
    "infinite": (bad(b=torch.tensor([torch.inf, 0.0])), 1),
    "minus infinite": (bad(b=torch.tensor([0.0, -torch.inf])), 1),
    "too large": (bad(b=torch.tensor([0.0, 256.1])), 1),
    "too small": (bad(b=torch.tensor([-256.1, 0.0])), 1),
    "wrong shape": (bad(b=torch.ones(3)), 1),
    "broadcastable shape": (bad(b=torch.ones(1)), 1),
    "transposed": (bad(w=torch.ones(3, 2)), 1),
    "unknown name": (bad(c=torch.ones(2)), 1),
    "weight 0": (bad(), 0),
    "negative weight": (bad(), -1),
    "fractional weight": (bad(), 1.5),
    "over-declared weight": (bad(), 98),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_refused_changes_nothing(what: str) -> None:
    delta, weight = REFUSED[what]
    total = ExactSum(max_weight=100)
    total.fold(PARTS[0], {"w": torch.ones(2, 3)}, 3, LARGE)
    before = bits(total)
    with pytest.raises(UpdateError):
        total.fold(PARTS[0], delta, weight, LARGE)  # type: ignore[arg-type]
    assert bits(total) == before
    total.fold(PARTS[0], bad(), 97, LARGE)  # what fits is still taken


OUTSIDE = {
    "a slice beyond the end": View("b", (slice(3, 5),)),
    "a gather beyond the end": View("b", (torch.tensor([0, 4]),)),
    "a gather before the beginning": View("b", (torch.tensor([0, -1]),)),
    "an unknown parameter": View("c", (slice(0, 2),)),
    "too many dimensions": View("b", (slice(0, 2), slice(0, 1))),
}


@pytest.mark.parametrize("what", OUTSIDE)
def test_a_sub_model_that_does_not_fit_the_model_is_refused_and_changes_nothing(what: str) -> None:
    view = OUTSIDE[what]
    submodel = SubModel({}, {"w": View("w", (slice(0, 2), slice(0, 3))), "b": view})
    total = folded([(PARTS[0], bad(), 3)], max_weight=100)
    before = bits(total)
    with pytest.raises(UpdateError):
        total.fold(submodel, {"w": torch.ones(2, 3), "b": torch.ones(view.shape)}, 1, LARGE)
    assert bits(total) == before


def test_only_sums_of_equal_bounds_are_merged() -> None:
    for other in (ExactSum(max_weight=5), ExactSum(max_weight=4, max_entry=1.0)):
        with pytest.raises(UpdateError, match="equal bounds"):
            ExactSum(max_weight=4).merge(other)


def test_sub_sums_beyond_the_declared_weight_are_not_merged() -> None:
    one, other = (folded([(PARTS[0], bad(), 3)], max_weight=5) for _ in range(2))
    before = bits(one)
    with pytest.raises(UpdateError, match="exceed"):
        one.merge(other)
    assert bits(one) == before


@pytest.mark.parametrize(("max_weight", "max_entry"), [(0, 1.0), (-1, 1.0), (1, 0.0), (1, -1.0)])
def test_bounds_must_be_positive(max_weight: int, max_entry: float) -> None:
    with pytest.raises(UpdateError, match="positive"):
        ExactSum(max_weight, max_entry)


def test_bounds_that_leave_a_grid_coarser_than_one_are_refused() -> None:
    # One client that claims 2^56 examples would round everybody's deltas to multiples of 8.
    with pytest.raises(UpdateError):
        ExactSum(max_weight=1 << 56)


def test_a_part_of_the_names_may_be_folded() -> None:
    total = folded([(PARTS[0], {"b": torch.ones(2)}, 2)])
    assert [name for name, _, _ in total.means(LARGE)] == ["b"]


def test_the_mean_is_zero_where_nobody_reported() -> None:
    total = folded([(PARTS[1], {"w": torch.full((2, 2), 8.0)}, 5)])
    (name, mean, weights), *others = total.means(LARGE)
    assert name == "w" and not others
    # Rows 3 and 0, columns 2 and 0.
    assert mean.tolist() == [[8, 0, 8], [0, 0, 0], [0, 0, 0], [8, 0, 8]]
    assert weights.tolist() == [[5, 0, 5], [0, 0, 0], [0, 0, 0], [5, 0, 5]]


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_fold_leaves_the_update_alone(kind: torch.dtype) -> None:
    delta = {"w": torch.randn(2, 3).to(kind), "b": torch.randn(2).to(kind)}
    before = sha256(delta)
    folded([(PARTS[0], delta, 3)])
    assert sha256(delta) == before


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_every_floating_type_is_summed(kind: torch.dtype) -> None:
    total = folded([(PARTS[0], {"b": torch.tensor([0.5, -1.25], dtype=kind)}, 1)])
    assert next(total.means(LARGE))[1].tolist() == [0.5, -1.25, 0.0, 0.0]


def test_large_tensors_are_converted_in_pieces_without_a_seam() -> None:
    count = (1 << 18) + 3
    submodel = SubModel({}, {"w": View("w", (slice(0, count),))})
    delta, large = torch.arange(float(count)).remainder(251), {"w": torch.zeros(count)}
    total = ExactSum(max_weight=1)
    total.fold(submodel, {"w": delta}, 1, large)
    assert torch.equal(next(total.means(large))[1], delta.double())


def test_check_delta_takes_what_lies_on_the_bound() -> None:
    check_delta(PARTS[0], {"b": torch.tensor([MAX_ENTRY, -MAX_ENTRY])}, LARGE)
