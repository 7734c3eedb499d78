"""The order of a client's examples, and their augmentation: the same draws for every engine."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from tesserafl.core import seeds
from tesserafl.core.fit import Training
from tesserafl.data.examples import Examples


def batches(total: int, size: int, draw: torch.Generator) -> Iterator[Tensor]:
    """One epoch: every example once, int64 [batch] rows each, at most `size + 1` of them.

    Of a `size` of 1 every example is a batch.
    """
    yield from _split(torch.randperm(total, generator=draw), size)


def passes(total: int, training: Training, draw: torch.Generator) -> Iterator[list[Tensor]]:
    """The batches of each epoch of a client's round; the last is cut off where steps are counted.

    An epoch is drawn when it is asked for, after what its batches drew in the one before it.
    """
    if training.steps is None:
        for _ in range(training.epochs):
            yield list(batches(total, training.batch_size, draw))
        return
    left = training.steps
    while left:
        epoch = list(batches(total, training.batch_size, draw))[:left]
        left -= len(epoch)
        yield epoch


def num_steps(total: int, training: Training) -> int:
    """Optimiser steps of a client with so many examples in a round."""
    if training.steps is not None:
        return training.steps
    return training.epochs * len(_sizes(total, training.batch_size))


def steps_of_last_pass(total: int, training: Training) -> int:
    """Of the optimiser steps, those of the last epoch, which may have been cut off."""
    each = len(_sizes(total, training.batch_size))
    return each if training.steps is None else (training.steps - 1) % each + 1


def num_seen(total: int, training: Training) -> int:
    """Examples that a client's round goes through, each as often as it is."""
    if training.steps is None:
        return training.epochs * total
    sizes = _sizes(total, training.batch_size)
    whole, rest = divmod(training.steps, len(sizes))
    return whole * total + sum(sizes[:rest])


def _sizes(total: int, size: int) -> list[int]:
    """Examples in each batch of an epoch, as `_split` makes them."""
    if total <= size:
        return [total]
    whole, rest = divmod(total, size)
    sizes = [size] * whole
    if rest == 1:
        sizes[-1] += 1
    elif rest:
        sizes.append(rest)
    return sizes


def in_order(total: int, size: int) -> Iterator[Tensor]:
    """Every example once, in their order, in batches as in training."""
    yield from _split(torch.arange(total), size)


def _split(rows: Tensor, size: int) -> Iterator[Tensor]:
    if len(rows) <= size:
        yield rows
        return
    split = list(torch.split(rows, size))
    if size > 1 and len(split) > 1 and len(split[-1]) == 1:
        # One example alone has no batch statistics: it joins the batch before it.
        split[-2:] = [torch.cat(split[-2:])]
    yield from split


def held_out_of(total: int, share: float, seed: int = 0, client: int = 0) -> Tensor:
    """Which of a client's examples are held out in all rounds, bool [total].

    As many as the share says, rounded down, but one at least, if there are two, and never all.
    """
    held = torch.zeros(total, dtype=torch.bool)
    # 0.29 * 100 is a little less than 29.
    count = min(max(math.floor(share * total + 1e-9), 1), total - 1)
    draw = seeds.generator(seed, client, "held out")
    held[torch.randperm(total, generator=draw)[:count]] = True
    return held


def widest(total: int, size: int) -> int:
    """Examples in the largest batch of a client that has `total`."""
    return size + 1 if total > size and total % size == 1 else min(total, size)


def augments(training: Training, examples: Examples) -> bool:
    """Whether batches are augmented: only images are."""
    return training.augment and examples.inputs.dim() == 4


def augment(images: Tensor, draw: torch.Generator) -> Tensor:
    """Flip with probability 1/2 and shift by up to 4 pixels (He et al., CVPR 2016, 4.2)."""
    batch, _, height, width = images.shape
    flip = torch.rand(batch, generator=draw) < 0.5
    images = torch.where(flip[:, None, None, None], images.flip(3), images)
    padded = nn.functional.pad(images, (4, 4, 4, 4))
    top, left = torch.randint(0, 9, (2, batch), generator=draw)
    rows = top[:, None] + torch.arange(height)  # [batch, height]
    columns = left[:, None] + torch.arange(width)  # [batch, width]
    position = torch.arange(batch)[:, None, None]
    return padded.permute(0, 2, 3, 1)[position, rows[:, :, None], columns[:, None, :]].permute(
        0, 3, 1, 2
    )
