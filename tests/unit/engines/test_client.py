"""Executing a client's Fit."""

from dataclasses import replace

import pytest
import torch

from tesserafl.core import seeds
from tesserafl.core.fit import CrossEntropy, Fit, Training
from tesserafl.core.model import Output
from tesserafl.data.examples import Examples
from tesserafl.engines.batches import augment, batches
from tesserafl.engines.client import execute
from tesserafl.engines.optimisers import Optimiser


def examples(count: int = 9) -> Examples:
    draw = seeds.generator(0, "examples")
    inputs = torch.randn(count, 3, generator=draw)
    return Examples(inputs=inputs, labels=(inputs[:, 0] > 0).long())


def forward(params, inputs):
    return Output(inputs @ params["w"].T + params["b"], inputs)


def fit(**changes) -> Fit:
    start = {"w": torch.zeros(3, 3), "b": torch.zeros(3)}
    training = Training(**{"lr": 0.1, "epochs": 3, "batch_size": 4, **changes})
    return Fit(params=start, training=training)


def run(work: Fit, seed: int = 0):
    return execute(work, forward, examples(), seeds.generator(seed, "batches"))


@pytest.mark.parametrize("optimiser", ["sgd", "adamw"])
def test_training_lowers_the_loss_and_leaves_the_start_alone(optimiser):
    work = fit(optimiser=optimiser, epochs=20)
    before = float(CrossEntropy()(forward, work.params, *examples().batch(torch.arange(9)), {}))
    fitted = run(work)
    assert fitted.metrics["loss"] < 0.7 * before
    assert (fitted.num_examples, fitted.num_steps) == (9, 20 * 2)  # 4 + 5: no batch of one
    assert torch.equal(work.params["w"], torch.zeros(3, 3))
    assert fitted.classes.tolist() == [0, 1]


def test_one_step_of_sgd_by_hand():
    # Zero weights: softmax is 1/3 each. The gradient of the mean loss in b is 1/3 - share of class.
    fitted = run(fit(epochs=1, batch_size=9, lr=0.3))
    shares = torch.bincount(examples().labels, minlength=3) / 9
    assert torch.allclose(fitted.params["b"], -0.3 * (1 / 3 - shares), atol=1e-6)


def test_weight_decay_and_clipping_take_effect():
    start = {"w": torch.ones(3, 3), "b": torch.ones(3)}
    plain = run(replace(fit(), params=start))
    decayed = run(replace(fit(weight_decay=0.5), params=start))
    assert decayed.params["w"].norm() < plain.params["w"].norm()
    clipped = run(fit(clip_norm=1e-3, epochs=1, batch_size=9, lr=1.0))
    moved = torch.cat([clipped.params["w"].reshape(-1), clipped.params["b"]]).norm()
    assert float(moved) == pytest.approx(1e-3, rel=1e-3)


def test_only_trainable_parameters_move_and_are_reported():
    fitted = run(replace(fit(), trainable=frozenset({"b"})))
    assert set(fitted.params) == {"b"}


def test_absent_classes_are_masked_to_zero_logits():
    masked = run(fit(mask_absent_classes=True))
    assert torch.equal(masked.params["b"][2], torch.tensor(0.0))  # class 2 is nobody's here
    assert run(fit()).params["b"][2] < 0


@pytest.mark.parametrize(("total", "sizes"), [(8, [4, 4]), (9, [4, 5]), (10, [4, 4, 2]), (1, [1])])
def test_batches_cover_all_once_and_none_is_a_lone_example(total, sizes):
    parts = list(batches(total, 4, seeds.generator(0, "b")))
    assert [len(batch) for batch in parts] == sizes
    assert torch.cat(parts).sort().values.tolist() == list(range(total))


def test_augmentation_shifts_and_flips_but_invents_nothing():
    images = torch.arange(1.0, 2 * 6 * 6 + 1).reshape(2, 1, 6, 6)
    seen = [augment(images, seeds.generator(seed, "augment")) for seed in range(20)]
    again = augment(images, seeds.generator(0, "augment"))
    assert torch.equal(seen[0], again)
    assert len({tuple(image.reshape(-1).tolist()) for image in seen}) > 15
    for image in seen:
        assert image.shape == images.shape
        for before, after in zip(images, image, strict=True):
            kept = after[after != 0]
            assert set(kept.tolist()) <= set(before.reshape(-1).tolist())


OPTIMISERS = {
    "plain": {},
    "momentum": {"momentum": 0.9},
    "decay": {"weight_decay": 0.1},
    "all": {"momentum": 0.9, "weight_decay": 0.1, "clip_norm": 0.5},
    "adamw": {"optimiser": "adamw", "weight_decay": 0.1, "clip_norm": 0.5},
}


@pytest.mark.parametrize("name", OPTIMISERS)
def test_a_client_steps_with_the_bits_of_torchs_optimisers(name: str) -> None:
    training = Training(lr=0.1, **OPTIMISERS[name])
    draw = seeds.generator(5)
    start = [torch.randn(4, 3, generator=draw), torch.randn(3, generator=draw)]
    theirs = [t.clone().requires_grad_() for t in start]
    kind, extra = (torch.optim.SGD, {"momentum": training.momentum})
    if training.optimiser == "adamw":
        kind, extra = torch.optim.AdamW, {}
    reference = kind(theirs, lr=0.1, weight_decay=training.weight_decay, **extra)
    ours, optimiser = [t.clone() for t in start], Optimiser(training)
    received = ours
    for _ in range(4):
        gradients = [torch.randn(t.shape, generator=draw) for t in start]
        for leaf, gradient in zip(theirs, gradients, strict=True):
            leaf.grad = gradient.clone()
        if training.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(theirs, training.clip_norm)
        reference.step()
        ours = optimiser.step(ours, gradients)
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(received, start, strict=True))  # not written to
