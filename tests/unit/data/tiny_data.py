"""Small images for the tests of this folder."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

SaveRows = Callable[..., Path]
"""`save_parquet(part, column=values, ...)`, the folder that holds the file."""


def png(pixels: np.ndarray, kind: str = "PNG") -> dict[str, object]:
    """An image as Hugging Face data sets store it."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return {"bytes": file.getvalue(), "path": None}


def random_pixels(num: int, *shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (num, *shape), dtype=np.uint8)
