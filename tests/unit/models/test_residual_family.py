"""The deep residual family: vectors, images, exits; blocks left out and put elsewhere."""

import pytest
import torch
from torch.func import functional_call

from tesserafl.core.errors import ModelError
from tesserafl.core.model import Model, Output
from tesserafl.core.params import Params
from tesserafl.core.submodel import cut
from tesserafl.data.examples import Spec
from tesserafl.models.residual import Residual
from tesserafl.models.resnet import ResNet

VECTORS = Spec(kind="vector", task="vector-classification", shape=(6,), num_classes=3)
IMAGES = Spec(kind="image", task="image-classification", shape=(3, 9, 9), num_classes=3)
TEXTS = Spec(kind="tokens", task="causal-lm", shape=(9,), num_classes=20, vocab_size=20)
KINDS = {"vectors": VECTORS, "images": IMAGES}
each_kind = pytest.mark.parametrize("spec", KINDS.values(), ids=KINDS)
each_exits = pytest.mark.parametrize("exits", [False, True], ids=["one head", "exits"])


def model_of(spec: Spec, **settings: object) -> Model:
    return Residual(**{"stream": 8, "inner": 12, "blocks": 4, **settings}).build_model(spec)


def answer(model: Model, params: Params, spec: Spec) -> Output:
    inputs = torch.randn(2, *spec.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return functional_call(model.module().eval(), params, (inputs,))


@each_kind
@each_exits
def test_axes(spec, exits):
    model = model_of(spec, exits=exits)
    assert set(model.cuttable) == {"stream", "inner"}
    assert (model.units("blocks"), model.movable("blocks")) == (4, (0, 1, 2, 3))
    prefixes = ("blocks.", "exits.") if exits else ("blocks.",)
    assert model.depths["blocks"].prefixes == prefixes


@each_kind
@each_exits
def test_cut_and_run(spec, exits):
    model = model_of(spec, exits=exits)
    large = model.init(0)
    part = model.slice({"stream": range(1), "inner": [2, 0], "blocks": [0, 2, 3]})
    small = model.resized(part)
    params = cut(large, part)
    small.module().load_state_dict(params, strict=True)
    assert answer(small, params, spec).logits.shape == (2, 3)
    inner = "widen.bias" if spec is VECTORS else "norm2.weight"
    rows = [2, 0] if spec is VECTORS else [8, 9, 10, 11, 0, 1, 2, 3]
    assert torch.equal(params[f"blocks.1.{inner}"], large[f"blocks.2.{inner}"][rows])


@each_kind
def test_blocks_in_another_order_are_the_same_blocks(spec):
    """Every block adds to the same stream: a part with them turned round is a model of its own."""
    model = model_of(spec)
    large = model.init(0)
    turned = model.slice({"blocks": [3, 1, 0]})
    params = cut(large, turned)
    by_hand = {}
    for name, tensor in large.items():
        head, _, rest = name.partition(".")
        if head != "blocks":
            by_hand[name] = tensor
            continue
        number, _, rest = rest.partition(".")
        if int(number) in (3, 1, 0):
            by_hand[f"blocks.{[3, 1, 0].index(int(number))}.{rest}"] = tensor
    assert params.keys() == by_hand.keys()
    assert all(torch.equal(params[name], by_hand[name]) for name in by_hand)
    small = model.resized(turned)
    straight = model.slice({"blocks": [0, 1, 3]})
    one = answer(small, params, spec).logits
    other = answer(model.resized(straight), cut(large, straight), spec).logits
    assert one.shape == other.shape and not torch.allclose(one, other, rtol=1e-3)


@each_kind
def test_exits_answer_as_the_models_cut_behind_them_and_the_model_with_their_mean(spec):
    model = model_of(spec, exits=True)
    large = model.init(0)
    out = answer(model, large, spec)
    assert out.exits.shape == (4, 2, 3)
    torch.testing.assert_close(out.logits, out.exits.mean(0))
    for blocks in (1, 2, 3):
        part = model.slice({"blocks": range(blocks)})
        small = answer(model.resized(part), cut(large, part), spec)
        last = small.logits if small.exits is None else small.exits[-1]
        torch.testing.assert_close(last, out.exits[blocks - 1])
        assert (small.exits is None) == (blocks == 1)  # of one exit there is nothing to average


@each_kind
def test_without_exits_there_are_none(spec):
    model = model_of(spec)
    out = answer(model, model.init(0), spec)
    assert out.exits is None
    assert out.features.shape == (2, 8)


@pytest.mark.parametrize("name", ["stream", "inner", "blocks", "patch", "group_size"])
def test_sizes_below_one_are_refused(name):
    with pytest.raises(ModelError, match=f"model.{name} must be at least 1; got 0"):
        model_of(IMAGES, **{name: 0})


def test_a_patch_larger_than_the_images_is_refused():
    with pytest.raises(ModelError, match="patch 10 is larger than the images, 9 x 9"):
        model_of(IMAGES, patch=10)


def test_texts_are_refused():
    with pytest.raises(ModelError, match="the data are texts; use model 'huggingface'"):
        model_of(TEXTS)


def test_a_resnet_has_an_axis_of_blocks_for_every_stage():
    model = ResNet(channels=(8, 16), blocks=(2, 3)).build_model(IMAGES)
    assert {axis: depth.blocks for axis, depth in model.depths.items()} == {
        "blocks1": 2,
        "blocks2": 3,
    }
    assert model.movable("blocks1") == (0, 1)
    assert model.movable("blocks2") == (1, 2)  # the first one halves the resolution
    large = model.init(0)
    part = model.slice({"blocks1": [1], "blocks2": [0, 2]})
    small = model.resized(part)
    assert answer(small, cut(large, part), IMAGES).logits.shape == (2, 3)
    with pytest.raises(ModelError, match="block 1 is built differently from block 0"):
        model.slice({"blocks2": [1, 2]})
