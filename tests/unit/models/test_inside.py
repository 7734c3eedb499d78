"""What a model's blocks give on the way."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tesserafl.core import seeds
from tesserafl.core.metrics import measure
from tesserafl.core.model import Model
from tesserafl.data.examples import Spec
from tesserafl.models import HuggingFace, Residual
from tesserafl.models.inside import Inside
from tesserafl.models.scaling import forward_of

IMAGES = Spec(kind="image", task="image-classification", shape=(1, 8, 8), num_classes=3)
TOKENS = Spec(
    kind="tokens", task="causal-lm", shape=(6,), num_classes=20, vocab_size=20, class_names=()
)


def images(number: int) -> tuple[Tensor, Tensor]:
    pixels = torch.randn(number, 1, 8, 8, generator=seeds.generator(0, "images"))
    return pixels, torch.arange(number) % 3


def inside_of(model: Model, inputs: Tensor, labels: Tensor) -> Inside:
    return Inside(model=model, inputs=inputs, labels=labels)


def test_outputs_are_the_streams_behind_each_block() -> None:
    model = Residual(stream=8, inner=8, blocks=3).build_model(IMAGES)
    params, (inputs, labels) = model.init(1), images(5)
    found = inside_of(model, inputs, labels).outputs(params, "blocks")
    module = model.module()
    module.load_state_dict(params)
    stream = module.stem(inputs)
    assert len(found) == 3
    for block, given in zip(module.blocks, found, strict=True):
        stream = block(stream)
        torch.testing.assert_close(given, stream.detach())


def test_many_examples_come_in_batches_and_in_order() -> None:
    model = Residual(stream=8, inner=8, blocks=1).build_model(IMAGES)
    params, (inputs, labels) = model.init(1), images(600)
    inside = inside_of(model, inputs, labels)
    (found,) = inside.outputs(params, "blocks")
    assert len(found) == 600
    rows = torch.tensor([3, 599, 250])
    (few,) = inside_of(model, inputs[rows], labels[rows]).outputs(params, "blocks")
    torch.testing.assert_close(found[rows], few)
    forward = forward_of(model, model.whole(), model.module().eval(), "none")
    whole = measure(forward(params, inputs).logits.detach(), labels)
    metrics = inside.metrics(params)
    assert (metrics.correct, metrics.count) == (whole.correct, 600)
    assert metrics.loss == pytest.approx(whole.loss, rel=1e-5)
    assert inside.metrics(params, rows).count == 3


def test_blocks_of_a_language_model() -> None:
    options = {"n_embd": 16, "n_layer": 2, "n_head": 2}
    model = HuggingFace(config="gpt2", options=options).build_model(TOKENS)
    tokens = torch.randint(0, 20, (3, 6), generator=seeds.generator(0, "tokens"))
    found = inside_of(model, tokens, tokens.roll(-1, 1)).outputs(model.init(0), "layers")
    assert [tuple(out.shape) for out in found] == [(3, 6, 16)] * 2


def test_a_loss_has_a_slope() -> None:
    model = Residual(stream=8, inner=8, blocks=1).build_model(IMAGES)
    params = {name: value.clone().requires_grad_() for name, value in model.init(1).items()}
    inside = inside_of(model, *images(4))
    loss = inside.loss(params, torch.arange(4), torch.nn.functional.cross_entropy)
    loss.backward()
    assert all(value.grad is not None for value in params.values())
