"""Permutation alignment of units: it finds what was permuted, and never makes matters worse."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Collection

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import functional_call

from tesserafl.core import seeds
from tesserafl.core.axes import probe
from tesserafl.core.axis import Tie
from tesserafl.core.errors import ModelError
from tesserafl.core.model import Model, Output, Sizes
from tesserafl.core.params import Params, norm, subtract
from tesserafl.core.submodel import index_tensor
from tesserafl.data.examples import Spec
from tesserafl.methods._align import aligned, aligned_block, private_axes
from tesserafl.models import CNN, MLP, HuggingFace, Residual, ResNet

VECTORS = Spec(kind="vector", task="vector-classification", shape=(6,), num_classes=3)
IMAGES = Spec(kind="image", task="image-classification", shape=(3, 8, 8), num_classes=3)
WORDS = Spec(kind="tokens", task="causal-lm", shape=(8,), num_classes=30, vocab_size=30)
GPT2 = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32}
LLAMA = {
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 6,
    "hidden_size": 32,
    "intermediate_size": 48,
}
BOTTLENECKS = {"embedding_size": 8, "hidden_sizes": [16, 32], "depths": [2, 2]}
STAGES = ResNet(channels=(8, 16), blocks=(2, 2), group_size=2)
FAMILIES: dict[str, tuple[Callable[[], Model], Spec]] = {
    "mlp": (lambda: MLP(hidden=(12, 16)).build_model(VECTORS), VECTORS),
    "cnn": (lambda: CNN(channels=(8, 16), group_size=2).build_model(IMAGES), IMAGES),
    "residual": (lambda: Residual(stream=8, inner=12, blocks=3).build_model(VECTORS), VECTORS),
    "residual on images": (
        lambda: Residual(stream=12, inner=8, blocks=2, group_size=2).build_model(IMAGES),
        IMAGES,
    ),
    "resnet": (lambda: STAGES.build_model(IMAGES), IMAGES),
    "bottlenecks": (
        lambda: HuggingFace(config="resnet", options=BOTTLENECKS).build_model(
            Spec(kind="image", task="image-classification", shape=(3, 32, 32), num_classes=3)
        ),
        Spec(kind="image", task="image-classification", shape=(3, 32, 32), num_classes=3),
    ),
    "gpt2": (lambda: HuggingFace(config="gpt2", options=GPT2).build_model(WORDS), WORDS),
    "llama": (lambda: HuggingFace(config="llama", options=LLAMA).build_model(WORDS), WORDS),
}
PRIVATE = {
    "residual": {"blocks": ("inner",)},
    "residual on images": {"blocks": ("inner",)},
    "resnet": {"blocks1": ("inner1",), "blocks2": ("inner2",)},
    "bottlenecks": {
        "layers0": ("stage0.layer", "stage0.layer2"),
        "layers1": ("stage1.layer", "stage1.layer2"),
    },
    "gpt2": {"layers": ("embed.attn", "mlp")},
    "llama": {"layers": ("heads", "mlp")},
}
each_family = pytest.mark.parametrize("family", FAMILIES)


@functools.cache
def model_of(family: str) -> Model:
    return FAMILIES[family][0]()


def noisy(model: Model, seed: int) -> Params:
    """No two units are alike, as they are in zero biases and unit gains."""
    draw = torch.Generator().manual_seed(seed)
    init = model.init(seed)
    return {n: t + 0.1 * torch.randn(t.shape, generator=draw) for n, t in init.items()}


def block_of(model: Model, axis: str, number: int, params: Params) -> Params:
    places = {name: model.depths[axis].locate(name) for name in params}
    return {p[2]: params[name] for name, p in places.items() if p and p[1] == number}


def shuffled(
    model: Model, params: Params, seed: int, axes: Collection[str] | None = None
) -> Params:
    """The same function with units of all axes, or of these, in an order that is drawn: for every
    axis, and for private ones for every block."""
    draw = seeds.generator(seed, "shuffle")
    counted = {a: model.depths[d] for d in model.depths for a in private_axes(model, d)}
    orders: dict[object, torch.Tensor] = {}
    result = dict(params)
    for name, ties in model.ties.items():
        for dim, tie in enumerate(ties):
            if tie is None or tie.axis not in (model.cuttable if axes is None else axes):
                continue
            place = counted[tie.axis].locate(name) if tie.axis in counted else None
            key = (tie.axis, place and place[:2])
            if key not in orders:
                orders[key] = torch.randperm(model.units(tie.axis), generator=draw)
            entries = index_tensor(tie.expand(orders[key], model.units(tie.axis)))
            result[name] = result[name].index_select(dim, entries)
    return result


def logits(model: Model, family: str, params: Params) -> torch.Tensor:
    spec, draw = FAMILIES[family][1], torch.Generator().manual_seed(0)
    if spec.kind == "tokens":
        inputs = torch.randint(1, spec.vocab_size, (4, *spec.shape), generator=draw)
    else:
        inputs = torch.randn(4, *spec.shape, generator=draw).double()
    module = model.module().double().eval()
    with torch.no_grad():
        params = {name: tensor.double() for name, tensor in params.items()}
        out = functional_call(module, params, (inputs,))
    return out.logits if isinstance(out, Output) else out


def distance(one: Params, other: Params) -> float:
    return norm(subtract({n: t.double() for n, t in one.items()}, other))


@pytest.mark.parametrize("family", PRIVATE)
def test_private_axes_are_those_that_no_other_block_reads(family: str) -> None:
    model = model_of(family)
    assert {axis: private_axes(model, axis) for axis in model.depths} == PRIVATE[family]


@each_family
def test_a_shuffled_copy_is_put_back_in_order(family: str) -> None:
    model = model_of(family)
    params = noisy(model, 1)
    copy = shuffled(model, params, 2)
    assert distance(params, copy) > 0.5 * norm(params)  # something was permuted
    torch.testing.assert_close(
        logits(model, family, copy), logits(model, family, params), rtol=1e-4, atol=1e-4
    )
    back = aligned(model, params, copy)
    assert all(torch.equal(back[name], params[name]) for name in params)


@each_family
def test_what_was_trained_elsewhere_keeps_its_function_and_comes_closer(family: str) -> None:
    model = model_of(family)
    reference, other = noisy(model, 1), noisy(model, 2)
    near = aligned(model, reference, other)
    assert distance(reference, near) < distance(reference, other)
    # transformers compute norms in float32.
    torch.testing.assert_close(
        logits(model, family, near), logits(model, family, other), rtol=1e-4, atol=1e-4
    )


@each_family
def test_a_noisy_shuffled_copy_is_put_back_in_order(family: str) -> None:
    model = model_of(family)
    params = noisy(model, 1)
    draw = torch.Generator().manual_seed(3)
    noise = {n: 0.02 * torch.randn(t.shape, generator=draw) for n, t in params.items()}
    trained = {n: t + noise[n] for n, t in params.items()}
    back = aligned(model, params, shuffled(model, trained, 2))
    assert distance(params, back) == pytest.approx(norm(noise), rel=1e-5)


@each_family
def test_units_in_their_best_order_are_the_same_tensors(family: str) -> None:
    model = model_of(family)
    params = noisy(model, 1)
    draw = torch.Generator().manual_seed(3)
    trained = {n: t + 0.02 * torch.randn(t.shape, generator=draw) for n, t in params.items()}
    for one in (params, trained, {name: torch.zeros_like(t) for name, t in params.items()}):
        kept = aligned(model, params, one)
        assert list(kept) == list(one)
        assert all(kept[name] is one[name] for name in one)


@pytest.mark.parametrize("family", PRIVATE)
def test_a_block_is_put_back_in_order_by_itself(family: str) -> None:
    model = model_of(family)
    params = noisy(model, 1)
    for axis in model.depths:
        copy = shuffled(model, params, 2, private_axes(model, axis))
        everywhere = shuffled(model, params, 2)
        for number in range(model.units(axis)):
            reference, given = (block_of(model, axis, number, p) for p in (params, copy))
            assert distance(reference, given) > 0.1
            back = aligned_block(model, axis, reference, given)
            assert all(torch.equal(back[name], reference[name]) for name in reference)
            # Where the stream is permuted too, that is left alone.
            given = block_of(model, axis, number, everywhere)
            near = aligned_block(model, axis, reference, given)
            assert distance(reference, near) <= distance(reference, given)
            assert norm(near) == pytest.approx(norm(given))
            assert any(near[name] is given[name] for name in given)


def test_a_block_may_be_aligned_to_a_block_at_another_place() -> None:
    model = Residual(stream=6, inner=4, blocks=3).build_model(VECTORS)
    params = noisy(model, 1)
    one, other = (block_of(model, "blocks", number, params) for number in (0, 2))
    near = aligned_block(model, "blocks", one, other)
    inner = {"widen.weight": 0, "widen.bias": 0, "narrow.weight": 1}
    orders = [torch.tensor(order) for order in itertools.permutations(range(4))]
    moved = [
        other | {name: other[name].index_select(dim, order) for name, dim in inner.items()}
        for order in orders
    ]
    best = min(distance(one, each) for each in moved)
    assert distance(one, near) == pytest.approx(best, rel=1e-7)
    assert best < distance(one, other)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000))
def test_a_single_axis_is_matched_as_well_as_by_brute_force(seed: int) -> None:
    model = small(4)
    reference, other = noisy(model, seed), noisy(model, seed + 1)
    near = aligned(model, reference, other)
    best = math.inf
    for order in itertools.permutations(range(4)):
        moved = dict(other)
        for name, ties in model.ties.items():
            for dim, tie in enumerate(ties):
                if tie and tie.axis == "hidden1":
                    moved[name] = moved[name].index_select(dim, torch.tensor(order))
        best = min(best, distance(reference, moved))
    assert distance(reference, near) == pytest.approx(best, rel=1e-6)


@functools.cache
def small(*hidden: int) -> Model:
    return MLP(hidden=hidden).build_model(VECTORS)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000))
def test_the_distance_never_grows(seed: int) -> None:
    for model in (small(5, 7, 4), recurrent()):
        reference, other = noisy(model, seed), noisy(model, seed + 1)
        near = aligned(model, reference, other)
        assert distance(reference, near) <= distance(reference, other) * (1 + 1e-7)


class Recurrent(torch.nn.Module):
    """The same units are rows and columns of one matrix."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.enter = torch.nn.Linear(6, sizes["state"])
        self.again = torch.nn.Linear(sizes["state"], sizes["state"])
        self.leave = torch.nn.Linear(sizes["state"], sizes["classes"])

    def forward(self, inputs: torch.Tensor) -> Output:
        state = torch.tanh(self.enter(inputs))
        for _ in range(2):
            state = torch.tanh(state + self.again(state))
        return Output(self.leave(state), None)


@functools.cache
def recurrent() -> Model:
    return probe(
        Recurrent, {"state": 8, "classes": 3}, lambda: torch.randn(3, 6), outputs=("classes",)
    )


def test_units_that_are_rows_and_columns_of_one_matrix_are_put_back_in_order() -> None:
    model = recurrent()
    assert model.ties["again.weight"] == (Tie("state", (1,)), Tie("state", (1,)))
    params = noisy(model, 1)
    back = aligned(model, params, shuffled(model, params, 2))
    assert all(torch.equal(back[name], params[name]) for name in params)


def test_units_that_are_alike_stay_where_they_are() -> None:
    # Units 1 and 3 are equal, 0 and 2 have changed places: nothing else may move.
    model = small(4)
    params = noisy(model, 1)
    for name, dim in (("layers.0.weight", 0), ("layers.0.bias", 0), ("head.weight", 1)):
        params[name] = params[name].index_select(dim, torch.tensor([0, 1, 2, 1]))
    params["layers.0.bias"] = params["layers.0.bias"].clone()
    moved = dict(params)
    marks = torch.tensor([0.0, 0.1, 0.0, -0.1])  # tells the two apart, at the same distance
    for name, dim in (("layers.0.weight", 0), ("layers.0.bias", 0), ("head.weight", 1)):
        moved[name] = moved[name].index_select(dim, torch.tensor([2, 1, 0, 3]))
    moved["layers.0.bias"] = moved["layers.0.bias"] + marks
    back = aligned(model, params, moved)
    assert torch.equal(back["layers.0.weight"], params["layers.0.weight"])
    assert torch.equal(back["layers.0.bias"], params["layers.0.bias"] + marks)


def test_rows_of_classes_may_be_left_out_and_are_never_permuted() -> None:
    model = small(12, 16)
    params = noisy(model, 1)
    copy = shuffled(model, params, 2)
    rows = {n: t[:2] if n.startswith("head") else t for n, t in copy.items()}
    wanted = {n: t[:2] if n.startswith("head") else t for n, t in params.items()}
    back = aligned(model, wanted, rows)
    assert all(torch.equal(back[name], wanted[name]) for name in wanted)
    swapped = {n: t.flip(0) if n.startswith("head") else t for n, t in params.items()}
    assert aligned(model, params, swapped)["head.bias"] is swapped["head.bias"]


def test_rounding_of_sums_moves_no_unit() -> None:
    # Every unit has the same entries in another order and all are wanted alike: whichever is best
    # in floating point is so by rounding alone, which differs between numbers of threads.
    model = MLP(hidden=(6,)).build_model(
        Spec(kind="vector", task="vector-classification", shape=(500,), num_classes=3)
    )
    draw = torch.Generator().manual_seed(0)
    row = torch.randn(500, generator=draw)
    rows = torch.stack([row[torch.randperm(500, generator=draw)] for _ in range(6)])
    assert len(set(rows.double().mul(0.1).sum(dim=1).tolist())) > 1
    params = {name: torch.zeros(shape) for name, shape in model.shapes.items()}
    same = params | {"layers.0.weight": torch.full((6, 500), 0.1)}
    other = params | {"layers.0.weight": rows}
    assert aligned(model, same, other)["layers.0.weight"] is rows


def test_towers_that_use_one_name_for_other_units_are_refused() -> None:
    class Two(torch.nn.Module):
        def __init__(self, sizes: Sizes) -> None:
            super().__init__()
            self.one = torch.nn.ModuleList(Wide(sizes["inner"]) for _ in range(sizes["layers"]))
            self.two = torch.nn.ModuleList(Wide(sizes["other"]) for _ in range(sizes["layers"]))
            self.head = torch.nn.Linear(6, sizes["classes"])

        def forward(self, inputs: torch.Tensor) -> Output:
            for block in (*self.one, *self.two):
                inputs = inputs + block(inputs)
            return Output(self.head(inputs), None)

    class Wide(torch.nn.Module):
        def __init__(self, inner: int) -> None:
            super().__init__()
            self.widen, self.narrow = torch.nn.Linear(6, inner), torch.nn.Linear(inner, 6)

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return self.narrow(torch.relu(self.widen(inputs)))

    model = probe(
        Two,
        {"inner": 4, "other": 4, "layers": 2, "classes": 3},
        lambda: torch.randn(3, 6),
        outputs=("classes",),
    )
    assert private_axes(model, "layers") == ("inner", "other")
    params = noisy(model, 1)
    block = {p[2]: t for n, t in params.items() if (p := model.depths["layers"].locate(n))}
    with pytest.raises(ModelError, match="other units in one tower than in another"):
        aligned_block(model, "layers", block, block)
    back = aligned(model, params, shuffled(model, params, 2))
    assert all(torch.equal(back[name], params[name]) for name in params)
