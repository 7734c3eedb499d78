"""Training settings and the loss, by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tesserafl.core.errors import ConfigError
from tesserafl.core.fit import IGNORED, CrossEntropy, Training
from tesserafl.core.model import Output
from tesserafl.core.params import Params


def logits_of(params: Params, inputs: Tensor) -> Output:
    """The inputs are the logits."""
    return Output(inputs, None)


def loss(logits: list[list[float]], labels: list[int], **extra: Tensor) -> float:
    return float(CrossEntropy()(logits_of, {}, torch.tensor(logits), torch.tensor(labels), extra))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("lr", 0.0),
        ("lr", -0.1),
        ("lr", math.nan),
        ("epochs", 0),
        ("batch_size", 0),
        ("batch_size", -1),
        ("momentum", 1.0),
        ("momentum", -0.1),
        ("clip_norm", 0.0),
        ("clip_norm", -1.0),
        ("clip_norm", math.nan),
    ],
)
def test_a_setting_out_of_range_is_refused_by_its_name(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=rf"training\.{name}"):
        Training(**{name: value})  # type: ignore[arg-type]


def test_settings_on_the_edge_of_their_range_are_taken() -> None:
    Training(lr=1e-9, epochs=1, batch_size=1, momentum=0.0, clip_norm=1e-9)
    Training(momentum=0.999, clip_norm=None)


def test_the_constant_schedule_is_constant() -> None:
    assert {Training(lr=0.3).lr_at(round, 10) for round in range(10)} == {0.3}


def test_the_cosine_schedule_falls_from_lr_to_zero() -> None:
    rates = [Training(lr=0.4, schedule="cosine").lr_at(round, 4) for round in range(5)]
    # 0.4 (1 + cos(pi t / 4)) / 2
    half = math.sqrt(0.5)
    assert rates == pytest.approx([0.4, 0.2 * (1 + half), 0.2, 0.2 * (1 - half), 0.0], abs=1e-7)


def test_cross_entropy_is_the_mean_over_the_labels_that_count() -> None:
    # softmax(0, ln 3) = (1/4, 3/4)
    row = [0.0, math.log(3.0)]
    assert loss([row, row], [0, 1]) == pytest.approx((math.log(4) + math.log(4 / 3)) / 2)
    assert loss([row, row], [0, IGNORED]) == pytest.approx(math.log(4))


def test_logits_of_absent_classes_are_set_to_zero_not_to_minus_infinity() -> None:
    # The client has classes 0 and 1: (ln 3, 0, 9) become (ln 3, 0, 0), softmax (3, 1, 1) / 5.
    row = [math.log(3.0), 0.0, 9.0]
    assert loss([row], [0], classes=torch.tensor([0, 1])) == pytest.approx(math.log(5 / 3))


def test_masked_logits_get_no_gradient() -> None:
    logits = torch.tensor([[1.0, 2.0, 3.0]], requires_grad=True)
    extra = {"classes": torch.tensor([0, 2])}
    CrossEntropy()(logits_of, {}, logits, torch.tensor([2]), extra).backward()
    assert logits.grad is not None
    assert (logits.grad != 0).tolist() == [[True, False, True]]


def test_every_token_of_a_text_counts_once() -> None:
    # Two texts of two tokens; the last of the second is padding.
    logits = torch.zeros(2, 2, 4)
    labels = torch.tensor([[0, 1], [2, IGNORED]])
    value = CrossEntropy()(logits_of, {}, logits, labels, {})
    assert float(value) == pytest.approx(math.log(4))


def test_a_batch_without_a_label_that_counts_gives_no_nan_gradient() -> None:
    # Otherwise one all-padding batch turns a client's whole part into NaN.
    logits = torch.zeros(1, 4, requires_grad=True)
    CrossEntropy()(logits_of, {}, logits, torch.tensor([IGNORED]), {}).backward()
    assert logits.grad is not None and bool(logits.grad.isfinite().all())
