"""From settings to clients, end to end."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_data import SaveRows, png, random_pixels

from tesserafl.core.errors import DataError
from tesserafl.data import DataSettings, Examples, FederatedData, load


def tensors(data: FederatedData) -> Iterator[torch.Tensor]:
    parts: list[Examples] = [data.test]
    for client in data.clients:
        parts += [client.train, client.validation, client.test]
    for part in parts:
        yield from (part.inputs, part.labels)


def test_digits_end_to_end() -> None:
    data = load(DataSettings(validation=0.1, test=0.1), seed=0)
    spec = data.spec
    assert (spec.kind, spec.task, spec.shape) == ("image", "image-classification", (1, 8, 8))
    assert spec.class_names == tuple("0123456789") and spec.num_classes == 10
    assert len(data.clients) == 20 and len(data.test) == 360
    held = [len(c.train) + len(c.validation) + len(c.test) for c in data.clients]
    assert sum(held) == 1437 and min(held) >= 10
    inputs, labels = data.clients[0].train.batch(torch.arange(4))
    assert inputs.dtype == torch.float32 and labels.dtype == torch.int64
    assert data.test.batch(torch.arange(360))[0].aminmax() == (-1.0, 1.0)


def test_equal_seeds_give_equal_data() -> None:
    settings = DataSettings(validation=0.2, max_train=600, max_test=50)
    first, again = load(settings, seed=3), load(settings, seed=3)
    assert all(torch.equal(a, b) for a, b in zip(tensors(first), tensors(again), strict=True))
    other = load(settings, seed=4)
    assert not torch.equal(first.test.labels, other.test.labels)
    assert len(first.test) == 50
    assert sum(len(c.train) + len(c.validation) for c in first.clients) == 600


def test_sub_sampling_does_not_change_the_classes() -> None:
    data = load(DataSettings(max_train=3, num_clients=1, partition="iid", max_test=1), seed=0)
    assert data.spec.num_classes == 10
    with pytest.raises(DataError, match=r"data\.max_train must be at least 1.*got 0"):
        load(DataSettings(max_train=0), seed=0)


def test_images_from_a_folder(save_parquet: SaveRows) -> None:
    pixels = random_pixels(12, 4, 4, 3)
    save_parquet("train", image=[png(p, "WEBP") for p in pixels], label=[0, 1] * 6)
    folder = save_parquet("test", image=[png(p) for p in pixels[:3]], label=[0, 1, 0])
    settings = DataSettings(path=folder, partition="iid", num_clients=3)
    first, again = load(settings, seed=0), load(settings, seed=0)
    assert first.spec.shape == (3, 4, 4)
    assert [len(client.train) for client in first.clients] == [4, 4, 4]
    assert torch.equal(first.test.inputs, torch.from_numpy(pixels[:3]).permute(0, 3, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(tensors(first), tensors(again), strict=True))
    assert load(replace(settings, image_size=2), seed=0).spec.shape == (3, 2, 2)


def test_a_label_out_of_range_is_named(save_parquet: SaveRows) -> None:
    save_parquet("train", text=["a", "b"], label=[0, 1])
    folder = save_parquet("test", text=["c"], label=[2])
    with pytest.raises(DataError, match=r"test\.parquet, row 0: 'label' is 2; .*0\.\.1"):
        load(DataSettings(path=folder, partition="iid", num_clients=1), seed=0)


def test_train_and_test_images_must_agree(save_parquet: SaveRows) -> None:
    save_parquet("train", image=[png(random_pixels(1, 4, 4)[0])], label=[0])
    folder = save_parquet("test", image=[png(random_pixels(1, 5, 5)[0])], label=[0])
    settings = DataSettings(path=folder, partition="iid", num_clients=1)
    with pytest.raises(DataError, match=r"\(1, 5, 5\), of the training part \(1, 4, 4\)"):
        load(settings, seed=0)
    assert load(replace(settings, image_size=4), seed=0).spec.shape == (1, 4, 4)


def test_vectors_from_csv(tmp_path: Path) -> None:
    lines = [f"{row},{row / 2},{row % 3}" for row in range(30)]
    (tmp_path / "train.csv").write_text("\n".join(["x,y,label", *lines]))
    settings = DataSettings(path=tmp_path, num_clients=2, partition="iid")
    data = load(settings, seed=0)
    assert (data.spec.kind, data.spec.shape, data.spec.num_classes) == ("vector", (2,), 3)
    rows = data.clients[0].train.inputs
    assert torch.equal(rows[:, 0], rows[:, 1] * 2)
    assert torch.equal(rows[:, 0].long() % 3, data.clients[0].train.labels)
    assert len(data.test) == 6


def test_text_classification(save_parquet: SaveRows) -> None:
    save_parquet("train", text=["good", "bad", "fine"], label=["+", "-", "+"])
    folder = save_parquet("test", text=["a"], label=["-"])
    settings = DataSettings(path=folder, partition="iid", num_clients=1, sequence_length=4)
    data = load(settings, seed=0)
    spec = data.spec
    assert (spec.kind, spec.task, spec.shape) == ("tokens", "text-classification", (4,))
    assert (spec.vocab_size, spec.pad_id, spec.class_names) == (258, 256, ("+", "-"))
    assert data.clients[0].train.inputs.tolist()[:2] == [[*b"good"], [*b"bad", 257]]
    assert data.test.inputs.tolist() == [[97, 257, 256, 256]] and data.test.labels.tolist() == [1]
    with pytest.raises(DataError, match=r"data\.sequence_length must be at least 1; got 0"):
        load(replace(settings, sequence_length=0), seed=0)


def test_language_modelling_joins_texts_of_one_client_only(save_parquet: SaveRows) -> None:
    save_parquet("train", text=["ab", "x", "c"], who=["p", "q", "p"])
    folder = save_parquet("test", text=["abc"], who=["p"])
    settings = DataSettings(
        path=folder, partition="column", partition_column="who", sequence_length=3
    )
    data = load(settings, seed=0)
    assert (data.spec.task, data.spec.num_classes, data.spec.class_names) == ("causal-lm", 258, ())
    first, second = (client.train for client in data.clients)
    assert first.inputs.tolist() == [[97, 98, 257], [99, 256, 256]]
    assert first.labels.tolist() == [[98, 257, 99], [257, -100, -100]]
    assert second.inputs.tolist() == [[120, 256, 256]]
    assert data.test.labels.tolist() == [[98, 99, 257]]
    assert tuple(data.clients[0].validation.inputs.shape) == (0, 3)


def test_language_modelling_can_be_partitioned_by_class(save_parquet: SaveRows) -> None:
    save_parquet("train", text=["a", "b", "c", "d"], label=[0, 1, 0, 1])
    folder = save_parquet("test", text=["e"])  # the test part needs no labels then
    settings = DataSettings(
        path=folder, task="causal-lm", partition="shards", classes_per_client=1, num_clients=2
    )
    clients = load(settings, seed=0).clients
    held = [set(client.train.inputs[0, :3].tolist()) - {257} for client in clients]
    assert held == [{97, 99}, {98, 100}]


def test_partition_columns_are_checked(save_parquet: SaveRows) -> None:
    save_parquet("train", text=["a", "b"], who=["p", None])
    folder = save_parquet("test", text=["b"])
    settings = DataSettings(path=folder, partition="column")
    with pytest.raises(DataError, match=r"one of text, who with --data\.partition-column"):
        load(settings, seed=0)
    with pytest.raises(DataError, match=r"row 1: 'who' is empty"):
        load(replace(settings, partition_column="who"), seed=0)
    with pytest.raises(DataError, match="no column 'whom'"):
        load(replace(settings, partition_column="whom"), seed=0)


def test_a_client_without_a_token_to_predict_is_named(save_parquet: SaveRows) -> None:
    save_parquet("train", text=["a", ""], who=["p", "q"])
    settings = DataSettings(
        path=save_parquet("test", text=["b"]), partition="column", partition_column="who"
    )
    with pytest.raises(DataError, match=r"client 1 has no token to predict.*train\.parquet"):
        load(settings, seed=0)


def test_nothing_heavy_is_imported_with_the_package() -> None:
    code = (
        "import sys, tesserafl.data; "
        "print({'datasets', 'flwr_datasets', 'transformers', 'sklearn', 'pyarrow', 'PIL'} "
        "& set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_public_examples_are_taken_from_the_clients() -> None:
    settings = DataSettings(num_clients=4, partition="iid")
    plain, data = load(settings, seed=0), load(replace(settings, public=100), seed=0)
    assert plain.public is None and data.public is not None
    assert len(data.public) == 100 and data.public.inputs.dtype == torch.uint8
    rows = [data.public.inputs, *(client.train.inputs for client in data.clients)]
    before = torch.cat([client.train.inputs for client in plain.clients]).flatten(1)
    after = torch.cat(rows).flatten(1)
    assert sorted(before.tolist()) == sorted(after.tolist())
    again, other = load(replace(settings, public=100), 0), load(replace(settings, public=100), 1)
    assert again.public is not None and torch.equal(again.public.inputs, data.public.inputs)
    assert other.public is not None and not torch.equal(other.public.inputs, data.public.inputs)
    for wrong in (-1, 1437):
        with pytest.raises(DataError, match=rf"data\.public={wrong} must be"):
            load(replace(settings, public=wrong), seed=0)


def test_named_clients_keep_their_own_rows_beside_public_ones(save_parquet: SaveRows) -> None:
    names = [f"c{i % 3}" for i in range(30)]
    folder = save_parquet(
        "train",
        image=[png(p) for p in random_pixels(30, 4, 4, 3)],
        label=[i % 3 for i in range(30)],
        who=names,
    )
    settings = DataSettings(path=folder, partition="column", partition_column="who", public=6)
    data = load(replace(settings, num_clients=3), seed=0)
    # The label is the client's number: nobody has another's rows.
    assert [client.train.labels.unique().numel() for client in data.clients] == [1, 1, 1]
    assert data.public is not None and len(data.public) == 6
