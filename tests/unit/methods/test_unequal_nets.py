"""Devices that take unequal numbers of steps: where averaging ends, on a small net.

F_j is the mean squared error to device j's own targets on shared inputs, so the devices contradict
each other and no net is best for all. What holds for quadratics (`test_unequal_steps.py`) holds for
gradients here: PLAIN averaging ends where that of the re-weighted objective, sum of p_j tau_j F_j,
vanishes, and per step (FedNova) where that of the sum of p_j F_j does, with min_k ||grad F(w_k)||^2
falling with the number of rounds K where lr goes as 1 / sqrt(K).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import linear

from tesserafl.core import seeds
from tesserafl.core.fit import Training
from tesserafl.core.messages import Client, Update
from tesserafl.core.method import State
from tesserafl.core.params import Params, subtract
from tesserafl.data.examples import Spec
from tesserafl.methods import HierFAVG
from tesserafl.methods._normalised import NORM
from tesserafl.models import MLP

CLIENTS = {c: Client(id=c, num_examples=n) for c, n in {0: 2, 1: 1, 2: 1}.items()}
SHARE = {0: 0.5, 1: 0.25, 2: 0.25}
EDGES = {"a": (0, 1), "b": (2,)}
STEPS = {0: 1, 1: 3, 2: 8}
ROUNDS = {"a": 1, "b": 2}
"""Averages of an edge."""
TAU = {0: 1, 1: 3, 2: 16}
"""Steps in a round of the cloud."""
PLAIN, NORMALISED = HierFAVG(), HierFAVG(normalised=True)
MODEL = MLP(hidden=(5,)).build_model(
    Spec(kind="vector", task="vector-classification", shape=(3,), num_classes=1)
)
INPUTS = torch.randn(16, 3, generator=seeds.generator(0, "inputs"))
WAY = torch.tensor([1.0, -0.5, 0.5])
TARGETS = {
    c: (scale * torch.tanh(INPUTS @ WAY) + shift)[:, None]
    for c, (scale, shift) in {0: (1.0, 0.0), 1: (-0.5, 0.5), 2: (2.0, 1.0)}.items()
}
DECAY = 0.05


def gradient(params: Params, device: int) -> Params:
    """Of F_j: the mean squared error of tanh units to device j's targets, with weight decay."""
    own = {name: tensor.detach().requires_grad_() for name, tensor in params.items()}
    hidden = torch.tanh(linear(INPUTS, own["layers.0.weight"], own["layers.0.bias"]))
    answers = linear(hidden, own["head.weight"], own["head.bias"])
    error = (answers - TARGETS[device]).square().mean()
    loss = error + DECAY / 2 * sum(tensor.square().sum() for tensor in own.values())
    return dict(zip(own, torch.autograd.grad(loss, list(own.values())), strict=True))


def slope(params: Params, weights: Mapping[int, float]) -> float:
    """||grad of the sum of weights_j F_j||^2, the weights taken to sum 1."""
    total = sum(weights.values())
    own = {c: gradient(params, c) for c in weights}
    mixed = {n: sum(weights[c] / total * own[c][n] for c in weights) for n in params}
    return float(sum(torch.as_tensor(part).square().sum() for part in mixed.values()))


def answered(
    method: HierFAVG, state: State, devices: Sequence[int], lr: float, steps: Mapping[int, int]
) -> Iterator[Update]:
    """What devices report after their gradient steps."""
    people = [CLIENTS[device] for device in devices]
    for task in method.configure(MODEL, state, people, Training(lr=lr)):
        device, params = task.client.id, dict(task.params)
        for _ in range(steps[device]):
            slopes = gradient(params, device)
            params = {name: value - lr * slopes[name] for name, value in params.items()}
        yield Update(
            round=state.round,
            client=device,
            submodel=task.submodel,
            delta=subtract(params, task.params),
            num_examples=task.client.num_examples,
            num_steps=steps[device],
            metrics={NORM: float(steps[device])},
        )


def cloud_round(method: HierFAVG, state: State, lr: float, steps: Mapping[int, int]) -> State:
    """Edges average as often as their periods say, then the cloud does."""
    updates, people = [], []
    for name, devices in EDGES.items():
        model, below = state, [CLIENTS[device] for device in devices]
        for _ in range(ROUNDS[name]):
            own = answered(method, model, devices, lr, steps)
            model = method.aggregate(MODEL, model, below, own)
        edge = replace(below[0], num_examples=sum(client.num_examples for client in below))
        relayed = method.relayed(MODEL, state, model, edge) if method.normalised else None
        updates.append(
            relayed
            or Update(  # as the tree does it: the change of the edge's model
                round=state.round,
                client=edge.id,
                submodel=MODEL.whole(),
                delta=subtract(model.params, state.params),
                num_examples=edge.num_examples,
                num_steps=1,
                metrics={},
            )
        )
        people.append(edge)
    return method.aggregate(MODEL, state, people, iter(updates))


def trained(
    method: HierFAVG, rounds: int, lr: float, steps: Mapping[int, int] = STEPS
) -> tuple[float, float, float]:
    """||grad||^2 of F and of the re-weighted objective at the end; the least of F on the way."""
    state, least = State(params=MODEL.init(0), seed=0, rounds=rounds), float("inf")
    for _ in range(rounds):
        state = cloud_round(method, state, lr, steps)
        least = min(least, slope(state.params, SHARE))
    return slope(state.params, SHARE), slope(state.params, REWEIGHTED), least


REWEIGHTED = {c: SHARE[c] * TAU[c] for c in CLIENTS}


@pytest.mark.parametrize("rounds", [(25, 100), pytest.param((100, 400), marks=pytest.mark.slow)])
def test_gradients_vanish_with_the_rounds_and_of_the_objective_that_is_averaged(
    rounds: tuple[int, int],
) -> None:
    few, many = (trained(NORMALISED, k, 0.5 / k**0.5) for k in rounds)
    # O(1 / sqrt(K)): four times the rounds, half of it at most.
    assert many[2] < 0.55 * few[2]
    assert many[0] < 0.1 * many[1]
    # Plain averaging does not get nearer to the minimum of F, but to the re-weighted one.
    few, many = (trained(PLAIN, k, 0.5 / k**0.5) for k in rounds)
    assert many[2] > 0.9 * few[2] and many[2] > 0.1
    assert many[1] < 0.55 * few[1]


@pytest.mark.slow
def test_the_gradient_that_is_left_grows_with_the_most_steps() -> None:
    for method in (PLAIN, NORMALISED):
        left = [trained(method, 200, 3e-2, {**STEPS, 2: most})[0] for most in (1, 4, 16)]
        assert left[0] < left[1] < left[2]
