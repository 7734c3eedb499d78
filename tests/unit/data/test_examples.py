"""Compact tensors and the batches that come of them."""

from __future__ import annotations

import torch

from tesserafl.data import Examples


def test_images_become_floats_between_minus_one_and_one() -> None:
    images = torch.tensor([[0, 255], [51, 204], [7, 7]], dtype=torch.uint8).reshape(3, 1, 1, 2)
    examples = Examples(inputs=images, labels=torch.tensor([5, 6, 7]))
    inputs, labels = examples.batch(torch.tensor([1, 0]))
    expected = torch.tensor([[-0.6, 0.6], [-1.0, 1.0]]).reshape(2, 1, 1, 2)
    torch.testing.assert_close(inputs, expected)
    assert labels.tolist() == [6, 5]
    assert images.dtype == torch.uint8 and images[0, 0, 0, 1] == 255


def test_tokens_become_int64_and_vectors_stay() -> None:
    rows = torch.tensor([0])
    tokens = Examples(inputs=torch.ones(2, 3, dtype=torch.int32), labels=torch.zeros(2).long())
    assert tokens.batch(rows)[0].dtype == torch.int64
    vectors = Examples(inputs=torch.full((2, 3), 0.5), labels=torch.zeros(2).long())
    assert torch.equal(vectors.batch(rows)[0], torch.full((1, 3), 0.5))


def test_a_batch_is_a_copy() -> None:
    examples = Examples(inputs=torch.ones(2, 1), labels=torch.zeros(2).long())
    examples.batch(torch.tensor([0]))[0].zero_()
    assert examples.inputs.min() == 1


def test_take_keeps_the_order_that_was_asked() -> None:
    examples = Examples(inputs=torch.arange(4.0).view(4, 1), labels=torch.arange(4))
    taken = examples.take(torch.tensor([3, 1]))
    assert len(taken) == 2 and taken.labels.tolist() == [3, 1]
    assert len(examples.take(torch.tensor([], dtype=torch.int64))) == 0


def test_classes_are_sorted_and_leave_out_ignored_positions() -> None:
    labels = torch.tensor([[4, -100], [2, 4]])
    assert Examples(inputs=labels.int(), labels=labels).classes.tolist() == [2, 4]


def test_num_bytes_counts_both_tensors() -> None:
    examples = Examples(inputs=torch.zeros(3, 5, dtype=torch.uint8), labels=torch.zeros(3).long())
    assert examples.num_bytes == 3 * 5 + 3 * 8
