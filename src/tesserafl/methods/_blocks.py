"""FedBRB's block grid: which units are a group, which entries a block, which block has its turn."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from tesserafl.core.errors import CapacityError, ConfigError
from tesserafl.core.fit import Training
from tesserafl.core.messages import Client, Task
from tesserafl.core.method import State
from tesserafl.core.model import Model
from tesserafl.core.submodel import Index, SubModel, View, as_index, cut, index_tensor
from tesserafl.methods._width import check_ratios, prefix

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
