"""Many clients' examples as batches of one shape, [clients, width, ...], filled up with padding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tesserafl.core.fit import IGNORED, Training
from tesserafl.data.examples import Examples
from tesserafl.engines.batches import passes

Order = list[NDArray[np.int64]]
"""The rows of every batch of a client."""
_AT_ONCE = 1 << 22
"""Bytes of batches that are gathered at once."""


def order_of(total: int, training: Training, draw: torch.Generator) -> Order:
    """The rows of every batch of every epoch, drawn as for a client alone."""
    if total <= training.batch_size:  # an epoch is a batch
        count = training.epochs if training.steps is None else training.steps
        return [torch.randperm(total, generator=draw).numpy() for _ in range(count)]
    return [rows.numpy() for epoch in passes(total, training, draw) for rows in epoch]


def pooled(parts: Sequence[Examples]) -> Examples:
    """All clients' examples and one more, which does not count and fills batches up."""
    inputs = [part.inputs for part in parts]
    labels = [part.labels for part in parts]
    return Examples(
        inputs=torch.cat([*inputs, torch.zeros_like(inputs[0][:1])]),
        labels=torch.cat([*labels, torch.full_like(labels[0][:1], IGNORED)]),
    )


def batch_rows(orders: Sequence[Order], counts: Sequence[int], rows: int, width: int) -> Tensor:
    """Rows of the pool: int64 [steps, rows of the program, width].

    Args:
        orders: of each client, the one with the most steps first.
        counts: examples of each client.
        rows: of the program, at least one per client.
        width: examples in a batch, at least those of the largest.
    """
    table = np.full((len(orders[0]), rows, width), sum(counts), dtype=np.int64)
    if all(len(order) == len(orders[0]) for order in orders):
        # Client after client and step after step; a batch's rows come first in its place.
        sizes = np.array([[len(own) for own in order] for order in orders])
        firsts = np.repeat(np.cumsum([0, *counts[:-1]]), sizes.sum(axis=1))
        real = np.arange(width) < sizes[:, :, None]
        every = np.concatenate([own for order in orders for own in order])
        table.swapaxes(0, 1)[: len(orders)][real] = every + firsts
    else:
        first = 0
        for rank, (order, count) in enumerate(zip(orders, counts, strict=True)):
            for step, own in enumerate(order):
                table[step, rank, : len(own)] = own + first
            table[len(order) :, rank] = table[0, rank]  # who is done goes on, and nobody looks
            first += count
    table[:, len(orders) :] = table[:, :1]
    return torch.from_numpy(table)


def gathered(
    table: Tensor, pool: Examples, others: Sequence[Tensor], device: str
) -> Iterator[tuple[Tensor, ...]]:
    """Inputs, labels and others of every step [rows, width, ...], several steps at once.

    Args:
        table: `batch_rows`.
        pool: `pooled` examples.
        others: of the pool's examples, each [len(pool), ...] and on the device.
        device: where the batches are wanted.
    """
    entries = max(1, pool.inputs[0].numel()) + sum(each[0].numel() for each in others)
    for rows in torch.split(table, max(1, _AT_ONCE // (table[0].numel() * 4 * entries))):
        inputs, labels = pool.batch(rows)
        there = rows.to(device) if others else rows
        stacks = [inputs.to(device), labels.to(device), *(each[there] for each in others)]
        yield from zip(*stacks, strict=True)
