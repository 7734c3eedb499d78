"""Parts of one axis that may keep different units, although their sizes must be equal.

GPT-2's embedding size counts both the residual stream and the entries inside attention: permuting
the heads inside leaves the output unchanged, with the stream as it was. Cut alike, only diagonal
blocks of a weight [embed, embed] would ever be trained; so each group becomes an axis of its own.

A group is found without knowing any name. A unit changed where it is produced (a linear layer's
outputs, a gain, an embedding) changes exactly that unit where a linear layer reads it, unless
something in between mixes units: so places that see the same unit are linked. A linked set is a
group if it passes the permutation test alone; what does not pass stays with the axis itself.

The features in front of the head are the units of the one group that moves them when permuted.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call

from tesserafl.core import seeds
from tesserafl.core.axis import Tie, Width
from tesserafl.core.modules import fan_in_dims
from tesserafl.core.params import Params
from tesserafl.core.permute import (
    TINY_UNITS,
    Instance,
    Layout,
    PermutationTest,
    Place,
    alike,
    entries_in_order,
    passes,
    permuted,
    splits_of,
)
from tesserafl.core.submodel import index_tensor

_UNCHANGED = 1e-6
"""Relative to the largest value read; families that compute in float32 inside round at 1e-7."""


def independent_groups(
    test: PermutationTest, axis: str, quantum: int, layout: Layout
) -> dict[str, Layout]:
    """Name -> its part of the layout, for every group that can be permuted alone.

    The first is named like the axis and holds whatever does not pass alone; the others are named
    `axis.module` after the innermost module that holds them.
    """
    instance = test.tiny_instance(axis, quantum)
    here = {place: parts for place, parts in layout.items() if place[0] in instance.params}
    readers = _readers(instance.module, here)
    groups = _merge_alike(
        members
        for members in _linked(test, instance, here, readers)
        if len(members) < len(here) and passes(instance, {p: here[p] for p in members}, TINY_UNITS)
    )
    grouped = {place for members in groups for place in members}
    if groups and not any(place in readers for place in here.keys() - grouped):
        groups.remove(max(groups, key=len))  # what nothing reads may go along with any group
    root = _shared([name.split(".")[:-1] for name in instance.params])
    owners: dict[Place, str] = {}
    for members in groups:
        name = _unused(f"{axis}.{_container(members, root)}", owners.values())
        owners |= {(test.role(parameter), dim): name for parameter, dim in members}
    found: dict[str, Layout] = {axis: {}}
    for (parameter, dim), parts in layout.items():
        owner = owners.get((test.role(parameter), dim), axis)
        found.setdefault(owner, {})[parameter, dim] = parts
    return found


def feature_layout(
    test: PermutationTest,
    widths: Mapping[str, Width],
    ties: Mapping[str, Sequence[Tie | None]],
) -> Tie | None:
    """How the module's features lie along the one cuttable axis whose units move them.

    None where there are no features [batch, features], nothing moves them, they move as no layout
    says, or several axes move them: a tie to one would not tell all that a cut leaves out.
    """
    found: list[Tie] = []
    for axis in (axis for axis, width in widths.items() if width.cuttable):
        dims = [(name, dim, tie) for name, all_ in ties.items() for dim, tie in enumerate(all_)]
        layout = {(name, dim): tie.parts for name, dim, tie in dims if tie and tie.axis == axis}
        parts = _feature_parts(test, widths[axis], layout)
        if parts is None:
            return None
        if parts:
            found.append(Tie(axis, parts))
    return found[0] if len(found) == 1 else None


def _feature_parts(test: PermutationTest, width: Width, layout: Layout) -> tuple[int, ...] | None:
    """As `Tie.parts`; () if the features stay as they are, None if nothing explains them."""
    seen = []
    # A fixed number of channels looks like all of them when tiny: look at other widths too.
    for units in test.num_units(width.size, width.quantum):
        instance = test.instance(width.size, width.quantum, units)
        before, out = instance.expected.features, permuted(instance, layout, units)
        if before is None or before.dim() != 2 or out is None or out.features is None:
            return None
        seen.append((before, out.features, units))

    def follows(parts: tuple[int, ...], before: Tensor, after: Tensor, units: int) -> bool:
        entries = entries_in_order(parts, units) if parts else torch.arange(before.shape[1])
        return entries.numel() == before.shape[1] and alike(after, before[:, entries])

    count, rest = divmod(seen[0][0].shape[1], TINY_UNITS)
    splits = [] if rest else splits_of(count, min(map(sum, layout.values())))
    return next((p for p in ((), *splits) if all(follows(p, *s) for s in seen)), None)


def _readers(module: nn.Module, here: Layout) -> dict[Place, list[nn.Module]]:
    """Places that are the inputs of linear layers, with the modules that read through them."""
    names = {id(value): name for name, value in module.named_parameters()}
    readers: dict[Place, list[nn.Module]] = {}
    for part in module.modules():
        for own, dim in fan_in_dims(part).items():
            place = names[id(part.get_parameter(own))], dim
            if place in here:
                readers.setdefault(place, []).append(part)
    return readers


def _linked(
    test: PermutationTest,
    instance: Instance,
    here: Layout,
    readers: dict[Place, list[nn.Module]],
) -> Iterator[list[Place]]:
    """Sets of places that one unit's values pass through unmixed, each with a reader."""
    links = {place: place for place in here}

    def find(place: Place) -> Place:
        while links[place] != place:
            place = links[place]
        return place

    blocks: dict[Place, Place] = {}
    for name, dim in here:  # blocks of a depth must stay interchangeable
        links[find((name, dim))] = find(blocks.setdefault((test.role(name), dim), (name, dim)))
    for path, part in instance.module.named_modules():
        if isinstance(part, nn.MultiheadAttention):  # calls no modules that could be watched
            heads = [("in_proj_weight", 0), ("in_proj_bias", 0), ("out_proj.weight", 1)]
            inside = [p for own, dim in heads if (p := (f"{path}.{own}".lstrip("."), dim)) in here]
            for place in inside[1:]:
                links[find(place)] = find(inside[0])
    before = _read(instance, instance.params, readers)
    for place in here:
        if place in readers and not _is_embedding(instance.module, place[0]):
            continue
        changed: dict[Place, set[int]] = {}
        # NaN passes a ReLU that is off, noise passes a softmax that drops NaN.
        for value in (math.nan, 1.0):
            after = _read(
                instance, _with_one_unit_changed(instance, place, here[place], value), readers
            )
            for reader, inputs in after.items():
                channels = _changed_channels(before[reader], inputs)
                changed[reader] = changed.get(reader, set()) | channels
        for reader, channels in changed.items():
            if channels and channels <= _unit(here[reader]):
                links[find(place)] = find(reader)
    sets: dict[Place, list[Place]] = {}
    for place in here:
        sets.setdefault(find(place), []).append(place)
    for members in sets.values():
        if len(members) > 1 and any(place in readers for place in members):
            yield members


def _is_embedding(module: nn.Module, name: str) -> bool:
    # Tied to the head, it is read through the head and produced by the embedding.
    return isinstance(module.get_submodule(name.rpartition(".")[0]), nn.Embedding)


def _with_one_unit_changed(
    instance: Instance, place: Place, parts: tuple[int, ...], scale: float
) -> Params:
    name, dim = place
    index = torch.tensor(sorted(_unit(parts)))
    changed = instance.params[name].clone()
    shape = changed.index_select(dim, index).shape
    # A constant would vanish behind a normalisation.
    noise = torch.randn(shape, generator=seeds.generator(0, "probe", "noise"), dtype=changed.dtype)
    return instance.params | {name: changed.index_add_(dim, index, scale * noise)}


def _read(
    instance: Instance, params: Params, readers: dict[Place, list[nn.Module]]
) -> dict[Place, list[Tensor]]:
    """What every reader is given, call by call: [channels, values]."""
    seen: dict[Place, list[Tensor]] = {}

    def watch(reader: Place, part: nn.Module, args: tuple[Tensor, ...]) -> None:
        channel = 1 if isinstance(part, nn.modules.conv._ConvNd) else -1
        seen.setdefault(reader, []).append(args[0].detach().movedim(channel, 0).flatten(1))

    hooks = [
        part.register_forward_pre_hook(lambda part, args, reader=reader: watch(reader, part, args))
        for reader, parts in readers.items()
        for part in parts
    ]
    try:
        with torch.no_grad():
            functional_call(instance.module, params, (instance.inputs,))
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def _changed_channels(before: list[Tensor], after: list[Tensor]) -> set[int]:
    changed: set[int] = set()
    for old, new in zip(before, after, strict=True):
        kept = (new - old).abs().amax(dim=1) <= _UNCHANGED * old.abs().amax()  # False for NaN
        changed |= set((~kept).nonzero().flatten().tolist())
    return changed


def _unit(parts: tuple[int, ...]) -> set[int]:
    """Entries of the middle unit."""
    return set(index_tensor(Tie("", parts).expand(slice(1, 2), TINY_UNITS)).tolist())


def _merge_alike(found: Iterable[list[Place]]) -> list[list[Place]]:
    """Groups of repeated modules as one, unless they meet in a parameter.

    The two inner layers of a bottleneck meet in the weight between them: they stay two.
    """
    merged: list[list[Place]] = []
    for members in found:
        roles = {(_numberless(name), dim) for name, dim in members}
        names = {name for name, _ in members}
        for group in merged:
            if roles == {(_numberless(name), dim) for name, dim in group} and names.isdisjoint(
                name for name, _ in group
            ):
                group += members
                break
        else:
            merged.append(members)
    return merged


def _container(members: list[Place], root: list[str]) -> str:
    """Last name of the innermost module that holds all of a group, unless that is the whole model.

    Then the name of the module that holds the group's first layer, or of that layer.
    """
    paths = [name.split(".")[:-1] for name, _ in members]
    shared = _shared(paths)[len(root) :]
    inner = [part for part in shared if not part.isdigit() and part != "*"]
    if inner:
        return inner[-1]
    first = [part for part in paths[0][len(root) :] if not part.isdigit()]
    return first[-2:][0] if first else members[0][0].split(".")[-2:][0]


def _shared(paths: list[list[str]]) -> list[str]:
    """The common beginning, with `*` for numbers that differ."""
    shared = []
    for level in zip(*paths, strict=False):
        if len(set(level)) > 1 and not all(part.isdigit() for part in level):
            break
        shared.append(level[0] if len(set(level)) == 1 else "*")
    return shared


def _numberless(name: str) -> str:
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", name)


def _unused(name: str, taken: Iterable[str]) -> str:
    names = set(taken)
    return next(
        n for i in range(1, len(names) + 2) if (n := f"{name}{i}" if i > 1 else name) not in names
    )
