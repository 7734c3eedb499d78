"""Decoding, and the cache of what was decoded."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from tiny_data import SaveRows, png, random_pixels

from tesserafl.core.errors import DataError
from tesserafl.data.images import read_images
from tesserafl.data.tables import Table, table


def images(*values: object, files: tuple[Path, ...] = ()) -> Table:
    return table(pa.table({"image": list(values)}), origin="here", files=files)


def test_colour_images_keep_their_pixels() -> None:
    pixels = random_pixels(3, 4, 5, 3)
    read = read_images(images(*map(png, pixels)), "image", None)
    assert read.dtype == torch.uint8
    assert np.array_equal(read.numpy(), pixels.transpose(0, 3, 1, 2))


def test_grey_images_have_one_channel() -> None:
    pixels = random_pixels(3, 4, 5)
    read = read_images(images(*map(png, pixels)), "image", None)
    assert np.array_equal(read.numpy(), pixels[:, None])


def test_a_colour_image_among_grey_ones_gives_all_three_channels() -> None:
    grey, colour = random_pixels(1, 4, 4)[0], random_pixels(1, 4, 4, 3)[0]
    read = read_images(images(png(grey), png(colour), png(grey)), "image", None).numpy()
    assert read.shape == (3, 3, 4, 4)
    assert np.array_equal(read[0], np.stack([grey] * 3)) and np.array_equal(read[2], read[0])
    assert np.array_equal(read[1], colour.transpose(2, 0, 1))


def test_plain_bytes_and_nested_lists_are_images() -> None:
    pixels = random_pixels(1, 4, 4)[0]
    for value in (png(pixels)["bytes"], pixels.tolist()):
        assert np.array_equal(read_images(images(value), "image", None)[0, 0].numpy(), pixels)


def test_unequal_sizes_need_image_size() -> None:
    rows = images(png(random_pixels(1, 4, 4)[0]), png(random_pixels(1, 6, 5)[0]))
    with pytest.raises(DataError, match=r"here, row 1: the image is 5x6.*4x4.*--data.image-size"):
        read_images(rows, "image", None)
    assert tuple(read_images(rows, "image", 8).shape) == (2, 1, 8, 8)
    with pytest.raises(DataError, match=r"data\.image_size must be at least 1"):
        read_images(rows, "image", 0)


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ({"bytes": b"no image", "path": None}, "cannot identify"),
        ({"bytes": None, "path": None}, "it is empty"),
        ({"bytes": None, "path": "/absent.png"}, "absent.png"),
        (png(np.zeros((2, 2), dtype=np.uint16)), "not of 8 bits"),
        ([[0, 256]], "out of bounds"),
    ],
)
def test_what_is_no_image_is_named(value: object, says: str) -> None:
    with pytest.raises(DataError, match=rf"here, row 0: 'image' is not an image.*{says}"):
        read_images(images(value), "image", None)


@pytest.fixture
def cached_rows(save_parquet: SaveRows) -> Table:
    pixels = random_pixels(5, 3, 3)
    folder = save_parquet("train", image=[png(p) for p in pixels])
    return images(*map(png, pixels), files=(folder / "train.parquet",))


def entries(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.exists() else []


def test_the_cache_gives_what_decoding_gives(
    cached_rows: Table, cache_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded = read_images(cached_rows, "image", None)
    assert [path.suffix for path in entries(cache_folder)] == [".safetensors"]
    monkeypatch.setattr("tesserafl.data.images._decode", None)  # calling it would fail
    assert torch.equal(read_images(cached_rows, "image", None), decoded)


def test_other_rows_files_or_sizes_are_other_entries(
    cached_rows: Table, cache_folder: Path
) -> None:
    read_images(cached_rows, "image", None)
    read_images(cached_rows, "image", 2)
    some = read_images(cached_rows.take(torch.tensor([3, 1])), "image", None)
    assert torch.equal(some, read_images(cached_rows, "image", None)[[3, 1]])
    assert len(entries(cache_folder)) == 3
    os.utime(cached_rows.files[0], ns=(1, 1))
    read_images(cached_rows, "image", None)
    assert len(entries(cache_folder)) == 4


@pytest.mark.parametrize("damage", ["cut", "flipped", "emptied"])
def test_a_damaged_entry_is_built_again(
    cached_rows: Table, cache_folder: Path, damage: str
) -> None:
    decoded = read_images(cached_rows, "image", None)
    (entry,) = entries(cache_folder)
    content = entry.read_bytes()
    flipped = content[:-1] + bytes([content[-1] ^ 1])
    entry.write_bytes({"cut": content[:-4], "flipped": flipped, "emptied": b""}[damage])
    assert torch.equal(read_images(cached_rows, "image", None), decoded)
    assert entry.read_bytes() == content


def test_an_unwritable_cache_does_nothing(
    cached_rows: Table, cache_folder: Path, recwarn: pytest.WarningsRecorder
) -> None:
    cache_folder.write_text("a file where the folder should be")
    assert len(read_images(cached_rows, "image", None)) == 5
    assert not recwarn.list
