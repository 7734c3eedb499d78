"""What a block adds to its input, and which of its parameters that is proportional to.

    h <- h + f(h)        a residual block; with s times its output projections: h + s f(h)

No family is named: a block is run alone on what enters it. If it gives its input back once all its
parameters are zero, it adds; then parameters get their values back one after another, gains of
normalisations first, as long as it still gives its input back. What has to stay zero are the last
ones of every branch, its output projections. That what is added is proportional to them is tried.

Which parameters lie below the blocks is read off autograd's graph of what enters them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from tesserafl.core.axis import Depth
from tesserafl.core.params import Params
from tesserafl.core.permute import Instance, PermutationTest

_TOLERANCE = 1e-9
"""Relative, in double precision; families that compute in float32 inside add exactly too."""
_SMALL = 1e-4


def with_outputs(test: PermutationTest, depths: Mapping[str, Depth]) -> dict[str, Depth]:
    """The depth axes, which know what their blocks' outputs are proportional to."""
    if not depths:
        return {}
    instance = test.smallest()
    outside = [n for n in instance.params if not any(d.locate(n) for d in depths.values())]
    return {
        axis: replace(
            depth,
            outputs=_outputs(instance, depth, test.tiny[axis] - 1),
            below=_below(instance, depth, test.tiny[axis] - 1, outside),
        )
        for axis, depth in depths.items()
    }


def _below(
    instance: Instance, depth: Depth, number: int, outside: Sequence[str]
) -> tuple[str, ...]:
    """`Depth.below`, from what enters the block of this number."""
    found: set[str] = set()
    for prefix in depth.prefixes:
        try:
            block = instance.module.get_submodule(f"{prefix}{number}")
        except AttributeError:
            continue
        watched = {name: instance.params[name].detach().requires_grad_() for name in outside}
        calls = _calls(instance._replace(params={**instance.params, **watched}), block)
        given = calls[0].given if calls else None
        if given is None or not given.requires_grad:
            continue
        slopes = torch.autograd.grad(given.sum(), list(watched.values()), allow_unused=True)
        found |= {name for name, slope in zip(outside, slopes, strict=True) if slope is not None}
    return tuple(name for name in outside if name in found)


def _outputs(instance: Instance, depth: Depth, number: int) -> tuple[str, ...]:
    """`Depth.outputs`, from the block of this number; it must stand in no other tower as well."""
    if len(depth.prefixes) != 1:
        return ()
    path = f"{depth.prefixes[0]}{number}"
    own = {
        name.removeprefix(f"{path}."): value
        for name, value in instance.params.items()
        if name.startswith(f"{path}.")
    }
    try:
        block = instance.module.get_submodule(path)
    except AttributeError:
        return ()
    call = _call(instance, block)
    if call is None or not _passes_through(block, call, _zeroed(own, own)):
        return ()
    needed = dict(own)
    matrices = {_owner(name) for name, value in own.items() if value.dim() > 1}
    for name in sorted(own, key=lambda name: _owner(name) in matrices):
        without = {other: value for other, value in needed.items() if other != name}
        if _passes_through(block, call, _zeroed(own, without)):
            needed = without
    return tuple(n for n in own if n in needed) if _is_linear(block, call, own, needed) else ()


def _owner(name: str) -> str:
    return name.rpartition(".")[0]


def _is_linear(block: nn.Module, call: _Call, own: Params, needed: Params) -> bool:
    """Whether half as much is added once these parameters are half as large, both being small.

    So that what one branch adds hardly changes what another one is given.
    """
    added = []
    for scale in (_SMALL, _SMALL / 2):
        params = {n: value * scale if n in needed else value for n, value in own.items()}
        hidden = _answer(block, call, params)
        assert hidden is not None and call.given is not None
        added.append((hidden - call.given) / scale)
    return float((added[0] - added[1]).abs().max()) <= 0.01 * float(added[1].abs().max())


class _Call(NamedTuple):
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def given(self) -> Tensor | None:
        """What enters the block: the first tensor that it is called with."""
        values = (*self.args, *self.kwargs.values())
        return next((value for value in values if isinstance(value, Tensor)), None)


def _call(instance: Instance, block: nn.Module) -> _Call | None:
    """How the block is called, once, when the instance answers; None: another number of times."""
    with torch.no_grad():
        calls = _calls(instance, block)
    return calls[0] if len(calls) == 1 and calls[0].given is not None else None


def _calls(instance: Instance, block: nn.Module) -> list[_Call]:
    """How the block is called when the instance answers."""
    calls: list[_Call] = []

    def note(part: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append(_Call(args, kwargs))

    hook: Callable[[], None] = block.register_forward_pre_hook(note, with_kwargs=True).remove
    try:
        functional_call(instance.module, instance.params, (instance.inputs,))
    finally:
        hook()
    return calls


def _zeroed(own: Params, names: Mapping[str, object]) -> Params:
    return {n: torch.zeros_like(t) if n in names else t for n, t in own.items()}


def _passes_through(block: nn.Module, call: _Call, params: Params) -> bool:
    given, hidden = call.given, _answer(block, call, params)
    if given is None or hidden is None or hidden.shape != given.shape:
        return False
    return float((hidden - given).abs().max()) <= _TOLERANCE * float(given.abs().max())


def _answer(block: nn.Module, call: _Call, params: Params) -> Tensor | None:
    with torch.no_grad():
        out = functional_call(block, params, call.args, call.kwargs)
    hidden = out[0] if isinstance(out, tuple) and out else out
    return hidden if isinstance(hidden, Tensor) else None
