"""FedBRB's values on the block grid: equal blocks to begin with, and the weighted broadcast."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import TypedDict

import torch
from torch import Tensor

from tesserafl.core.kernels import BLOCK, empty
from tesserafl.core.params import Params
from tesserafl.methods._blocks import Grid
from tesserafl.models.scaling import own_scales


class _Options(TypedDict):
    beta: float
    of_updates: bool
    similarity: bool


def tiled_init(grid: Grid, seed: int) -> Params:
    """The smallest client's own initialisation in every block: the global model begins as it.

    Weights are divided by s along their inputs, so that s equal blocks sum to what one small layer
    gives: W = 1_{s x s} (x) B / s. A pre-trained model is not touched.
    """
    model = grid.model
    if model.pretrained is not None:
        return model.init(seed)
    smallest = model.slice({axis: grid.units(axis, 0, 1) for axis in model.cuttable})
    small = model.resized(smallest).init(seed)
    scales = own_scales(model, smallest, model.module(smallest.sizes, device="meta"))
    params = {}
    for name, shape in model.shapes.items():
        order = grid.order(name)
        counts = [1 if groups is None else groups.shape[0] for groups in order]
        block = small[name] / scales.get(name, 1.0)
        blocks = block.expand(math.prod(counts), *block.shape)
        params[name] = _from_blocks(blocks, order, torch.Size(shape)).contiguous()
    return params


def broadcast_mean(
    old: Tensor,
    mean: Tensor,
    weights: Tensor,
    order: Sequence[Tensor | None],
    *,
    beta: float,
    of_updates: bool,
    similarity: bool,
) -> Tensor:
    """One parameter after in-place averaging and weighted broadcast, some rows at a time.

    Args:
        old: B before the round, any shape.
        mean: mean delta per entry, float64, 0 where nobody trained.
        weights: v, the sum of weights per entry, int64.
        order: per dimension, the entries of each group [s, entries / s], or None.
        beta: share of the broadcast, 1 - lambda.
        of_updates: spread the mean update instead of the mean block, so that what blocks differ in
            stays with them.
        similarity: multiply a block's weight by exp(-|mean delta|).
    """
    options: _Options = {"beta": beta, "of_updates": of_updates, "similarity": similarity}
    if similarity or old.numel() <= BLOCK:  # a block's own weight is made from all of its entries
        return _broadcast(old, mean, weights, order, **options)
    new = empty(old.shape, old)
    for rows, groups in _some_rows(order[0], old):
        part = (old[rows], mean[rows], weights[rows])
        new[rows] = _broadcast(*part, (groups, *order[1:]), **options)
    return new


def _some_rows(
    groups: Tensor | None, tensor: Tensor
) -> Iterator[tuple[slice | Tensor, Tensor | None]]:
    """Rows of `tensor`, a few places of every group at a time; and how these rows are grouped.

    Blocks of such rows hold the same positions of all the blocks, so a position's sum over blocks
    has all its terms, in their order.
    """
    count = 1 if groups is None else len(groups)
    places = len(tensor) // count
    step = max(2, BLOCK * places // tensor.numel())  # one place alone would be summed another way
    starts = list(range(0, places, step))
    if len(starts) > 1 and places - starts[-1] < 2:
        starts.pop()
    for start, stop in itertools.pairwise([*starts, places]):
        if groups is None:
            yield slice(start, stop), None
        else:
            rows = groups[:, start:stop].to(tensor.device)
            yield rows.reshape(-1), torch.arange(rows.numel()).reshape(rows.shape)


def _broadcast(
    old: Tensor,
    mean: Tensor,
    weights: Tensor,
    order: Sequence[Tensor | None],
    *,
    beta: float,
    of_updates: bool,
    similarity: bool,
) -> Tensor:
    before = old.double()
    if all(groups is None or len(groups) == 1 for groups in order):
        return (before + mean).to(old.dtype)  # one block: its own mean is the broadcast
    update, weight = _to_blocks(mean, order), _to_blocks(weights.double(), order)
    if similarity:
        change = update.square().sum(dim=tuple(range(1, update.dim()))).sqrt()
        weight = weight * torch.exp(-change).reshape(-1, *[1] * (update.dim() - 1))
    spread = update if of_updates else _to_blocks(before, order) + update
    total = weight.sum(dim=0, keepdim=True)
    average = (weight * spread).sum(dim=0, keepdim=True) / total.clamp(min=1e-300)
    # x + beta (mean - x) rather than (1 - beta) x + beta mean: equal blocks stay equal to the bit.
    moved = torch.where(total > 0, beta * (average - spread), torch.zeros_like(spread))
    return (before + mean + _from_blocks(moved, order, before.shape)).to(old.dtype)


def _to_blocks(tensor: Tensor, order: Sequence[Tensor | None]) -> Tensor:
    """[blocks, entries of a block per dimension ...], blocks in raster order."""
    shape: list[int] = []
    for dim, groups in enumerate(order):
        if groups is None:
            shape += [1, tensor.shape[dim]]
        else:
            tensor = tensor.index_select(dim, groups.reshape(-1).to(tensor.device))
            shape += [groups.shape[0], groups.shape[1]]
    ranks = len(order)
    split = tensor.reshape(shape).permute(*range(0, 2 * ranks, 2), *range(1, 2 * ranks, 2))
    return split.reshape(-1, *shape[1::2])


def _from_blocks(blocks: Tensor, order: Sequence[Tensor | None], shape: torch.Size) -> Tensor:
    ranks = len(order)
    counts = [1 if groups is None else groups.shape[0] for groups in order]
    split = blocks.reshape(*counts, *blocks.shape[1:])
    interleaved = [
        d for pair in zip(range(ranks), range(ranks, 2 * ranks), strict=True) for d in pair
    ]
    tensor = split.permute(*interleaved).reshape(shape)
    for dim, groups in enumerate(order):
        if groups is not None:
            tensor = tensor.index_select(dim, groups.reshape(-1).argsort().to(tensor.device))
    return tensor
