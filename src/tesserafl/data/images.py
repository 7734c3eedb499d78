"""Images: from encoded bytes, files or nested lists to one uint8 tensor."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tesserafl.core.errors import DataError
from tesserafl.data import cache
from tesserafl.data.tables import Table

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL import Image

GREY_MODES = ("1", "L", "LA")
COLOUR_MODES = ("RGB", "RGBA", "RGBX", "P", "PA", "CMYK", "YCbCr", "HSV", "LAB")


def read_images(table: Table, column: str, size: int | None) -> Tensor:
    """The images of a column: uint8 [n, channels, height, width], decoded once and cached.

    Grey images have 1 channel, unless some image has colour; then all have 3.
    """
    if size is not None and size < 1:
        raise DataError(f"data.image_size must be at least 1, or None to keep it; got {size}")
    if not table.files:
        return _decode(table, column, size)
    key = cache.key(table.files, column, size, table.identity())
    return cache.cached(key, lambda: _decode(table, column, size))


def _decode(table: Table, column: str, size: int | None) -> Tensor:
    import numpy as np

    images = np.empty((0, 0, 0, 0), dtype=np.uint8)  # [n, channels, height, width]
    for row, value in enumerate(_values(table, column)):
        try:
            pixels = _pixels(_open(value), size)
        except (OSError, ValueError, TypeError, OverflowError, SyntaxError) as error:
            raise DataError(
                f"{table.where(row)}: {column!r} is not an image that can be decoded: {error}; "
                f"replace it or remove the row"
            ) from error
        if row == 0:
            images = np.empty((len(table), *pixels.shape), dtype=np.uint8)
        if pixels.shape[1:] != images.shape[2:]:
            raise DataError(
                f"{table.where(row)}: the image is {_size(pixels)}, the ones before are "
                f"{_size(images)}; images must be equal in size: set --data.image-size to resize"
            )
        if len(pixels) > images.shape[1]:  # the first one with colour
            images = np.repeat(images, 3, axis=1)
        images[row] = pixels  # a grey image fills all channels
    return torch.from_numpy(images)


def _values(table: Table, column: str) -> Iterator[object]:
    """Cell by cell, so that only a part of the bytes is held twice."""
    for batch in table.column(column).chunks:
        for start in range(0, len(batch), 1000):
            yield from batch.slice(start, 1000).to_pylist()


def _open(value: object) -> Image.Image:
    import numpy as np
    from PIL import Image

    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if value is None:
        raise ValueError("it is empty")
    if isinstance(value, list):
        return Image.fromarray(np.array(value, dtype=np.uint8))
    if isinstance(value, bytes):
        return Image.open(io.BytesIO(value))
    return Image.open(str(value))


def _pixels(image: Image.Image, size: int | None) -> NDArray[np.uint8]:
    """uint8 [channels, height, width] with 1 or 3 channels."""
    import numpy as np

    with image:
        if image.mode not in GREY_MODES + COLOUR_MODES:
            raise ValueError(f"mode {image.mode!r} is not of 8 bits a channel")
        image = image.convert("L" if image.mode in GREY_MODES else "RGB")
        if size is not None and image.size != (size, size):
            image = image.resize((size, size))
        pixels = np.asarray(image)
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def _size(pixels: NDArray[np.uint8]) -> str:
    return f"{pixels.shape[-1]}x{pixels.shape[-2]}"
