"""Find a model's axes by building it, so that no model code has to be written.

1. Build on the `meta` device, double one size, compare shapes: dimensions that doubled are tied to
   that axis; parameters that appeared are blocks of a depth (as mu-Parametrisation finds its
   infinite dimensions from base shapes, Yang et al., arXiv 2203.03466).
2. A dimension may hold several entries of one unit (whole heads, fused query-key-value, flattened
   maps). Its layout, and how many entries make a unit at all, are settled by the permutation test.
3. One size may count several axes that are independent of each other: they are told apart.
4. Of blocks it finds out what they add to their input, and what that is proportional to.

A size that cannot be explained this way is refused: better no training than training nonsense.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction

import torch
from torch import Tensor, nn

from tesserafl.core.axis import Depth, Tie, Width
from tesserafl.core.errors import ModelError
from tesserafl.core.groups import feature_layout, independent_groups
from tesserafl.core.model import Build, Model, Sizes
from tesserafl.core.params import Params
from tesserafl.core.permute import Layout, PermutationTest, Place
from tesserafl.core.residual import with_outputs

Shapes = dict[str, tuple[int, ...]]


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
        ModelError: a size that changes nothing, cannot be enlarged, changes a dimension in another
            way than in proportion, shares a dimension with another axis, or fails the test.
    """
    empty = {axis: size for axis, size in sizes.items() if size < 1}
    if empty:
        raise ModelError(f"sizes are at least 1; got {empty}")
    shapes = _shapes(build, sizes, "as given")
    depths: dict[str, Depth] = {}
    slopes: dict[str, dict[Place, Fraction]] = {}
    for axis in sizes:
        factor, grown = _grow(build, sizes, axis, shapes)
        if grown.keys() != shapes.keys():
            depths[axis] = depth_of(axis, sizes[axis], shapes, grown)
        else:
            slopes[axis] = _slopes(axis, sizes[axis], factor, shapes, grown)
    _refuse_shared(slopes)
    test = PermutationTest(build, sizes, depths, example, outputs, quanta or {})
    widths: dict[str, Width] = {}
    ties: dict[str, list[Tie | None]] = {name: [None] * len(s) for name, s in shapes.items()}
    layout: Layout
    for size, found in slopes.items():
        if size in outputs:
            # Permuting classes permutes the output, so nothing can be tested: one entry a class.
            quantum, layout = 1, {place: (1,) for place, slope in found.items() if slope == 1}
            groups = {size: layout}
        else:
            quantum, layout = test.settle(size, found)
            groups = independent_groups(test, size, quantum, layout)
        for axis, layout in groups.items():
            widths[axis] = Width(sizes[size] // quantum, quantum, size, size not in outputs)
            for (name, dim), parts in layout.items():
                ties[name][dim] = Tie(axis, parts)
    return Model(
        build=build,
        sizes=dict(sizes),
        widths=widths,
        depths=with_outputs(test, depths),
        ties={name: tuple(dims) for name, dims in ties.items()},
        shapes=shapes,
        features=feature_layout(test, widths, ties),
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


def _grow(build: Build, sizes: Sizes, axis: str, shapes: Shapes) -> tuple[int, Shapes]:
    """(factor, shapes with this size that much larger)."""
    grown = {}
    for factor in (2, 3):  # a shortcut may come or go where one enlarged width meets another
        size = factor * sizes[axis]
        grown[factor] = _shapes(build, {**sizes, axis: size}, f"with {axis!r} enlarged to {size}")
        if grown[factor].keys() == shapes.keys():
            return factor, grown[factor]
    return 2, grown[2]


def _slopes(
    axis: str, size: int, factor: int, shapes: Shapes, grown: Shapes
) -> dict[Place, Fraction]:
    """Entries per entry of the size, for dimensions that grew as it did."""
    found: dict[Place, Fraction] = {}
    for name, shape in shapes.items():
        for dim, (before, after) in enumerate(zip(shape, grown[name], strict=True)):
            if after == factor * before:
                found[name, dim] = Fraction(before, size)
            elif after != before:
                raise ModelError(
                    f"axis {axis!r}: dimension {dim} of {name!r} went from {before} to {after} "
                    f"when the size was multiplied by {factor}; only dimensions in proportion to "
                    f"an axis can be cut"
                )
    if not found:
        raise ModelError(f"size {axis!r} changes no parameter; leave it out of the sizes")
    return found


def depth_of(axis: str, size: int, shapes: Shapes, doubled: Shapes) -> Depth:
    """The blocks that are counted by a size, from the parameters at this size and at twice that.

    Raises:
        ModelError: another parameter changes too, or the names do not count the blocks.
    """
    changed = [name for name in shapes if doubled.get(name) != shapes[name]]
    if changed:
        raise ModelError(
            f"axis {axis!r} changes both which parameters there are and {changed[0]!r}; give depth "
            f"and width sizes of their own"
        )
    added = sorted(doubled.keys() - shapes.keys())
    counted: dict[str, set[int]] = {}  # prefix -> the numbers that follow it
    places = {name: [match for match in re.finditer(r"(?<![^.])\d+(?=\.)", name)] for name in added}
    for name, numbers in places.items():
        for number in numbers:
            counted.setdefault(name[: number.start()], set()).add(int(number.group()))
    blocks = set(range(size, 2 * size))
    prefixes = set()
    for name, numbers in places.items():
        found = [p for number in numbers if counted[p := name[: number.start()]] == blocks]
        if not found:
            raise ModelError(
                f"axis {axis!r} adds {name!r}, whose name does not count the blocks {size} to "
                f"{2 * size - 1}; build repeated blocks as an nn.ModuleList or nn.Sequential"
            )
        prefixes.add(found[0])
    return Depth(size, tuple(sorted(prefixes)))


def _refuse_shared(slopes: Mapping[str, Mapping[Place, Fraction]]) -> None:
    owner: dict[Place, str] = {}
    for axis, found in slopes.items():
        for place in found:
            if place in owner:
                raise ModelError(
                    f"dimension {place[1]} of {place[0]!r} grows with both {owner[place]!r} and "
                    f"{axis!r}; keep one of the two out of the sizes"
                )
            owner[place] = axis
