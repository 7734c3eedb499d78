"""FedIT by hand: Zhang et al., ICASSP 2024; and how far from the mean product a round is noted."""

from __future__ import annotations

import contextlib
from dataclasses import replace

import pytest
import torch
from worked import (
    TRAINING,
    adapted,
    answer,
    clients,
    mean_product,
    products,
    setting,
    state_of,
    trained,
    trained_factors,
    values,
)

from tesserafl.core.coverage import Coverage
from tesserafl.core.errors import ConfigError
from tesserafl.core.lowrank import Collected, aggregation_error
from tesserafl.core.messages import Update
from tesserafl.core.method import State, weights_of
from tesserafl.core.model import Model
from tesserafl.core.params import sha256
from tesserafl.engines.settings import Batching
from tesserafl.methods import FedAvg, FedIT
from tesserafl.run.experiment import from_json
from tesserafl.run.federate import federate
from tesserafl.run.rounds import Notes, play_round
from tesserafl.run.setup import make_engine, prepare

X, Y = [[1.0, -2.0], [0.5, 1.0], [2.0, 0.25]], [0, 1, 1]


def error_of(
    model: Model, before: State, after: State, updates: list[Update], *num_examples: int
) -> float | None:
    kept = Collected(model, weights_of(clients(*num_examples), "examples"))
    for _ in kept.watching(before.params, updates):
        pass
    return aggregation_error(model, after.params, kept.shares)


def test_the_factors_are_averaged_each_by_itself() -> None:
    # n = 1, 3.  A_0 = (1 0), B_0 = (4 0)^T; A_1 = (0 1), B_1 = (0 4)^T
    # A = 1/4 (1 0) + 3/4 (0 1) = (1/4 3/4);  B = 1/4 (4 0)^T + 3/4 (0 4)^T = (1 3)^T
    # B A = (1/4 3/4; 3/4 9/4), but the mean product is (1 0; 0 3).
    # Squares: (3/4)^2 + 2 (3/4)^2 + (3/4)^2 = 9/4 over 1 + 9: 0.225
    model, asked = adapted(1, 2, 2), clients(1, 3)
    state = state_of(model)
    one, other = FedIT().configure(model, state, asked, TRAINING)
    updates = [
        setting(one, layers_0_a=[[1, 0]], layers_0_b=[[4], [0]]),
        setting(other, layers_0_a=[[0, 1]], layers_0_b=[[0], [4]]),
    ]
    after = FedIT().aggregate(model, state, asked, updates)
    assert values(after.params, "layers_0_a") == [[0.25, 0.75]]
    assert values(after.params, "layers_0_b") == [[1.0], [3.0]]
    assert after.round == 1
    error = error_of(model, state, after, updates, 1, 3)
    assert error == pytest.approx(0.225**0.5, rel=1e-6)
    uniform = FedIT(weighting="uniform").aggregate(model, state, asked, updates)
    assert values(uniform.params, "layers_0_b") == [[2.0], [2.0]]


def test_averages_of_factors_are_biased_and_by_how_much() -> None:
    model, asked, shares = adapted(3, 5, 4, 6), clients(1, 2, 5), (0.125, 0.25, 0.625)
    state = FedIT().init(model, 0, 1)
    tasks = list(FedIT().configure(model, state, asked, TRAINING))
    updates = [trained_factors(task, seed) for seed, task in enumerate(tasks)]
    after = FedIT().aggregate(model, state, asked, updates)
    means = mean_product(model, tasks, updates, shares)
    found = products(model, after.params)
    off = sum(float((f - m).square().sum()) for f, m in zip(found, means, strict=True))
    size = sum(float(m.square().sum()) for m in means)
    error = error_of(model, state, after, updates, 1, 2, 5)
    assert error == pytest.approx((off / size) ** 0.5, rel=1e-5)
    assert off / size > 0.01


def test_clients_that_agree_are_not_biased() -> None:
    model, asked = adapted(2, 3, 3), clients(2, 2)
    state = FedIT().init(model, 0, 1)
    updates = []
    for task in FedIT().configure(model, state, asked, TRAINING):
        updates.append(answer(task, 0.5))
    after = FedIT().aggregate(model, state, asked, updates)
    error = error_of(model, state, after, updates, 2, 2)
    assert error is not None
    assert error < 1e-6


def test_an_entry_is_averaged_over_those_that_trained_it() -> None:
    # Ranks 4 x (1, 1/2): both move the first two ranks, by 1 and 4: (1 + 3 x 4) / 4 = 13/4;
    # the others only client 0 moves.
    model, asked, method = adapted(4, 2, 1), clients(1, 3), FedIT(ratio=(1.0, 0.5))
    state = state_of(model)
    one, other = method.configure(model, state, asked, TRAINING)
    assert [len(task.params["layers.0.a"]) for task in (one, other)] == [4, 2]
    after = method.aggregate(model, state, asked, [answer(one, 1.0), answer(other, 4.0)])
    assert values(after.params, "layers_0_b") == [[3.25, 3.25, 1.0, 1.0]]
    assert values(after.params, "layers_0_a") == [[3.25] * 2] * 2 + [[1.0] * 2] * 2


def test_one_client_alone_is_plain_local_training() -> None:
    model, method = adapted(2, 2, 2, classes=2), FedIT()
    state = method.init(model, 0, 1)
    (task,) = method.configure(model, state, clients(3), TRAINING)
    update = trained(method, model, task, X, Y)
    assert update.delta.keys() == model.shapes.keys()
    after = method.aggregate(model, state, clients(3), [update])
    for name, before in state.params.items():
        torch.testing.assert_close(after.params[name], before + update.delta[name])
    error = error_of(model, state, after, [update], 3)
    assert error is not None
    assert error < 1e-6


def test_it_is_fedavg_of_the_adapters_to_the_bit() -> None:
    model, asked = adapted(2, 2, 2, classes=2), clients(3, 2, 1)
    results = []
    for method in (FedIT(), FedAvg()):
        state = method.init(model, 5, 3)
        for _ in range(3):
            updates = []
            for task in method.configure(model, state, asked, TRAINING):
                rows = range(task.client.num_examples)
                inputs, labels = [X[i] for i in rows], [Y[i] for i in rows]
                updates.append(trained(method, model, task, inputs, labels))
            state = method.aggregate(model, state, asked, updates)
        results.append(sha256(state.params))
    assert results[0] == results[1]


@pytest.mark.parametrize("ratio", [(), (0.0,), (1.5,)])
def test_ratios_that_are_refused(ratio: tuple[float, ...]) -> None:
    model, method = adapted(2, 2, 2), FedIT(ratio=ratio)
    state = method.init(model, 0, 1)
    with pytest.raises(ConfigError, match=r"method\.ratio"):
        next(method.configure(model, state, clients(1), TRAINING))


# --- What a run notes -----------------------------------------------------------------------------


def played(
    adapters: Model | None,
    method: str,
    rounds: int = 2,
    topology: str = "star",
    batching: Batching = "sequential",
) -> list[Notes]:
    """The notes of a run on digits, of these adapters or of an MLP."""
    experiment = from_json(
        {
            "data": {"num_clients": 4, "max_train": 80, "max_test": 40},
            "model": {"name": "mlp", "hidden": [8]},
            "method": {"name": method, "ratio": [1.0, 0.5]},
            "training": {"lr": 0.05, "clip_norm": 1.0},
            "network": {"topology": topology},
            "engine": {"batching": "sequential"},
            "rounds": rounds,
            "clients_per_round": 4,
        }
    )
    setup = prepare(experiment)
    if adapters is not None:
        engine = replace(setup.experiment.engine, batching=batching)
        setup = replace(setup, model=adapters, experiment=replace(setup.experiment, engine=engine))
    state = setup.experiment.method.init(setup.model, 0, rounds)
    federation = federate(setup, state)
    coverage, costs = Coverage(setup.model.shapes), setup.costs()
    with contextlib.closing(make_engine(setup)) as worker:
        return [play_round(setup, worker, federation, coverage, costs) for _ in range(rounds)]


DIGITS = adapted(4, 64, 12, classes=10)


def test_a_run_with_a_server_notes_the_error_of_every_round() -> None:
    notes = played(DIGITS, "fedit")
    # In the first round B begins at zero, and A has hardly moved.
    assert all(note.error is not None and 0 < note.error < 2 for note in notes)
    assert [note.exchange for note in notes] == [{"aggregation_error": n.error} for n in notes]
    assert [note.error for note in played(DIGITS, "fedit")] == [note.error for note in notes]


def test_what_is_noted_is_the_error_of_the_next_model() -> None:
    # FlexLoRA is exact but for truncation: far nearer to the mean product than FedIT.
    (fedit,), (flexlora,) = (played(DIGITS, name, rounds=1) for name in ("fedit", "flexlora"))
    assert fedit.error is not None
    assert flexlora.error is not None
    assert flexlora.error < 0.5 * fedit.error


def test_models_without_adapters_and_peers_have_no_such_error() -> None:
    for notes in (
        played(None, "heterofl", rounds=1),
        played(DIGITS, "fedit", rounds=1, topology="peers"),
    ):
        assert [note.error for note in notes] == [None]
        assert "aggregation_error" not in notes[0].exchange


@pytest.mark.parametrize("method", ["fedit", "ffa_lora", "flexlora", "hetlora"])
def test_clients_trained_together_get_what_each_gets_alone(method: str) -> None:
    alone = played(DIGITS, method)
    together = played(DIGITS, method, batching="vmapped")
    for one, other in zip(alone, together, strict=True):
        assert other.loss == pytest.approx(one.loss, rel=1e-4)
        assert other.error == pytest.approx(one.error, rel=1e-2, abs=1e-4)
        assert other.amounts["bytes_up"] == one.amounts["bytes_up"]


@pytest.mark.parametrize("method", ["fedit", "ffa_lora", "flexlora", "hetlora"])
def test_adapters_without_a_head_are_all_there_is(method: str) -> None:
    notes = played(adapted(4, 64, 10), method)
    assert all(len(note.clients) == 4 and not note.failures for note in notes)
    assert all(note.error is not None for note in notes)
