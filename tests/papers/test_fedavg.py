"""FedAvg by hand: McMahan et al., AISTATS 2017, Algorithm 1."""

from __future__ import annotations

import torch
from worked import TRAINING, answer, clients, mlp, state_of, trained, values

from tesserafl.core.params import sha256
from tesserafl.methods import FedAvg


def test_the_server_weights_clients_by_their_examples() -> None:
    # n_0 = 1, n_1 = 3, w = (0, 8): w_0 = (4, 12), w_1 = (0, 4)
    # w <- 1/4 (4, 12) + 3/4 (0, 4) = (1, 6)
    model, asked = mlp(2), clients(1, 3)
    state = state_of(model, head_bias=[0, 8])
    one, other = FedAvg().configure(model, state, asked, TRAINING)
    updates = [answer(one, 0.0, head_bias=[4, 4]), answer(other, 0.0, head_bias=[0, -4])]
    after = FedAvg().aggregate(model, state, asked, updates)
    assert values(after.params, "head_bias") == [1.0, 6.0]
    assert after.round == 1
    uniform = FedAvg(weighting="uniform").aggregate(model, state, asked, updates)
    assert values(uniform.params, "head_bias") == [2.0, 8.0]


def test_only_those_who_answer_are_weighted() -> None:
    # Of three clients that were asked the last two answer: (3 x 4 + 5 x 12) / 8 = 9
    model, asked = mlp(2), clients(1, 3, 5)
    state = state_of(model)
    _, *tasks = FedAvg().configure(model, state, asked, TRAINING)
    updates = [answer(task, change) for task, change in zip(tasks, (4, 12), strict=True)]
    after = FedAvg().aggregate(model, state, asked, updates)
    assert all((tensor == 9).all() for tensor in after.params.values())


def test_a_round_of_gradient_steps() -> None:
    # Identity in front, zeros in the head: p = (1/2, 1/2), the features are x.
    # Client 0: x = (1, 2), y = 0.  g_b = (-1/2, 1/2), g_W = g_b x; eta = 1/2
    #           b = (1/4, -1/4), W = ((1/4, 1/2), (-1/4, -1/2))
    # Client 1: three times x = (2, 0), y = 1.
    #           b = (-1/4, 1/4), W = ((-1/2, 0), (1/2, 0))
    # Mean with 1/4 and 3/4: b = (-1/8, 1/8), W = ((-5/16, 1/8), (5/16, -1/8))
    model, asked, method = mlp(2), clients(1, 3), FedAvg()
    state = state_of(model, layers_0_weight=[[1, 0], [0, 1]])
    one, other = method.configure(model, state, asked, TRAINING)
    updates = [
        trained(method, model, one, [[1.0, 2.0]], [0]),
        trained(method, model, other, [[2.0, 0.0]] * 3, [1] * 3),
    ]
    assert [update.num_examples for update in updates] == [1, 3]
    after = method.aggregate(model, state, asked, updates)
    assert values(after.params, "head_bias") == [-0.125, 0.125]
    assert values(after.params, "head_weight") == [[-0.3125, 0.125], [0.3125, -0.125]]
    assert values(after.params, "layers_0_weight") == [[1.0, 0.0], [0.0, 1.0]]


def test_below_full_width_the_model_is_as_narrow_as_the_smallest_client() -> None:
    # The bar: ratios 1/2 and 1/4 of 8 units, so everybody trains 2.
    model, method = mlp(8), FedAvg(ratio=(0.5, 0.25))
    state = method.init(model, 3, 1)
    predictor = method.predictor(model, state)
    assert predictor.model.sizes == {"hidden1": 2, "classes": 2}
    assert sha256(state.params) == sha256(mlp(2).init(3))  # a fresh small model, not a cut one
    for task in method.configure(model, state, clients(1, 1), TRAINING):
        assert sha256(task.params) == sha256(state.params)


def test_the_bar_trains_like_a_small_model_of_its_own() -> None:
    # Nothing is cut, so nothing is scaled: the same bits as FedAvg of the small architecture.
    inputs, labels = [[1.0, -2.0], [0.5, 1.0]], [0, 1]
    results = []
    for model, method in ((mlp(8), FedAvg(ratio=(0.25,))), (mlp(2), FedAvg())):
        state, asked = method.init(model, 0, 1), clients(2)
        (task,) = method.configure(model, state, asked, TRAINING)
        update = trained(method, model, task, inputs, labels)
        results.append(sha256(method.aggregate(model, state, asked, [update]).params))
        assert any(bool(torch.count_nonzero(delta)) for delta in update.delta.values())
    assert results[0] == results[1]
