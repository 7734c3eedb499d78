"""FedBRB's block grid: which units are a group, which entries a block, and the broadcast on it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tesserafl.core.errors import CapacityError, ConfigError
from tesserafl.core.fit import Training
from tesserafl.core.messages import Client, Task
from tesserafl.core.method import State
from tesserafl.core.model import Model
from tesserafl.core.params import Params
from tesserafl.core.submodel import Index, SubModel, View, as_index, cut, index_tensor
from tesserafl.methods._width import check_ratios, prefix
from tesserafl.models.scaling import own_scales

_SLOPES = ((1, 0), (1, 1), (0, 1))


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Every cuttable axis divided into s groups of equally many units."""

    model: Model
    s: int
    """The smallest client holds 1/s of every axis."""

    def blocks(self, ratio: float) -> int:
        """rho: groups per axis that a client of this ratio holds."""
        return round(ratio * self.s)

    def units(self, axis: str, group: int, rho: int) -> list[int]:
        """Units of the groups group, group + 1, ..., group + rho - 1, cyclic, ascending."""
        size = self.model.units(axis) // self.s
        groups = sorted((group + k) % self.s for k in range(rho))
        return [unit for g in groups for unit in range(g * size, (g + 1) * size)]

    def order(self, name: str) -> tuple[Tensor | None, ...]:
        """Per dimension of a parameter: its entries group by group, [s, entries / s].

        None for a dimension that is not cut.
        """
        rows: list[Tensor | None] = []
        for tie in self.model.ties[name]:
            if tie is None or tie.axis not in self.model.cuttable:
                rows.append(None)
                continue
            total = self.model.units(tie.axis)
            groups = [as_index(self.units(tie.axis, group, 1)) for group in range(self.s)]
            rows.append(torch.stack([index_tensor(tie.expand(g, total)) for g in groups]))
        return tuple(rows)


def grid_of(ratios: tuple[float, ...], model: Model) -> Grid:
    """The grid of the smallest ratio.

    Raises:
        ConfigError: the smallest ratio is not 1/s, another is no multiple of it, or an axis does
            not divide into s groups.
    """
    check_ratios(ratios)
    s = round(1.0 / min(ratios))
    if abs(s * min(ratios) - 1.0) > 1e-6:
        raise ConfigError(
            f"FedBRB: the smallest ratio must be 1 over a whole number (1/2, 1/4, 1/8, ...), so "
            f"that blocks tile the model; got {min(ratios)}; the nearest is {1 / s:g}"
        )
    for ratio in ratios:
        if abs(ratio * s - round(ratio * s)) > 1e-6:
            raise ConfigError(
                f"FedBRB: ratio {ratio} is not a multiple of the smallest, 1/{s}; choose among "
                f"{', '.join(f'{k}/{s}' for k in range(1, s + 1))}"
            )
    for axis in model.cuttable:
        units = model.units(axis)
        if units % s:
            allowed = [f"1/{d}" for d in range(1, units + 1) if units % d == 0]
            raise ConfigError(
                f"FedBRB: axis {axis!r} has {units} units, which do not divide into {s} groups; "
                f"choose a smallest ratio among {', '.join(allowed)}, or another width"
            )
    return Grid(model=model, s=s)


def refuse_holders(ratios: tuple[float, ...], model: Model) -> None:
    """Strict small-to-large: raise CapacityError if a client class would hold the whole model."""
    for ratio in ratios:
        held = prefix(model, ratio).num_entries
        if held >= model.num_entries:
            raise CapacityError(
                f"FedBRB: clients of ratio {ratio} would hold {held:,} of the model's "
                f"{model.num_entries:,} parameters; in the small-to-large setting every client is "
                f"smaller than the model. Lower the ratio, widen the model, or set "
                f"method.strict false (--method.no-strict)"
            )


def lattice_slopes(model: Model) -> dict[str, tuple[int, int]]:
    """(a, b) per axis such that axes that meet in a parameter sweep all pairs of groups.

    Groups a u + b v and c u + d v take all s^2 pairs over (u, v) when a d - b c is a unit modulo s.
    Any two of (1, 0), (1, 1), (0, 1) do, for every s; so axes that meet get different ones.

    Raises:
        ConfigError: an axis meets itself, or four axes meet each other; some blocks would never
            be trained.
    """
    meets: dict[str, set[str]] = {axis: set() for axis in model.cuttable}
    for name, ties in model.ties.items():
        axes = [tie.axis for tie in ties if tie is not None and tie.axis in meets]
        for one, other in itertools.permutations(axes, 2):
            if one == other:
                raise ConfigError(
                    f"FedBRB: axis {one!r} is two dimensions of {name!r}, so the lattice would "
                    f"only train its diagonal blocks; give the layers sizes of their own, or set "
                    f"method.rolling independent"
                )
            meets[one].add(other)
    slopes = _coloured(list(meets), meets, {})
    if slopes is None:
        raise ConfigError(
            f"FedBRB: more than three of the axes {', '.join(meets)} meet each other in "
            f"parameters; the lattice cannot sweep all their pairs. Set method.rolling independent"
        )
    return slopes


def _coloured(
    rest: list[str], meets: Mapping[str, set[str]], slopes: dict[str, tuple[int, int]]
) -> dict[str, tuple[int, int]] | None:
    """A colouring of the graph with the three slopes, by backtracking; None if there is none."""
    if not rest:
        return slopes
    taken = {slopes[other] for other in meets[rest[0]] if other in slopes}
    for slope in _SLOPES:
        if slope not in taken:
            found = _coloured(rest[1:], meets, {**slopes, rest[0]: slope})
            if found is not None:
                return found
    return None


def glued_views(
    model: Model,
    state: State,
    client: Client,
    training: Training,
    grid: Grid,
    turn: tuple[int, int],
    rho: int,
) -> Task:
    """Variant I: block (p, q) of every layer, even where one q is not the next p."""
    whole = model.slice({axis: grid.units(axis, 0, rho) for axis in model.cuttable})
    views = {}
    for small, view in whole.views.items():
        groups = itertools.cycle(turn)
        index: list[Index] = []
        for tie, plain in zip(model.ties[view.name], view.index, strict=True):
            if tie is None or tie.axis not in model.cuttable:
                index.append(plain)
            else:
                units = as_index(grid.units(tie.axis, next(groups), rho))
                index.append(tie.expand(units, model.units(tie.axis)))
        views[small] = View(view.name, tuple(index))
    submodel = SubModel(whole.sizes, views)
    return Task(
        round=state.round,
        client=client,
        submodel=submodel,
        params=cut(state.params, submodel),
        training=training,
    )


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
    """One parameter after in-place averaging and weighted broadcast.

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
