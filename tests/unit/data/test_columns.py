"""What columns mean, and labels and vectors out of them."""

from __future__ import annotations

from dataclasses import replace

import pyarrow as pa
import pytest
import torch

from tesserafl.core.errors import DataError
from tesserafl.data import DataSettings
from tesserafl.data.columns import choose, read_labels, read_vectors
from tesserafl.data.tables import Table, table

IMAGE = [{"bytes": b"", "path": None}] * 2


def made(**columns: object) -> Table:
    return table(pa.table(columns), origin="here")


@pytest.mark.parametrize(
    ("columns", "task", "inputs", "label"),
    [
        ({"image": IMAGE, "label": [0, 1]}, "image-classification", ("image",), "label"),
        ({"img": IMAGE, "fine_label": [0, 1]}, "image-classification", ("img",), "fine_label"),
        ({"text": ["a", "b"], "labels": [0, 1]}, "text-classification", ("text",), "labels"),
        ({"text": ["a", "b"], "role": ["x", "y"]}, "causal-lm", ("text",), None),
        (
            {"x": [1, 2], "y": [0.5, 1], "label": [0, 1]},
            "vector-classification",
            ("x", "y"),
            "label",
        ),
    ],
)
def test_the_task_is_read_off_the_columns(
    columns: dict[str, object], task: str, inputs: tuple[str, ...], label: str | None
) -> None:
    chosen = choose(DataSettings(), made(**columns))
    assert (chosen.task, chosen.inputs, chosen.label) == (task, inputs, label)


def test_named_columns_win_and_the_client_is_no_feature() -> None:
    rows = made(x=[1, 2], y=[3, 4], who=[5, 6], kind=["a", "b"])
    settings = DataSettings(label_column="kind", partition_column="who")
    assert choose(settings, rows).inputs == ("x", "y")
    assert choose(replace(settings, input_column="y"), rows).inputs == ("y",)


def test_text_with_labels_can_be_modelled_as_language() -> None:
    chosen = choose(DataSettings(task="causal-lm"), made(text=["a"], label=[0]))
    assert chosen.task == "causal-lm"


@pytest.mark.parametrize(
    ("settings", "columns", "says"),
    [
        ({}, {"image": IMAGE}, r"no label column \(label, labels.*its columns are image.*--data\."),
        ({}, {"image": ["a.png"], "label": [0]}, "'image' of here holds string, not image"),
        ({}, {"words": ["a"], "label": [0]}, r"not all numbers.*--data\.input-column"),
        ({"label_column": "kind"}, {"text": ["a"]}, "no column 'kind'; its columns are text"),
        ({"input_column": "kind"}, {"text": ["a"]}, "no column 'kind'"),
        ({"task": "causal-lm"}, {"image": IMAGE}, r"tokens inputs, but column 'image'"),
        ({"task": "regression"}, {"text": ["a"]}, "'regression' is unknown; allowed: auto"),
    ],
)
def test_what_does_not_fit_is_refused(
    settings: dict[str, object], columns: dict[str, object], says: str
) -> None:
    with pytest.raises(DataError, match=says):
        choose(replace(DataSettings(), **settings), made(**columns))  # type: ignore[arg-type]


def test_names_are_numbered_in_sorted_order_and_the_test_part_follows() -> None:
    labels, names = read_labels(made(label=["dog", "ant", "dog"]), "label")
    assert labels.tolist() == [1, 0, 1] and names == ("ant", "dog")
    assert read_labels(made(label=["dog"]), "label", names)[0].tolist() == [1]
    with pytest.raises(DataError, match=r"row 1: 'label' is 'cat'.*allowed: ant, dog"):
        read_labels(made(label=["ant", "cat"]), "label", names)


def test_numbers_keep_their_value() -> None:
    labels, names = read_labels(made(label=[2.0, 0.0]), "label")
    assert labels.tolist() == [2, 0] and labels.dtype == torch.int64 and names == ("0", "1", "2")
    assert read_labels(made(label=[True, False]), "label")[0].tolist() == [1, 0]


@pytest.mark.parametrize(
    ("values", "names", "says"),
    [
        ([0, -1], None, r"row 1: 'label' is -1; allowed: whole numbers 0, 1, 2"),
        ([0, 3], ("0", "1"), r"row 1: 'label' is 3; allowed: whole numbers 0\.\.1"),
        ([0.5], None, r"row 0: 'label' is 0\.5"),
        ([float("nan")], None, r"row 0: 'label' is nan"),
        ([0, None], None, r"row 1: 'label' is empty"),
    ],
)
def test_labels_out_of_range_are_named(
    values: list[object], names: tuple[str, ...] | None, says: str
) -> None:
    with pytest.raises(DataError, match=f"here, {says}"):
        read_labels(made(label=values), "label", names)


def test_a_row_is_named_by_its_number_in_the_source() -> None:
    rows = made(label=[0, 1, -4]).take(torch.tensor([2, 0]))
    with pytest.raises(DataError, match="here, row 2: 'label' is -4"):
        read_labels(rows, "label")


def test_vectors_come_from_columns_or_from_lists() -> None:
    expected = torch.tensor([[1.0, 0.5], [2.0, 1.5]])
    assert torch.equal(read_vectors(made(a=[1, 2], b=[0.5, 1.5]), ("a", "b")), expected)
    assert torch.equal(read_vectors(made(v=expected.tolist()), ("v",)), expected)


@pytest.mark.parametrize(
    ("columns", "says"),
    [
        ({"a": [1.0, 2.0], "b": [1.0, None]}, "row 1: 'b' is missing"),
        ({"a": [float("inf"), 2.0]}, "row 0: 'a' is missing or not a finite"),
        ({"v": [[1.0, 2.0], [3.0]]}, "v cannot be read as vectors of equal length"),
        ({"v": [[1.0, 2.0], [3.0, None]]}, r"row 1: 'v\[1\]' is missing"),
    ],
)
def test_vectors_that_are_not_finite_are_named(columns: dict[str, object], says: str) -> None:
    with pytest.raises(DataError, match=says):
        read_vectors(made(**columns), tuple(columns))


def test_numbers_are_not_taken_for_the_training_parts_names() -> None:
    with pytest.raises(DataError, match="use the same names in both parts"):
        read_labels(made(label=[0, 1]), "label", ("bad", "good"))


def test_a_label_that_would_make_millions_of_classes_is_refused() -> None:
    with pytest.raises(DataError, match="3000000"):
        read_labels(made(label=[0, 3_000_000]), "label")
