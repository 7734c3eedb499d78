"""Views against plain NumPy indexing: cut, merge, coverage."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tesserafl.core.coverage import Coverage
from tesserafl.core.errors import ModelError
from tesserafl.core.exactsum import ExactSum
from tesserafl.core.params import num_entries, sha256
from tesserafl.core.submodel import (
    Index,
    SubModel,
    View,
    as_index,
    cut,
    index_length,
    index_tensor,
    merge,
    whole,
)

fast = settings(deadline=None, max_examples=60)


class Place(NamedTuple):
    """A view of a large tensor called "w", and the same place for NumPy."""

    shape: tuple[int, ...]
    view: View

    @property
    def mesh(self) -> tuple[np.ndarray, ...]:
        return np.ix_(*(index_tensor(index).numpy() for index in self.view.index))


@st.composite
def indices(draw: st.DrawFn, size: int) -> Index:
    """A slice, or a gather of distinct entries in any order (a wrapped window is one)."""
    kind = draw(st.sampled_from(["slice", "gather", "wrapped"]))
    count = draw(st.integers(1, size))
    if kind == "slice":
        start = draw(st.integers(0, size - count))
        return slice(start, start + count)
    if kind == "wrapped":
        return (torch.arange(count) + draw(st.integers(0, size - 1))) % size
    return torch.tensor(draw(st.permutations(range(size)))[:count])


@st.composite
def places(draw: st.DrawFn) -> Place:
    shape = tuple(draw(st.lists(st.integers(1, 5), min_size=1, max_size=3)))
    return Place(shape, View("w", tuple(draw(indices(size)) for size in shape)))


def numbered(shape: tuple[int, ...]) -> Tensor:
    return torch.arange(float(np.prod(shape))).reshape(shape)


def sub_model(**views: View) -> SubModel:
    return SubModel({}, views)


@given(places())
@fast
def test_cut_reads_what_numpy_reads(place: Place) -> None:
    large = numbered(place.shape)
    small = cut({"w": large}, sub_model(w=place.view))["w"]
    assert np.array_equal(small.numpy(), large.numpy()[place.mesh])
    assert tuple(small.shape) == place.view.shape


@given(places())
@fast
def test_cut_owns_its_bytes_and_no_more(place: Place) -> None:
    large = numbered(place.shape)
    small = place.view.read(large)
    assert small.is_contiguous()
    assert small.untyped_storage().nbytes() == small.numel() * small.element_size()
    small.fill_(-1.0)
    assert torch.equal(large, numbered(place.shape))


@given(places(), st.booleans())
@fast
def test_add_changes_the_viewed_entries_and_no_others(place: Place, plain_number: bool) -> None:
    large, expected = numbered(place.shape), numbered(place.shape).numpy().copy()
    small = torch.randn(place.view.shape)
    expected[place.mesh] += 7 if plain_number else small.numpy()
    place.view.add(large, 7 if plain_number else small)
    assert np.array_equal(large.numpy(), expected)


def test_several_gathers_in_one_view_by_hand() -> None:
    # Rows 3, 0 (a window that wraps) and columns 2, 0 of
    #   0  1  2
    #   3  4  5
    #   6  7  8
    #   9 10 11
    view = View("w", (torch.tensor([3, 0]), torch.tensor([2, 0])))
    assert view.read(numbered((4, 3))).tolist() == [[11.0, 9.0], [2.0, 0.0]]


def test_one_ascending_run_becomes_a_slice_and_anything_else_stays_a_gather() -> None:
    assert as_index([2, 3, 4]) == slice(2, 5)
    assert as_index(range(3)) == slice(0, 3)
    assert as_index(torch.tensor([1])) == slice(1, 2)
    for entries in ([3, 2, 1], [6, 7, 0], [0, 2, 4], [0, 1, 1, 3]):
        index = as_index(entries)
        assert isinstance(index, Tensor)
        assert index.tolist() == entries


@given(st.lists(st.integers(0, 9), min_size=1, max_size=6))
@fast
def test_as_index_keeps_entries_and_length(entries: list[int]) -> None:
    index = as_index(entries)
    assert index_tensor(index).tolist() == entries
    assert index_length(index) == len(entries)


@pytest.mark.parametrize("nothing", [[], range(0), torch.tensor([]), slice(3, 3)], ids=repr)
def test_an_empty_index_is_refused(nothing: list[int] | range | slice | Tensor) -> None:
    with pytest.raises(ModelError, match="at least one"):
        as_index(nothing)


def test_a_slice_with_a_step_is_not_taken_for_one_without() -> None:
    # Either refused, or read as 0, 2, 4, 6: never silently as 0, 1, ..., 7.
    try:
        index = as_index(slice(0, 8, 2))
    except ModelError:
        return
    assert index_tensor(index).tolist() == [0, 2, 4, 6]


def test_keys_are_equal_for_the_same_entries_in_the_same_order() -> None:
    def key(*entries: int) -> tuple[object, ...]:
        return View("w", (torch.tensor(entries), slice(0, 2))).key

    assert key(3, 0) == key(3, 0)
    assert len({key(3, 0), key(0, 3), View("v", (torch.tensor([3, 0]), slice(0, 2))).key}) == 3


@given(st.lists(st.integers(1, 5), min_size=1, max_size=3), st.data())
@fast
def test_whole_pieces_merge_to_the_weighted_mean(weights: list[int], data: st.DataObject) -> None:
    shape = (2, 3)
    params, submodel = {"w": torch.randn(shape)}, whole({}, {"w": shape})
    total = ExactSum(max_weight=sum(weights))
    deltas = []
    for weight in weights:
        entries = data.draw(st.lists(st.integers(-64, 64), min_size=6, max_size=6))
        deltas.append(torch.tensor(entries).reshape(shape) / 8)  # on every grid
        total.fold(submodel, {"w": deltas[-1]}, weight, params)
    mean = sum(w * d.double() for w, d in zip(weights, deltas, strict=True)) / sum(weights)
    assert torch.equal(merge(params, total)["w"], (params["w"].double() + mean).float())


@given(places())
@fast
def test_cut_then_merge_of_what_was_cut_changes_nothing(place: Place) -> None:
    params = {"w": torch.randn(place.shape)}
    submodel, total = sub_model(w=place.view), ExactSum(max_weight=3)
    small = cut(params, submodel)
    total.fold(submodel, {"w": small["w"] - small["w"]}, 3, params)
    assert torch.equal(merge(params, total)["w"], params["w"])


@given(places(), places())
@fast
def test_merge_averages_over_those_who_trained_an_entry(one: Place, other: Place) -> None:
    params = {"a": torch.randn(one.shape), "b": torch.randn(other.shape)}
    views = {"x": View("a", one.view.index), "y": View("b", other.view.index)}
    total = ExactSum(max_weight=4)
    for weight, change, names in ((3, 1.0, "xy"), (1, 5.0, "x")):
        part = {name: views[name] for name in names}
        delta = {name: torch.full(view.shape, change) for name, view in part.items()}
        total.fold(SubModel({}, part), delta, weight, params)
    expected = {name: tensor.double().numpy().copy() for name, tensor in params.items()}
    expected["a"][one.mesh] += 2.0  # (3 x 1 + 1 x 5) / 4
    expected["b"][other.mesh] += 1.0  # the first client alone
    for name, tensor in merge(params, total).items():
        assert np.array_equal(tensor.numpy(), expected[name].astype(np.float32))


def test_merge_where_nobody_trained_returns_the_same_tensors() -> None:
    params = {"w": torch.randn(4), "b": torch.randn(2)}
    assert all(merge(params, ExactSum(max_weight=1))[name] is params[name] for name in params)
    total = ExactSum(max_weight=1)
    total.fold(sub_model(w=View("w", (slice(0, 1),))), {"w": torch.ones(1)}, 1, params)
    merged = merge(params, total)
    assert merged["b"] is params["b"]
    assert merged["w"] is not params["w"]
    assert torch.equal(merged["w"][1:], params["w"][1:])


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16, torch.float64])
def test_merge_keeps_the_type_and_leaves_its_arguments_alone(kind: torch.dtype) -> None:
    params = {"w": torch.randn(4).to(kind)}
    before, total = sha256(params), ExactSum(max_weight=1)
    total.fold(whole({}, {"w": (4,)}), {"w": torch.ones(4, dtype=kind)}, 1, params)
    assert merge(params, total)["w"].dtype == kind
    assert sha256(params) == before


@given(st.lists(places(), min_size=1, max_size=4), st.integers(1, 3))
@fast
def test_coverage_adds_up_to_a_count_by_hand(parts: list[Place], times: int) -> None:
    names = [f"w{i}" for i in range(len(parts))]
    shapes = {name: part.shape for name, part in zip(names, parts, strict=True)}
    views = {n: View(n, part.view.index) for n, part in zip(names, parts, strict=True)}
    coverage = Coverage(shapes)
    coverage.add([SubModel({}, views)] * times)
    coverage.add([SubModel({}, {names[0]: views[names[0]]})])
    expected = {name: np.zeros(shape, dtype=np.int32) for name, shape in shapes.items()}
    for name, part in zip(names, parts, strict=True):
        expected[name][part.mesh] += times
    expected[names[0]][parts[0].mesh] += 1
    for name, count in coverage.counts.items():
        assert np.array_equal(count.numpy(), expected[name])
    trained = sum(int((count > 0).sum()) for count in expected.values())
    assert coverage.share == trained / sum(count.size for count in expected.values())


@given(places())
@fast
def test_untrained_entries_are_zeroed_and_the_others_kept(place: Place) -> None:
    coverage, params = Coverage({"w": place.shape}), {"w": torch.randn(place.shape)}
    coverage.add([sub_model(w=place.view)])
    expected = np.zeros(place.shape, dtype=np.float32)
    expected[place.mesh] = params["w"].numpy()[place.mesh]
    assert np.array_equal(coverage.zero_untrained(params)["w"].numpy(), expected)


def test_untrained_entries_of_a_part_are_those_of_the_large_model() -> None:
    """The part's block 0 is the large model's block 1, of which rows 1 and 2 were trained."""
    coverage = Coverage({"0.w": (3, 2), "1.w": (3, 2)})
    coverage.add([SubModel({}, {"0.w": View("1.w", (slice(1, 3), slice(0, 2)))})])
    part = SubModel({}, {"0.w": View("1.w", (slice(0, 3), slice(0, 2)))})
    kept = coverage.zero_untrained({"0.w": torch.full((3, 2), 5.0)}, part)
    assert kept["0.w"].tolist() == [[0.0, 0.0], [5.0, 5.0], [5.0, 5.0]]


def test_restrict_keeps_rows_of_the_small_tensor_and_their_place_in_the_large() -> None:
    # Small rows 0, 1, 2 are large rows 5, 1, 3; small rows 2 and 0 are reported.
    view = View("head", (torch.tensor([5, 1, 3]), slice(2, 6)))
    reported = sub_model(head=view, other=View("b", (slice(0, 2),))).restrict(
        {"head": {0: torch.tensor([2, 0])}}
    )
    assert index_tensor(reported.views["head"].index[0]).tolist() == [3, 5]
    assert reported.views["head"].index[1] == slice(2, 6)
    assert reported.views["other"].index == (slice(0, 2),)
    assert index_tensor(view.index[0]).tolist() == [5, 1, 3]


@given(places(), st.data())
@fast
def test_restricting_reads_a_part_of_what_was_cut(place: Place, data: st.DataObject) -> None:
    rows = torch.tensor(
        data.draw(st.permutations(range(place.view.shape[0])))[
            : data.draw(st.integers(1, place.view.shape[0]))
        ]
    )
    submodel, params = sub_model(w=place.view), {"w": numbered(place.shape)}
    part = cut(params, submodel.restrict({"w": {0: rows}}))["w"]
    assert torch.equal(part, cut(params, submodel)["w"][rows])


def test_whole_is_the_model_itself() -> None:
    params = {"w": torch.randn(2, 3), "scalar": torch.tensor(2.0)}
    submodel = whole({"hidden": 3}, {name: tuple(p.shape) for name, p in params.items()})
    assert submodel.num_entries == num_entries(params) == 7
    assert sha256(cut(params, submodel)) == sha256(params)
    assert submodel.sizes == {"hidden": 3}
