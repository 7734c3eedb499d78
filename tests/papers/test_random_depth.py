"""Random depth by hand: Huang et al., ECCV 2016, sections 3 and 4."""

from __future__ import annotations

from collections import Counter
from itertools import combinations

import pytest
import torch
from worked import TRAINING, answer, blocks_of, clients, deep, rounds_of, state_of, values

from tesserafl.core.errors import ConfigError
from tesserafl.core.method import State
from tesserafl.core.model import Model
from tesserafl.core.params import Params
from tesserafl.data.examples import Spec
from tesserafl.methods import RandomDepth
from tesserafl.models import ResNet
from tesserafl.models.scaling import forward_of

LINEAR = [14 / 15, 13 / 15, 12 / 15, 11 / 15, 10 / 15]
"""L = 5, 4 of them held: p_l = 1 - l / L (1 - p_L), sum p_l = 4, so 1 - p_L = 2 (5 - 4) / 6."""


def stages() -> Model:
    spec = Spec(kind="image", task="image-classification", shape=(1, 8, 8), num_classes=2)
    return ResNet(channels=(4, 8), blocks=(2, 2)).build_model(spec)


def test_a_client_holds_exactly_its_depth_in_the_models_order() -> None:
    model = deep(5)
    for tasks in rounds_of(RandomDepth(depth=(3, 1)), model, 2, range(20)):
        for task, depth in zip(tasks, (3, 1), strict=True):
            held = blocks_of(model, task)
            assert len(held) == depth and held == sorted(set(held))
            assert task.submodel.sizes["blocks"] == depth


def test_every_client_and_round_has_a_draw_of_its_own() -> None:
    model = deep(16)
    rounds = rounds_of(RandomDepth(depth=(8,)), model, 5, range(8))
    drawn = {tuple(blocks_of(model, task)) for tasks in rounds for task in tasks}
    assert len(drawn) == 40  # of 12,870 subsets: a pair is alike with odds of about 1 in 16


def test_uniform_draws_take_every_subset_alike() -> None:
    # 10 subsets of 3 of 5, 1000 draws: 100 each, standard deviation 9.5.
    model = deep(5)
    rounds = rounds_of(RandomDepth(depth=(3,)), model, 5, range(200))
    found = Counter(tuple(blocks_of(model, task)) for tasks in rounds for task in tasks)
    assert found.keys() == set(combinations(range(5), 3))
    assert all(abs(count - 100) < 5 * 9.5 for count in found.values())


def test_linear_decay_draws_the_papers_probabilities() -> None:
    # 1000 draws of 4 of 5 blocks; standard deviation at most 0.015.
    model = deep(5)
    rounds = rounds_of(RandomDepth(depth=(4,), keep="linear"), model, 5, range(200))
    counts = torch.zeros(5)
    for tasks in rounds:
        for task in tasks:
            counts[blocks_of(model, task)] += 1
    assert int(counts.sum()) == 4000
    assert (counts / 1000 - torch.tensor(LINEAR)).abs().max() < 5 * 0.015


def additions(model: Model, method: RandomDepth) -> list[float]:
    """By what every block's output projection is multiplied when the model answers."""
    ones = {name: torch.ones(shape) for name, shape in model.shapes.items()}
    (depth,) = model.depths.values()
    found = method.predictor(model, State(params=ones, seed=0, rounds=1)).params
    for name in ones:
        place = depth.locate(name)
        if not place or not place[2].startswith("narrow"):
            assert found[name] is ones[name]
    return [float(found[f"blocks.{i}.narrow.weight"][0, 0]) for i in range(depth.blocks)]


def test_the_model_answers_with_every_addition_times_its_probability() -> None:
    """Equation 5: H_l = p_l f_l(H_{l-1}) + H_{l-1}."""
    model = deep(5)
    assert additions(model, RandomDepth(depth=(3,))) == pytest.approx([0.6] * 5)
    assert additions(model, RandomDepth(depth=(4,), keep="linear")) == pytest.approx(LINEAR)
    # Classes that hold 1 and 4 of 5, dealt in turn: (1/5 + 4/5) / 2.
    assert additions(model, RandomDepth(depth=(1, 4))) == pytest.approx([0.5] * 5)
    assert additions(model, RandomDepth(depth=(3,), scaled=False)) == [1.0] * 5
    assert additions(model, RandomDepth(depth=(9,))) == [1.0] * 5


def test_the_answer_itself() -> None:
    """One block in two, s = 1/2: h + 1/2 f(h), from a model without scaling."""
    model = deep(2)
    drawn = State(params=model.init(3), seed=0, rounds=1)
    forward = forward_of(model, model.whole(), model.module().eval(), "none")
    inputs = torch.tensor([[0.3, -1.2], [2.0, 0.1]])

    def stream(params: Params, blocks: int) -> torch.Tensor:
        h = inputs @ params["stem.weight"].T + params["stem.bias"]
        for i in range(blocks):

            def of(part: str, i: int = i) -> torch.Tensor:
                return params[f"blocks.{i}.{part}"]

            normed = torch.nn.functional.layer_norm(h, (2,), of("norm.weight"), of("norm.bias"))
            inner = torch.relu(normed @ of("widen.weight").T + of("widen.bias"))
            h = h + 0.5 * (inner @ of("narrow.weight").T + of("narrow.bias"))
        return h

    params = drawn.params
    h = stream(params, 2)
    normed = torch.nn.functional.layer_norm(
        h, (2,), params["exits.0.norm.weight"], params["exits.0.norm.bias"]
    )
    expected = torch.relu(normed) @ params["exits.0.head.weight"].T + params["exits.0.head.bias"]
    served = RandomDepth(depth=(1,)).predictor(model, drawn).params
    torch.testing.assert_close(forward(served, inputs).logits, expected)


def test_a_block_is_averaged_over_those_that_held_it() -> None:
    model, method = deep(3), RandomDepth(depth=(2,))
    state = state_of(model)
    asked = clients(1, 1, 1)
    tasks = list(method.configure(model, state, asked, TRAINING))
    held = [blocks_of(model, task) for task in tasks]
    updates = [answer(task, change) for task, change in zip(tasks, (1.0, 2.0, 6.0), strict=True)]
    after = method.aggregate(model, state, asked, iter(updates))
    assert values(after.params, "stem_bias") == [3.0, 3.0]
    for block in range(3):
        changes = [c for own, c in zip(held, (1.0, 2.0, 6.0), strict=True) if block in own]
        mean = sum(changes) / len(changes) if changes else 0.0
        assert values(after.params, f"blocks_{block}_narrow_bias") == [mean, mean]


def test_blocks_that_cannot_move_are_always_held() -> None:
    """The first block of a stage that halves the resolution: with depth 1 it is the only one."""
    model = stages()
    for tasks in rounds_of(RandomDepth(depth=(1,)), model, 3, range(5)):
        for task in tasks:
            assert task.submodel.sizes["blocks2"] == 1
            assert "stages.1.0.shortcut.weight" in task.submodel.views
    ones = {name: torch.ones(shape) for name, shape in model.shapes.items()}
    state = State(params=ones, seed=0, rounds=1)
    found = RandomDepth(depth=(1,)).predictor(model, state).params
    scales = [float(found[f"stages.{s}.{b}.conv2.weight"].mean()) for s in (0, 1) for b in (0, 1)]
    assert scales == [0.5, 0.5, 1.0, 0.0]  # nobody ever held the last one


def test_linear_decay_needs_half_of_the_blocks() -> None:
    with pytest.raises(ConfigError, match=r"with 2 of 5 blocks .* train at least 3 of them"):
        rounds_of(RandomDepth(depth=(2,), keep="linear"), deep(5), 1, [0])
    rounds_of(RandomDepth(depth=(3,), keep="linear"), deep(5), 1, [0])
