"""Folders of small data sets, and a cache that is not the user's."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet
from tiny_data import SaveRows


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
