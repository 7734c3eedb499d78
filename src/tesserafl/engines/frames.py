"""Length-prefixed frames on a pipe: `b"TSRA"`, seconds, failed?, length, body."""

from __future__ import annotations

import struct
from typing import IO, NamedTuple

from tesserafl.core.errors import MessageError

_HEAD = struct.Struct("<4sd?Q")
_MAGIC = b"TSRA"
_LONGEST = 1 << 40


class Frame(NamedTuple):
    """What came through a pipe."""

    seconds: float
    """Computing time of what the body answers; 0 for a request."""
    body: bytes
    failed: bool
    """The body is an error's text."""


def write_frame(pipe: IO[bytes], body: bytes, seconds: float = 0.0, failed: bool = False) -> None:
    """Write one frame and flush it."""
    pipe.write(_HEAD.pack(_MAGIC, seconds, failed, len(body)))
    pipe.write(body)
    pipe.flush()


def read_frame(pipe: IO[bytes]) -> Frame | None:
    """The next frame; None at the end of the pipe, also in the middle of a frame.

    Raises:
        MessageError: the bytes are not a frame.
    """
    head = pipe.read(_HEAD.size)
    if len(head) < _HEAD.size:
        return None
    magic, seconds, failed, length = _HEAD.unpack(head)
    if magic != _MAGIC or length > _LONGEST:
        raise MessageError(f"a pipe carries {head!r} where a frame should begin")
    body = pipe.read(length)
    return Frame(seconds, body, failed) if len(body) == length else None
