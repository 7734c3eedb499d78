"""What may be summed and what may not, one rule at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from tesserafl.core.answers import check_part, check_update, most_header_bytes
from tesserafl.core.axis import Tie, Width
from tesserafl.core.errors import UpdateError
from tesserafl.core.fit import Training
from tesserafl.core.messages import Client, Task, Update, Wanted
from tesserafl.core.model import Model
from tesserafl.core.submodel import SubModel, View
from tesserafl.core.wire import decode_update, encode_update, unpack

LARGE = {"w": torch.zeros(5, 6), "b": torch.zeros(5)}
ROWS, COLUMNS = slice(0, 5), torch.tensor([4, 1, 5])
PART = SubModel({"units": 3}, {"w": View("w", (ROWS, COLUMNS)), "b": View("b", (ROWS,))})
MODEL = Model(
    build=lambda sizes: torch.nn.Linear(1, 1),
    sizes={"units": 6, "classes": 5},
    widths={"units": Width(6, 1, "units"), "classes": Width(5, 1, "classes", cuttable=False)},
    depths={},
    ties={"w": (Tie("classes", (1,)), Tie("units", (1,))), "b": (Tie("classes", (1,)),)},
    shapes={"w": (5, 6), "b": (5,)},
)
TASK = Task(
    round=3,
    client=Client(id=2, num_examples=10),
    submodel=PART,
    params={"w": torch.zeros(5, 3), "b": torch.zeros(5)},
    training=Training(epochs=2),
)
UPDATE = Update(
    round=3,
    client=2,
    submodel=PART,
    delta={"w": torch.ones(5, 3), "b": torch.ones(5)},
    num_examples=10,
    num_steps=20,
    metrics={"loss": 1.0},
)
MASKED = replace(TASK, training=replace(TASK.training, mask_absent_classes=True))


def check(task: Task, update: Update) -> None:
    check_update(task, update, LARGE, MODEL)


def test_an_answer_passes() -> None:
    check(TASK, UPDATE)
    again, _ = decode_update(encode_update(UPDATE, {}), TASK)  # another object, the same places
    assert again.submodel is not PART
    check(TASK, again)


def delta(**changes: torch.Tensor) -> Update:
    return replace(UPDATE, delta={**UPDATE.delta, **changes})


def metrics(**values: float) -> Update:
    return replace(UPDATE, metrics=values)


def part(name: str, *index: slice | torch.Tensor, large: str | None = None) -> Update:
    views = {**PART.views, name: View(large or name, tuple(index))}
    return replace(UPDATE, submodel=SubModel(PART.sizes, views))


WRONG: dict[str, tuple[Callable[[], Update], str]] = {
    "another round": (
        lambda: replace(UPDATE, round=2),
        "in round 2; asked was client 2 in round 3",
    ),
    "another client": (lambda: replace(UPDATE, client=1), "client 1 in round 3"),
    "more examples": (lambda: replace(UPDATE, num_examples=11), "11 examples; client 2 has 10"),
    "fewer than none": (lambda: replace(UPDATE, num_examples=-1), "-1 examples"),
    "more steps": (lambda: replace(UPDATE, num_steps=21), "21 steps; its task has 20"),
    "no number": (lambda: metrics(loss=float("nan")), "'loss' is nan"),
    "infinite": (lambda: metrics(loss=float("-inf")), "'loss' is -inf"),
    "a count below 0": (lambda: metrics(trained_entries=-1.0), "allowed is 0"),
    "a name of ours": (lambda: metrics(client=7.0), "no metric 'client'"),
    "a name that is none": (lambda: metrics(**{"../x": 1.0}), r"no metric '\.\./x'"),
    "many": (lambda: metrics(**{f"m{n}": 1.0 for n in range(65)}), "65 metrics; allowed are 64"),
    "a change less": (
        lambda: replace(UPDATE, delta={"b": torch.ones(5)}),
        "lacks the change of 'w'",
    ),
    "a change more": (lambda: delta(c=torch.ones(1)), "holds 'c'"),
    "a tensor more": (lambda: replace(UPDATE, extra={"x": torch.ones(1)}), "holds 'x'; its task"),
    "double": (lambda: delta(b=torch.ones(5, dtype=torch.float64)), "float64; the model's is"),
    "whole numbers": (lambda: delta(b=torch.ones(5, dtype=torch.int64)), "int64"),
    "another shape": (lambda: delta(b=torch.ones(4)), r"shape \(4,\); expected is \(5,\)"),
    "not finite": (lambda: delta(b=torch.full((5,), torch.nan)), "'b' reaches nan"),
    "too large": (lambda: delta(b=torch.full((5,), 257.0)), "'b' reaches 257"),
    "other columns": (
        lambda: part("w", ROWS, torch.tensor([4, 1, 2])),
        "other rows in dimension 1",
    ),
    "other order": (lambda: part("w", ROWS, torch.tensor([1, 4, 5])), "other rows in dimension 1"),
    "another place": (lambda: part("w", ROWS, large="b"), "which the task's does not"),
    "a dimension more": (lambda: part("b", ROWS, ROWS), "which the task's does not"),
    "another name": (
        lambda: replace(UPDATE, submodel=SubModel(PART.sizes, {"w": PART.views["w"]})),
        "has 1 parameters; the task's has 2",
    ),
    "other sizes": (
        lambda: replace(UPDATE, submodel=SubModel({"units": 4}, PART.views)),
        "other sizes",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_does_not_answer_is_refused(what: str) -> None:
    made, text = WRONG[what]
    with pytest.raises(UpdateError, match=text):
        check(TASK, made())


def of_classes(kept: torch.Tensor, bias: torch.Tensor | None = None) -> Update:
    bias = kept if bias is None else bias
    views = {"w": View("w", (kept, COLUMNS)), "b": View("b", (bias,))}
    return replace(
        UPDATE,
        submodel=SubModel(PART.sizes, views),
        delta={"w": torch.ones(len(kept), 3), "b": torch.ones(len(bias))},
    )


def test_with_masked_classes_rows_of_classes_alone_may_be_left_out() -> None:
    two = torch.tensor([1, 3])
    check(MASKED, of_classes(two))
    with pytest.raises(UpdateError, match="other rows"):
        check(TASK, of_classes(two))
    with pytest.raises(UpdateError, match="lacks rows in dimension 0"):
        check(MASKED, of_classes(two, torch.tensor([1, 2])))  # two classes, not the same two
    with pytest.raises(UpdateError, match="other rows"):
        check(MASKED, of_classes(torch.tensor([1, 1])))  # would count twice
    with pytest.raises(UpdateError, match="other rows"):
        check(MASKED, of_classes(torch.tensor([1, 7])))
    fewer = part("w", ROWS, torch.tensor([4, 1]))
    with pytest.raises(UpdateError, match="lacks rows in dimension 1"):
        check(MASKED, replace(fewer, delta={**UPDATE.delta, "w": torch.ones(5, 2)}))


def test_further_tensors_are_those_that_the_task_wants() -> None:
    task = replace(TASK, wanted=Wanted(deltas=frozenset(), extra={"gate": (2, 3)}))
    good = replace(UPDATE, delta={}, extra={"gate": torch.ones(2, 3)})
    check(task, good)
    check(task, replace(good, submodel=SubModel(PART.sizes, {})))
    for wrong, text in (
        ({}, "lacks the tensor 'gate'"),
        ({"gate": torch.ones(3, 2)}, r"\[3, 2\]; wanted is torch.float32 \[2, 3\]"),
        ({"gate": torch.ones(2, 3, dtype=torch.int32)}, "int32"),
        ({"gate": torch.full((2, 3), torch.inf)}, "reaches inf"),
    ):
        with pytest.raises(UpdateError, match=text):
            check(task, replace(good, extra=wrong))


def test_values_in_place_of_changes_need_their_places() -> None:
    values = dict(UPDATE.delta)
    shapes = {name: tuple(t.shape) for name, t in values.items()}
    task = replace(TASK, wanted=Wanted(deltas=frozenset(), extra=shapes))
    check(task, replace(UPDATE, delta={}, extra=values))
    with pytest.raises(UpdateError, match="has 0 parameters"):
        check(task, replace(UPDATE, delta={}, extra=values, submodel=SubModel(PART.sizes, {})))


def test_what_a_method_divides_by_is_there_and_no_less_than_one() -> None:
    task = replace(TASK, wanted=Wanted(divisors=frozenset({"steps_taken"})))
    check(task, metrics(steps_taken=1.0))
    for wrong in (metrics(loss=1.0), metrics(steps_taken=0.0), metrics(steps_taken=1e-300)):
        with pytest.raises(UpdateError, match="steps_taken"):
            check(task, wrong)


def test_a_claim_costs_nothing_before_it_is_refused() -> None:
    # 2^120 entries, and many names for a list that each would copy to tell it apart.
    huge = slice(0, 1 << 60)
    claims = {
        "huge": part("w", huge, huge),
        "long": part("w", ROWS, torch.zeros(1 << 20, dtype=torch.int64)),
    }
    for update in claims.values():
        for task in (TASK, MASKED):
            with pytest.raises(UpdateError, match="other rows"):
                check_part(task, update.submodel)


def test_a_header_has_room_for_every_honest_answer_and_not_for_much_more() -> None:
    data = encode_update(UPDATE, {})
    length = int.from_bytes(data[:8], "little")
    most = most_header_bytes(TASK)
    assert length < most < 200_000
    unpack(data, max_header_bytes=most)
    names = {f"\u03b8.{n}.\U0001f9e9" * 20: View("w", (ROWS, COLUMNS)) for n in range(2000)}
    task = replace(TASK, submodel=SubModel({}, names), params={})
    values = {name: torch.ones(1) for name in names}
    data = encode_update(replace(UPDATE, submodel=task.submodel, delta=values), {})
    assert int.from_bytes(data[:8], "little") < most_header_bytes(task)
