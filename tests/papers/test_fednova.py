"""FedNova by hand: Wang et al., NeurIPS 2020, Equations 6 and 7."""

from __future__ import annotations

from dataclasses import replace

import pytest
from worked import TRAINING, answer, clients, mlp, state_of, trained, values

from tesserafl.core.fit import Training
from tesserafl.core.messages import Task, Update
from tesserafl.methods import FedAvg, FedNova
from tesserafl.methods._normalised import relayed_normed, step_norm

MODEL = mlp(2)


def in_steps(task: Task, change: float, steps: int) -> Update:
    """A change that was made in so many steps of SGD."""
    metrics = {"accumulated_steps": float(steps)}
    return replace(answer(task, change), num_steps=steps, metrics=metrics)


def test_a_change_counts_per_step() -> None:
    # p = (1/4, 3/4), tau = (1, 3), Delta = (2, 12).
    # sum p_i Delta_i / tau_i = 1/4 x 2 + 3/4 x 4 = 3.5;  tau_eff = 1/4 x 1 + 3/4 x 3 = 2.5
    # w + 2.5 x 3.5 = 1 + 8.75
    asked, method = clients(1, 3), FedNova()
    state = state_of(MODEL, head_bias=[1, 1])
    one, other = method.configure(MODEL, state, asked, TRAINING)
    after = method.aggregate(MODEL, state, asked, [in_steps(one, 2.0, 1), in_steps(other, 12.0, 3)])
    assert values(after.params, "head_bias") == [9.75, 9.75]
    assert (after.round, after.notes["steps"]) == (1, 2.5)
    # With one weight each: (2 + 4) / 2 = 3, tau_eff = 2.
    uniform = FedNova(weighting="uniform").aggregate(
        MODEL, state, asked, [in_steps(one, 2.0, 1), in_steps(other, 12.0, 3)]
    )
    assert values(uniform.params, "head_bias") == [7.0, 7.0]


def test_only_those_who_answer_are_weighted() -> None:
    asked, method, state = clients(1, 3, 12), FedNova(), state_of(MODEL)
    one, other, _ = method.configure(MODEL, state, asked, TRAINING)
    after = method.aggregate(MODEL, state, asked, [in_steps(one, 2.0, 1), in_steps(other, 12.0, 3)])
    assert values(after.params, "head_bias") == [8.75, 8.75]


def test_with_equal_steps_it_is_fedavg() -> None:
    asked, state = clients(1, 3), state_of(MODEL)
    updates = [
        in_steps(task, change, 4)
        for task, change in zip(
            FedNova().configure(MODEL, state, asked, TRAINING), (4.0, 12.0), strict=True
        )
    ]
    for method in (FedNova(), FedAvg()):
        after = method.aggregate(MODEL, state, asked, updates)
        assert all((value == 10.0).all() for value in after.params.values())


def test_the_norm_of_steps_with_momentum() -> None:
    # rho = 1/2, tau = 3: a = (1 + 1/2 + 1/4, 1 + 1/2, 1), ||a||_1 = 4.25
    momentum = Training(momentum=0.5)
    assert step_norm(3, momentum) == pytest.approx(4.25)
    for steps in (1, 2, 7, 30):
        a = [sum(0.5**k for k in range(steps - i)) for i in range(steps)]
        assert step_norm(steps, momentum) == pytest.approx(sum(a))
    assert step_norm(7, Training()) == 7.0
    assert step_norm(7, Training(optimiser="adamw", momentum=0.5)) == 7.0  # it has none


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_the_norm_is_the_change_over_a_constant_slope(momentum: float) -> None:
    # Zeros everywhere and a tiny rate: the slope of b stays (-1/2, 1/2), so that
    # Delta / ||a||_1 = eta / 2 whatever the steps and the momentum are.
    training = Training(lr=1e-4, momentum=momentum, steps=6, batch_size=4)
    method, asked, state = FedNova(), clients(1), state_of(MODEL)
    (task,) = method.configure(MODEL, state, asked, training)
    update = trained(method, MODEL, task, [[1.0, 2.0]], [0])
    norm = update.metrics["accumulated_steps"]
    assert update.delta["head.bias"].tolist() == pytest.approx(
        [0.5e-4 * norm, -0.5e-4 * norm], rel=2e-3
    )
    assert norm == (6.0 if momentum == 0 else pytest.approx(step_norm(6, training)))


def test_the_minimum_is_that_of_the_weighted_loss() -> None:
    # F_1 = (w + 1)^2 / 2 with 1 step, F_2 = (w - 1)^2 / 2 with 10, p = 1/2 each: minimum at 0.
    # A step of eta = 0.01 leaves 0.99 of the distance. Plain: weights 0.01 and 1 - 0.99^10.
    asked, state = clients(1, 1), state_of(MODEL)
    ends = {}
    for method in (FedAvg(), FedNova()):
        now = state
        for _ in range(400):
            w = float(now.params["head.bias"][0])
            updates = [
                in_steps(task, (0.99**steps - 1) * (w - goal), steps)
                for task, goal, steps in zip(
                    method.configure(MODEL, now, asked, TRAINING), (-1.0, 1.0), (1, 10), strict=True
                )
            ]
            now = method.aggregate(MODEL, now, asked, updates)
        ends[type(method)] = float(now.params["head.bias"][0])
    far = 1 - 0.99**10
    assert ends[FedAvg] == pytest.approx((far - 0.01) / (far + 0.01), abs=1e-3)  # 0.81
    assert abs(ends[FedNova]) < 0.03


def test_an_edge_reports_its_change_and_the_steps_behind_it() -> None:
    # Two averages: tau_eff = 2.5, then 4 alone; what it reports weighs 6.5 steps.
    asked, method, state = clients(1, 3), FedNova(), state_of(MODEL)
    one, other = method.configure(MODEL, state, asked, TRAINING)
    between = method.aggregate(
        MODEL, state, asked, [in_steps(one, 2.0, 1), in_steps(other, 12.0, 3)]
    )
    after = method.aggregate(MODEL, between, asked, [in_steps(one, 1.0, 4)])
    edge = replace(asked[0], num_examples=4)
    update = relayed_normed(method, MODEL, state, after, edge)
    assert all((delta == 8.75 + 1.0).all() for delta in update.delta.values())
    assert (update.metrics["accumulated_steps"], update.num_examples) == (6.5, 4)
