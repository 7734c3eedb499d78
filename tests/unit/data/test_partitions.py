"""Who holds which rows: disjoint, complete where it should be, the same for the same seed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tesserafl.core.errors import DataError
from tesserafl.data import PARTITIONS, DataSettings, partition, split

NUM_ROWS = 600
LABELS = torch.arange(NUM_ROWS) % 10
CLIENT_IDS = [f"writer {row % 7}" for row in range(NUM_ROWS)]


def made(settings: DataSettings, seed: int = 0) -> tuple[Tensor, ...]:
    return partition(settings, seed, num_rows=NUM_ROWS, labels=LABELS, client_ids=CLIENT_IDS)


def settings_of(kind: str, num_clients: int = 5) -> DataSettings:
    return replace(DataSettings(), partition=kind, num_clients=num_clients)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", PARTITIONS)
def test_every_row_is_given_at_most_once_and_clients_are_sorted(kind: str) -> None:
    clients = made(settings_of(kind))
    assert len(clients) == 5
    given_rows = torch.cat(clients)
    assert given_rows.dtype == torch.int64
    assert len(given_rows.unique()) == len(given_rows)
    assert all(torch.equal(rows, rows.sort().values) and len(rows) for rows in clients)


@pytest.mark.parametrize("kind", sorted(set(PARTITIONS) - {"column"}))
def test_every_row_is_given(kind: str) -> None:
    clients = made(settings_of(kind, num_clients=5))
    missing = set(range(NUM_ROWS)) - set(torch.cat(clients).tolist())
    if kind == "shards":  # classes that no client drew are left out
        held = set(LABELS[torch.cat(clients)].tolist())
        assert not {int(LABELS[row]) for row in missing} & held
    else:
        assert not missing


@pytest.mark.parametrize("kind", PARTITIONS)
def test_the_seed_decides(kind: str) -> None:
    first, again, other = (
        made(settings_of(kind)),
        made(settings_of(kind)),
        made(settings_of(kind), 1),
    )
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    differs = [not torch.equal(a, b) for a, b in zip(first, other, strict=True)]
    assert any(differs) != (kind == "column")


@pytest.mark.parametrize("kind", PARTITIONS)
def test_nothing_is_printed(kind: str, capfd: pytest.CaptureFixture[str]) -> None:
    made(settings_of(kind))
    assert capfd.readouterr() == ("", "")


@settings(max_examples=15, deadline=None)
@given(num_clients=st.integers(1, 30), seed=st.integers(0, 2**40))
def test_iid_parts_are_equal(num_clients: int, seed: int) -> None:
    clients = made(settings_of("iid", num_clients), seed)
    sizes = [len(rows) for rows in clients]
    assert sum(sizes) == NUM_ROWS and max(sizes) - min(sizes) <= 1


@settings(max_examples=15, deadline=None)
@given(num_clients=st.integers(1, 8), alpha=st.floats(0.5, 1e3), seed=st.integers(0, 2**40))
def test_dirichlet_gives_all_rows_and_enough_to_each(
    num_clients: int, alpha: float, seed: int
) -> None:
    asked = replace(settings_of("dirichlet", num_clients), alpha=alpha)
    clients = made(asked, seed)
    assert torch.cat(clients).sort().values.tolist() == list(range(NUM_ROWS))
    assert min(len(rows) for rows in clients) >= asked.min_examples


def test_dirichlet_concentrates_as_alpha_falls() -> None:
    def largest_share(alpha: float) -> float:
        clients = made(replace(settings_of("dirichlet"), alpha=alpha, min_examples=1))
        counts = torch.stack([LABELS[rows].bincount(minlength=10) for rows in clients])
        return float((counts.max(dim=0).values / counts.sum(dim=0)).mean())

    assert largest_share(0.1) > 0.6 > largest_share(100.0)


def test_shards_have_k_classes_and_leave_none_out() -> None:
    clients = made(replace(settings_of("shards", 12), classes_per_client=3))
    assert all(len(LABELS[rows].unique()) == 3 for rows in clients)
    assert len(torch.cat(clients)) == NUM_ROWS


def test_a_column_makes_one_client_of_each_value() -> None:
    clients = made(settings_of("column", num_clients=100))
    assert len(clients) == 7
    assert all(len({CLIENT_IDS[row] for row in rows.tolist()}) == 1 for rows in clients)
    assert len(torch.cat(clients)) == NUM_ROWS


def test_a_column_keeps_the_largest_clients_whole() -> None:
    ids = ["a"] * 2 + ["b"] * 5 + ["c"] * 3
    asked = settings_of("column", num_clients=2)
    clients = partition(asked, 0, num_rows=10, labels=None, client_ids=ids)
    assert [rows.tolist() for rows in clients] == [[2, 3, 4, 5, 6], [7, 8, 9]]


def test_sizes_grow_as_the_name_says() -> None:
    sizes = {kind: [len(rows) for rows in made(settings_of(kind, 4))] for kind in PARTITIONS}
    assert sizes["linear"] == [60, 120, 180, 240]
    assert sizes["square"] == [20, 80, 180, 320]
    assert sizes["exponential"] == [19, 52, 142, 387]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"alpha": 0.0}, r"data\.alpha must be positive.*0\.0"),
        ({"alpha": float("nan")}, r"data\.alpha must be positive"),
        ({"num_clients": 0}, r"data\.num_clients must be at least 1; got 0"),
        ({"num_clients": 601}, r"num_clients=601 is more than the 600 training rows; lower"),
        ({"alpha": 0.01, "min_examples": 100}, r"max number of attempts.*raise data\.alpha"),
        ({"partition": "shards", "classes_per_client": 0}, r"classes_per_client must be"),
        ({"partition": "shards", "classes_per_client": 11}, r"unique classes.*classes_per_client"),
        ({"partition": "exponential", "num_clients": 20}, r"or use linear"),
        ({"partition": "iidd"}, r"'iidd' is unknown; did you mean 'iid'"),
    ],
)
def test_what_cannot_be_made_is_refused(changes: dict[str, object], says: str) -> None:
    with pytest.raises(DataError, match=f"(?s){says}"):
        made(replace(DataSettings(), **changes))  # type: ignore[arg-type]


def test_an_empty_client_is_named() -> None:
    asked = replace(settings_of("dirichlet", 50), alpha=0.01, min_examples=0)
    with pytest.raises(DataError, match=r"leaves client \d+ of 50 without any; raise data\.alpha"):
        made(asked)


@pytest.mark.parametrize("kind", ["dirichlet", "shards"])
def test_a_partition_by_class_needs_labels(kind: str) -> None:
    with pytest.raises(DataError, match=r"no label column.*use iid"):
        partition(settings_of(kind), 0, num_rows=50, labels=None, client_ids=None)


@settings(max_examples=50, deadline=None)
@given(
    num=st.integers(1, 40),
    validation=st.floats(0, 0.5, exclude_max=True),
    test=st.floats(0, 0.5, exclude_max=True),
)
def test_a_split_is_a_partition_with_training_rows(
    num: int, validation: float, test: float
) -> None:
    rows = torch.arange(num) * 3
    parts = split(rows, validation=validation, test=test, seed=1, client=2)
    assert torch.equal(torch.cat(parts).sort().values, rows)
    assert len(parts[0]) > 0
    again = split(rows, validation=validation, test=test, seed=1, client=2)
    assert all(torch.equal(a, b) for a, b in zip(parts, again, strict=True))


def test_a_split_differs_between_clients_and_has_the_asked_sizes() -> None:
    rows = torch.arange(100)
    first = split(rows, validation=0.2, test=0.1, seed=0, client=0)
    other = split(rows, validation=0.2, test=0.1, seed=0, client=1)
    assert [len(part) for part in first] == [70, 20, 10]
    assert not torch.equal(first[1], other[1])


@pytest.mark.parametrize(
    ("validation", "test", "says"),
    [(1.0, 0.0, "data.validation"), (0.0, -0.1, "data.test"), (0.5, 0.5, "below 1")],
)
def test_fractions_leave_something_to_train_on(validation: float, test: float, says: str) -> None:
    with pytest.raises(DataError, match=says):
        split(torch.arange(9), validation=validation, test=test, seed=0, client=0)
