"""Deltas in fewer bytes: bfloat16, int8 with scales, or the largest entries alone.

Parameters that go down are rounded to bfloat16 by the same functions.

    kind       main                       codes                      bytes of n entries in r rows
    bfloat16   bfloat16, as the delta     -                          2 n
    int8       int8, as the delta         float32 [r] scales         n + 4 r
    topk       float32 [k], largest       int32 [k], their places    8 k

A coded delta is always decoded from what is sent, also where nothing is sent, so that one process,
many, or devices far away sum the same bits.

Sources: int8 with one scale for a bucket of entries: Alistarh et al., "QSGD", NeurIPS 2017
(https://arxiv.org/abs/1610.02132), rounded to the nearest instead of at random. Largest entries:
Stich, Cordonnier and Jaggi, "Sparsified SGD with Memory", NeurIPS 2018
(https://arxiv.org/abs/1809.07599).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, NoReturn, get_args

import torch
from torch import Tensor

from tesserafl.core.buffers import shown
from tesserafl.core.errors import MessageError
from tesserafl.core.layout import Shape
from tesserafl.core.params import Params, num_bytes

Coding = Literal["bfloat16", "int8", "topk"]
CODINGS: tuple[Coding, ...] = get_args(Coding)
_MOST = 127
"""Largest int8 that is used: as many below zero as above."""
_PLACES = (1 << 31) - 1
"""Entries of a tensor that int32 can count."""


class Coded(dict[str, Tensor]):
    """Decoded deltas or parameters that know in which form they are sent.

    To whoever takes no notice they are parameters like any other; but none can be replaced: make a
    plain `dict` of them first, which is then sent as it is.

    Args:
        coding: how.
        main: what is sent of each parameter, in their order; those without a code of their own are
            sent as they are.
        codes: the second part of what is sent, by parameter; of bfloat16 none.
        coded: names of the parameters that are coded.
        values: the parameters, decoded from these.
    """

    def __init__(
        self, coding: Coding, main: Params, codes: Params, coded: frozenset[str], values: Params
    ) -> None:
        super().__init__(values)
        self.coding, self.main, self.codes, self.coded = coding, main, codes, coded

    @property
    def num_bytes(self) -> int:
        """Bytes of what is sent."""
        return sum(t.nbytes for part in (self.main, self.codes) for t in part.values())

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise TypeError("coded deltas cannot be replaced one by one; use dict(delta)")

    __setitem__ = __delitem__ = __ior__ = _refuse
    pop = popitem = update = setdefault = clear = _refuse


def sent_bytes(params: Params) -> int:
    """Bytes of parameters or deltas as they are sent."""
    return params.num_bytes if isinstance(params, Coded) else num_bytes(params)


def coded_groups(params: Params, group: str, header: dict[str, Any]) -> dict[str, Params]:
    """The groups of a message in which coded tensors are sent, noted in its header; none of others.

    `codes` is the second; the first takes the place of `group`, whose tensors these are.
    """
    if not isinstance(params, Coded):
        return {}
    header["coded"] = {"coding": params.coding, "names": sorted(params.coded)}
    return {group: params.main, "codes": params.codes}


def coded(delta: Mapping[str, Tensor], coding: Coding, share: float = 1.0) -> Coded:
    """A delta in the form in which it is sent.

    Args:
        delta: what changed, all of it finite; float32 tensors are coded, others sent as they are.
        coding: how.
        share: of topk, the share of each tensor's entries that is kept, at least one.
    """
    main, codes, names = Params(), Params(), set[str]()
    for name, tensor in delta.items():
        if tensor.dtype != torch.float32 or not 0 < tensor.numel() <= _PLACES:
            main[name] = tensor
            continue
        names.add(name)
        if coding == "bfloat16":
            main[name] = tensor.bfloat16()
        elif coding == "int8":
            main[name], codes[name] = _to_int8(tensor)
        else:
            main[name], codes[name] = _largest(tensor, num_kept(tensor.numel(), share))
    shapes = {name: tuple(tensor.shape) for name, tensor in delta.items()}
    return decoded(coding, main, codes, frozenset(names), shapes)


def decoded(
    coding: Coding,
    main: Params,
    codes: Params,
    names: frozenset[str],
    shapes: Mapping[str, Shape],
) -> Coded:
    """Deltas from what was sent of them; see `Coded`.

    `shapes` of the parameters come from who asked for them, never from who sent them: topk says
    nothing of how large a tensor is.

    Raises:
        MessageError: what was sent is not of that form.
    """
    if not names <= main.keys() or codes.keys() != (names if coding != "bfloat16" else set()):
        raise MessageError(f"a {coding} delta needs both parts of each parameter that is coded")
    values = Params()
    for name, tensor in main.items():
        if name not in names:
            values[name] = tensor
            continue
        shape = shapes.get(name)
        if shape is None:
            raise MessageError(
                f"a {coding} delta holds {shown(name)}, which its sub-model does not"
            )
        if coding == "topk":
            values[name] = _scattered(name, tensor, codes[name], shape)
            continue
        dtype = torch.bfloat16 if coding == "bfloat16" else torch.int8
        if tensor.dtype != dtype or tensor.shape != shape:
            raise MessageError(
                f"{coding} entry {name!r} is {tensor.dtype} {shown(list(tensor.shape))}; "
                f"expected is {dtype} {list(shape)}"
            )
        values[name] = tensor.float() if coding == "bfloat16" else _scaled(name, tensor, codes)
    return Coded(coding, main, codes, names, values)


def num_kept(entries: int, share: float) -> int:
    """Entries of a tensor that topk keeps: a share of them, rounded up."""
    return min(entries, max(1, math.ceil(round(share * entries, 6))))


def coded_bytes(shape: Shape, coding: Coding, share: float = 1.0) -> int:
    """Bytes of a float32 parameter of this shape when it is coded."""
    entries = math.prod(shape)
    if coding == "bfloat16":
        return 2 * entries
    return entries + 4 * _rows(shape) if coding == "int8" else 8 * num_kept(entries, share)


def _rows(shape: Shape) -> int:
    """Scales of a tensor: one for each of its rows; a vector has one."""
    return shape[0] if len(shape) > 1 else 1


def _to_int8(tensor: Tensor) -> tuple[Tensor, Tensor]:
    rows = tensor.detach().reshape(_rows(tensor.shape), -1)
    scales = rows.abs().amax(dim=1) / _MOST  # [rows]
    steps = torch.where(scales[:, None] > 0, rows / scales[:, None], 0.0)
    whole = steps.round().clamp(-_MOST, _MOST).to(torch.int8)
    return whole.reshape(tensor.shape), scales


def _scaled(name: str, whole: Tensor, codes: Params) -> Tensor:
    scales, rows = codes[name], _rows(tuple(whole.shape))
    if scales.dtype != torch.float32 or scales.shape != (rows,) or bool((scales < 0).any()):
        raise MessageError(
            f"the scales of int8 entry {name!r} are {scales.dtype} {shown(list(scales.shape))}; "
            f"expected are {rows} float32 of 0 or more"
        )
    return (whole.reshape(rows, -1).float() * scales[:, None]).reshape(whole.shape)


def _largest(tensor: Tensor, count: int) -> tuple[Tensor, Tensor]:
    flat = tensor.detach().reshape(-1)
    sizes = flat.abs()
    least = sizes.topk(count).values[-1]
    above = sizes > least
    # Of equal entries the first: `topk` may take any of them.
    above[(sizes == least).nonzero()[: count - int(above.sum())]] = True
    places = above.nonzero()[:, 0]
    return flat[places], places.to(torch.int32)


def _scattered(name: str, kept: Tensor, places: Tensor, shape: Shape) -> Tensor:
    total, wide = math.prod(shape), places.long()  # differences of int32 may not fit one
    if (
        kept.dtype != torch.float32
        or places.dtype != torch.int32
        or kept.dim() != 1
        or places.shape != kept.shape
        or not 0 < len(places) <= total
        or not (int(places[0]) >= 0 and int(places[-1]) < total)
        or not bool((wide.diff() > 0).all())
    ):
        raise MessageError(
            f"topk entry {name!r} needs as many float32 values as ascending int32 places below "
            f"{total}, at least one"
        )
    flat = torch.zeros(total)
    flat[wide] = kept
    return flat.reshape(shape)
