"""JSON and groups of tensors as one safetensors buffer, read as if an enemy had written it.

    8 bytes                 length of the header
    header, JSON            per tensor its type, shape and place; under `__metadata__` ours
    tensors                 one after another, no gaps, no overlaps (safetensors checks that)

What a buffer may claim is bounded by its own length: nothing is allocated that it does not hold.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save

from tesserafl.core.errors import MessageError
from tesserafl.core.params import Params

_SHOWN = 300
"""Characters of an error that are kept: its text may be the sender's."""


def pack(header: Mapping[str, Any], groups: Mapping[str, Params]) -> bytes:
    """One safetensors buffer with JSON in its header; `groups` are told apart by name."""
    seen: set[int] = set()
    tensors = {}
    for group, params in groups.items():
        for name, tensor in params.items():
            plain = tensor.detach().contiguous()
            if plain.untyped_storage().data_ptr() in seen:
                plain = plain.clone()  # safetensors refuses two names for one storage
            seen.add(plain.untyped_storage().data_ptr())
            tensors[f"{group}/{name}"] = plain
    # With their order: safetensors has one of its own, and a gradient norm depends on it.
    names = {group: list(params) for group, params in groups.items()}
    return save(tensors, metadata={"tessera": json.dumps({"groups": names, **header})})


def unpack(
    data: bytes, max_header_bytes: int | None = None
) -> tuple[dict[str, Any], dict[str, Params]]:
    """The JSON and the tensor groups of a buffer.

    `max_header_bytes` is what the header may have, looked at before it is read: JSON takes up to
    twenty times as much memory as it has bytes. None: as much as safetensors allows.

    Raises:
        MessageError: the bytes are not a message of ours.
    """
    try:
        length = int.from_bytes(data[:8], "little")
        if length > len(data) - 8:
            raise ValueError("its header is longer than the message")
        if max_header_bytes is not None and length > max_header_bytes:
            raise ValueError(f"its header has {length} bytes; allowed are {max_header_bytes}")
        header = _json(data[8 : 8 + length])
        body = _json(header["__metadata__"]["tessera"])
        listed = body.pop("groups")
        tensors = load(data)
        groups: dict[str, Params] = {}
        for group, names in listed.items():
            if not isinstance(names, list):
                raise TypeError(f"group {group!r} is no list of names")
            groups[group] = {name: tensors.pop(f"{group}/{name}") for name in names}
        if tensors:
            raise ValueError(f"it holds tensors of no group, {next(iter(tensors))!r} for one")
    except (
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        RecursionError,
        OverflowError,
        RuntimeError,  # torch: a shape of nothing by more than it can count
        SafetensorError,
    ) as error:
        raise MessageError(
            f"{len(data)} bytes are not a TesseraFL message: {shown(error)}"
        ) from error
    return body, groups


def shown(error: object) -> str:
    """An error's text in one line of ASCII, cut off: who is refused has no say in our logs."""
    text = str(error)[: 4 * _SHOWN].encode("ascii", "backslashreplace").decode()
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def _json(text: bytes | str) -> Any:
    return json.loads(text, object_pairs_hook=_once)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object none of whose keys comes twice: readers differ in which of the two they take."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key of its JSON comes twice")
    return found
