"""Parameters as plain dictionaries, and the few operations that everything else shares."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

Params = dict[str, Tensor]
"""Parameter name -> tensor. Never changed in place by a hook."""


def subtract(left: Params, right: Params) -> Params:
    """`left - right`, entry by entry; `right` holds the names of `left`, or more."""
    return {name: left[name] - right[name] for name in left}


_LINE = 64
"""Bytes of a cache line, to which torch aligns what it allocates."""


def aligned(tensor: Tensor) -> Tensor:
    """The tensor, or a copy if it does not begin at a cache line.

    A matrix product's bits depend on that, and what was read from a file or a pipe lies anywhere.
    """
    return tensor if tensor.data_ptr() % _LINE == 0 else tensor.clone()


def num_entries(params: Params) -> int:
    """How many numbers the parameters hold."""
    return sum(tensor.numel() for tensor in params.values())


def num_bytes(params: Params) -> int:
    """Bytes of the parameters as they would be sent uncompressed."""
    return sum(tensor.numel() * tensor.element_size() for tensor in params.values())


def norm(params: Params) -> float:
    """Euclidean norm over all entries, in double precision."""
    squares = [tensor.double().square().sum() for tensor in params.values()]
    return float(torch.stack(squares).sum().sqrt()) if squares else 0.0


def sha256(params: Params) -> str:
    """A digest of names, types, shapes and bits, independent of the dictionary's order."""
    digest = hashlib.sha256()
    for name in sorted(params):
        tensor = params[name].detach().cpu().contiguous()
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
