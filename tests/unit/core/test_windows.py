"""Kept units and carried values against numbers worked by hand and against full-size tensors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tesserafl.core.axes import probe
from tesserafl.core.errors import ModelError
from tesserafl.core.model import Model, Output, Sizes
from tesserafl.core.submodel import (
    Index,
    SubModel,
    View,
    as_index,
    cut,
    index_length,
    index_tensor,
    whole,
)
from tesserafl.core.windows import carry, feature_entries, kept

fast = settings(deadline=None, max_examples=60)


class Stack(nn.Module):
    """A stream, blocks with fused pairs of `inner` units, a flattened map of 3 entries a unit."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.stem = nn.Linear(4, sizes["embed"])
        self.blocks = nn.ModuleList(nn.ModuleList(pair(sizes)) for _ in range(sizes["layers"]))
        self.spread = nn.Conv1d(sizes["embed"], sizes["maps"], 1)
        self.head = nn.Linear(3 * sizes["maps"], sizes["classes"])

    def forward(self, inputs: Tensor) -> Output:
        stream = self.stem(inputs)  # [batch, 3, embed]
        for up, down in self.blocks:
            gate, value = up(stream).chunk(2, dim=-1)
            stream = stream + down(gate.sigmoid() * value)
        features = self.spread(stream.transpose(1, 2)).flatten(1)  # [batch, maps x 3]
        return Output(self.head(features), features)


def pair(sizes: Sizes) -> tuple[nn.Module, nn.Module]:
    embed, inner = sizes["embed"], sizes["inner"]
    return nn.Linear(embed, 2 * inner), nn.Linear(inner, embed)


SIZES = {"embed": 8, "inner": 6, "maps": 5, "layers": 3, "classes": 4}


def build(sizes: Sizes) -> nn.Module:
    return Stack(sizes)


@pytest.fixture(scope="module")
def model() -> Model:
    return probe(build, SIZES, lambda: torch.randn(2, 3, 4), outputs=("classes",))


def listed(found: dict[str, Index]) -> dict[str, list[int]]:
    return {axis: index_tensor(index).tolist() for axis, index in found.items()}


# kept


def test_kept_is_what_was_given_to_slice(model: Model) -> None:
    assert model.ties["blocks.0.0.weight"][0].parts == (1, 1)  # type: ignore[union-attr]
    asked = {"inner": [4, 5, 0], "maps": range(1, 3), "layers": [2]}
    found = kept(model, model.slice(asked))
    assert found["maps"] == slice(1, 3) and found["embed"] == slice(0, 8)
    assert listed(found) == {"embed": list(range(8)), "inner": [4, 5, 0], "maps": [1, 2]}


def test_all_units_in_another_order_are_not_a_slice(model: Model) -> None:
    order = [3, 1, 4, 0, 2]
    found = kept(model, model.slice({"maps": order}))["maps"]
    assert isinstance(found, Tensor) and found.tolist() == order and found.dtype == torch.int64


@given(st.data())
@fast
def test_kept_inverts_slice(model: Model, data: st.DataObject) -> None:
    asked = {axis: data.draw(units(model.units(axis))) for axis in model.cuttable}
    found = kept(model, model.slice(asked))
    for axis, index in asked.items():
        assert type(found[axis]) is type(as_index(index)), axis
        assert index_tensor(found[axis]).tolist() == index_tensor(index).tolist()


def test_the_units_of_a_resized_model_are_its_own(model: Model) -> None:
    small = model.resized(model.slice({"maps": [4, 1, 2]}))
    assert small.features == model.features
    assert listed(kept(small, small.slice({"maps": [2, 0]})))["maps"] == [2, 0]
    assert listed(kept(model, model.slice({"maps": [2, 4]})))["maps"] == [2, 4]


def broken(model: Model, name: str, dim: int, index: Index) -> SubModel:
    views = dict(model.whole().views)
    dims = list(views[name].index)
    dims[dim] = index
    return SubModel(model.sizes, views | {name: View(name, tuple(dims))})


@pytest.mark.parametrize(
    ("name", "dim", "entries", "axis"),
    [
        ("head.weight", 1, range(0, 7), "maps"),  # two units and a third of one
        ("head.weight", 1, range(1, 7), "maps"),  # as many as two units, one entry off
        ("head.weight", 1, [1, 0, 2], "maps"),  # one unit, its entries in another order
        ("blocks.1.0.weight", 0, [0, 1, 6, 8], "inner"),  # other units in the second part
        ("blocks.1.0.bias", 0, range(6, 12), "inner"),  # the second part alone
        ("blocks.0.1.weight", 1, range(0, 7), "inner"),  # more than there are
    ],
)
def test_views_without_whole_units_are_refused(
    model: Model, name: str, dim: int, entries: list[int], axis: str
) -> None:
    with pytest.raises(ModelError, match=rf"axis '{axis}': '{name}' .* whole units"):
        kept(model, broken(model, name, dim, as_index(entries)))


def test_parameters_that_keep_other_units_are_refused(model: Model) -> None:
    with pytest.raises(ModelError, match=r"'maps': 'head.weight' .* other units than 'spread"):
        kept(model, broken(model, "head.weight", 1, slice(0, 6)))


def test_a_submodel_must_show_the_axis_and_be_of_this_model(model: Model) -> None:
    views = dict(model.whole().views)
    only = SubModel(SIZES, {"stem.bias": views["stem.bias"]})
    with pytest.raises(ModelError, match="axis 'inner': no parameter of the sub-model"):
        kept(model, only)
    strange = SubModel(SIZES, {"stem.bias": View("steam.bias", (slice(0, 8),))})
    with pytest.raises(ModelError, match=r"'steam.bias', which is no .* did you mean 'stem.bias'"):
        kept(model, strange)


# feature_entries


def test_the_entries_of_a_wrapped_window(model: Model) -> None:
    # Channel c of the map has entries 3c, 3c + 1, 3c + 2 of the features.
    found = feature_entries(model, model.slice({"maps": [4, 0], "inner": [1], "embed": [2, 3]}))
    assert found.tolist() == [12, 13, 14, 0, 1, 2] and found.dtype == torch.int64
    assert feature_entries(model, model.whole()).tolist() == list(range(15))


def test_only_the_features_own_axis_is_read(model: Model) -> None:
    views = model.slice({"maps": [3]}).views
    head = SubModel(SIZES, {"head.weight": views["head.weight"]})
    assert feature_entries(model, head).tolist() == [9, 10, 11]


def test_a_model_without_known_features_says_what_to_do() -> None:
    plain = probe(
        lambda s: nn.Sequential(nn.Linear(4, s["h"]), nn.ReLU(), nn.Linear(s["h"], 3)),
        {"h": 6},
        lambda: torch.randn(2, 4),
    )
    assert plain.features is None
    with pytest.raises(ModelError, match=r"follow no cuttable axis.*must return Output"):
        feature_entries(plain, plain.whole())


# carry


def sub(**views: tuple[str, tuple[Index, ...]]) -> SubModel:
    return SubModel({}, {name: View(*view) for name, view in views.items()})


def test_a_window_that_wraps_around_by_hand() -> None:
    old = sub(w=("w", (torch.tensor([4, 5, 0, 1]),)))
    values = {"w": torch.tensor([40.0, 50.0, 10.0, 11.0])}
    new = sub(w=("w", (slice(0, 4),)))
    assert carry(values, old, new)["w"].tolist() == [10, 11, 0, 0]
    back = carry(carry(values, old, new), new, old)
    assert back["w"].tolist() == [0, 0, 10, 11]


def test_two_dimensions_by_hand() -> None:
    # Rows 1, 2 and columns 3, 0 of a [3, 4]; the new view has rows 2, 0 and columns 0, 1, 3.
    old = sub(w=("w", (slice(1, 3), torch.tensor([3, 0]))))
    values = {"w": torch.tensor([[13.0, 10.0], [23.0, 20.0]])}
    new = sub(w=("w", (torch.tensor([2, 0]), torch.tensor([0, 1, 3]))))
    assert carry(values, old, new)["w"].tolist() == [[20, 0, 23], [0, 0, 0]]


def test_small_names_may_differ(model: Model) -> None:
    old, new = model.slice({"layers": [0, 2]}), model.slice({"layers": [2]})
    values = cut(model.init(0), old)
    found = carry(values, old, new)
    assert torch.equal(found["blocks.0.0.weight"], values["blocks.1.0.weight"])
    assert found.keys() == new.views.keys()


def test_names_in_one_of_both_are_zero() -> None:
    old = sub(a=("a", (slice(0, 2),)), b=("b", (slice(0, 2),)))
    new = sub(b=("b", (slice(2, 5),)), c=("c", (slice(0, 2), slice(0, 3))), s=("s", ()))
    values = {"a": torch.ones(2, dtype=torch.float16)}  # nothing for b
    found = carry(values, old, new)
    assert {name: tuple(value.shape) for name, value in found.items()} == {
        "b": (3,),
        "c": (2, 3),
        "s": (),
    }
    assert all(value.dtype == torch.float16 and not value.any() for value in found.values())
    assert not carry({}, old, new)["c"].any()


def test_what_is_carried_is_ones_own() -> None:
    same = sub(w=("w", (slice(0, 3),)), s=("s", ()))
    values = {"w": torch.tensor([1.0, 2.0, 3.0]), "s": torch.tensor(4.0)}
    found = carry(values, same, same)
    assert found["w"].tolist() == [1, 2, 3] and float(found["s"]) == 4
    found["w"].zero_()
    found["s"].zero_()
    assert values["w"].tolist() == [1, 2, 3] and float(values["s"]) == 4


def test_no_tensor_of_the_large_size_is_made() -> None:
    many = 1_000_000  # the whole has 10^12 entries, as has all of one window by all of the other
    old = sub(w=("w", (torch.tensor([5]), torch.arange(many).roll(1))))
    new = sub(w=("w", (slice(0, many), torch.tensor([7]))))
    found = carry({"w": torch.arange(1.0, many + 1)[None]}, old, new)["w"]
    assert found.shape == (many, 1) and found.nonzero().tolist() == [[5, 0]]
    assert float(found[5]) == 9  # column 7 is the ninth of columns last, 0, 1, ...


def test_values_of_another_submodel_are_refused() -> None:
    old = sub(weight=("weight", (slice(0, 2),)))
    with pytest.raises(ModelError, match="did you mean 'weight'"):
        carry({"weigth": torch.ones(2)}, old, old)
    with pytest.raises(ModelError, match=r"shape \(3,\), its view in the old sub-model \(2,\)"):
        carry({"weight": torch.ones(3)}, old, old)


@st.composite
def units(draw: st.DrawFn, size: int) -> Index:
    """A slice, a wrapped window, or distinct entries in any order."""
    count = draw(st.integers(1, size))
    start = draw(st.integers(0, size - 1))
    kind = draw(st.sampled_from(["slice", "wrapped", "any"]))
    if kind == "slice":
        return slice(min(start, size - count), min(start, size - count) + count)
    if kind == "wrapped":
        return (torch.arange(count) + start) % size
    return torch.tensor(draw(st.permutations(range(size)))[:count])


@given(st.lists(st.integers(1, 6), min_size=1, max_size=3), st.data())
@fast
def test_carry_agrees_with_a_full_size_tensor(shape: list[int], data: st.DataObject) -> None:
    old, new = (tuple(data.draw(units(size)) for size in shape) for _ in range(2))
    values = torch.randn([index_length(index) for index in old])
    full = np.zeros(shape, dtype=np.float32)
    full[np.ix_(*(index_tensor(index).numpy() for index in old))] = values.numpy()
    expected = full[np.ix_(*(index_tensor(index).numpy() for index in new))]
    found = carry({"here": values}, sub(here=("w", old)), sub(there=("w", new)))
    assert found.keys() == {"there"} and np.array_equal(found["there"].numpy(), expected)


@given(st.data())
@fast
def test_carry_between_cuts_of_a_model(model: Model, data: st.DataObject) -> None:
    old, new = (
        model.slice(
            {axis: data.draw(units(model.units(axis))) for axis in model.cuttable}
            | {"layers": as_index(data.draw(st.permutations(range(3)))[:2])}
        )
        for _ in range(2)
    )
    params = model.init(0)
    everything = whole(model.sizes, model.shapes)
    there = carry(cut(params, old), old, everything)  # what old holds, at full size
    found = carry(cut(params, old), old, new)
    for name, value in cut(there, new).items():
        assert torch.equal(found[name], value), name
