"""The permutation test: which entries of an axis make a unit, and how they lie.

Permuting an axis's units in every dimension that is tied to it must leave the output unchanged.
The test runs in double precision on an instance that is tiny in every other axis, and takes the
smallest unit and the plainest layout that pass both tiny and at the axis's own width.
"""

from __future__ import annotations

import bisect
import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from fractions import Fraction
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from tesserafl.core import seeds
from tesserafl.core.axis import Depth, Tie
from tesserafl.core.errors import ModelError
from tesserafl.core.model import Build, Output, Sizes
from tesserafl.core.modules import parameters_of
from tesserafl.core.params import Params
from tesserafl.core.submodel import index_tensor

Place = tuple[str, int]
"""(parameter, dimension)."""
Layout = dict[Place, tuple[int, ...]]
"""Entries of one unit in each part of a dimension, as in `Tie`."""

TINY_UNITS = 3
"""Units of an axis under test; odd, so that a fixed number of groups does not fit by luck."""
_TINY_SIZE = 8
_TOLERANCE = 1e-5
"""Relative. The right layout is off by 1e-12 (1e-7 where a family computes in float32 inside),
a wrong one by 0.01 and more."""
_MAX_LAYOUTS = 256
_MAX_ENTRIES = 2_000_000
"""Entries of an instance on which an axis is tested at its own width."""


class Instance(NamedTuple):
    """A module with noise in its parameters, and what it answers."""

    module: nn.Module
    params: Params
    inputs: Tensor
    expected: Output


class PermutationTest:
    """Of one model; remembers the sizes at which it is tiny."""

    def __init__(
        self,
        build: Build,
        sizes: Sizes,
        depths: Mapping[str, Depth],
        example: Callable[[], Tensor],
        outputs: Sequence[str],
        quanta: Mapping[str, int],
    ) -> None:
        self.build, self.sizes, self.example = build, dict(sizes), example
        self.depths, self.quanta = depths, quanta
        self.tiny = dict(sizes)
        self._shrink_depths()
        self._shrink_widths(outputs)

    def settle(self, axis: str, found: Mapping[Place, Fraction]) -> tuple[int, Layout]:
        """(entries per unit, layout) of the first hypothesis that passes.

        Raises:
            ModelError: none does.
        """
        size, given = self.sizes[axis], self.quanta.get(axis)
        step = math.lcm(*(slope.denominator for slope in found.values()))
        if given and (size % given or given % step):
            raise ModelError(
                f"axis {axis!r}: a unit of {given} entries was given; it must divide the size "
                f"{size} and be a multiple of {step}"
            )
        candidates = [given] if given else [q for q in divisors(size) if q % step == 0]
        tried: list[str] = []
        for q in candidates:
            instance = self._instance({**self.tiny, axis: TINY_UNITS * q})
            if isinstance(instance, Exception):
                tried.append(f"{q} (cannot be built: {_first_line(instance)})")
                continue
            entries = {place: int(slope * q) for place, slope in found.items()}
            for layout in itertools.islice(_layouts(entries), _MAX_LAYOUTS):
                if passes(instance, layout, TINY_UNITS) and all(
                    self._passes_at(axis, layout, q, units)
                    for units in (self._few(axis, q), self._wide(axis, q))
                ):
                    return q, layout
            tried.append(str(q))
        raise ModelError(
            f"axis {axis!r} (size {size}) cannot be cut: permuting its units changes the model's "
            f"output. Units tried: {'; '.join(tried) or 'none'}. Common causes: a normalisation "
            f"with a fixed number of groups (make the groups' size fixed), a size that is not a "
            f"number of channels. Mend the build, give the unit through "
            f"quanta={{{axis!r}: entries}}, or leave the axis out of the sizes"
        )

    def smallest(self) -> Instance:
        """The instance that is tiny in every axis; the constructor has built it before."""
        instance = self._instance(self.tiny)
        assert not isinstance(instance, Exception), instance
        return instance

    def tiny_instance(self, axis: str, quantum: int) -> Instance:
        """An instance with few units of this axis; `settle` has built it before."""
        return self.instance(axis, quantum, TINY_UNITS)

    def instance(self, axis: str, quantum: int, units: int) -> Instance:
        """An instance with this many units of the axis, one of those that `settle` has built."""
        instance = self._instance({**self.tiny, axis: units * quantum})
        assert not isinstance(instance, Exception), instance
        return instance

    def num_units(self, axis: str, quantum: int) -> tuple[int, int, int]:
        """Numbers of units at which an axis is tested: tiny, another few, up to its own width."""
        return TINY_UNITS, self._few(axis, quantum), self._wide(axis, quantum)

    def _passes_at(self, axis: str, layout: Layout, q: int, units: int) -> bool:
        instance = self._instance({**self.tiny, axis: units * q})
        return not isinstance(instance, Exception) and passes(instance, layout, units)

    def _few(self, axis: str, q: int) -> int:
        # Where 2 units happen to meet another tiny width, a shortcut may vanish: take more.
        names = (self._shapes(self.tiny) or {}).keys()
        for units in (2, 4, 5):
            shapes = self._shapes({**self.tiny, axis: units * q})
            if shapes is None or shapes.keys() == names:
                return units
        return 2

    def _wide(self, axis: str, q: int) -> int:
        # A norm with a fixed number of groups may look ungrouped when tiny: look at width too.
        units = self.sizes[axis] // q
        while units > 2 * TINY_UNITS and self._entries({**self.tiny, axis: units * q}) > (
            _MAX_ENTRIES
        ):
            units //= 2
        return units

    def _shrink_depths(self) -> None:
        wanted = {self.role(name) for name in self._shapes(self.sizes) or ()}
        for axis, depth in self.depths.items():
            for blocks in range(min(2, depth.blocks), depth.blocks + 1):
                shapes = self._shapes({**self.tiny, axis: blocks}) or {}
                if {self.role(name) for name in shapes} == wanted:
                    self.tiny[axis] = blocks
                    break

    def _shrink_widths(self, outputs: Sequence[str]) -> None:
        names = (self._shapes(self.tiny) or {}).keys()
        widths = [axis for axis in self.sizes if axis not in self.depths]
        for axis in widths:
            size, q = self.sizes[axis], self.quanta.get(axis)
            sizes = [_TINY_SIZE << shift for shift in range(size.bit_length())]
            if axis not in outputs:
                whole = [d for d in divisors(size) if d >= _TINY_SIZE]
                small = bisect.bisect(whole, 8 * _TINY_SIZE)  # a prime has none: take others
                sizes = [TINY_UNITS * q] if q else [*whole[:small], *sizes[:4], *whole[small:]]
            for small in (s for s in sizes if s < size):
                # The same parameters: a shortcut where two widths differ must not vanish.
                shapes = self._shapes({**self.tiny, axis: small})
                if shapes is not None and shapes.keys() == names:
                    self.tiny[axis] = small
                    break
        for restored in ((), outputs, widths):
            self.tiny |= {axis: self.sizes[axis] for axis in restored}
            instance = self._instance(self.tiny)
            if not isinstance(instance, Exception):
                return
        raise ModelError(
            f"the model does not run on the example (sizes {self.tiny}): {instance}; the example "
            f"must be a batch as the module's forward takes it, and its output finite"
        )

    def role(self, name: str) -> str:
        """The name with `*` for the numbers that count blocks of a depth."""
        for depth in self.depths.values():
            if place := depth.locate(name):
                name = f"{place[0]}*.{place[2]}"
        return name

    def _shapes(self, sizes: Sizes) -> dict[str, torch.Size] | None:
        try:
            with torch.device("meta"):
                return {n: p.shape for n, p in self.build(dict(sizes)).named_parameters()}
        except Exception:
            return None  # sizes that the family itself refuses

    def _entries(self, sizes: Sizes) -> int:
        return sum(shape.numel() for shape in (self._shapes(sizes) or {}).values())

    def _instance(self, sizes: Sizes) -> Instance | Exception:
        try:
            with seeds.seeded(0, "probe"):
                module = self.build(dict(sizes)).double().eval()
                # Zero biases and unit gains are alike for every unit: noise tells them apart.
                params = {
                    n: p + 0.1 * torch.randn_like(p) for n, p in parameters_of(module).items()
                }
                inputs = self.example()
                inputs = inputs.double() if inputs.is_floating_point() else inputs
            expected = answer(module, params, inputs)
            if not bool(expected.logits.isfinite().all()):
                return ModelError("the output is not finite")
            return Instance(module, params, inputs, expected)
        except Exception as error:  # whatever a family raises at sizes that it refuses
            return error


def divisors(number: int) -> list[int]:
    """All divisors, ascending."""
    return [d for d in range(1, number + 1) if number % d == 0]


def answer(module: nn.Module, params: Params, inputs: Tensor) -> Output:
    """What the module answers with these parameters."""
    with torch.no_grad():
        out = functional_call(module, params, (inputs,))
    return out if isinstance(out, Output) else Output(out, None)


def passes(instance: Instance, layout: Layout, num_units: int) -> bool:
    """Whether permuting the units in every dimension of the layout leaves the output unchanged."""
    out = permuted(instance, layout, num_units)
    return out is not None and alike(out.logits, instance.expected.logits)


def permuted(instance: Instance, layout: Layout, num_units: int) -> Output | None:
    """The answer with the units permuted; None where a dimension does not hold them."""
    moved = dict(instance.params)
    for (name, dim), parts in layout.items():
        if name in moved:  # blocks beyond the instance's depth repeat these
            entries = entries_in_order(parts, num_units)
            if entries.numel() != moved[name].shape[dim]:
                return None
            moved[name] = moved[name].index_select(dim, entries)
    return answer(instance.module, moved, instance.inputs)


def entries_in_order(parts: tuple[int, ...], num_units: int) -> Tensor:
    """Entries of a dimension once its units are permuted."""
    # Every unit moves where there are few; where there are many, most do.
    order = torch.arange(num_units).roll(1)
    if num_units > TINY_UNITS:
        order = torch.randperm(num_units, generator=seeds.generator(0, "probe", "order"))
    return index_tensor(Tie("", parts).expand(order, num_units))


def alike(found: Tensor, expected: Tensor) -> bool:
    """Whether two answers are equal but for rounding."""
    return float((found - expected).abs().max()) <= _TOLERANCE * float(expected.abs().max())


def _layouts(entries: Mapping[Place, int]) -> Iterator[Layout]:
    """Hypotheses, plainest first: units in one run everywhere, then stacks in some roles.

    A role is a module's name without numbers: repeated modules share one layout.
    """
    least = min(entries.values())
    roles = {
        (_module_role(name), count): splits_of(count, least) for (name, _), count in entries.items()
    }
    picks = itertools.product(*(range(len(splits)) for splits in roles.values()))
    for pick in sorted(
        itertools.islice(picks, 4 * _MAX_LAYOUTS), key=lambda pick: sum(p > 0 for p in pick)
    ):
        chosen = {role: roles[role][p] for role, p in zip(roles, pick, strict=True)}
        yield {
            (name, dim): chosen[_module_role(name), count] for (name, dim), count in entries.items()
        }


def splits_of(count: int, least: int) -> list[tuple[int, ...]]:
    """Ways to lay out `count` entries of a unit: one run, equal stacks, one long and two short."""
    if count % least:
        return [(count,)]
    times = count // least
    splits = [(count // stacks,) * stacks for stacks in divisors(times)]
    if times > 3:
        splits.append(((times - 2) * least, least, least))  # grouped queries, keys, values
    return splits


def _module_role(name: str) -> str:
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", name).rpartition(".")[0]


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:120]
