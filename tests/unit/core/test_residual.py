"""What a block adds, and which of its parameters that is proportional to, is found by trying."""

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from tesserafl.core.axes import probe
from tesserafl.core.model import Model, Output
from tesserafl.core.params import Params
from tesserafl.core.submodel import cut
from tesserafl.data.examples import Spec
from tesserafl.methods._blockscale import scaled_blocks
from tesserafl.models import ResNet
from tesserafl.models.huggingface import HuggingFace
from tesserafl.models.residual import Residual

VECTORS = Spec(kind="vector", task="vector-classification", shape=(6,), num_classes=3)
IMAGES = Spec(kind="image", task="image-classification", shape=(3, 8, 8), num_classes=3)
TEXTS = Spec(
    kind="tokens",
    task="text-classification",
    shape=(12,),
    num_classes=3,
    class_names=("a", "b", "c"),
    vocab_size=40,
    pad_id=0,
)
HEADS = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 16}
LLAMA = {**HEADS, "num_key_value_heads": 1, "intermediate_size": 24}
CONFIGS = {
    "gpt2": (HEADS, TEXTS),
    "bert": ({**HEADS, "intermediate_size": 24}, TEXTS),
    "vit": ({**HEADS, "intermediate_size": 24, "patch_size": 4}, IMAGES),
    "llama": (LLAMA, TEXTS),
}
GPT2 = ("attn.c_proj.weight", "attn.c_proj.bias", "mlp.c_proj.weight", "mlp.c_proj.bias")
OF_TRANSFORMERS = {
    "gpt2": {GPT2},
    "llama": {("self_attn.o_proj.weight", "mlp.down_proj.weight")},
    "bert": {()},  # it normalises the sum
    "vit": {
        ("attention.o_proj.weight", "attention.o_proj.bias", "mlp.fc2.weight", "mlp.fc2.bias"),
    },
}
BELOW = {
    "gpt2": {"wte", "wpe"},
    "llama": {"embed_tokens"},
    "bert": {"word_embeddings", "position_embeddings", "LayerNorm"},
    "vit": {"cls_token", "position_embeddings", "projection"},
}


def transformer(name: str) -> Model:
    config, spec = CONFIGS[name]
    return HuggingFace(config=name, options=config).build_model(spec)


OURS = {
    "vectors": (lambda: Residual(stream=8, inner=12, blocks=4).build_model(VECTORS), VECTORS),
    "images": (lambda: Residual(stream=8, inner=12, blocks=4).build_model(IMAGES), IMAGES),
    "resnet": (lambda: ResNet(channels=(8, 16), blocks=(2, 3)).build_model(IMAGES), IMAGES),
}


def answer(model: Model, params: Params, inputs: Tensor) -> Tensor:
    module = model.module().eval()
    with torch.no_grad():
        out = functional_call(module, params, (inputs,))
    return out.logits if isinstance(out, Output) else out


def inputs_of(spec: Spec) -> Tensor:
    if spec.kind == "tokens":
        return torch.randint(1, 40, (3, 12), generator=torch.Generator().manual_seed(0))
    return torch.randn(3, *spec.shape, generator=torch.Generator().manual_seed(0))


def test_output_projections_of_our_families():
    vectors, images, resnet = (OURS[name][0]() for name in ("vectors", "images", "resnet"))
    assert vectors.depths["blocks"].outputs == ("narrow.weight", "narrow.bias")
    assert images.depths["blocks"].outputs == ("conv2.weight",)
    assert [depth.outputs for depth in resnet.depths.values()] == [("conv2.weight",)] * 2


def test_what_lies_below_the_blocks_of_our_families():
    vectors, resnet = OURS["vectors"][0](), OURS["resnet"][0]()
    assert vectors.depths["blocks"].below == ("stem.weight", "stem.bias")
    assert [depth.below for depth in resnet.depths.values()] == [("stem.weight",)] * 2


@pytest.mark.parametrize("name", CONFIGS)
def test_transformers(name):
    pytest.importorskip("transformers")
    model = transformer(name)
    depths = list(model.depths.values())
    assert {depth.outputs for depth in depths} == OF_TRANSFORMERS[name]
    below = {part for depth in depths for n in depth.below for part in n.split(".")}
    assert BELOW[name] <= below
    assert not below & {"score", "classifier", "ln_f", "pooler", "layernorm"}


@pytest.mark.parametrize("name", [*OURS, "gpt2", "vit", "llama"])
def test_with_outputs_at_zero_a_block_is_the_identity(name):
    """So leaving it out changes nothing, wherever it stands."""
    if name in OURS:
        build, spec = OURS[name]
        model = build()
    else:
        pytest.importorskip("transformers")
        model, spec = transformer(name), CONFIGS[name][1]
    axis = list(model.depths)[-1]
    gone = model.units(axis) - 1
    params, inputs = model.init(0), inputs_of(spec)
    without = model.slice({axis: range(gone)})
    small = answer(model.resized(without), cut(params, without), inputs)
    emptied = scaled_blocks(params, model, {axis: {gone: 0.0}})
    torch.testing.assert_close(answer(model, emptied, inputs), small, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(answer(model, params, inputs), small, rtol=1e-3)


def test_a_factor_scales_what_a_block_adds():
    """h + s f(h), by hand: one block, of which the head reads the stream without a norm."""

    class Adds(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.up, self.down = nn.Linear(width, width), nn.Linear(width, width)

        def forward(self, x):
            return x + self.down(torch.tanh(self.up(x)))

    model = stack(Adds)
    params, inputs = model.init(1), torch.randn(4, 5)
    stream = inputs @ params["stem.weight"].T + params["stem.bias"]
    for scale in (0.25, -3.0):
        expected = stream
        for block, factor in ((0, scale), (1, 1.0)):
            up = (
                expected @ params[f"blocks.{block}.up.weight"].T + params[f"blocks.{block}.up.bias"]
            )
            added = torch.tanh(up) @ params[f"blocks.{block}.down.weight"].T
            expected = expected + factor * (added + params[f"blocks.{block}.down.bias"])
        expected = expected @ params["head.weight"].T + params["head.bias"]
        scaled = scaled_blocks(params, model, {"blocks": {0: scale}})
        torch.testing.assert_close(answer(model, scaled, inputs), expected)


def test_folding_leaves_the_given_parameters_and_all_others_alone():
    model = OURS["vectors"][0]()
    params = model.init(0)
    before = {name: tensor.clone() for name, tensor in params.items()}
    scaled = scaled_blocks(params, model, {"blocks": {1: 0.5, 2: 1.0}})
    changed = {name for name in params if scaled[name] is not params[name]}
    assert changed == {"blocks.1.narrow.weight", "blocks.1.narrow.bias"}
    assert all(torch.equal(params[name], before[name]) for name in params)


class Normalises(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm, self.down = nn.LayerNorm(width), nn.Linear(width, width)

    def forward(self, x):
        return self.norm(x + self.down(x))


class Multiplies(nn.Module):
    """What is added has two factors."""

    def __init__(self, width):
        super().__init__()
        self.up, self.down = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x):
        return x * (1.0 + self.down(x) * self.up(x))


class ScalesTheSum(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.gain, self.down = nn.Parameter(torch.ones(width)), nn.Linear(width, width)

    def forward(self, x):
        return self.gain * (x + self.down(x))


class Replaces(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.down = nn.Linear(width, width)

    def forward(self, x):
        return torch.relu(self.down(x))


class Stack(nn.Module):
    def __init__(self, kind, width, blocks, repeats=1):
        super().__init__()
        self.stem, self.head = nn.Linear(5, width), nn.Linear(width, 7)
        self.blocks = nn.ModuleList(kind(width) for _ in range(blocks))
        self.repeats = repeats

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            for _ in range(self.repeats):
                x = block(x)
        return self.head(x)


def stack(kind, repeats=1) -> Model:
    return probe(
        lambda s: Stack(kind, 8, s["blocks"], repeats), {"blocks": 2}, lambda: torch.randn(3, 5)
    )


@pytest.mark.parametrize("kind", [Normalises, ScalesTheSum, Replaces])
def test_a_block_that_does_not_add_has_no_outputs(kind):
    depth = stack(kind).depths["blocks"]
    assert depth.outputs == ()
    assert depth.below == ("stem.weight", "stem.bias")


def test_a_block_that_multiplies_is_proportional_to_one_factor_alone():
    """x + x (down x)(up x): to halve both would quarter it, so one of them is the output."""
    (outputs,) = {depth.outputs for depth in stack(Multiplies).depths.values()}
    assert {name.partition(".")[0] for name in outputs} in ({"up"}, {"down"})


def test_a_block_that_is_called_twice_has_no_outputs():
    """With a factor on both calls the second would not add s times what it added before."""

    class Adds(Replaces):
        def forward(self, x):
            return x + torch.tanh(self.down(x))

    assert stack(Adds, repeats=2).depths["blocks"].outputs == ()
    assert stack(Adds, repeats=2).depths["blocks"].below == ("stem.weight", "stem.bias")


def test_a_block_whose_output_is_not_linear_in_its_parameters_has_none():
    class Adds(Replaces):
        def forward(self, x):
            return x + self.down(x) ** 2

    assert stack(Adds).depths["blocks"].outputs == ()


def test_of_a_tied_embedding_that_is_the_head_too():
    """It lies below the blocks as well: freezing what is below freezes it."""

    class Tied(nn.Module):
        def __init__(self, blocks):
            super().__init__()
            self.words = nn.Parameter(torch.randn(8, 5))
            self.norm = nn.LayerNorm(8)
            self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(blocks))

        def forward(self, x):
            x = x @ self.words.T
            for block in self.blocks:
                x = x + block(x)
            return self.norm(x) @ self.words

    model = probe(lambda s: Tied(s["blocks"]), {"blocks": 2}, lambda: torch.randn(3, 5))
    assert model.depths["blocks"].below == ("words",)
