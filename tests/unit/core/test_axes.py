import itertools

import pytest
import torch
from torch import nn

from tesserafl.core.axes import probe
from tesserafl.core.axis import Depth, Tie
from tesserafl.core.errors import ModelError
from tesserafl.core.model import Model


def linear_net(sizes):
    return nn.Sequential(
        nn.Linear(5, sizes["first"]), nn.ReLU(), nn.Linear(sizes["first"], sizes["classes"])
    )


def vectors():
    return torch.randn(3, 5)


def images():
    return torch.randn(3, 3, 8, 8)


class Block(nn.Module):
    def __init__(self, embed, inner):
        super().__init__()
        self.norm = nn.LayerNorm(embed)
        self.up = nn.Linear(embed, inner)
        self.down = nn.Linear(inner, embed)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Stack(nn.Module):
    def __init__(self, embed, inner, layers, classes=7):
        super().__init__()
        self.stem = nn.Linear(5, embed)
        self.blocks = nn.ModuleList(Block(embed, inner) for _ in range(layers))
        self.head = nn.Linear(embed, classes)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Attention(nn.Module):
    """Heads of 4 entries; queries, keys and values fused."""

    def __init__(self, embed):
        super().__init__()
        self.heads = embed // 4
        self.stem = nn.Linear(5, embed)
        self.norm = nn.LayerNorm(embed)
        self.qkv = nn.Linear(embed, 3 * embed)
        self.out = nn.Linear(embed, embed)
        self.head = nn.Linear(embed, 3)

    def forward(self, x):
        x = self.stem(x)
        q, k, v = (
            part.unflatten(-1, (self.heads, 4)).transpose(1, 2)
            for part in self.qkv(self.norm(x)).chunk(3, dim=-1)
        )
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.head((x + self.out(mixed.transpose(1, 2).flatten(2))).mean(dim=1))


def conv_net(norm):
    return lambda sizes: nn.Sequential(
        nn.Conv2d(3, sizes["channels"], 3),
        norm(sizes["channels"]),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(sizes["channels"] * 36, 10),
    )


def assert_cuts_load(model: Model, share: float) -> None:
    """Random units of every axis; the cut parameters are exactly those of the small module."""
    generator = torch.Generator().manual_seed(0)
    keep = {}
    for axis in model.cuttable:
        units = model.units(axis)
        keep[axis] = torch.randperm(units, generator=generator)[: max(1, int(units * share))]
    submodel = model.slice(keep)
    small = model.module(submodel.sizes)
    small.load_state_dict(
        {n: v.read(dict(model.module().named_parameters())[v.name]) for n, v in
         submodel.views.items()}, strict=False,
    )  # fmt: skip
    assert {n: tuple(p.shape) for n, p in small.named_parameters()} == {
        n: v.shape for n, v in submodel.views.items()
    }


def test_an_mlp_has_one_unit_per_entry_and_knows_its_classes():
    model = probe(linear_net, {"first": 16, "classes": 4}, vectors, outputs=("classes",))
    assert model.ties["0.weight"] == (Tie("first", (1,)), None)
    assert model.ties["2.weight"] == (Tie("classes", (1,)), Tie("first", (1,)))
    assert model.cuttable == ("first",)
    assert_cuts_load(model, 0.5)


def test_a_flattened_map_is_one_run_per_channel():
    model = probe(conv_net(nn.BatchNorm2d), {"channels": 16}, images)
    assert model.widths["channels"].units == 16
    assert model.ties["4.weight"] == (None, Tie("channels", (36,)))
    assert_cuts_load(model, 0.25)


def test_group_norm_makes_a_groups_channels_the_unit():
    model = probe(conv_net(lambda c: nn.GroupNorm(c // 4, c)), {"channels": 32}, images)
    assert (model.units("channels"), model.widths["channels"].quantum) == (8, 4)
    assert_cuts_load(model, 0.5)


@pytest.mark.parametrize("groups", [2, 3, 4, 8, 32])
def test_a_fixed_number_of_groups_is_refused(groups):
    with pytest.raises(ModelError, match="fixed number of groups"):
        probe(conv_net(lambda c: nn.GroupNorm(groups, c)), {"channels": 96}, images)


def test_a_residual_stack_has_widths_and_depth():
    model = probe(
        lambda s: Stack(s["embed"], s["mlp"], s["layers"]),
        {"embed": 16, "mlp": 24, "layers": 4},
        vectors,
    )
    (depth,) = model.depths.values()
    assert depth == Depth(
        4,
        ("blocks.",),
        outputs=("down.weight", "down.bias"),
        below=("stem.weight", "stem.bias"),
    )
    assert model.ties["blocks.3.up.weight"] == (Tie("mlp", (1,)), Tie("embed", (1,)))
    assert set(model.widths) == {"embed", "mlp"}
    assert_cuts_load(model, 0.5)


def test_blocks_of_several_stages_are_counted_by_the_right_number():
    def build(sizes):
        return nn.Sequential(
            *(nn.Sequential(*(Block(8, 8) for _ in range(sizes[f"layers{i}"]))) for i in range(4)),
        )

    sizes = {"layers0": 3, "layers1": 4, "layers2": 6, "layers3": 3}
    model = probe(build, sizes, lambda: torch.randn(2, 8))
    assert [d.prefixes for d in model.depths.values()] == [("0.",), ("1.",), ("2.",), ("3.",)]


def test_heads_and_residual_stream_of_one_size_are_two_axes():
    model = probe(lambda s: Attention(s["embed"]), {"embed": 32}, lambda: torch.randn(3, 6, 5))
    assert model.widths["embed"].quantum == 4  # found, although nothing says so
    inner = next(axis for axis in model.widths if axis != "embed")
    assert model.widths[inner].size == "embed"
    assert model.ties["qkv.weight"] == (Tie(inner, (4, 4, 4)), Tie("embed", (4,)))
    assert model.ties["out.weight"] == (Tie("embed", (4,)), Tie(inner, (4,)))
    assert_cuts_load(model, 0.5)


def test_torchs_own_attention_is_split_too():
    class Net(nn.Module):
        def __init__(self, embed):
            super().__init__()
            self.stem = nn.Linear(5, embed)
            self.layer = nn.TransformerEncoderLayer(embed, embed // 8, 12, batch_first=True)
            self.head = nn.Linear(embed, 3)

        def forward(self, x):
            return self.head(self.layer(self.stem(x)).mean(dim=1))

    model = probe(lambda s: Net(s["embed"]), {"embed": 32}, lambda: torch.randn(3, 4, 5))
    assert list(model.widths) == ["embed", "embed.self_attn"]
    assert model.ties["layer.self_attn.in_proj_weight"][0] == Tie("embed.self_attn", (8, 8, 8))


def test_layers_of_one_size_never_share_an_axis_across_a_weight():
    widths = [5, "h", "h", "h", "h", 3]

    def build(sizes):
        ends = [sizes.get(w, w) for w in widths]
        return nn.Sequential(
            *itertools.chain(*((nn.Linear(a, b), nn.ReLU()) for a, b in itertools.pairwise(ends)))
        )

    model = probe(build, {"h": 16}, vectors)
    for name, ties in model.ties.items():
        axes = [tie.axis for tie in ties if tie]
        assert len(axes) == len(set(axes)), name
    assert_cuts_load(model, 0.5)


def test_batch_norm_residual_blocks_split_into_stream_and_inside():
    class Residual(nn.Module):
        def __init__(self, c):
            super().__init__()
            self.conv1, self.norm1 = nn.Conv2d(c, c, 3, padding=1), nn.BatchNorm2d(c)
            self.conv2, self.norm2 = nn.Conv2d(c, c, 3, padding=1), nn.BatchNorm2d(c)

        def forward(self, x):
            inner = torch.relu(self.norm1(self.conv1(x)))
            return torch.relu(x + self.norm2(self.conv2(inner)))

    class Net(nn.Module):
        def __init__(self, sizes):
            super().__init__()
            self.stem = nn.Conv2d(3, sizes["c"], 3)
            self.blocks = nn.Sequential(*(Residual(sizes["c"]) for _ in range(sizes["layers"])))
            self.head = nn.Linear(sizes["c"], 5)

        def forward(self, x):
            return self.head(self.blocks(self.stem(x)).mean(dim=(2, 3)))

    model = probe(Net, {"c": 16, "layers": 3}, images)
    inner = next(axis for axis in model.widths if axis != "c")
    assert {n for n, ties in model.ties.items() if Tie(inner, (1,)) in ties} == {
        f"blocks.{i}.{n}"
        for i in range(3)
        for n in ("conv1.weight", "conv1.bias", "norm1.weight", "norm1.bias", "conv2.weight")
    }


def test_gates_of_an_lstm_are_stacks():
    class Net(nn.Module):
        def __init__(self, hidden):
            super().__init__()
            self.lstm = nn.LSTM(5, hidden, batch_first=True)
            self.head = nn.Linear(hidden, 3)

        def forward(self, x):
            return self.head(self.lstm(x)[0][:, -1])

    model = probe(lambda s: Net(s["hidden"]), {"hidden": 12}, lambda: torch.randn(2, 4, 5))
    assert model.ties["lstm.weight_hh_l0"] == (Tie("hidden", (1, 1, 1, 1)), Tie("hidden", (1,)))


class Ordered(nn.Module):
    def __init__(self, hidden):
        super().__init__()
        self.first, self.second = nn.Linear(5, hidden), nn.Linear(hidden, 3)

    def forward(self, x):
        return self.second(self.first(x).cumsum(dim=-1))


@pytest.mark.parametrize(
    ("build", "sizes", "message"),
    [
        (lambda s: Ordered(s["h"]), {"h": 16}, r"axis 'h' \(size 16\) cannot be cut"),
        (lambda s: nn.Linear(5, s["h"] + 1), {"h": 16}, "went from 17 to 33"),
        (lambda s: nn.Linear(5, s["a"] * s["b"]), {"a": 4, "b": 2}, "both 'a' and 'b'"),
        (lambda s: nn.Linear(5, s["a"] + s["b"]), {"a": 4, "b": 2}, "went from 6 to 10"),
        (lambda s: nn.Linear(5, 3), {"h": 16}, "changes no parameter"),
        (
            lambda s: Stack(8 * s["layers"], 8, s["layers"]),
            {"layers": 3},
            "both which parameters there are and 'stem.weight'",
        ),
        (
            lambda s: nn.ModuleDict({f"layer{i}": nn.Linear(5, 5) for i in range(s["n"])}),
            {"n": 3},
            "does not count the blocks 3 to 5",
        ),
        (lambda s: nn.Linear(6, s["h"]), {"h": 16}, "does not run on the example"),
        (lambda s: nn.Linear(5, {16: 16}[s["h"]]), {"h": 16}, "with 'h' enlarged to 32"),
    ],
)
def test_what_cannot_be_cut_is_refused(build, sizes, message):
    with pytest.raises(ModelError, match=message):
        probe(build, sizes, vectors)


def test_a_given_unit_is_used_or_refused():
    build = conv_net(nn.BatchNorm2d)
    assert probe(build, {"channels": 16}, images, quanta={"channels": 4}).units("channels") == 4
    with pytest.raises(ModelError, match="must divide the size 16"):
        probe(build, {"channels": 16}, images, quanta={"channels": 5})
    with pytest.raises(ModelError, match="cannot be cut"):
        probe(
            conv_net(lambda c: nn.GroupNorm(c // 4, c)),
            {"channels": 16},
            images,
            quanta={"channels": 2},
        )


def test_probing_leaves_torchs_random_state_alone():
    before = torch.random.get_rng_state()
    probe(linear_net, {"first": 16, "classes": 4}, vectors, outputs=("classes",))
    assert torch.equal(before, torch.random.get_rng_state())


def test_a_prime_width_is_probed_on_small_ones():
    built = []

    def build(sizes):
        if torch.empty(0).device.type != "meta":
            built.append((sizes["a"], sizes["b"]))
        return nn.Sequential(
            nn.Linear(6, sizes["a"]),
            nn.ReLU(),
            nn.Linear(sizes["a"], sizes["b"]),
            nn.ReLU(),
            nn.Linear(sizes["b"], 2),
        )

    model = probe(build, {"a": 1009, "b": 1013}, lambda: torch.randn(2, 6))
    assert model.units("a") == 1009 and model.units("b") == 1013
    assert built and all(min(pair) <= 64 for pair in built)
