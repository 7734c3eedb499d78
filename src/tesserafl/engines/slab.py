"""Memory that two processes of one machine see: a message's tensors are copied into it once.

The reader's tensors are views of it. They hold until the writer starts over, which it may do as
soon as the reader has answered. The layout is a safetensors file's, with gaps for alignment.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import tempfile
from collections.abc import Mapping
from typing import Any

import torch

from tesserafl.core.errors import MessageError
from tesserafl.core.params import Params

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_LINE = 64
"""Bytes to which messages and their tensors are aligned."""
_GROWTH = 1 << 20
"""Smallest growth: a system call and new pages."""


class Slab:
    """One direction of one pair of processes. It has no name, so nothing is left to clean up."""

    def __init__(self, descriptor: int | None = None) -> None:
        """A new one, or the one that another process made and passed on."""
        self.descriptor = _nameless() if descriptor is None else descriptor
        self._map: mmap.mmap | None = None
        self._used = 0

    def close(self) -> None:
        """Let go of it, once; views that are still held stay."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
        self.descriptor = -1

    def start_over(self) -> None:
        """Forget what was written: its reader has answered."""
        self._used = 0

    def put(self, body: Mapping[str, Any], groups: Mapping[str, Params]) -> tuple[int, int]:
        """Copy a message in; where it begins, and its length."""
        entries: dict[str, Any] = {}
        at = 0
        for group, params in groups.items():
            for name, tensor in params.items():
                entries[f"{group}/{name}"] = {
                    "dtype": _NAMES[tensor.dtype],
                    "shape": list(tensor.shape),
                    "data_offsets": [at, at + tensor.nbytes],
                }
                at += _rounded(tensor.nbytes)
        names = {group: list(params) for group, params in groups.items()}
        entries["__metadata__"] = {"tessera": json.dumps({"groups": names, **body})}
        head = json.dumps(entries).encode()
        start, length = self._used, _rounded(8 + len(head))
        view = self._mapped(start + length + at)
        view[start : start + 8] = (length - 8).to_bytes(8, "little")
        view[start + 8 : start + length] = head.ljust(length - 8)
        for group, params in groups.items():
            for name, tensor in params.items():
                if tensor.numel():
                    first = start + length + entries[f"{group}/{name}"]["data_offsets"][0]
                    there = torch.frombuffer(
                        view, dtype=tensor.dtype, count=tensor.numel(), offset=first
                    )
                    there.view(tensor.shape).copy_(tensor.detach())
        self._used = start + length + at
        return start, length + at

    def get(self, start: int, length: int) -> tuple[dict[str, Any], dict[str, Params]]:
        """The message at a place: its JSON, and its tensors as views.

        Raises:
            MessageError: there is none.
        """
        try:
            view = self._mapped(start + length)
            head = 8 + int.from_bytes(view[start : start + 8], "little")
            if head > length:
                raise ValueError("its header is longer than the message")
            entries = json.loads(view[start + 8 : start + head])
            body = json.loads(entries["__metadata__"]["tessera"])
            groups: dict[str, Params] = {}
            for group, names in body.pop("groups").items():
                groups[group] = {
                    name: _tensor(view, entries[f"{group}/{name}"], start + head, start + length)
                    for name in names
                }
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise MessageError(f"shared memory holds no message at {start}: {error}") from error
        return body, groups

    def _mapped(self, size: int) -> mmap.mmap:
        if self._map is None or len(self._map) < size:
            if os.fstat(self.descriptor).st_size < size:
                os.ftruncate(self.descriptor, max(size + size // 2, _GROWTH))
            # Views of the old mapping keep it alive.
            self._map = mmap.mmap(self.descriptor, os.fstat(self.descriptor).st_size)
        return self._map


def _tensor(view: mmap.mmap, entry: Mapping[str, Any], first: int, end: int) -> torch.Tensor:
    dtype, shape = _DTYPES[entry["dtype"]], [int(size) for size in entry["shape"]]
    count, offset = math.prod(shape), first + int(entry["data_offsets"][0])
    if min(shape, default=0) < 0 or offset < first or offset + count * dtype.itemsize > end:
        raise ValueError(f"a tensor {entry} lies outside")
    if not count:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(view, dtype=dtype, count=count, offset=offset).view(shape)


def _nameless() -> int:
    if hasattr(os, "memfd_create"):
        return os.memfd_create("tesserafl", 0)
    with tempfile.TemporaryFile() as file:  # elsewhere a file that has no name any more
        return os.dup(file.fileno())


def _rounded(size: int) -> int:
    return -(-size // _LINE) * _LINE
