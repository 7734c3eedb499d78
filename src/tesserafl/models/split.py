"""Run a module's upper blocks from stored hidden states; what lies below is not computed.

A tower is a list of blocks, each of which takes what the one before it gave. If training touches
only blocks k and above, block k - 1 gives an example the same hidden state in every epoch. For a
call from stored ones, blocks 0 to k - 1 answer with them instead of computing; masks, positions and
whatever else the module makes of its inputs are still its own, and so is everything above.

That a tower may be treated so is found by running it, not by its family (`towers_of`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tesserafl.core import seeds
from tesserafl.core.fit import Forward
from tesserafl.core.params import Params
from tesserafl.models.modes import predicting

_TOLERANCE = 1e-5


class Cut(NamedTuple):
    """Where a tower is cut in two."""

    path: str
    """Of the module that lists the blocks."""
    first: int
    """The first block that is computed; the number of blocks: none is."""


@dataclass(frozen=True, kw_only=True)
class Tower:
    """A cut tower whose lower blocks may be left out."""

    cut: Cut
    names: frozenset[str]
    """The parameters that what the last lower block gives depends on."""
    constant: bool
    """Whether it gives the same for any inputs, instead of one row for each example."""
    num_bytes: int
    """Of what it gives for one example, or for all if it is constant."""
    tuple_size: int
    """Of the tuple that a block answers with, the hidden state first; 0: the bare tensor."""


def cuts_of(module: nn.Module, prefixes: Iterable[str], trained: Iterable[str]) -> tuple[Cut, ...]:
    """Where training leaves blocks at the bottom of a tower alone; empty: nowhere.

    Args:
        module: the model.
        prefixes: parameters of block i of a tower begin with its prefix and `i.`.
        trained: names of the trained parameters.
    """
    names, cuts = list(trained), []
    for prefix in prefixes:
        blocks = _blocks(module, prefix.rstrip("."))
        numbers = [number for name in names if (number := _number(prefix, name)) is not None]
        first = min(numbers, default=len(blocks))
        if 0 < first <= len(blocks):
            cuts.append(Cut(prefix.rstrip("."), first))
    return tuple(cuts)


def towers_of(
    module: nn.Module, forward: Forward, params: Params, cuts: Sequence[Cut], inputs: Tensor
) -> tuple[Tower, ...]:
    """Those of the cut towers whose lower blocks may be left out in training.

    Below the cut nothing may be random, an example must not depend on its batch, blocks must answer
    with a hidden state and nothing else, and the module's outputs must be the same without them.

    Args:
        module: in training mode.
        forward: what runs it.
        params: where `forward` runs.
        cuts: `cuts_of` the module.
        inputs: two examples [2, ...], best unlike.
    """
    try:
        return _found(module, forward, params, cuts, inputs)
    except Exception:
        # A batch of one, a second call or an answer of another kind may be more than a module
        # takes. Then nothing is left out; what is wrong without all this fails in training too.
        return ()


def _found(
    module: nn.Module, forward: Forward, params: Params, cuts: Sequence[Cut], inputs: Tensor
) -> tuple[Tower, ...]:
    """`towers_of`, with what the module raises."""
    run = partial(_run, module, cuts=cuts)
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in params.items()}
    with torch.enable_grad(), seeds.seeded(0, "split"):
        graph = run(lambda: forward(leaves, inputs))
        names = {cut: _names_below(graph[cut].hidden, leaves, cut) for cut in graph}
    found = []
    for number, batch in enumerate((inputs, inputs, inputs[:1], inputs[1:])):
        with torch.no_grad(), seeds.seeded(0, "split", number):  # each from another state
            found.append(run(partial(forward, params, batch)))
    towers = []
    for cut in cuts:
        answers = [each.get(cut) for each in found]
        if cut in graph and all(answer is not None for answer in answers):
            hidden = [answer.hidden for answer in answers if answer is not None]
            if (constant := _is_constant(*hidden)) is not None:
                towers.append(
                    Tower(
                        cut=cut,
                        names=names[cut],
                        constant=constant,
                        num_bytes=hidden[0].nbytes if constant else hidden[2].nbytes,
                        tuple_size=graph[cut].tuple_size,
                    )
                )
    given = {tower: found[0][tower.cut].hidden for tower in towers}
    with torch.no_grad(), predicting(module):
        whole = forward(params, inputs)
        with replayed(module, given):
            split = forward(params, inputs)
    same = all(
        (one is None and other is None)
        or (one is not None and other is not None and _close(one, other))
        for one, other in zip(whole, split, strict=True)
    )
    return tuple(towers) if same else ()


@torch.no_grad()
def hidden_of(
    module: nn.Module, forward: Forward, params: Params, inputs: Tensor, towers: Sequence[Tower]
) -> dict[Tower, Tensor]:
    """What the last lower block of each tower gives; what lies above is not computed.

    Args:
        module: what `forward` runs, in training mode.
        forward: the model.
        params: its parameters.
        inputs: a batch [batch, ...].
        towers: `towers_of` the module.
    """
    cuts = [tower.cut for tower in towers]
    found = _run(module, partial(forward, params, inputs), cuts=cuts, early=True)
    return {tower: found[tower.cut].hidden for tower in towers}


@contextmanager
def replayed(module: nn.Module, hidden: Mapping[Tower, Tensor]) -> Iterator[None]:
    """The module's lower blocks answer with these hidden states and compute nothing."""
    held: list[tuple[nn.Module, object]] = []
    try:
        for tower, rows in hidden.items():
            size = tower.tuple_size
            answer = (rows, *[None] * (size - 1)) if size else rows
            for block in _blocks(module, tower.cut.path)[: tower.cut.first]:
                held.append((block, block.__dict__.get("forward")))
                block.__dict__["forward"] = partial(_constant, answer)
        yield
    finally:
        for block, before in reversed(held):
            if before is None:
                del block.__dict__["forward"]
            else:
                block.__dict__["forward"] = before


def _constant(answer: object, *args: object, **kwargs: object) -> object:
    return answer


class _Answer(NamedTuple):
    hidden: Tensor
    tuple_size: int


class _Enough(BaseException):
    """Ends a forward pass of which no more is wanted; a model's own handlers let it pass."""


def _run(
    module: nn.Module, call: Callable[[], object], *, cuts: Sequence[Cut], early: bool = False
) -> dict[Cut, _Answer]:
    """What the last lower blocks answer in one call, but those that may not be stored.

    Args:
        module: the model.
        call: runs it.
        cuts: its towers.
        early: to end the call when all have answered; else also look whether one answers twice,
            or was there a random number before.
    """
    answers: dict[Cut, list[_Answer | None]] = {cut: [] for cut in cuts}
    start = [] if early else _random_state()

    def keep(cut: Cut, part: nn.Module, args: object, output: object) -> None:
        drawn = not early and any(
            not torch.equal(one, other) for one, other in zip(start, _random_state(), strict=True)
        )
        answers[cut].append(None if drawn else _answer(output))
        if early and all(answers.values()):
            raise _Enough

    handles = [
        _blocks(module, cut.path)[cut.first - 1].register_forward_hook(partial(keep, cut))
        for cut in cuts
    ]
    try:
        call()
    except _Enough:
        pass
    finally:
        for handle in handles:
            handle.remove()
    single = {cut: given[0] for cut, given in answers.items() if len(given) == 1}
    return {cut: answer for cut, answer in single.items() if answer is not None}


def _answer(output: object) -> _Answer | None:
    """A block's answer; None if it holds more than a hidden state."""
    if isinstance(output, Tensor):
        return _Answer(output, 0)
    if type(output) is tuple and output and isinstance(output[0], Tensor):
        return _Answer(output[0], len(output)) if all(o is None for o in output[1:]) else None
    return None


def _random_state() -> list[Tensor]:
    """Of the CPU's generator and of every GPU's that is in use."""
    used = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if used else [])]


def _is_constant(one: Tensor, two: Tensor, first: Tensor, second: Tensor) -> bool | None:
    """Whether a hidden state is the same for any inputs; None if it may not be stored.

    Args:
        one: for a batch of two.
        two: for the same batch, in another call.
        first: for its first example alone.
        second: for its second example alone.
    """
    if not torch.equal(one, two):
        return None  # dropout
    if one.shape == first.shape:
        return True if torch.equal(one, first) and torch.equal(one, second) else None
    if (len(one), len(first)) != (2, 1) or one.shape[1:] != first.shape[1:]:
        return None
    return False if _close(one, torch.cat([first, second])) else None


def _names_below(hidden: Tensor, leaves: Params, cut: Cut) -> frozenset[str]:
    """Names of the parameters that lie below the cut, or that the hidden state has a slope in."""
    numbers = {name: _number(cut.path + ".", name) for name in leaves}
    names = {name for name, number in numbers.items() if number is not None and number < cut.first}
    if hidden.requires_grad:
        slopes = torch.autograd.grad(hidden.sum(), list(leaves.values()), allow_unused=True)
        names |= {n for n, slope in zip(leaves, slopes, strict=True) if slope is not None}
    return frozenset(names)


def _close(one: Tensor, other: Tensor) -> bool:
    scale = max(1.0, float(one.abs().max()))
    return torch.allclose(one, other, rtol=_TOLERANCE, atol=_TOLERANCE * scale)


def _blocks(module: nn.Module, path: str) -> list[nn.Module]:
    """The blocks that the module at this path lists; none if it is no list of modules."""
    try:
        blocks = module.get_submodule(path)
    except AttributeError:
        return []
    return list(blocks) if isinstance(blocks, nn.ModuleList) else []


def _number(prefix: str, name: str) -> int | None:
    """The block that a parameter belongs to; None if to none with this prefix."""
    if not name.startswith(prefix):
        return None
    number, dot, _ = name[len(prefix) :].partition(".")
    return int(number) if dot and number.isdigit() else None
