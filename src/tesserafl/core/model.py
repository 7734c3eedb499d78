"""A model as every method sees it: axes that can be cut, blocks that can be left out, no names.

Model = build(sizes) -> nn.Module, plus what `axes.probe` found:
  widths   axis -> how many units, how many entries of its size one unit is
  depths   axis -> how many blocks, and the name prefixes that count them
  ties     parameter -> per dimension, the axis it grows with and the layout of its units
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tesserafl.core import seeds
from tesserafl.core.axis import Depth, LowRank, Tie, Width, structures_of
from tesserafl.core.errors import ModelError, did_you_mean
from tesserafl.core.modules import parameters_of
from tesserafl.core.params import Params
from tesserafl.core.submodel import (
    Index,
    SubModel,
    Units,
    View,
    as_index,
    cut,
    index_length,
    index_tensor,
    whole,
)

Sizes = Mapping[str, int]
_MOST_SLICES = 64
CLASSES = "classes"
"""The axis of a classifier's outputs, in every family."""
Build = Callable[[Sizes], nn.Module]


class Output(NamedTuple):
    """What a model's module returns; a module may also return the logits alone."""

    logits: Tensor
    """[batch, classes], or [batch, time, vocabulary] for language models."""
    features: Tensor | None
    """[batch, features]: the representation in front of the head, pooled over time or space. Of an
    adapted language model [batch, time, features]: of every place, from it and those before it."""
    exits: Tensor | None = None
    """[exits, batch, classes]: what classifiers inside the model answer, from input to output, the
    last one's answer included; None: it has none."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Model:
    """Made by `axes.probe`; everything derived is a field, so it is found once."""

    build: Build
    sizes: Sizes
    widths: Mapping[str, Width]
    depths: Mapping[str, Depth]
    ties: Mapping[str, tuple[Tie | None, ...]]
    shapes: Mapping[str, tuple[int, ...]]
    low_rank: tuple[LowRank, ...] = ()
    """Of an adapted model: pairs of parameters whose product changes a frozen weight."""
    features: Tie | None = None
    """Layout of `Output.features` along the one axis that moves them; None: no such axis."""
    feature_size: Callable[[], int] | None = field(default=None, repr=False)
    """Of an adapted model: counts the entries of `Output.features`, which no axis changes."""
    frozen_blocks: tuple[str, ...] = ()
    """Of a frozen model under adapters: what the names of its blocks begin with, tower by tower, in
    front of their number. What enters a block is the same as long as nothing below is trained."""
    pretrained: Callable[[], Params] | None = field(default=None, repr=False)
    """Loads the parameters to start from; None: the module's own initialisation."""
    save: Callable[[nn.Module, str], None] | None = field(default=None, repr=False)
    """Writes a trained module to a folder in its family's own format; None: safetensors + sizes."""

    _slices: dict[object, SubModel] = field(default_factory=dict, init=False, repr=False)
    """The newest results of `slice`: their indices and layouts are found once."""
    _models: dict[SubModel, Model] = field(default_factory=dict, init=False, repr=False)
    """The newest result of `resized`."""

    @property
    def num_entries(self) -> int:
        """Parameters of the whole model."""
        return self.whole().num_entries

    def module(self, sizes: Sizes | None = None, *, device: str = "cpu") -> nn.Module:
        """A fresh module at these sizes (this model's own by default)."""
        with torch.device(device):
            return self.build(dict(sizes or self.sizes))

    def init(self, seed: int) -> Params:
        """Initial parameters: pre-trained ones, or the module's own draw from `seed`."""
        with seeds.seeded(seed, "init"):  # a pre-trained trunk may come with a new head
            return parameters_of(self.module()) if self.pretrained is None else self.pretrained()

    def whole(self) -> SubModel:
        """The sub-model that leaves nothing out."""
        return self._whole

    @cached_property
    def _whole(self) -> SubModel:
        return whole(self.sizes, self.shapes)

    def adapted(self, blocks: int) -> frozenset[str]:
        """The parameters outside of adapted blocks, and those in so many blocks of every tower.

        Blocks are counted from the output.

        Raises:
            ModelError: the model has no adapted blocks.
        """
        axes = [depth for depth in self.depths.values() if depth.last is not None]
        if not axes:
            raise ModelError(
                "the model has no adapters in numbered blocks; choose --model lora with targets in "
                "the blocks of a transformer"
            )
        return frozenset(
            name
            for name in self.shapes
            if all(not (place := axis.locate(name)) or place[1] < blocks for axis in axes)
        )

    def units(self, axis: str) -> int:
        """Units of a width axis, or blocks of a depth axis."""
        if axis in self.widths:
            return self.widths[axis].units
        if axis in self.depths:
            return self.depths[axis].blocks
        raise ModelError(
            f"the model has no axis {axis!r}; {did_you_mean(axis, [*self.widths, *self.depths])}"
        )

    @property
    def cuttable(self) -> tuple[str, ...]:
        """Width axes that a method may cut, in the model's order from input to output."""
        return tuple(axis for axis, width in self.widths.items() if width.cuttable)

    def slice(self, keep: Mapping[str, Units]) -> SubModel:
        """The sub-model that keeps these units (or blocks) of these axes, all of the others.

        The same object for the same units, as long as few others were asked for in between.
        Where only some of the axes that share a size are given, the others keep the same units as
        the first of them.

        Raises:
            ModelError: an unknown axis, a unit outside the axis, unequal numbers of units on axes
                that share a size, or blocks that are not interchangeable.
        """
        key = tuple((axis, _key(units)) for axis, units in keep.items())
        if key not in self._slices:
            while len(self._slices) >= _MOST_SLICES:
                self._slices.pop(next(iter(self._slices)))
            self._slices[key] = self._slice(keep)
        return self._slices[key]

    def _slice(self, keep: Mapping[str, Units]) -> SubModel:
        kept = {axis: self._checked(axis, units) for axis, units in keep.items()}
        widths = self._with_sharers(kept)
        sizes = dict(self.sizes)
        for axis, index in widths.items():
            sizes[self.widths[axis].size] = index_length(index) * self.widths[axis].quantum
        sizes |= {axis: index_length(kept[axis]) for axis in self.depths if axis in kept}
        views = {}
        for name, source in self._names(kept).items():
            dims: list[Index] = []
            for tie, size in zip(self.ties[source], self.shapes[source], strict=True):
                if tie is not None and tie.axis in widths:
                    dims.append(tie.expand(widths[tie.axis], self.widths[tie.axis].units))
                else:
                    dims.append(slice(0, size))
            views[name] = View(source, tuple(dims))
        return SubModel(sizes, views)

    def resized(self, submodel: SubModel) -> Model:
        """The sub-model as a model in its own right, with axes of its own.

        Pre-trained parameters are cut with it; otherwise it initialises itself at its own sizes.
        """
        if submodel not in self._models:
            self._models.clear()  # one is asked for again and again
            self._models[submodel] = self._resize(submodel)
        return self._models[submodel]

    def _resize(self, submodel: SubModel) -> Model:
        sizes = dict(submodel.sizes)
        load = self.pretrained
        return replace(
            self,
            sizes=sizes,
            widths={
                axis: replace(width, units=sizes[width.size] // width.quantum)
                for axis, width in self.widths.items()
            },
            depths={
                axis: replace(depth, blocks=sizes[axis]) for axis, depth in self.depths.items()
            },
            ties={name: self.ties[view.name] for name, view in submodel.views.items()},
            shapes={name: view.shape for name, view in submodel.views.items()},
            low_rank=tuple(pair for pair in self.low_rank if pair.down in submodel.views),
            pretrained=None if load is None else lambda: cut(load(), submodel),
        )

    def _checked(self, axis: str, units: Units) -> Index:
        index, total = as_index(units), self.units(axis)
        entries = index_tensor(index)
        if int(entries.min()) < 0 or int(entries.max()) >= total:
            raise ModelError(
                f"axis {axis!r} has units 0 to {total - 1}; asked were {int(entries.min())} to "
                f"{int(entries.max())}"
            )
        if len(set(entries.tolist())) != entries.numel():
            raise ModelError(f"axis {axis!r}: a unit is kept twice; keep each at most once")
        return index

    def _with_sharers(self, kept: Mapping[str, Index]) -> dict[str, Index]:
        """Kept units of every width axis that shares a size with one of `kept`."""
        leaders: dict[str, str] = {}
        for axis in kept:
            if axis in self.widths:
                leader = leaders.setdefault(self.widths[axis].size, axis)
                asked, first = index_length(kept[axis]), index_length(kept[leader])
                if asked != first:
                    raise ModelError(
                        f"axes {leader!r} and {axis!r} share the size {self.widths[axis].size!r} "
                        f"and must keep equally many units; asked were {first} and {asked}"
                    )
        return {
            axis: kept.get(axis, kept[leaders[width.size]])
            for axis, width in self.widths.items()
            if width.size in leaders
        }

    def _names(self, kept: Mapping[str, Index]) -> dict[str, str]:
        """Small parameter -> large parameter, where blocks may be left out."""
        names = {name: name for name in self.shapes}
        for axis, depth in self.depths.items():
            if axis not in kept:
                continue
            blocks = index_tensor(kept[axis]).tolist()
            if depth.last is not None:
                names = _first_adapters(axis, depth, blocks, names)
                continue
            self._check_interchangeable(axis, blocks)
            renamed = {}
            for small, large in names.items():
                place = depth.locate(small)
                if place is None:
                    renamed[small] = large
                elif place[1] in blocks:
                    renamed[f"{place[0]}{blocks.index(place[1])}.{place[2]}"] = large
            names = renamed
        return names

    def movable(self, axis: str) -> tuple[int, ...]:
        """Blocks of a depth axis that may stand in each other's place, ascending.

        The others, like the first one of a stage that halves the resolution, stay where they are.
        """
        structures = structures_of(self.depths[axis], self.ties, self.shapes)
        last = structures[max(structures)]
        return tuple(sorted(block for block in structures if structures[block] == last))

    def _check_interchangeable(self, axis: str, blocks: list[int]) -> None:
        structures = structures_of(self.depths[axis], self.ties, self.shapes)
        for position, block in enumerate(blocks):
            if structures[block] != structures[position]:
                raise ModelError(
                    f"axis {axis!r}: block {block} is built differently from block {position} and "
                    f"cannot stand in its place; keep block {position} there"
                )


def _first_adapters(
    axis: str, depth: Depth, units: list[int], names: Mapping[str, str]
) -> dict[str, str]:
    if units != list(range(len(units))):
        raise ModelError(
            f"axis {axis!r}: adapters are kept next to the output, without a gap: units 0, 1, "
            f"...; asked were {units}"
        )
    places = {name: depth.locate(name) for name in names}
    return {n: large for n, large in names.items() if not (p := places[n]) or p[1] < len(units)}


def _key(units: Units) -> object:
    if isinstance(units, range | slice):
        return repr(units)
    return torch.as_tensor(units, dtype=torch.int64).cpu().numpy().tobytes()
