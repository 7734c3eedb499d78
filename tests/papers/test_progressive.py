"""Progressive training by hand: ProFL's growing stage, and copies as new blocks."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from worked import TRAINING, answer, blocks_of, clients, deep, state_of, trained, values

from tesserafl.core.errors import ConfigError
from tesserafl.core.messages import Task
from tesserafl.core.method import State
from tesserafl.core.model import Model
from tesserafl.data.examples import Spec
from tesserafl.methods import Progressive
from tesserafl.models import ResNet


def at(state: State, round: int) -> State:
    return State(params=state.params, seed=0, rounds=state.rounds, round=round)


def tasks_at(method: Progressive, model: Model, round: int, rounds: int = 6) -> list[Task]:
    asked = clients(*[1] * len(method.depth))
    return list(method.configure(model, state_of(model, round, rounds), asked, TRAINING))


def trained_by(task: Task) -> set[str]:
    """Blocks that are trained, `stem` and `exits`."""
    assert task.trainable is not None
    parts = [name.split(".") for name in task.trainable]
    return {".".join(part[:2]) if part[0] == "blocks" else part[0] for part in parts}


def test_the_model_grows_phase_by_phase_and_what_is_below_is_frozen() -> None:
    # 5 blocks, 2 a phase: 2, 4, 5 blocks, of 6 rounds two each.
    model, method = deep(5), Progressive(depth=(2,))
    tasks = [tasks_at(method, model, round)[0] for round in range(6)]
    assert [len(blocks_of(model, task)) for task in tasks] == [2, 2, 4, 4, 5, 5]
    assert [trained_by(tasks[round]) for round in (0, 2, 4)] == [
        {"stem", "blocks.0", "blocks.1", "exits"},
        {"blocks.2", "blocks.3", "exits"},
        {"blocks.4", "exits"},
    ]
    assert [trained_by(tasks[round]) for round in (1, 3, 5)] == [
        trained_by(tasks[round]) for round in (0, 2, 4)
    ]


def test_nobody_trains_more_blocks_than_its_depth() -> None:
    """Steps of 2, a class of 1: it trains the upper one of the new blocks, over what is there."""
    model, method = deep(4), Progressive(depth=(2, 1), step=2)
    first, second = tasks_at(method, model, 0)
    assert trained_by(first) == {"stem", "blocks.0", "blocks.1", "exits"}
    assert trained_by(second) == {"blocks.1", "exits"}
    first, second = tasks_at(method, model, 5)
    assert trained_by(first) == {"blocks.2", "blocks.3", "exits"}
    assert trained_by(second) == {"blocks.3", "exits"}


def test_without_a_step_a_phase_adds_what_the_weakest_class_trains() -> None:
    model, method = deep(4), Progressive(depth=(3, 1))
    held = [len(blocks_of(model, tasks_at(method, model, r, 4)[0])) for r in range(4)]
    assert held == [1, 2, 3, 4]
    assert trained_by(tasks_at(method, model, 3, 4)[0]) == {"blocks.3", "exits"}


def test_what_is_frozen_stays_and_is_not_sent_back() -> None:
    model, method = deep(2), Progressive(depth=(1,))
    state = State(params=model.init(0), seed=0, rounds=2, round=1)
    (task,) = method.configure(model, state, clients(1), TRAINING)
    update = trained(method, model, task, [[1.0, 2.0], [0.5, -1.0]], [0, 1])
    assert update.delta.keys() == task.trainable
    after = method.aggregate(model, state, clients(1), iter([update])).params
    moved = {name for name in after if not torch.equal(after[name], state.params[name])}
    assert moved and all(name.startswith(("blocks.1.", "exits.")) for name in moved)


def test_an_entry_is_averaged_over_those_that_trained_it() -> None:
    model, method = deep(2), Progressive(depth=(2, 1), step=2)
    state, asked = state_of(model, 0, 1), clients(1, 1)
    updates = []
    for task, change in zip(
        method.configure(model, state, asked, TRAINING), (2.0, 6.0), strict=True
    ):
        update = answer(task, change)
        delta = {n: t for n, t in update.delta.items() if n in (task.trainable or ())}
        updates.append(replace(update, delta=delta))
    after = method.aggregate(model, state, asked, iter(updates)).params
    assert values(after, "blocks_0_narrow_bias") == values(after, "stem_bias") == [2.0, 2.0]
    assert values(after, "blocks_1_narrow_bias") == values(after, "exits_0_head_bias") == [4.0, 4.0]


def names_of(model: Model, block: int) -> list[str]:
    return [name for name in model.shapes if name.startswith(f"blocks.{block}.")]


def same(params: dict[str, torch.Tensor], model: Model, one: int, other: int) -> bool:
    pairs = zip(names_of(model, one), names_of(model, other), strict=True)
    return all(torch.equal(params[a], params[b]) for a, b in pairs)


def test_new_blocks_are_copies_of_the_group_below() -> None:
    """2 blocks a phase, 5 in all: 2 and 3 begin as 0 and 1, 4 then as the trained 2."""
    model, method = deep(5), Progressive(depth=(2,), start="copy")
    state = method.init(model, 0, 3)
    asked = clients(1)
    for round, copies in enumerate([{2: 0, 3: 1, 4: 0}, {4: 2}, {}]):
        state = at(state, round) if round else state
        (task,) = method.configure(model, state, asked, TRAINING)
        assert all(same(state.params, model, new, below) for new, below in copies.items())
        updates = [trained(method, model, task, [[1.0, 2.0], [0.5, -1.0]], [0, 1])]
        before, state = state, method.aggregate(model, state, asked, iter(updates))
        assert not same(before.params, model, 0, 1)
    assert not same(state.params, model, 4, 2)  # by now both went their own way


def test_fresh_blocks_begin_as_they_were_drawn() -> None:
    model, method = deep(3), Progressive(depth=(1,))
    state = method.init(model, 7, 3)
    drawn = model.init(7)
    assert all(torch.equal(state.params[name], drawn[name]) for name in drawn)
    assert not same(drawn, model, 1, 0)


def test_the_predictor_is_the_model_grown_so_far() -> None:
    """A phase's first round is played before its blocks are served."""
    model, method = deep(5), Progressive(depth=(2,))
    state = State(params=model.init(0), seed=0, rounds=6)
    served = [method.predictor(model, at(state, round)) for round in (0, 1, 2, 3, 5, 6)]
    assert [p.model.sizes["blocks"] for p in served] == [2, 2, 2, 4, 5, 5]
    small = served[0]
    assert small.part is not None and small.part.views.keys() == small.params.keys()
    later = {name for block in (2, 3, 4) for name in names_of(model, block)}
    assert small.params.keys() == model.shapes.keys() - later
    small.model.module().load_state_dict(small.params, strict=True)
    assert (served[-1].part, served[-1].model) == (None, model)


def test_more_phases_than_rounds_are_refused() -> None:
    with pytest.raises(ConfigError, match="grows in 5 phases, of a round or more each; got 4"):
        Progressive(depth=(1,)).init(deep(5), 0, 4)


def test_a_model_of_stages_is_refused() -> None:
    spec = Spec(kind="image", task="image-classification", shape=(1, 8, 8), num_classes=2)
    model = ResNet(channels=(4, 8), blocks=(2, 2)).build_model(spec)
    with pytest.raises(ConfigError, match="one row; it has blocks1, blocks2"):
        Progressive(depth=(1,)).init(model, 0, 9)


def test_a_negative_step_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"method\.step must be 0 or more; got -1"):
        Progressive(depth=(1,), step=-1).init(deep(3), 0, 9)
