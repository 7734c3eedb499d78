"""Folders of small data sets, and a cache that is not the user's."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

SaveRows = Callable[..., Path]


@pytest.fixture(autouse=True)
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("TESSERA_CACHE", str(folder))
    return folder


@pytest.fixture
def save_parquet(tmp_path: Path) -> SaveRows:
    """Writes `part.parquet` into a folder: `save_parquet("train", text=[...], label=[...])`."""

    def save(part: str, **columns: object) -> Path:
        folder = tmp_path / "source"
        folder.mkdir(exist_ok=True)
        parquet.write_table(pa.table(columns), folder / f"{part}.parquet")
        return folder

    return save


def png(pixels: np.ndarray, kind: str = "PNG") -> dict[str, object]:
    """An image as Hugging Face data sets store it."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return {"bytes": file.getvalue(), "path": None}


def random_pixels(num: int, *shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (num, *shape), dtype=np.uint8)
