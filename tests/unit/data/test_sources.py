"""Each source gives a training and a test table, or says why not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny_data import SaveRows, png, random_pixels

from tesserafl.core.errors import DataError
from tesserafl.data import SOURCES, DataSettings
from tesserafl.data.sources import read


def test_digits_hold_out_a_fifth_of_each_class() -> None:
    train, test = read(DataSettings(), seed=0)
    assert (len(train), len(test)) == (1437, 360)
    assert not set(train.numbers.tolist()) & set(test.numbers.tolist())
    counts = torch.tensor(test.column("label").to_pylist()).bincount()
    assert counts.min() >= 34 and counts.max() <= 37
    assert torch.equal(read(DataSettings(), seed=0)[1].numbers, test.numbers)
    assert not torch.equal(read(DataSettings(), seed=1)[1].numbers, test.numbers)


def test_parquet_with_a_test_part(save_parquet: SaveRows) -> None:
    save_parquet("train", text=["a", "b"], label=[0, 1])
    folder = save_parquet("test", text=["c"], label=[1])
    train, test = read(DataSettings(path=folder), seed=0)
    assert train.column("text").to_pylist() == ["a", "b"]
    assert test.column("text").to_pylist() == ["c"]


def test_without_a_test_part_a_fifth_is_held_out(save_parquet: SaveRows) -> None:
    folder = save_parquet("train", text=[str(row) for row in range(20)])
    train, test = read(DataSettings(path=folder), seed=0)
    assert len(test) == 4
    both = train.column("text").to_pylist() + test.column("text").to_pylist()
    assert sorted(both, key=int) == [str(row) for row in range(20)]
    assert torch.equal(read(DataSettings(path=folder), seed=0)[1].numbers, test.numbers)


def test_files_in_pieces_are_one_part(save_parquet: SaveRows) -> None:
    save_parquet("train-00001-of-00002", text=["c"])
    folder = save_parquet("train-00000-of-00002", text=["a", "b"])
    save_parquet("test-00000-of-00001", text=["d"])
    assert read(DataSettings(path=folder), seed=0)[0].column("text").to_pylist() == ["a", "b", "c"]


def test_csv_with_quoted_line_breaks(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text('text,label\n"two\nlines",0\nplain,1\n')
    (tmp_path / "test.csv").write_text("text,label\nx,0\n")
    train, test = read(DataSettings(path=tmp_path), seed=0)
    assert train.column("text").to_pylist() == ["two\nlines", "plain"] and len(test) == 1


def test_saved_data_sets_keep_their_class_names(tmp_path: Path) -> None:
    import datasets

    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])}
    )
    rows = {"text": ["a", "b", "c"], "label": [0, 1, 1]}
    part = datasets.Dataset.from_dict(rows, features=features)
    part.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict(train=part, validation=part).save_to_disk(str(tmp_path / "two"))
    part.to_parquet(str(tmp_path / "train.parquet"))
    one = read(DataSettings(path=tmp_path / "one"), seed=0)
    two = read(DataSettings(path=tmp_path / "two"), seed=0)
    assert (len(one[0]), len(one[1])) == (2, 1)
    assert (len(two[0]), len(two[1])) == (3, 3)
    for train in (one[0], two[0], read(DataSettings(path=tmp_path), seed=0)[0]):
        assert train.class_names == {"label": ("no", "yes")}
        assert train.files


def test_a_folder_of_images_for_each_class(tmp_path: Path) -> None:
    for part, number in (("train", 3), ("test", 1)):
        for name in ("cat", "dog"):
            folder = tmp_path / part / name
            folder.mkdir(parents=True)
            for row, pixels in enumerate(random_pixels(number, 4, 4)):
                Image.fromarray(pixels).save(folder / f"{row}.png")
    train, test = read(DataSettings(path=tmp_path), seed=0)
    assert train.column("label").to_pylist() == ["cat"] * 3 + ["dog"] * 3
    assert test.column("label").to_pylist() == ["cat", "dog"]
    whole, held_out = read(DataSettings(path=tmp_path / "train"), seed=0)
    assert (len(whole), len(held_out)) == (5, 1)


def test_a_path_stands_for_a_folder(tmp_path: Path) -> None:
    assert DataSettings(path=tmp_path).resolved_source == "folder"
    assert DataSettings(source="hub").resolved_source == "hub"
    assert set(SOURCES) == {"digits", "folder", "hub"}


def test_folders_that_hold_nothing_known(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"absent is not a folder"):
        read(DataSettings(path=tmp_path / "absent"), seed=0)
    (tmp_path / "notes.txt").touch()
    with pytest.raises(DataError, match=r"found .*notes\.txt; give a folder with train\.parquet"):
        read(DataSettings(path=tmp_path), seed=0)
    with pytest.raises(DataError, match=r"--data\.path"):
        read(DataSettings(source="folder"), seed=0)
    (tmp_path / "train.parquet").write_bytes(b"PAR1 no more")
    with pytest.raises(DataError, match=r"train\.parquet cannot be read"):
        read(DataSettings(path=tmp_path), seed=0)


def test_too_few_rows(save_parquet: SaveRows) -> None:
    with pytest.raises(DataError, match="has 1 row and no test part"):
        read(DataSettings(path=save_parquet("train", text=["a"])), seed=0)
    with pytest.raises(DataError, match="has no rows"):
        read(DataSettings(path=save_parquet("train", text=[])), seed=0)


def test_images_in_parquet_know_their_file(save_parquet: SaveRows) -> None:
    folder = save_parquet("train", image=[png(p) for p in random_pixels(5, 2, 2)])
    assert read(DataSettings(path=folder), seed=0)[0].files == (folder / "train.parquet",)


def test_the_hub_without_a_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import datasets
    import huggingface_hub

    # Both read HF_HUB_OFFLINE when they are imported, which another test may have caused.
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    with pytest.raises(DataError, match=r"(?s)'someone/cifar' could not be fetched.*--data\.path"):
        read(DataSettings(source="hub", name="someone/cifar"), seed=0)
    with pytest.raises(DataError, match=r"--data\.name"):
        read(DataSettings(source="hub"), seed=0)


def test_a_hub_data_set_is_read_by_its_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    part = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [0, 1]})
    asked: list[object] = []

    def load_dataset(name: str, subset: str | None) -> datasets.DatasetDict:
        asked.extend((name, subset))
        return datasets.DatasetDict(train=part, test=part.select([0]))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    train, test = read(DataSettings(source="hub", name="n", subset="s"), seed=0)
    assert (len(train), len(test), asked) == (2, 1, ["n", "s"])
