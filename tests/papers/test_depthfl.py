"""DepthFL by hand: Kim et al., ICLR 2023, the loss and the ensemble."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from worked import TRAINING, answer, blocks_of, clients, deep, state_of, trained, values

from tesserafl.core.errors import ConfigError
from tesserafl.core.fit import IGNORED, CrossEntropy
from tesserafl.core.messages import Task
from tesserafl.core.method import State
from tesserafl.core.model import Output
from tesserafl.methods import DepthFL
from tesserafl.methods._exits import WEIGHT, MutualDistillation
from tesserafl.models.scaling import forward_of

LN2, LN3 = math.log(2), math.log(3)
FIRST, SECOND = [0.0, LN3], [0.0, 0.0]
"""Exits that answer (1/4, 3/4) and (1/2, 1/2)."""
CES = 2 * LN2 + LN2
"""Of label 0: ln 4 and ln 2."""
KLS = 0.5 * LN2 + 0.5 * math.log(2 / 3) + 0.25 * math.log(1 / 2) + 0.75 * math.log(3 / 2)
"""KL(second || first) + KL(first || second)."""


def loss_of(
    exits: Tensor,
    labels: list[int],
    weight: float = 1.0,
    temperature: float = 1.0,
    **extra: Tensor,
) -> Tensor:
    """Of a model that answers with these exits [exits, batch, classes]."""

    def forward(params: object, inputs: Tensor) -> Output:
        return Output(exits.mean(0), None, exits if len(exits) > 1 else None)

    objective = MutualDistillation(temperature=temperature)
    given = {WEIGHT: torch.tensor(weight), **extra}
    return objective(forward, {}, torch.zeros(len(labels)), torch.tensor(labels), given)


def test_the_loss_of_two_exits() -> None:
    exits = torch.tensor([[FIRST], [SECOND]])
    assert float(loss_of(exits, [0])) == pytest.approx(CES + KLS, rel=1e-6)
    assert float(loss_of(exits, [0], weight=0.25)) == pytest.approx(CES + 0.25 * KLS, rel=1e-6)
    assert float(loss_of(exits, [0], weight=0.0)) == pytest.approx(CES, rel=1e-6)


def test_of_three_exits_every_pair_counts_half() -> None:
    # d - 1 = 2: (1st, 2nd) and (1st, 3rd) each both ways; the 2nd and the 3rd agree.
    exits = torch.tensor([[FIRST], [SECOND], [SECOND]])
    assert float(loss_of(exits, [0])) == pytest.approx(CES + LN2 + 2 * KLS / 2, rel=1e-6)


def test_a_batch_is_averaged_and_padding_counts_nowhere() -> None:
    exits = torch.tensor([[FIRST, SECOND, [9.0, -9.0]], [SECOND, SECOND, [-9.0, 5.0]]])
    whole = (CES + KLS + 2 * LN2) / 2
    assert float(loss_of(exits, [0, 1, IGNORED])) == pytest.approx(whole, rel=1e-6)


def test_a_teaching_exit_is_constant() -> None:
    """dL/dz_1 = p_1 - y + w T (p_1^T - p_2^T): nothing flows into the teacher's answer."""
    for temperature in (1.0, 2.0):
        exits = torch.tensor([[FIRST], [SECOND]], requires_grad=True)
        loss_of(exits, [0], weight=0.5, temperature=temperature).backward()
        soft = [torch.softmax(torch.tensor(z) / temperature, 0) for z in (FIRST, SECOND)]
        pull = 0.5 * temperature * (soft[0] - soft[1])
        expected = [
            torch.tensor([0.25 - 1.0, 0.75]) + pull,
            torch.tensor([0.5 - 1.0, 0.5]) - pull,
        ]
        assert exits.grad is not None
        torch.testing.assert_close(exits.grad[:, 0], torch.stack(expected))


def test_classes_that_a_client_lacks_are_masked_in_every_exit() -> None:
    """Logits of the others become 0: exits that differ there alone agree."""
    exits = torch.tensor([[[0.0, 1.0, 7.0]], [[0.0, 1.0, -7.0]]])
    own = torch.tensor([0, 1])
    one = math.log(2 + math.e)  # of (0, 1, 0), label 0
    assert float(loss_of(exits, [0], classes=own)) == pytest.approx(2 * one, rel=1e-6)


def test_one_exit_alone_is_plain_training_to_the_bit() -> None:
    logits = torch.randn(1, 5, 3, generator=torch.Generator().manual_seed(0))
    labels = [0, 2, 1, IGNORED, 2]

    def forward(params: object, inputs: Tensor) -> Output:
        return Output(logits[0], None)

    plain = CrossEntropy()(forward, {}, torch.zeros(5), torch.tensor(labels), {})
    assert torch.equal(loss_of(logits, labels), plain)


def tasks_of(method: DepthFL, state: State, blocks: int = 3) -> list[Task]:
    model = deep(blocks, exits=True)
    asked = clients(*[1] * len(method.depth))
    return list(method.configure(model, state, asked, TRAINING))


def test_clients_hold_the_first_blocks_and_their_exits() -> None:
    model = deep(3, exits=True)
    tasks = tasks_of(DepthFL(depth=(1, 2, 9)), state_of(model))
    assert [blocks_of(model, task) for task in tasks] == [[0], [0, 1], [0, 1, 2]]
    for number, task in enumerate(tasks, 1):
        heads = {name for name in task.params if name.endswith("head.weight")}
        assert heads == {f"exits.{i}.head.weight" for i in range(number)}


def test_the_weight_rises_for_300_of_1000_rounds() -> None:
    """exp(-5 (1 - t / 300)^2), the first author's code."""
    state, method = state_of(deep(3, exits=True), rounds=1000), DepthFL(depth=(2,))
    found = {}
    for number in (0, 150, 300, 999):
        (task,) = tasks_of(method, State(params=state.params, seed=0, rounds=1000, round=number))
        found[number] = task.options[WEIGHT]
    expected = {0: math.exp(-5), 150: math.exp(-1.25), 300: 1.0, 999: 1.0}
    assert found == pytest.approx(expected)
    (task,) = tasks_of(DepthFL(depth=(2,), ramp=0.0, distill=0.3), state)
    assert task.options[WEIGHT] == 0.3


def test_a_block_is_averaged_over_those_that_have_it() -> None:
    model, method = deep(3, exits=True), DepthFL(depth=(1, 2))
    state, asked = state_of(model), clients(1, 1)
    tasks = tasks_of(method, state)
    updates = [answer(task, change) for task, change in zip(tasks, (1.0, 3.0), strict=True)]
    after = method.aggregate(model, state, asked, iter(updates)).params
    assert values(after, "stem_bias") == [2.0, 2.0]
    assert values(after, "exits_0_head_bias") == [2.0, 2.0]
    assert values(after, "blocks_1_narrow_bias") == values(after, "exits_1_head_bias") == [3.0, 3.0]
    assert values(after, "blocks_2_narrow_bias") == values(after, "exits_2_head_bias") == [0.0, 0.0]


def test_the_model_answers_with_the_mean_of_the_exits() -> None:
    model = deep(2, exits=True)
    state = state_of(model, exits_0_head_bias=[1.0, 5.0], exits_1_head_bias=[3.0, -1.0])
    served = DepthFL(depth=(1,)).predictor(model, state)
    forward = forward_of(model, model.whole(), model.module().eval(), "none")
    logits = forward(served.params, torch.zeros(1, 2)).logits
    assert logits.tolist() == [[2.0, 2.0]]


def test_a_real_step_on_all_exits() -> None:
    """Zeros, so every exit answers (1/2, 1/2) and agrees: the heads' biases move as alone.

    lr 0.5, label 0: p - y = (-1/2, 1/2), a step of (1/4, -1/4) in each.
    """
    model, method = deep(2, exits=True), DepthFL(depth=(2,), ramp=0.0)
    (task,) = tasks_of(method, state_of(model), blocks=2)
    update = trained(method, model, task, [[0.0, 0.0]], [0])
    for number in (0, 1):
        assert values(update.delta, f"exits_{number}_head_bias") == [0.25, -0.25]


def test_a_model_without_exits_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"--model residual --model\.exits"):
        DepthFL(depth=(2,)).init(deep(3), 0, 10)


@pytest.mark.parametrize("wrong", [{"distill": -1.0}, {"ramp": 1.5}, {"temperature": 0.0}])
def test_settings_out_of_range_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=r"method\.ramp in \[0, 1\]"):
        DepthFL(depth=(2,), **wrong).init(deep(3, exits=True), 0, 10)  # type: ignore[arg-type]
