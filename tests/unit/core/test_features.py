"""Which axis a module's features lie along: found by permuting, checked on cut modules."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor, nn

from tesserafl.core.axes import probe
from tesserafl.core.axis import Tie
from tesserafl.core.model import Model, Output, Sizes
from tesserafl.core.params import Params
from tesserafl.core.submodel import SubModel, Units, cut
from tesserafl.core.windows import feature_entries
from tesserafl.data.examples import Spec
from tesserafl.models.cnn import CNN
from tesserafl.models.huggingface import HuggingFace
from tesserafl.models.mlp import MLP
from tesserafl.models.resnet import ResNet


def images(side: int = 16) -> Spec:
    return Spec(kind="image", task="image-classification", shape=(3, side, side), num_classes=5)


def tokens(task: str) -> Spec:
    classes = 40 if task == "causal-lm" else 3
    return Spec(kind="tokens", task=task, shape=(12,), num_classes=classes, vocab_size=40, pad_id=0)


HEADS = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32}
GROUPED = {
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 6,
    "hidden_size": 32,
    "intermediate_size": 48,
}
STAGES = {"embedding_size": 8, "hidden_sizes": [16, 32], "depths": [2, 2]}


def huggingface(config: str, options: Mapping[str, object], spec: Spec) -> tuple[Model, Spec]:
    pytest.importorskip("transformers")
    family = HuggingFace(config=config, options=options)  # type: ignore[arg-type]
    return family.build_model(spec), spec


FAMILIES: dict[str, tuple[Callable[[], tuple[Model, Spec]], Tie]] = {
    "mlp": (
        lambda: (MLP(hidden=(12, 9), norm="layer").build_model(images()), images()),
        Tie("hidden2", (1,)),
    ),
    "cnn": (
        lambda: (CNN(channels=(8, 12, 20)).build_model(images()), images()),
        Tie("channels3", (4,)),  # a group of channels that are normalised together
    ),
    "cnn-batch": (
        lambda: (CNN(channels=(8, 12), norm="batch").build_model(images()), images()),
        Tie("channels2", (1,)),
    ),
    "resnet": (
        lambda: (ResNet(channels=(8, 16), blocks=(1, 2)).build_model(images()), images()),
        Tie("stage2", (4,)),
    ),
    "vit": (
        lambda: huggingface("vit", {**HEADS, "intermediate_size": 48, "patch_size": 4}, images()),
        Tie("embed", (8,)),
    ),
    "bert": (
        lambda: huggingface(
            "bert", {**HEADS, "intermediate_size": 48}, tokens("text-classification")
        ),
        Tie("embed", (8,)),
    ),
    "gpt2": (lambda: huggingface("gpt2", HEADS, tokens("causal-lm")), Tie("embed", (8,))),
    "llama": (
        lambda: huggingface("llama", GROUPED, tokens("causal-lm")),
        Tie("embed", (1,)),  # heads are an axis of their own, with two queries to a key
    ),
    "huggingface-resnet": (
        lambda: huggingface("resnet", STAGES, images(32)),
        Tie("stage1", (4,)),  # one channel inside a bottleneck is four outside
    ),
}


@functools.cache
def family(name: str) -> tuple[Model, Spec]:
    return FAMILIES[name][0]()


def batch(spec: Spec) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    if spec.kind == "image":
        return torch.randn(3, *spec.shape, generator=generator, dtype=torch.float64)
    found = torch.randint(1, spec.vocab_size, (3, *spec.shape), generator=generator)
    found[0, -3:] = spec.pad_id
    return found


def noisy(model: Model) -> Params:
    """Units that no two of are alike: zero biases and unit gains would hide a wrong layout."""
    generator = torch.Generator().manual_seed(1)
    return {
        name: value.double() + 0.1 * torch.randn(value.shape, generator=generator)
        for name, value in model.init(0).items()
    }


def answer(model: Model, submodel: SubModel, inputs: Tensor) -> Output:
    module = model.module(submodel.sizes).double().eval()
    with torch.no_grad():
        found = torch.func.functional_call(module, cut(noisy(model), submodel), (inputs,))
    assert isinstance(found, Output) and found.features is not None
    return found


def assert_features_are_where_they_should_be(
    model: Model, keep: Mapping[str, Units], inputs: Tensor
) -> Tensor:
    submodel = model.slice(keep)
    before, after = answer(model, model.whole(), inputs), answer(model, submodel, inputs)
    entries = feature_entries(model, submodel)
    assert before.features is not None and after.features is not None
    torch.testing.assert_close(after.features, before.features[:, entries], rtol=1e-5, atol=1e-6)
    return entries


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_has_features_along_an_axis(name: str) -> None:
    assert family(name)[0].features == FAMILIES[name][1]


@pytest.mark.parametrize("name", FAMILIES)
def test_units_in_another_order_give_the_same_features_in_that_order(name: str) -> None:
    model, spec = family(name)
    generator = torch.Generator().manual_seed(2)
    keep = {axis: torch.randperm(model.units(axis), generator=generator) for axis in model.cuttable}
    entries = assert_features_are_where_they_should_be(model, keep, batch(spec))
    assert entries.tolist() != sorted(entries.tolist())  # else nothing was tested
    assert sorted(entries.tolist()) == list(range(len(entries)))


@pytest.mark.parametrize(
    ("name", "window"), [("cnn", [4, 0, 1]), ("cnn", [2]), ("cnn-batch", [11, 0, 5])]
)
def test_a_window_of_the_last_layer_has_those_features_of_the_whole(
    name: str, window: list[int]
) -> None:
    # Nothing behind the last layer mixes its channels, and all that it reads is kept.
    model, spec = family(name)
    assert model.features is not None
    entries = assert_features_are_where_they_should_be(
        model, {model.features.axis: window}, batch(spec)
    )
    size = model.features.parts[0]
    assert entries.tolist() == [unit * size + i for unit in window for i in range(size)]


def test_a_window_of_a_plain_mlp_and_of_its_cut() -> None:
    model = MLP(hidden=(6, 10)).build_model(images())
    inputs = batch(images())
    window = [8, 9, 0, 1]
    entries = assert_features_are_where_they_should_be(model, {"hidden2": window}, inputs)
    assert entries.tolist() == window
    small = model.resized(model.slice({"hidden2": window}))
    inner = small.slice({"hidden2": [2, 0]})
    assert entries[feature_entries(small, inner)].tolist() == [0, 8]


def test_the_stem_has_no_say() -> None:
    # Another axis cut: all features are there, though their values are others.
    model, _ = family("cnn")
    assert feature_entries(model, model.slice({"channels1": [1]})).tolist() == list(range(20))


class Net(nn.Module):
    """Two hidden layers side by side; `pick` makes the features of them."""

    def __init__(self, sizes: Sizes, pick: Callable[..., object]) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(5, sizes["left"]), nn.Linear(5, sizes["right"])
        self.heads = nn.ModuleList(
            (nn.Linear(sizes["left"], 3), nn.Linear(sizes["right"], sizes["classes"]))
        )
        self.pick = pick

    def forward(self, inputs: Tensor) -> object:
        left, right = torch.tanh(self.left(inputs)), torch.tanh(self.right(inputs))
        logits = self.heads[1](right) + self.heads[0](left).sum(dim=1, keepdim=True)
        return self.pick(logits, left, right)


def found(pick: Callable[..., object]) -> Model:
    return probe(
        lambda sizes: Net(sizes, pick),
        {"left": 12, "right": 10, "classes": 4},
        lambda: torch.randn(3, 5),
        outputs=("classes",),
    )


NO_AXIS: dict[str, Callable[..., object]] = {
    "a plain tensor": lambda logits, left, right: logits,
    "no features": lambda logits, left, right: Output(logits, None),
    "the logits": lambda logits, left, right: Output(logits, logits),
    "a sum over the units": lambda logits, left, right: Output(logits, left.sum(1, keepdim=True)),
    "a map per unit": lambda logits, left, right: Output(logits, left[:, :, None]),
    "two axes one after another": lambda logits, left, right: Output(
        logits, torch.cat([left, right], dim=1)
    ),
    "every pair of units": lambda logits, left, right: Output(
        logits, (left[:, :, None] * right[:, None]).flatten(1)
    ),
    "one axis and one unit of another": lambda logits, left, right: Output(
        logits, left + right[:, :1]
    ),
    "the first units only": lambda logits, left, right: Output(logits, left[:, :3]),
    "sums of units and neighbours": lambda logits, left, right: Output(
        logits, left + left.roll(1, dims=1)
    ),
    "running sums": lambda logits, left, right: Output(logits, left.cumsum(dim=1)),
}


@pytest.mark.parametrize("what", NO_AXIS)
def test_features_that_follow_no_single_axis_are_not_known(what: str) -> None:
    model = found(NO_AXIS[what])
    assert model.features is None
    assert model.cuttable == ("left", "right")  # and cut it can be all the same


AN_AXIS: dict[str, tuple[Callable[..., object], Tie]] = {
    "plain": (lambda logits, left, right: Output(logits, right), Tie("right", (1,))),
    "two parts": (
        lambda logits, left, right: Output(logits, torch.cat([left, left.square()], dim=1)),
        Tie("left", (1, 1)),
    ),
    "two in turn": (
        lambda logits, left, right: Output(
            logits, torch.stack([left, left.square()], dim=2).flatten(1)
        ),
        Tie("left", (2,)),
    ),
    "weighted by the other": (
        lambda logits, left, right: Output(logits, left * right.sum(1, keepdim=True)),
        Tie("left", (1,)),
    ),
}


@pytest.mark.parametrize("what", AN_AXIS)
def test_the_layout_of_the_features_is_found(what: str) -> None:
    pick, tie = AN_AXIS[what]
    model = found(pick)
    assert model.features == tie
    if what != "weighted by the other":
        inputs = torch.linspace(-1, 1, 20, dtype=torch.float64).reshape(4, 5)
        assert_features_are_where_they_should_be(model, {tie.axis: [7, 8, 0]}, inputs)
