import pytest
import torch
from torch import nn

from tesserafl.core.axes import probe
from tesserafl.core.axis import Depth, Tie
from tesserafl.core.errors import ModelError
from tesserafl.core.model import Model
from tesserafl.core.modules import fan_in_dims
from tesserafl.core.params import sha256
from tesserafl.core.submodel import cut
from tesserafl.data.examples import Spec
from tesserafl.models import MLP


class Net(nn.Module):
    """Three equal layers, so that one size has two axes; blocks; a head."""

    def __init__(self, sizes):
        super().__init__()
        hidden = sizes["hidden"]
        self.first, self.second = nn.Linear(5, hidden), nn.Linear(hidden, hidden)
        self.third = nn.Linear(hidden, 8)
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(sizes["layers"]))
        self.head = nn.Linear(8, sizes["classes"])

    def forward(self, x):
        x = torch.relu(self.second(torch.relu(self.first(x))))
        x = self.third(x)
        for block in self.blocks:
            x = torch.relu(block(x)) + x
        return self.head(x)


@pytest.fixture(scope="module")
def model():
    return probe(
        Net,
        {"hidden": 12, "layers": 4, "classes": 3},
        lambda: torch.randn(2, 5),
        outputs=("classes",),
    )


def test_one_size_two_axes(model):
    assert [(a, w.size) for a, w in model.widths.items()] == [
        ("hidden", "hidden"),
        ("hidden.second", "hidden"),
        ("classes", "classes"),
    ]
    assert model.cuttable == ("hidden", "hidden.second")
    assert (model.units("hidden.second"), model.units("layers")) == (12, 4)


def test_axes_of_one_size_keep_different_units(model):
    submodel = model.slice({"hidden": [0, 1, 2], "hidden.second": [9, 4, 7]})
    assert submodel.sizes == {"hidden": 3, "layers": 4, "classes": 3}
    large = model.init(0)
    small = cut(large, submodel)
    assert torch.equal(small["second.weight"], large["second.weight"][[9, 4, 7]][:, :3])
    model.module(submodel.sizes).load_state_dict(small, strict=True)


def test_the_missing_axis_of_a_size_follows_the_first_given(model):
    submodel = model.slice({"hidden.second": [5, 8]})
    assert submodel.views["first.weight"].shape == (2, 5)
    assert submodel.views["first.weight"].index[0].tolist() == [5, 8]


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        ({"hidden": [0], "hidden.second": [0, 1]}, "equally many units; asked were 1 and 2"),
        ({"hiden": [0]}, "did you mean 'hidden'"),
        ({"hidden": [0, 12]}, "has units 0 to 11; asked were 0 to 12"),
        ({"hidden": [-1]}, "asked were -1 to -1"),
        ({"hidden": [3, 3]}, "kept twice"),
        ({"hidden": []}, "at least one unit"),
    ],
)
def test_wrong_units_are_refused(model, keep, message):
    with pytest.raises(ModelError, match=message):
        model.slice(keep)


def test_blocks_can_be_left_out(model):
    submodel = model.slice({"layers": [0, 2], "hidden": range(6)})
    assert submodel.sizes == {"hidden": 6, "layers": 2, "classes": 3}
    assert submodel.views["blocks.1.weight"].name == "blocks.2.weight"
    model.module(submodel.sizes).load_state_dict(cut(model.init(0), submodel), strict=True)


def test_blocks_of_different_build_do_not_stand_in_for_each_other():
    class Uneven(nn.Module):
        def __init__(self, layers):
            super().__init__()
            self.blocks = nn.ModuleList(nn.Linear(4, 4, bias=i > 0) for i in range(layers))

        def forward(self, x):
            for block in self.blocks:
                x = block(x)
            return x

    uneven = probe(lambda s: Uneven(s["layers"]), {"layers": 3}, lambda: torch.randn(2, 4))
    assert uneven.slice({"layers": [0, 2]}).sizes == {"layers": 2}
    with pytest.raises(ModelError, match="block 1 is built differently from block 0"):
        uneven.slice({"layers": [1, 2]})


def test_a_resized_model_has_axes_of_its_own(model):
    submodel = model.slice({"hidden": range(6), "hidden.second": range(6, 12), "layers": [0, 1]})
    small = model.resized(submodel)
    assert (small.units("hidden"), small.units("hidden.second"), small.units("layers")) == (6, 6, 2)
    again = small.slice({"hidden": [1, 2], "layers": [1]})
    small.module(again.sizes).load_state_dict(cut(small.init(0), again), strict=True)


def test_initialisation_depends_on_the_seed_alone(model):
    torch.manual_seed(1)
    first = sha256(model.init(3))
    torch.manual_seed(2)
    assert sha256(model.init(3)) == first != sha256(model.init(4))


def test_pretrained_parameters_are_cut_with_the_model(model):
    loaded = model.init(9)
    held = probe(
        Net, model.sizes, lambda: torch.randn(2, 5), outputs=("classes",), pretrained=lambda: loaded
    )
    submodel = held.slice({"hidden": [3, 5]})
    assert sha256(held.resized(submodel).init(0)) == sha256(cut(loaded, submodel))


@pytest.mark.parametrize(
    ("parts", "units", "expected"),
    [
        ((2,), slice(1, 3), slice(2, 6)),
        ((1, 1), [0, 2], [0, 2, 3, 5]),
        ((2, 1, 1), [1], [2, 3, 7, 10]),
    ],
)
def test_entries_of_units(parts, units, expected):
    index = units if isinstance(units, slice) else torch.tensor(units)
    got = Tie("a", parts).expand(index, 3)
    assert got == expected if isinstance(expected, slice) else got.tolist() == expected


def test_fan_in_of_the_layers_that_multiply():
    assert fan_in_dims(nn.Linear(2, 3)) == {"weight": 1}
    assert fan_in_dims(nn.Conv2d(2, 3, 1)) == {"weight": 1}
    assert fan_in_dims(nn.ConvTranspose2d(2, 3, 1)) == {"weight": 0}
    assert fan_in_dims(nn.MultiheadAttention(4, 2)) == {"in_proj_weight": 1}
    assert fan_in_dims(nn.LSTM(2, 3)) == {"weight_ih_l0": 1, "weight_hh_l0": 1}
    assert fan_in_dims(nn.LayerNorm(3)) == {} == fan_in_dims(nn.Embedding(3, 2))


def test_units_given_in_other_ways_are_not_mistaken_for_each_other() -> None:
    model = MLP(hidden=(8,)).build_model(
        Spec(kind="vector", task="vector-classification", shape=(4,), num_classes=2)
    )
    by_slice, by_list = (
        model.slice({"hidden1": slice(0, 4, 2)}),
        model.slice({"hidden1": [0, 4, 2]}),
    )
    assert (by_slice.sizes["hidden1"], by_list.sizes["hidden1"]) == (2, 3)
    small = model.slice({"hidden1": torch.tensor([1, 0], dtype=torch.int32)})
    assert (
        small.sizes["hidden1"],
        model.slice({"hidden1": torch.tensor([1])}).sizes["hidden1"],
    ) == (2, 1)
    assert model.slice({"hidden1": range(3)}) is model.slice({"hidden1": range(3)})


def towers(deep: int = 3, flat: int = 2) -> Model:
    """Adapters in two towers of unequal depth, and a head; towers of no blocks have no axis."""
    names = ["head", *(f"deep.{i}.up" for i in range(deep)), *(f"flat.{i}.up" for i in range(flat))]
    return Model(
        build=lambda sizes: nn.Identity(),
        sizes={axis: size for axis, size in (("deep", deep), ("flat", flat)) if size},
        widths={},
        depths={
            axis: Depth(size, (f"{axis}.",), last=size - 1)
            for axis, size in (("deep", deep), ("flat", flat))
            if size
        },
        ties={name: (None,) for name in names},
        shapes={name: (2,) for name in names},
    )


def test_adapters_are_counted_from_the_output() -> None:
    axis = Depth(3, ("a.", "b."), last=2)
    assert axis.locate("b.2.up") == ("b.", 0, "up")
    assert axis.locate("a.0.x.up") == ("a.", 2, "x.up")
    assert axis.locate("c.0.up") is None and axis.locate("a.up") is None
    assert Depth(3, ("a.",)).locate("a.2.up") == ("a.", 2, "up")


def test_so_many_blocks_of_every_tower() -> None:
    model = towers()
    assert model.adapted(0) == {"head"}
    assert model.adapted(1) == {"head", "deep.2.up", "flat.1.up"}
    assert model.adapted(2) == model.adapted(1) | {"deep.1.up", "flat.0.up"}
    assert model.adapted(3) == model.adapted(9) == model.shapes.keys()


@pytest.mark.parametrize(
    "model",
    [
        towers(0, 0),
        MLP(hidden=(4,)).build_model(
            Spec(kind="vector", task="vector-classification", shape=(6,), num_classes=3)
        ),
    ],
)
def test_a_model_without_adapted_blocks_has_none_to_count(model) -> None:
    with pytest.raises(ModelError, match="no adapters in numbered blocks; choose --model lora"):
        model.adapted(1)


def test_whole_blocks_are_no_adapted_blocks(model) -> None:
    with pytest.raises(ModelError, match="no adapters in numbered blocks"):
        model.adapted(1)


def test_the_adapters_furthest_from_the_output_can_be_left_out() -> None:
    model = towers()
    submodel = model.slice({"deep": range(2)})
    assert submodel.sizes == {"deep": 2, "flat": 2}
    assert submodel.views.keys() == model.shapes.keys() - {"deep.0.up"}
    # They stay where they are: no other adapter takes their place.
    assert {name: view.name for name, view in submodel.views.items()} == {
        name: name for name in submodel.views
    }
    small = model.resized(submodel)
    assert small.units("deep") == 2 and small.adapted(1) == model.adapted(1)
    assert small.adapted(2) == small.adapted(3) == submodel.views.keys()


@pytest.mark.parametrize("units", [[1, 2], [0, 2], [1, 0]])
def test_adapters_are_left_out_without_a_gap(units) -> None:
    with pytest.raises(ModelError, match="next to the output, without a gap"):
        towers().slice({"deep": units})


class Stages(nn.Module):
    """Blocks of which the first ones differ: of 8 and 6 inputs, then all of 4."""

    def __init__(self, sizes):
        super().__init__()
        widths = [8, 6, *[4] * sizes["layers"]]
        self.blocks = nn.ModuleList(
            nn.Linear(widths[i], widths[i + 1]) for i in range(sizes["layers"])
        )

    def forward(self, x):
        for block in self.blocks:
            x = torch.relu(block(x))
        return x


def test_blocks_of_the_last_ones_structure_are_movable(model):
    stages = probe(Stages, {"layers": 5}, lambda: torch.randn(2, 8))
    assert stages.movable("layers") == (2, 3, 4)
    assert model.movable("layers") == (0, 1, 2, 3)
    assert stages.slice({"layers": [0, 1, 4, 2]}).sizes == {"layers": 4}
    with pytest.raises(ModelError, match="block 3 is built differently from block 1"):
        stages.slice({"layers": [0, 3]})


def test_a_part_knows_its_own_movable_blocks():
    stages = probe(Stages, {"layers": 5}, lambda: torch.randn(2, 8))
    part = stages.slice({"layers": [0, 1, 4]})
    assert stages.resized(part).movable("layers") == (2,)
