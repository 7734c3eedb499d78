"""Find a model's axes by building it, so that no model code has to be written.

1. Build on the `meta` device, double one size, compare shapes: dimensions that doubled are tied to
   that axis; parameters that appeared are blocks of a depth (as mu-Parametrisation finds its
   infinite dimensions from base shapes, Yang et al., arXiv 2203.03466).
2. A dimension may hold several entries of one unit (whole heads, fused query-key-value, flattened
   maps). Its layout, and how many entries make a unit at all, are settled by a permutation test on
   a tiny instance: permuting an axis's units in every tied dimension must not change the output.

A size that cannot be explained this way is refused: better no training than training nonsense.
"""

from __future__ import annotations

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
from tesserafl.core.errors import ModelError
from tesserafl.core.model import Build, Depth, Model, Output, Sizes, Tie, Width, parameters_of
from tesserafl.core.params import Params
from tesserafl.core.submodel import index_tensor

Shapes = dict[str, tuple[int, ...]]

_TINY_UNITS = 4
_TINY_BLOCKS = 2
_TOLERANCE = 1e-6
"""Relative, in double precision. The right layout is off by 1e-12, a wrong one by 0.1 and more."""
_MAX_LAYOUTS = 256
_FULL_SIZE_LIMIT = 8_000_000
"""Entries up to which the test is repeated at the model's own widths."""


def probe(
    build: Build,
    sizes: Sizes,
    example: Callable[[], Tensor],
    *,
    outputs: Sequence[str] = (),
    quanta: Mapping[str, int] | None = None,
    pretrained: Callable[[], Params] | None = None,
    save: Callable[[nn.Module, str], None] | None = None,
) -> Model:
    """Find the axes of `build(sizes)`.

    Args:
        build: makes the module from sizes; must accept other sizes than these.
        sizes: every size that may become an axis, for instance `{"hidden": 256, "layers": 4}`.
        example: an input batch [2 or more, ...] for the permutation test.
        outputs: axes such as the classes whose rows are to be known but never cut.
        quanta: axis -> entries of its size that make one unit, where known (a head's size);
            otherwise the smallest number that passes the permutation test.
        pretrained: loads parameters to start from.
        save: writes a trained module in its family's own format.

    Raises:
        ModelError: a size that changes nothing, cannot be doubled, changes a dimension in another
            way than in proportion, shares a dimension with another axis, or fails the test.
    """
    quanta = quanta or {}
    shapes = _shapes(build, sizes, "as given")
    depths: dict[str, Depth] = {}
    slopes: dict[str, dict[tuple[str, int], Fraction]] = {}
    for axis, size in sizes.items():
        doubled = _shapes(build, {**sizes, axis: 2 * size}, f"with {axis!r} doubled to {2 * size}")
        if doubled.keys() != shapes.keys():
            depths[axis] = _depth(axis, size, shapes, doubled)
        else:
            slopes[axis] = _slopes(axis, size, shapes, doubled)
    _refuse_shared(slopes)
    test = _PermutationTest(build, sizes, depths, example)
    widths: dict[str, Width] = {}
    ties: dict[str, list[Tie | None]] = {name: [None] * len(s) for name, s in shapes.items()}
    for axis, found in slopes.items():
        quantum, parts = (
            _output_layout(found) if axis in outputs else test.settle(axis, found, quanta.get(axis))
        )
        widths[axis] = Width(sizes[axis] // quantum, quantum, cuttable=axis not in outputs)
        for (name, dim), layout in parts.items():
            ties[name][dim] = Tie(axis, layout)
    return Model(
        build=build,
        sizes=dict(sizes),
        widths=widths,
        depths=depths,
        ties={name: tuple(dims) for name, dims in ties.items()},
        shapes=shapes,
        pretrained=pretrained,
        save=save,
    )


def _shapes(build: Build, sizes: Sizes, how: str) -> Shapes:
    try:
        with torch.device("meta"):
            module = build(dict(sizes))
    except Exception as error:
        raise ModelError(
            f"the model cannot be built {how} (sizes {dict(sizes)}): {error}"
        ) from error
    return {name: tuple(value.shape) for name, value in module.named_parameters()}


def _slopes(
    axis: str, size: int, shapes: Shapes, doubled: Shapes
) -> dict[tuple[str, int], Fraction]:
    """(parameter, dimension) -> entries per entry of the size, for dimensions that doubled."""
    found: dict[tuple[str, int], Fraction] = {}
    for name, shape in shapes.items():
        for dim, (before, after) in enumerate(zip(shape, doubled[name], strict=True)):
            if after == 2 * before:
                found[name, dim] = Fraction(before, size)
            elif after != before:
                raise ModelError(
                    f"axis {axis!r}: dimension {dim} of {name!r} went from {before} to {after} when "
                    f"the size doubled; only dimensions in proportion to an axis can be cut"
                )
    if not found:
        raise ModelError(f"size {axis!r} changes no parameter; leave it out of the sizes")
    return found


def _depth(axis: str, size: int, shapes: Shapes, doubled: Shapes) -> Depth:
    grown = [name for name in shapes if name in doubled and doubled[name] != shapes[name]]
    if grown or not shapes.keys() < doubled.keys():
        raise ModelError(
            f"axis {axis!r} changes both which parameters there are and the shape of others "
            f"({(grown or sorted(shapes.keys() - doubled.keys()))[0]!r}); give depth and width "
            f"sizes of their own"
        )
    prefixes = set()
    for name in doubled.keys() - shapes.keys():
        numbers = [match for match in re.finditer(r"(?<=\.)\d+(?=\.)", f".{name}")]
        place = next((m for m in numbers if size <= int(m.group()) < 2 * size), None)
        if place is None:
            raise ModelError(
                f"axis {axis!r} adds {name!r}, whose name does not count the blocks {size} to "
                f"{2 * size - 1}; build repeated blocks as an nn.ModuleList or nn.Sequential"
            )
        prefixes.add(f".{name}"[1 : place.start()])
    return Depth(size, tuple(sorted(prefixes)))


def _refuse_shared(slopes: Mapping[str, Mapping[tuple[str, int], Fraction]]) -> None:
    owner: dict[tuple[str, int], str] = {}
    for axis, found in slopes.items():
        for place in found:
            if place in owner:
                raise ModelError(
                    f"dimension {place[1]} of {place[0]!r} grows with both {owner[place]!r} and "
                    f"{axis!r}; keep one of the two out of the sizes"
                )
            owner[place] = axis


def _output_layout(
    found: Mapping[tuple[str, int], Fraction],
) -> tuple[int, dict[tuple[str, int], tuple[int, ...]]]:
    # Permuting classes permutes the output, so there is nothing to test: one entry a class.
    return 1, {place: (int(slope),) for place, slope in found.items() if slope == 1}


class _Instance(NamedTuple):
    module: nn.Module
    params: Params
    inputs: Tensor
    expected: Tensor


class _PermutationTest:
    """Settles units and layouts on instances with few units and few blocks."""

    def __init__(
        self,
        build: Build,
        sizes: Sizes,
        depths: Mapping[str, Depth],
        example: Callable[[], Tensor],
    ) -> None:
        self.build, self.sizes, self.example = build, dict(sizes), example
        for axis, depth in depths.items():
            self.sizes[axis] = min(depth.blocks, _TINY_BLOCKS)

    def settle(
        self, axis: str, found: Mapping[tuple[str, int], Fraction], quantum: int | None
    ) -> tuple[int, dict[tuple[str, int], tuple[int, ...]]]:
        """(entries per unit, layout per tied dimension) of the first hypothesis that passes."""
        size = self.sizes[axis]
        step = math.lcm(*(slope.denominator for slope in found.values()))
        candidates = [quantum] if quantum else [q for q in _divisors(size) if q % step == 0]
        tried: list[str] = []
        for q in candidates:
            if size % q or (q * 2 > size and not quantum):
                continue
            entries = {place: int(slope * q) for place, slope in found.items()}
            instance = self._instance({**self.sizes, axis: _TINY_UNITS * q})
            if instance is None:
                tried.append(f"{q} (cannot be built)")
                continue
            for layout in itertools.islice(_layouts(entries), _MAX_LAYOUTS):
                if self._passes(instance, layout, _TINY_UNITS) and self._holds_at_full_size(
                    axis, layout, size // q
                ):
                    return q, layout
            tried.append(str(q))
        raise ModelError(
            f"axis {axis!r} (size {size}) cannot be cut: permuting its units changes the model's "
            f"output for every unit of {', '.join(tried) or 'no'} entries and every layout tried. "
            f"Give the unit through quanta={{{axis!r}: entries}}, or leave the axis out of the sizes"
        )

    def _instance(self, sizes: Sizes) -> _Instance | None:
        try:
            with seeds.seeded(0, "probe"):
                module = self.build(dict(sizes)).double().eval()
                # Zero biases and unit gains are alike for every unit: noise tells them apart.
                params = {n: p + 0.1 * torch.randn_like(p) for n, p in parameters_of(module).items()}
                inputs = self.example()
                inputs = inputs.double() if inputs.is_floating_point() else inputs
            return _Instance(module, params, inputs, _logits(module, params, inputs))
        except Exception:
            return None  # sizes that the family itself refuses; the caller reports them

    def _passes(
        self,
        instance: _Instance,
        layout: Mapping[tuple[str, int], tuple[int, ...]],
        num_units: int,
    ) -> bool:
        expected = instance.expected
        order = torch.randperm(num_units, generator=seeds.generator(0, "probe", "order"))
        if bool((order == torch.arange(num_units)).all()):
            order = order.roll(1)
        moved = dict(instance.params)
        for (name, dim), parts in layout.items():
            if name in moved:  # blocks beyond the instance's depth repeat these
                entries = index_tensor(Tie("", parts).expand(order, num_units))
                if entries.numel() != moved[name].shape[dim]:
                    return False
                moved[name] = moved[name].index_select(dim, entries)
        difference = float((_logits(instance.module, moved, instance.inputs) - expected).abs().max())
        return difference <= _TOLERANCE * max(float(expected.abs().max()), 1e-12)

    def _holds_at_full_size(
        self, axis: str, layout: Mapping[tuple[str, int], tuple[int, ...]], num_units: int
    ) -> bool:
        # A norm with a fixed number of groups looks ungrouped when tiny: look at the real width too.
        entries = sum(
            math.prod(shape) for shape in _shapes(self.build, self.sizes, "shallow").values()
        )
        if entries > _FULL_SIZE_LIMIT:
            return True
        instance = self._instance(self.sizes)
        return instance is not None and self._passes(instance, layout, num_units)


def _logits(module: nn.Module, params: Params, inputs: Tensor) -> Tensor:
    with torch.no_grad():
        out = functional_call(module, params, (inputs,))
    return out.logits if isinstance(out, Output) else out


def _layouts(
    entries: Mapping[tuple[str, int], int],
) -> Iterator[dict[tuple[str, int], tuple[int, ...]]]:
    """Hypotheses, plainest first: units in one run everywhere, then stacks in some roles.

    A role is a parameter's name without its block numbers: all blocks share one layout.
    """
    least = min(entries.values())
    roles: dict[tuple[str, int], list[tuple[int, ...]]] = {}
    for (name, dim), count in entries.items():
        roles.setdefault((_role(name), dim), _splits(count, least))
    choices = [range(len(splits)) for splits in roles.values()]
    for picks in sorted(
        itertools.islice(itertools.product(*choices), 4 * _MAX_LAYOUTS),
        key=lambda picks: sum(pick > 0 for pick in picks),
    ):
        chosen = {r: roles[r][pick] for r, pick in zip(roles, picks, strict=True)}
        yield {(name, dim): chosen[_role(name), dim] for name, dim in entries}


def _splits(count: int, least: int) -> list[tuple[int, ...]]:
    """Ways to lay out `count` entries of a unit: one run, equal stacks, one long and two short."""
    if count % least:
        return [(count,)]
    times = count // least
    splits = [(count // stacks,) * stacks for stacks in _divisors(times)]
    if times > 3:
        splits.append(((times - 2) * least, least, least))  # grouped queries, keys, values
    return splits


def _role(name: str) -> str:
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", name)


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]
