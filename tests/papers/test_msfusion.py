"""MSfusion by hand, as reconstructed: Xie and Li, 2024. See docs/methods/msfusion.md."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from worked import (
    TRAINING,
    answer,
    clients,
    mlp,
    rounds_of,
    share,
    state_of,
    times_trained,
    trained,
    units_of,
    values,
)

from tesserafl.core.errors import ConfigError, ModelError
from tesserafl.core.fit import CrossEntropy
from tesserafl.core.messages import Client, Memory, Task
from tesserafl.core.method import State
from tesserafl.core.model import Model
from tesserafl.core.params import Params, sha256
from tesserafl.data.examples import Examples
from tesserafl.engines.client import ClientWorker
from tesserafl.methods import FedAvg, FedRolex, HeteroFL, MethodSettings, MSfusion
from tesserafl.methods._contrast import Contrast
from tesserafl.methods._shift import adapted, overlap_at, start_of, union_of, widest_overlap

# --- Double shifting ------------------------------------------------------------------------------


def fixed(overlap: float, **settings: Any) -> MSfusion:
    """With one overlap in all rounds, and no contrast."""
    return MSfusion(overlap_schedule="constant", overlap=overlap, contrast=0.0, **settings)


def kept(
    method: MSfusion, model: Model, count: int, round: int, axis: str = "hidden1"
) -> list[list[int]]:
    """The units of every participant, ascending."""
    (tasks,) = rounds_of(method, model, count, [round])
    return [units_of(model, task)[axis] for task in tasks]


def test_two_participants_by_hand() -> None:
    # K = 8, w = 4, c = 1/2: the gap is round(4 / 2) = 2.
    model, method = mlp(8), fixed(0.5, ratio=(0.5,))
    # t = 0: they start at 0 and 2. t = 3: at 3 and 5, and 5 + 3 = 8 is 0.
    assert kept(method, model, 2, 0) == [[0, 1, 2, 3], [2, 3, 4, 5]]
    assert kept(method, model, 2, 3) == [[3, 4, 5, 6], [0, 5, 6, 7]]
    # t = 5: at 5 and 7: 5 6 7 0 and 7 0 1 2. t = 8: all round once.
    assert kept(method, model, 2, 5) == [[0, 5, 6, 7], [0, 1, 2, 7]]
    assert kept(method, model, 2, 8) == kept(method, model, 2, 0)


def test_three_participants_by_hand() -> None:
    # K = 10, w = 4, c = 1/4: the gap is round(4 x 3/4) = 3.
    model, method = mlp(10), fixed(0.25, ratio=(0.4,))
    assert kept(method, model, 3, 0) == [[0, 1, 2, 3], [3, 4, 5, 6], [6, 7, 8, 9]]
    # t = 7: at 7, 10 - 10 = 0 and 13 - 10 = 3
    assert kept(method, model, 3, 7) == [[0, 7, 8, 9], [0, 1, 2, 3], [3, 4, 5, 6]]


def test_five_participants_by_hand() -> None:
    # K = 6, w = 2, c = 1/2: the gap is 1; rank 4 starts at 4.
    model, method = mlp(6), fixed(0.5, ratio=(1 / 3,))
    assert kept(method, model, 5, 0) == [[0, 1], [1, 2], [2, 3], [3, 4], [4, 5]]
    # t = 4: at 4, 5, 6 - 6 = 0, 1, 2
    assert kept(method, model, 5, 4) == [[4, 5], [0, 5], [0, 1], [1, 2], [2, 3]]


def test_a_gap_of_a_half_is_rounded_up() -> None:
    # w = 5, c = 1/2: 2.5 becomes 3. (Python's round gives 2.)
    assert kept(fixed(0.5, ratio=(0.5,)), mlp(10), 2, 0)[1] == [3, 4, 5, 6, 7]


def test_unequal_widths_add_up_their_gaps() -> None:
    # K = 8, mu = 1/2 and 1/4 in turn: w = 4 2 4 2, c = 1/2: gaps 2 1 2, starts 0 2 3 5
    model, method = mlp(8), fixed(0.5, ratio=(0.5, 0.25))
    assert kept(method, model, 4, 0) == [[0, 1, 2, 3], [2, 3], [3, 4, 5, 6], [5, 6]]
    # t = 6: starts 6 0 1 3
    assert kept(method, model, 4, 6) == [[0, 1, 6, 7], [0, 1], [1, 2, 3, 4], [3, 4]]


def test_every_layer_has_gaps_of_its_own_width_and_wraps_at_its_own_end() -> None:
    # hidden1: K = 4, w = 2, gap 1; hidden2: K = 12, w = 6, gap 3. Rank 1 in round 3: 4 - 4 and 6
    (tasks,) = rounds_of(fixed(0.5, ratio=(0.5,)), mlp(4, 12), 2, [3])
    assert units_of(mlp(4, 12), tasks[1]) == {"hidden1": [0, 1], "hidden2": [6, 7, 8, 9, 10, 11]}


def test_ranks_count_those_that_take_part_whatever_the_order() -> None:
    # Of 1 4 9, in any order: rank 0 1 2. Ratios go by the client: 4 is even, 1 and 9 are odd.
    model, method = mlp(8), fixed(0.0, ratio=(0.5, 0.25))
    state = state_of(model)
    asked = [Client(id=n, num_examples=1) for n in (9, 1, 4)]
    tasks = list(method.configure(model, state, asked, TRAINING))
    # w = 2 (client 1), 4 (4), 2 (9), side by side
    assert [task.client.id for task in tasks] == [9, 1, 4]
    assert [units_of(model, task)["hidden1"] for task in tasks] == [[6, 7], [0, 1], [2, 3, 4, 5]]


def test_the_stride_moves_all_windows() -> None:
    # t = 2, stride 3: 6 and 6 + 2 = 8 - 8
    model = mlp(8)
    assert kept(fixed(0.5, ratio=(0.5,), stride=3), model, 2, 2) == [[0, 1, 6, 7], [0, 1, 2, 3]]
    still = fixed(0.5, ratio=(0.5,), stride=0)
    assert kept(still, model, 2, 5) == kept(still, model, 2, 0)


def test_staggered_layers_by_hand() -> None:
    # K = 8 on both, w = 2, c = 1/2, gap 1. Layer 0 as ever: starts 0 1 2.
    # Layer 1: gaps 1 x (1 + 1): 0 2 4.
    model, method = mlp(8, 8), fixed(0.5, ratio=(0.25,), layer_phase="staggered")
    assert kept(method, model, 3, 0, "hidden1") == [[0, 1], [1, 2], [2, 3]]
    assert kept(method, model, 3, 0, "hidden2") == [[0, 1], [2, 3], [4, 5]]
    # t = 4 = ceil(8 / 2): layer 1 is one width further: 4 + 2 + 0 2 4 = 6, 8 - 8, 10 - 8
    assert kept(method, model, 3, 4, "hidden1") == [[4, 5], [5, 6], [6, 7]]
    assert kept(method, model, 3, 4, "hidden2") == [[6, 7], [0, 1], [2, 3]]
    assert kept(method, model, 3, 3, "hidden2") == [[3, 4], [5, 6], [0, 7]]


def test_staggered_layers_train_pairs_that_one_offset_never_does() -> None:
    # One offset: a pair is trained if it lies in a window, |i - j| < w on the ring, 2 w - 1 of K.
    model = mlp(16, 16)
    counts = {
        phase: times_trained(
            model, rounds_of(fixed(0.5, ratio=(0.25,), layer_phase=phase), model, 4, range(64))
        )
        for phase in ("same", "staggered")
    }
    assert share(counts["same"]["layers.1.weight"]) == 7 / 16
    assert share(counts["staggered"]["layers.1.weight"]) >= 12 / 16
    for each in counts.values():
        assert share(each["layers.0.weight"]) == share(each["head.weight"]) == 1.0


@given(units=st.integers(1, 60), data=st.data())
def test_neighbours_share_the_overlap(units: int, data: st.DataObject) -> None:
    width = data.draw(st.integers(1, units))
    overlap, round = data.draw(st.floats(0, 1)), data.draw(st.integers(0, 200))
    stride, count = data.draw(st.integers(0, 5)), data.draw(st.integers(2, 6))

    def start(rank: int) -> int:
        return start_of(
            [width] * count,
            rank,
            units,
            overlap,
            round=round,
            stride=stride,
            axis=data.draw(st.integers(0, 3)),
            phase="same",
        )

    starts = [start(rank) for rank in range(count)]
    assert starts[0] == stride * round % units
    (gap,) = {(b - a) % units for a, b in itertools.pairwise(starts)}
    expected = (1 - overlap) * width
    if 0 < expected < 1:  # never none but at full overlap: narrow windows would all be the same
        expected = 1
    assert min(abs(gap - expected), abs(gap + units - expected)) <= 0.5


@given(
    units=st.integers(1, 200),
    ratios=st.lists(st.floats(0.01, 1.0), min_size=1, max_size=8),
    overlap=st.floats(0, 1),
    round=st.integers(0, 500),
)
def test_the_union_of_a_round_is_what_the_formula_says(
    units: int, ratios: list[float], overlap: float, round: int
) -> None:
    # A width is rounded up by less than 1, a gap to the nearest: the union ends less than
    # 1.5 (N - 1) + 1 units away from the formula's.
    sizes = [math.ceil(round_ * units) for round_ in ratios]
    held: set[int] = set()
    for rank, width in enumerate(sizes):
        start = start_of(sizes, rank, units, overlap, round=round, stride=1, axis=0, phase="same")
        held |= {(start + j) % units for j in range(width)}
    tolerance = 1.5 * (len(sizes) - 1) + 1
    assert abs(len(held) - units * union_of(ratios, overlap)) <= tolerance


def test_the_rank_that_reaches_furthest_ends_the_union() -> None:
    assert union_of((0.5, 0.25), 1.0) == 0.5
    assert union_of((0.9, 0.2), 0.5) == 0.9
    assert union_of((0.25,) * 3, 0.5) == 0.5  # 1/4 (1 + 2 x 1/2)
    assert widest_overlap((1.0, 0.25)) == widest_overlap((0.25, 1.0)) == 1.0
    assert widest_overlap((0.5, 0.75)) == pytest.approx(0.5)  # (1 - c) / 2 + 3/4 = 1


@given(count=st.integers(1, 12), width=st.integers(1, 12), times=st.integers(1, 6), data=st.data())
def test_every_unit_is_trained_in_a_round_iff_the_overlap_leaves_it(
    count: int, width: int, times: int, data: st.DataObject
) -> None:
    # Nothing is rounded here: K = times w, and the gap is a whole number.
    units, gap = width * times, data.draw(st.integers(0, width))
    overlap, ratios = 1 - gap / width, [1 / times] * count
    held = {
        (start_of([width] * count, r, units, overlap, round=5, stride=1, axis=0, phase="same") + j)
        % units
        for r in range(count)
        for j in range(width)
    }
    full = overlap <= widest_overlap(ratios) + 1e-9
    assert full == (len(held) == units)
    assert len(held) == pytest.approx(units * union_of(ratios, overlap))


# --- What it becomes with some of it left out -----------------------------------------------------

LABELS = {0: [0, 1, 1], 1: [1, 0, 1], 2: [0, 0, 1], 3: [1, 1, 0]}


def bits_of(method: MethodSettings, rounds: int = 4) -> list[str]:
    """Of every round's state, four clients of unequal numbers of examples really training."""
    model, asked = mlp(8, 4), clients(3, 6, 9, 12)
    state, seen = method.init(model, 1, rounds), []
    for _ in range(rounds):
        updates = []
        for task in method.configure(model, state, asked, TRAINING):
            times = task.client.id + 1
            inputs = [[1.0, -task.client.id], [-0.5, 2.0], [0.3, 0.7]] * times
            updates.append(trained(method, model, task, inputs, LABELS[task.client.id] * times))
        state = method.aggregate(model, state, asked, iter(updates))
        seen.append(sha256(state.params))
    assert len(set(seen)) == rounds
    return seen


@pytest.mark.parametrize("weighting", ["uniform", "examples"])
@pytest.mark.parametrize("ratio", [(0.5,), (0.5, 0.25)])
def test_with_one_window_for_all_it_is_fedrolex(weighting: Any, ratio: tuple[float, ...]) -> None:
    ours = bits_of(fixed(1.0, ratio=ratio, weighting=weighting))
    assert ours == bits_of(FedRolex(ratio=ratio, weighting=weighting))
    assert ours != bits_of(fixed(0.5, ratio=ratio, weighting=weighting))


@pytest.mark.parametrize("weighting", ["uniform", "examples"])
def test_with_one_window_that_stays_it_is_heterofl(weighting: Any) -> None:
    ratio = (0.5, 0.25, 1.0)
    ours = bits_of(fixed(1.0, ratio=ratio, weighting=weighting, stride=0))
    assert ours == bits_of(HeteroFL(ratio=ratio, weighting=weighting))


@pytest.mark.parametrize("weighting", ["uniform", "examples"])
@pytest.mark.parametrize("phase", ["same", "staggered"])
def test_with_the_whole_model_for_all_it_is_fedavg(weighting: Any, phase: Any) -> None:
    method = MSfusion(ratio=(1.0,), contrast=0.0, weighting=weighting, layer_phase=phase)
    assert bits_of(method) == bits_of(FedAvg(weighting=weighting))


# --- Overlap --------------------------------------------------------------------------------------


def test_the_overlap_falls_or_rises_along_half_a_cosine() -> None:
    ratios = [0.25] * 10
    for schedule, expected in {
        "decaying": (0.5, 0.3, 0.1),
        "growing": (0.1, 0.3, 0.5),
        "constant": (0.5, 0.5, 0.5),
    }.items():
        found = [overlap_at(schedule, 0.5, 0.1, ratios, t) for t in (0.0, 0.5, 1.0)]  # type: ignore[arg-type]
        assert found == pytest.approx(expected)
    # A third of the way: 0.1 + 0.4 (1 + cos 60 degrees) / 2 = 0.4
    assert overlap_at("decaying", 0.5, 0.1, ratios, 1 / 3) == pytest.approx(0.4)


@pytest.mark.parametrize(
    ("count", "ratio", "expected"),
    [
        # Largest c with full coverage, 1 - (1 / mu - 1) / (N - 1):
        (10, 0.25, 0.2),  # 1 - 3 / 9 = 0.67: it may be 0.2
        (5, 0.25, 0.2),  # 1 - 3 / 4 = 0.25: just so
        (8, 0.125, 0.0),  # 1 - 7 / 7: only disjoint windows cover all
        (9, 0.125, 0.125),  # 1 - 7 / 8
        (2, 0.25, 0.0),  # negative: not at all
        (1, 0.25, 0.0),
        (1, 1.0, 0.2),
    ],
)
def test_the_last_overlap_leaves_no_unit_out(count: int, ratio: float, expected: float) -> None:
    assert overlap_at("decaying", 0.5, None, [ratio] * count, 1.0) == pytest.approx(expected)


def test_the_overlap_follows_the_round_of_the_state() -> None:
    method = MSfusion(ratio=(0.25,), overlap=0.6, overlap_end=0.2)
    state, asked = state_of(mlp(8), rounds=10), clients(1, 1)
    found = [method.overlap_of(replace(state, round=t), asked) for t in (0, 5, 10)]
    assert found == pytest.approx([0.6, 0.4, 0.2])
    # w = 2, so the gap is round(2 x 0.4) = 1 first and round(2 x 0.8) = 2 in the end
    model = mlp(8)
    starts = []
    for round in (0, 9):
        tasks = list(method.configure(model, replace(state, round=round), asked, TRAINING))
        starts.append([units_of(model, task)["hidden1"] for task in tasks])
    assert starts == [[[0, 1], [1, 2]], [[1, 2], [3, 4]]]


def test_the_adaptive_overlap_by_hand() -> None:
    # The first measure only sets the mean; then 0.05 up above the mean, else down.
    notes = adapted(0.5, 0.4, {})
    assert notes == {"overlap": 0.5, "disagreement": 0.4, "rounds_measured": 1}
    notes = adapted(0.5, 0.8, notes)  # above 0.4; the mean becomes 0.6
    assert notes == {"overlap": 0.55, "disagreement": pytest.approx(0.6), "rounds_measured": 2}
    notes = adapted(0.55, 0.6, notes)  # not above
    assert notes["overlap"] == pytest.approx(0.5)
    assert adapted(0.02, 0.0, notes)["overlap"] == 0.0
    assert adapted(0.98, 9.0, notes)["overlap"] == 1.0


def ones(model: Model) -> State:
    params = {name: torch.ones(shape) for name, shape in model.shapes.items()}
    return State(params=params, seed=0, rounds=10)


def after_changes(
    method: MSfusion, model: Model, state: State, changes: Sequence[float], reverse: bool = False
) -> State:
    """The state after a round in which participant i moves all its entries by `changes[i]`."""
    asked = clients(*[1] * len(changes))
    tasks = method.configure(model, state, asked, TRAINING)
    answers = [answer(task, changes[task.client.id]) for task in tasks]
    return method.aggregate(model, state, asked, reversed(answers) if reverse else answers)


ADAPTIVE = MSfusion(
    ratio=(0.5,), overlap_schedule="adaptive", overlap=1.0, contrast=0.0, weighting="uniform"
)


def test_the_disagreement_of_a_round_by_hand() -> None:
    # One window for both; values 1 move by 0.3 and 0.1: mean 1.2, variance 0.1^2: 0.01 / 1.44
    model = mlp(4)
    state = after_changes(ADAPTIVE, model, ones(model), [0.3, 0.1])
    assert state.notes["disagreement"] == pytest.approx(0.01 / 1.44, rel=1e-5)
    # Whoever agrees disagrees less than before: c falls from 1 to 0.95.
    state = after_changes(ADAPTIVE, model, state, [0.1, 0.1])
    assert state.notes["overlap"] == pytest.approx(0.95)
    assert ADAPTIVE.overlap_of(state, clients(1, 1)) == state.notes["overlap"]
    # More than the mean of the rounds so far: it rises again.
    state = after_changes(ADAPTIVE, model, state, [0.9, -0.9])
    assert state.notes["overlap"] == pytest.approx(1.0)
    assert state.notes["rounds_measured"] == 3


def test_only_entries_of_several_holders_can_disagree() -> None:
    # Disjoint windows meet in the head's bias alone: values 1, moved by 1 and 0, mean 1.5:
    # variance 1/4 over 9/4
    model = mlp(4)
    method = replace(ADAPTIVE, overlap=0.0)
    state = after_changes(method, model, ones(model), [1.0, 0.0])
    assert state.notes["disagreement"] == pytest.approx(1 / 9, rel=1e-5)
    # Alone, nothing is measured and nothing changes.
    alone = after_changes(method, model, ones(model), [1.0])
    assert alone.notes == {}
    assert method.overlap_of(alone, clients(1)) == 0.0


def test_the_adaptive_overlap_does_not_depend_on_the_order_of_updates() -> None:
    model = mlp(8)
    method = replace(ADAPTIVE, overlap=0.5)
    changes = [0.1, 1 / 3, -0.7, 0.123456]
    one = after_changes(method, model, ones(model), changes)
    other = after_changes(method, model, ones(model), changes, reverse=True)
    assert one.notes == other.notes != {}


def test_without_answers_the_overlap_stays() -> None:
    model = mlp(4)
    state = after_changes(ADAPTIVE, model, ones(model), [0.3, 0.1])
    after = ADAPTIVE.aggregate(model, state, clients(1, 1), iter([]))
    assert after.notes == state.notes


# --- What a participant remembers -----------------------------------------------------------------

MOMENTUM = replace(TRAINING, momentum=0.9, lr=0.1)
EXAMPLES = Examples(
    inputs=torch.tensor([[1.0, -1.0], [0.5, 2.0], [-1.0, 0.3]]), labels=torch.tensor([0, 1, 1])
)


def work(method: MSfusion, model: Model, task: Task, memory: Memory) -> tuple[Params, Memory]:
    """The trained parameters and the new memory."""
    worker = ClientWorker(model=model, method=method, examples=lambda client: EXAMPLES, seed=0)
    update, memory = worker.work(task, memory)
    return {name: task.params[name] + delta for name, delta in update.delta.items()}, memory


def task_at(method: MSfusion, model: Model, round: int, participants: int = 1) -> Task:
    state = replace(method.init(model, 3, 10), round=round)
    return next(method.configure(model, state, clients(*[1] * participants), MOMENTUM))


@pytest.mark.parametrize(
    ("round", "rows"),
    [
        (0, {0: 1}),  # units 0 1, then 1 2: the second becomes the first
        (1, {0: 1}),  # 1 2, then 2 3
        (2, {1: 1}),  # 2 3, then 0 3: 3 stays where it is
        (3, {0: 0}),  # 0 3, then 0 1: 0 stays where it is
    ],
)
def test_momentum_is_kept_where_the_window_stays(round: int, rows: dict[int, int]) -> None:
    model, method = mlp(4), fixed(1.0, ratio=(0.5,), momentum="carry")
    _, memory = work(method, model, task_at(method, model, round), {})
    old = {name.removeprefix("momentum/"): t for name, t in memory.items() if "momentum" in name}
    following = task_at(method, model, round + 1)
    assert old.keys() == following.params.keys()
    fit = method.local(model, following, memory)
    assert fit.keep_momentum
    assert fit.momentum is not None
    weight, bias = torch.zeros(2, 2), torch.zeros(2)
    head = torch.zeros(2, 2)
    for new, before in rows.items():
        weight[new], bias[new] = old["layers.0.weight"][before], old["layers.0.bias"][before]
        head[:, new] = old["head.weight"][:, before]
    assert head.abs().sum() > 0
    expected = {
        "layers.0.weight": weight,
        "layers.0.bias": bias,
        "head.weight": head,
        "head.bias": old["head.bias"],  # everybody holds it always
    }
    assert fit.momentum.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(fit.momentum[name], tensor), name


def test_momentum_that_is_carried_moves_the_model() -> None:
    model = mlp(4)
    for momentum in ("reset", "carry"):
        method = fixed(1.0, ratio=(0.5,), momentum=momentum, stride=0)
        task = task_at(method, model, 0)
        first, memory = work(method, model, task, {})
        again = replace(task, round=1, params=first)
        moved, _ = work(method, model, again, memory)
        plain, _ = work(method, model, again, {})
        same = all(torch.equal(moved[name], plain[name]) for name in moved)
        assert same == (momentum == "reset")
        if momentum == "carry":  # by lr x 0.9 x the buffer that was kept
            for name in moved:
                kept = 0.1 * 0.9 * memory[f"momentum/{name}"]
                torch.testing.assert_close(plain[name] - moved[name], kept, atol=1e-6, rtol=1e-4)


def test_the_memory_is_the_last_sub_model() -> None:
    model, method = mlp(4), MSfusion(ratio=(0.5,))
    task = task_at(method, model, 3)
    params, memory = work(method, model, task, {})
    assert memory.keys() == {*(f"previous/{name}" for name in params), "previous entries"}
    assert memory["previous entries"].tolist() == [0, 3]
    for name, tensor in params.items():
        torch.testing.assert_close(memory[f"previous/{name}"], tensor)
        assert not torch.equal(memory[f"previous/{name}"], task.params[name])


@pytest.mark.parametrize("changes", [{"contrast": 0.0}, {"negatives": "peers"}])
def test_what_is_not_needed_is_not_remembered(changes: dict[str, Any]) -> None:
    model, method = mlp(4), MSfusion(ratio=(0.5,), **changes)
    assert work(method, model, task_at(method, model, 0), {})[1] == {}


def test_the_contrast_begins_with_the_second_round() -> None:
    model, method = mlp(4), MSfusion(ratio=(0.5,), contrast=0.7, temperature=0.3)
    task = task_at(method, model, 0)
    first = method.local(model, task, {})
    assert (first.objective, first.references) == (CrossEntropy(), {})
    _, memory = work(method, model, task, {})
    following = task_at(method, model, 1)
    fit = method.local(model, following, memory)
    assert fit.objective == Contrast(0.7, 0.3, ("previous",))
    assert fit.references.keys() == {"fused", "previous"}
    assert sha256(fit.references["fused"]) == sha256(following.params)
    for name, tensor in fit.references["previous"].items():
        assert torch.equal(tensor, memory[f"previous/{name}"])
    assert fit.extra["entries"].tolist() == [1, 2]
    assert fit.extra["previous entries"].tolist() == [0, 1]
    with_contrast, _ = work(method, model, following, memory)
    without, _ = work(replace(method, contrast=0.0), model, following, memory)
    assert sha256(with_contrast) != sha256(without)


# --- Negatives of peers ---------------------------------------------------------------------------


def peer_values(task: Task) -> dict[str, float]:
    """What the task says of its peers' `head.bias`, which all hold."""
    found = {}
    for name, tensor in task.extra.items():
        if name.endswith("/head.bias"):
            found[name.removesuffix("/head.bias")] = float(tensor[0])
    return found


@pytest.mark.parametrize("negatives", ["peers", "both"])
def test_negatives_are_those_of_the_following_ranks_before_fusion(negatives: Any) -> None:
    # Participant i moves everything by i + 1: the fused bias is 3, i's own was i + 1.
    model = mlp(4)
    method = MSfusion(ratio=(0.5,), negatives=negatives, weighting="uniform")
    state = after_changes(method, model, state_of(model), [1.0, 2.0, 3.0, 4.0, 5.0])
    assert values(state.params, "head_bias") == [3.0, 3.0]
    tasks = list(method.configure(model, state, clients(1, 1, 1, 1, 1), TRAINING))
    assert [peer_values(task) for task in tasks] == [
        {"peer 0": 2.0, "peer 1": 3.0},
        {"peer 0": 3.0, "peer 1": 4.0},
        {"peer 0": 4.0, "peer 1": 5.0},
        {"peer 0": 5.0, "peer 1": 1.0},
        {"peer 0": 1.0, "peer 1": 2.0},
    ]
    # t = 0, c = 1/2, w = 2: participant 2 had units 2 3, and 3 had 3 0
    assert tasks[1].extra["peer 0 entries"].tolist() == [2, 3]
    assert tasks[1].extra["peer 1 entries"].tolist() == [0, 3]
    fit = method.local(model, tasks[0], {})
    assert isinstance(fit.objective, Contrast)
    assert fit.objective.negatives == ("peer 0", "peer 1")
    assert fit.references["peer 1"]["head.bias"].tolist() == [3.0, 3.0]
    assert fit.references["peer 1"].keys() == tasks[0].params.keys()
    # Only the last round counts.
    state = after_changes(method, model, state, [10.0] * 5)
    task = next(method.configure(model, state, clients(1, 1, 1, 1, 1), TRAINING))
    assert peer_values(task) == {"peer 0": 13.0, "peer 1": 13.0}


def test_a_peer_that_reports_its_own_classes_alone_is_a_negative_too() -> None:
    model, method = mlp(4), MSfusion(ratio=(0.5,), negatives="peers", weighting="uniform")
    state, asked = state_of(model), clients(1, 1, 1)
    tasks = list(method.configure(model, state, asked, TRAINING))
    updates = []
    for task in tasks:
        whole = answer(task, 1.0)
        rows = {"head.weight": {0: torch.tensor([1])}, "head.bias": {0: torch.tensor([1])}}
        delta = {n: d[1:] if n in rows else d for n, d in whole.delta.items()}
        updates.append(replace(whole, submodel=task.submodel.restrict(rows), delta=delta))
    state = method.aggregate(model, state, asked, updates)
    for task in method.configure(model, state, asked, TRAINING):
        shapes = {name: tensor.shape for name, tensor in task.params.items()}
        for peer in ("peer 0", "peer 1"):
            part = {n: task.extra[f"{peer}/{n}"] for n in shapes}
            assert {name: tensor.shape for name, tensor in part.items()} == shapes
            before = tasks[(task.client.id + 1 + int(peer[-1])) % 3].params
            hidden = "layers.0.bias"
            assert torch.equal(part[hidden], before[hidden] + 1.0)


@pytest.mark.parametrize("count", [0, 1, 3, 9])
def test_as_many_peers_as_asked_for_and_never_oneself(count: int) -> None:
    model = mlp(4)
    method = MSfusion(ratio=(0.5,), negatives="peers", peer_negatives=count)
    state = after_changes(method, model, state_of(model), [1.0, 2.0, 3.0, 4.0])
    tasks = method.configure(model, state, clients(1, 1, 1, 1), TRAINING)
    found = [list(peer_values(task).values()) for task in tasks]
    following = [[2, 3, 4], [3, 4, 1], [4, 1, 2], [1, 2, 3]]
    assert found == [each[:count] for each in following]


def test_peers_of_other_shapes_are_left_out() -> None:
    # mu = 1/2 for 0 2 4, 1/4 for 1 3
    model, method = mlp(8), MSfusion(ratio=(0.5, 0.25), negatives="peers")
    state = after_changes(method, model, state_of(model), [1.0, 2.0, 3.0, 4.0, 5.0])
    tasks = list(method.configure(model, state, clients(1, 1, 1, 1, 1), TRAINING))
    found = [list(peer_values(task).values()) for task in tasks]
    assert found == [[3.0, 5.0], [4.0], [5.0, 1.0], [2.0], [1.0, 3.0]]


def test_peers_that_did_not_answer_or_are_not_there_now_are_passed_over() -> None:
    model, method = mlp(4), MSfusion(ratio=(0.5,), negatives="peers", peer_negatives=2)
    state, asked = state_of(model), clients(1, 1, 1, 1, 1)
    answers = [
        answer(task, task.client.id + 1.0)
        for task in method.configure(model, state, asked, TRAINING)
        if task.client.id != 1
    ]
    state = method.aggregate(model, state, asked, answers)
    now = [client for client in asked if client.id != 3]
    tasks = method.configure(model, state, now, TRAINING)
    found = {task.client.id: list(peer_values(task).values()) for task in tasks}
    assert found == {0: [3.0, 5.0], 1: [3.0, 5.0], 2: [5.0, 1.0], 4: [1.0, 3.0]}


def test_own_negatives_alone_send_nothing() -> None:
    model, method = mlp(4), MSfusion(ratio=(0.5,))
    state = after_changes(method, model, state_of(model), [1.0, 2.0])
    assert state.extra == {}
    for task in method.configure(model, state, clients(1, 1), TRAINING):
        assert task.extra == {}


# --- Fusion and settings --------------------------------------------------------------------------


def test_a_round_by_hand() -> None:
    # K = 4, w = 2, c = 1/2, gap 1; t = 3: windows 3 0 and 0 1, of 1 and 3 examples.
    # Changes 1 and 5: unit 3 gets 1, unit 0 (1 + 3 x 5) / 4 = 4, unit 1 gets 5, unit 2 stays.
    model, asked, method = mlp(4), clients(1, 3), fixed(0.5, ratio=(0.5,))
    state = state_of(model, round=3, layers_0_bias=[10, 20, 30, 40])
    one, other = method.configure(model, state, asked, TRAINING)
    after = method.aggregate(model, state, asked, [answer(one, 1.0), answer(other, 5.0)])
    assert values(after.params, "layers_0_bias") == [14.0, 25.0, 30.0, 41.0]
    assert after.round == 4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stride": -1}, r"method\.stride must be 0 or more; got -1"),
        ({"overlap": 1.1}, r"method\.overlap is the share"),
        ({"overlap_end": -0.1}, r"method\.overlap_end is the share"),
        ({"contrast": -1.0}, r"method\.contrast must be 0 or more"),
        ({"temperature": 0.0}, r"method\.temperature must be positive"),
    ],
)
def test_settings_that_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MSfusion(**settings).init(mlp(4), 0, 1)


def test_what_cannot_work_is_refused_before_anybody_trains() -> None:
    model, carrying = mlp(4), MSfusion(momentum="carry")
    state = carrying.init(model, 0, 1)
    for training in (replace(MOMENTUM, momentum=0.0), replace(TRAINING, optimiser="adamw")):
        with pytest.raises(ConfigError, match=r"method\.momentum 'carry' keeps SGD's momentum"):
            next(carrying.configure(model, state, clients(1), training))
    blind = replace(model, features=None)
    with pytest.raises(ModelError, match=r"set method\.contrast 0"):
        next(MSfusion().configure(blind, state, clients(1), TRAINING))
    next(MSfusion(contrast=0.0).configure(blind, state, clients(1), TRAINING))
