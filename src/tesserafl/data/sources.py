"""Where data comes from: each source gives a training and a test table."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from tesserafl.core.errors import DataError, did_you_mean
from tesserafl.core.seeds import derive
from tesserafl.data.settings import DataSettings
from tesserafl.data.tables import Table, hold_out, table

if TYPE_CHECKING:
    import datasets

SOURCES = {
    "digits": "1,797 scanned digits of 8x8 pixels that come with scikit-learn; no download",
    "folder": "a local folder: Parquet, CSV, a saved Hugging Face data set or image files",
    "hub": "a data set of the Hugging Face hub, by name",
}
"""Source -> one line about it."""

HELD_OUT = 0.2
"""Part of the rows that becomes the test set of a source that has none."""
IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
TEST_SPLITS = ("test", "validation", "valid", "val")


def read(settings: DataSettings, seed: int) -> tuple[Table, Table]:
    """Training and test table of a source. Raises DataError if it cannot be read."""
    source = settings.resolved_source
    if source == "digits":
        return _digits(seed)
    if source == "folder":
        train, test = _folder(settings.path)
    elif source == "hub":
        train, test = _hub(settings.name, settings.subset)
    else:
        raise DataError(f"data.source={source!r} is unknown; {did_you_mean(source, SOURCES)}")
    return (train, test) if test is not None else hold_out(train, HELD_OUT, seed)


def read_own(folder: Path) -> Table:
    """The training table of a participant's own folder. Raises DataError if it cannot be read."""
    return _folder(folder)[0]


def _digits(seed: int) -> tuple[Table, Table]:
    import pyarrow as pa
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    bunch = load_digits()
    pixels = (bunch.images * (255 / 16)).round().astype("uint8")  # [n, 8, 8]
    whole = table(
        pa.table({"image": pixels.tolist(), "label": bunch.target}),
        origin="digits",
        class_names={"label": tuple(str(digit) for digit in range(10))},
    )
    train, test = train_test_split(
        range(len(whole)),
        test_size=HELD_OUT,
        stratify=bunch.target,
        random_state=derive(seed, "data", "hold-out") % 2**32,
    )
    return whole.take(torch.tensor(sorted(train))), whole.take(torch.tensor(sorted(test)))


def _folder(path: Path | None) -> tuple[Table, Table | None]:
    if path is None:
        raise DataError("data.source=folder needs a folder; give one with --data.path")
    if not path.is_dir():
        raise DataError(f"data.path={path} is not a folder; give the folder that holds the data")
    if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        return _saved(path)
    for read_files, suffix in ((_parquet, "parquet"), (_csv, "csv")):
        train = _part_files(path, ("train",), suffix)
        if train:
            test = _part_files(path, TEST_SPLITS, suffix)
            return read_files(train), read_files(test) if test else None
    inner = path / "train"
    whole = _image_tree(inner if inner.is_dir() else path)
    if whole is not None:
        held_out = [path / part for part in TEST_SPLITS if inner.is_dir()]
        return whole, next((_image_tree(folder) for folder in held_out if folder.is_dir()), None)
    found = ", ".join(sorted(entry.name for entry in path.iterdir())[:8]) or "nothing"
    raise DataError(
        f"data.path={path} holds no data that is known: found {found}; give a folder with "
        f"train.parquet, train.csv, a data set written by save_to_disk, or one folder of image "
        f"files for each class"
    )


def _part_files(path: Path, parts: Iterable[str], suffix: str) -> tuple[Path, ...]:
    """Files of the first part that has any: `train.parquet` or `train-00000-of-00002.parquet`."""
    for part in parts:
        found = [*path.glob(f"{part}.{suffix}"), *path.glob(f"{part}-*.{suffix}")]
        if found:
            return tuple(sorted(found))
    return ()


def _parquet(files: tuple[Path, ...]) -> Table:
    import pyarrow as pa
    from pyarrow import parquet

    try:
        rows = pa.concat_tables([parquet.ParquetFile(path).read() for path in files])
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(files[0], error) from error
    metadata = json.loads((rows.schema.metadata or {}).get(b"huggingface", b"{}"))
    features = metadata.get("info", {}).get("features", {})
    names = {
        column: tuple(feature["names"])
        for column, feature in features.items()
        if isinstance(feature, dict) and feature.get("_type") == "ClassLabel"
    }
    return table(rows, origin=str(files[0]), class_names=names, files=files)


def _csv(files: tuple[Path, ...]) -> Table:
    import pyarrow as pa
    from pyarrow import csv

    options = csv.ParseOptions(newlines_in_values=True)
    try:
        rows = pa.concat_tables([csv.read_csv(path, parse_options=options) for path in files])
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(files[0], error) from error
    return table(rows, origin=str(files[0]), files=files)


def _image_tree(path: Path) -> Table | None:
    """One folder for each class, image files inside; None if it is not such a tree."""
    import pyarrow as pa

    files = sorted(f for f in path.glob("*/**/*") if f.suffix.lower() in IMAGE_SUFFIXES)
    if not files:
        return None
    images = [{"bytes": None, "path": str(file)} for file in files]
    labels = [file.relative_to(path).parts[0] for file in files]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    rows = pa.table({"image": pa.array(images, kind), "label": labels})
    return table(rows, origin=str(path), files=tuple(files))


def _saved(path: Path) -> tuple[Table, Table | None]:
    import datasets

    try:
        return _parts(datasets.load_from_disk(str(path)), str(path))
    except (OSError, KeyError, json.JSONDecodeError) as error:
        raise _unreadable(path, error) from error


def _hub(name: str, subset: str) -> tuple[Table, Table | None]:
    import datasets

    if not name:
        raise DataError("data.source=hub needs the name of a data set; give one with --data.name")
    try:
        loaded = datasets.load_dataset(name, subset or None)
    except Exception as error:  # datasets, huggingface_hub and httpx each raise their own kinds
        raise DataError(
            f"data set {name!r} could not be fetched from the Hugging Face hub: {error}; check its "
            f"name and the network, or save it where there is one (save_to_disk) and give the "
            f"folder with --data.path"
        ) from error
    return _parts(loaded, name)


def _parts(
    loaded: datasets.Dataset | datasets.DatasetDict, origin: str
) -> tuple[Table, Table | None]:
    """Training and test part; a data set of one part has no test part."""
    if not isinstance(loaded, dict):
        return _from_dataset(loaded, origin), None
    splits = list(loaded)
    if "train" not in splits and len(splits) > 1:
        raise DataError(f"{origin} has no part 'train', only {', '.join(splits)}; rename one")
    test = next((split for split in TEST_SPLITS if split in splits and len(splits) > 1), None)
    train = _from_dataset(loaded["train" if "train" in splits else splits[0]], f"{origin} (train)")
    return train, _from_dataset(loaded[test], f"{origin} ({test})") if test else None


def _from_dataset(part: datasets.Dataset, origin: str) -> Table:
    import datasets

    names = {
        column: tuple(feature.names)
        for column, feature in part.features.items()
        if isinstance(feature, datasets.ClassLabel)
    }
    files = tuple(Path(file["filename"]) for file in part.cache_files)
    return table(part.with_format("arrow")[:], origin=origin, class_names=names, files=files)


def _unreadable(path: Path, error: Exception) -> DataError:
    return DataError(f"{path} cannot be read: {error}; check the file, or write it again")
