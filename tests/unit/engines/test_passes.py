"""Rounds that are counted in steps: as many batches, of the same examples, however they train."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tesserafl.core import seeds
from tesserafl.core.errors import ConfigError
from tesserafl.core.fit import Fit, Fitted, Training
from tesserafl.data.examples import Examples, Spec
from tesserafl.engines.batches import num_seen, num_steps, passes, steps_of_last_pass, widest
from tesserafl.engines.client import execute
from tesserafl.engines.cohort import Cohorts, Member
from tesserafl.engines.gather import order_of
from tesserafl.models import CNN, MLP
from tesserafl.models.scaling import forward_of

fast = settings(max_examples=150, deadline=None)
SPEC = Spec(kind="vector", task="vector-classification", shape=(6,), num_classes=3)
MODEL = MLP(hidden=(8, 8), norm="layer").build_model(SPEC)
SIZES = (7, 1, 12, 5, 9)
"""With batches of 4: two, one, three, two (4 and 1 join) and two batches an epoch."""


def draw(client: int = 0) -> torch.Generator:
    return seeds.generator(4, client, "batches")


counted = st.builds(
    Training,
    steps=st.one_of(st.none(), st.integers(1, 25)),
    epochs=st.integers(1, 4),
    batch_size=st.integers(1, 12),
)


@given(st.integers(1, 40), counted)
@fast
def test_what_is_counted_is_what_is_drawn(total: int, training: Training) -> None:
    epochs = list(passes(total, training, draw()))
    drawn = [rows.tolist() for epoch in epochs for rows in epoch]
    assert num_steps(total, training) == len(drawn)
    assert num_seen(total, training) == sum(map(len, drawn))
    assert steps_of_last_pass(total, training) == len(epochs[-1])
    if training.steps is None:
        assert len(epochs) == training.epochs
    else:
        assert len(drawn) == training.steps
    # An epoch has every example once; one that was cut off has none twice.
    for number, epoch in enumerate(epochs):
        rows = torch.cat(epoch).tolist()
        assert len(set(rows)) == len(rows)
        if number < len(epochs) - 1 or training.steps is None:
            assert sorted(rows) == list(range(total))
        assert set(rows) <= set(range(total))
    # What a cohort trains on is what a client alone does.
    assert [rows.tolist() for rows in order_of(total, training, draw())] == drawn


@given(st.integers(1, 40), counted, st.integers(1, 25))
@fast
def test_fewer_steps_are_the_first_of_more(total: int, training: Training, fewer: int) -> None:
    more = [rows for epoch in passes(total, replace(training, steps=30), draw()) for rows in epoch]
    few = [
        rows for epoch in passes(total, replace(training, steps=fewer), draw()) for rows in epoch
    ]
    assert len(few) == fewer
    assert all(torch.equal(a, b) for a, b in zip(few, more, strict=False))


def test_an_epoch_is_drawn_after_what_the_one_before_drew() -> None:
    """Augmentation draws from the same generator, between two epochs."""
    training = Training(epochs=2, batch_size=4)
    for counts in (training, replace(training, steps=6)):
        generator, expected, seen = draw(), draw(), []
        for epoch in passes(12, counts, generator):
            seen.append(torch.cat(epoch))
            torch.rand(5, generator=generator)
        first = torch.randperm(12, generator=expected)
        torch.rand(5, generator=expected)
        assert torch.equal(seen[0], first)
        assert torch.equal(seen[1], torch.randperm(12, generator=expected))


def test_steps_that_cannot_be() -> None:
    with pytest.raises(ConfigError, match=r"training\.steps must be positive, or None .*; got 0"):
        Training(steps=0)


# What is trained.


def examples_of(count: int, client: int) -> Examples:
    generator = seeds.generator(3, client)
    labels = torch.arange(count) % 2 + client % 2
    return Examples(inputs=torch.randn(count, 6, generator=generator), labels=labels)


def alone(training: Training, client: int, size: int) -> Fitted:
    forward = forward_of(MODEL, MODEL.whole(), MODEL.module().train(), "none")
    fit = Fit(params=MODEL.init(0), training=training)
    return execute(fit, forward, examples_of(size, client), draw(client))


COHORTS = Cohorts(most=8, width=lambda size: max(widest(n, size) for n in SIZES))
"""Of all tests: its programs are traced once."""


def together(trainings: list[Training]) -> list[Fitted]:
    forward = forward_of(MODEL, MODEL.whole(), MODEL.module().train(), "none")
    start = MODEL.init(0)
    members = [
        Member(
            fit=Fit(params=start, training=training),
            examples=examples_of(size, client),
            draw=draw(client),
        )
        for client, (training, size) in enumerate(zip(trainings, SIZES, strict=True))
    ]
    assert len({member.shape for member in members}) == 1  # they are trained together
    return COHORTS.train(members, forward, "model")


def assert_alike(one: Fitted, other: Fitted) -> None:
    for name in one.params:
        torch.testing.assert_close(other.params[name], one.params[name], rtol=2e-4, atol=2e-6)
    assert (one.num_examples, one.num_steps) == (other.num_examples, other.num_steps)
    assert other.metrics["loss"] == pytest.approx(one.metrics["loss"], rel=1e-4)


KINDS = {
    "sgd": Training(lr=0.1, epochs=3, batch_size=4),
    "momentum": Training(lr=0.1, momentum=0.9, clip_norm=0.5, epochs=3, batch_size=4),
    "adamw": Training(optimiser="adamw", lr=0.01, weight_decay=0.1, epochs=3, batch_size=4),
    "one batch": Training(lr=0.1, epochs=3, batch_size=64),
}


@pytest.mark.parametrize("name", KINDS)
def test_as_many_steps_as_whole_epochs_have_give_their_bits(name: str) -> None:
    for client, size in enumerate(SIZES):
        epochs = KINDS[name]
        steps = replace(epochs, epochs=1, steps=num_steps(size, epochs))
        one, other = alone(epochs, client, size), alone(steps, client, size)
        assert all(torch.equal(one.params[n], other.params[n]) for n in one.params)
        assert (one.metrics, one.num_steps) == (other.metrics, other.num_steps)


def test_in_a_cohort_too() -> None:
    epochs = [KINDS["momentum"]] * 5
    steps = [
        replace(training, steps=num_steps(size, training))
        for training, size in zip(epochs, SIZES, strict=True)
    ]
    for one, other in zip(together(epochs), together(steps), strict=True):
        assert all(torch.equal(one.params[n], other.params[n]) for n in one.params)
        assert one.metrics == other.metrics


@pytest.mark.parametrize("name", ["momentum", "adamw"])
def test_unequal_steps_train_together_as_each_alone(name: str) -> None:
    trainings = [replace(KINDS[name], steps=steps) for steps in (3, 8, 1, 4, 7)]
    for client, (training, fitted) in enumerate(zip(trainings, together(trainings), strict=True)):
        assert fitted.num_steps == training.steps
        assert_alike(alone(training, client, SIZES[client]), fitted)


def test_the_loss_is_of_the_last_epoch_where_it_was_cut_off_too() -> None:
    # 12 examples in batches of 4: of 4 steps the last is the only one of the second epoch.
    fitted = alone(Training(lr=1e-9, batch_size=4, steps=4), 2, 12)
    forward = forward_of(MODEL, MODEL.whole(), MODEL.module(), "none")
    last = list(passes(12, Training(batch_size=4, steps=4), draw(2)))[-1]
    inputs, labels = examples_of(12, 2).batch(last[0])
    logits = forward(MODEL.init(0), inputs).logits
    expected = torch.nn.functional.cross_entropy(logits, labels)
    assert fitted.metrics["loss"] == pytest.approx(float(expected), rel=1e-5)


def test_augmented_steps_are_the_bits_of_augmented_epochs() -> None:
    spec = Spec(kind="image", task="image-classification", shape=(1, 8, 8), num_classes=2)
    model = CNN(channels=(4,)).build_model(spec)
    pixels = torch.randint(0, 256, (10, 1, 8, 8), generator=seeds.generator(1)).to(torch.uint8)
    examples = Examples(inputs=pixels, labels=torch.arange(10) % 2)
    forward = forward_of(model, model.whole(), model.module().train(), "none")
    training = Training(lr=0.1, batch_size=4, epochs=2, augment=True)
    one, other = (
        execute(Fit(params=model.init(0), training=each), forward, examples, draw())
        for each in (training, replace(training, steps=6))
    )
    assert all(torch.equal(one.params[n], other.params[n]) for n in one.params)
