"""What a node of a tree adds up: sums of sums are the sum, and edges weigh what stands below."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tesserafl.core.errors import ConfigError
from tesserafl.core.fit import Training
from tesserafl.core.messages import Client, Update
from tesserafl.core.method import State
from tesserafl.core.params import num_bytes, sha256
from tesserafl.data.examples import Spec
from tesserafl.engines.sums import Added, Passed, Sums, sums_of
from tesserafl.methods import FedAvg, FedBRB, HeteroFL, HierFAVG, MethodSettings
from tesserafl.models import MLP

SPEC = Spec(kind="vector", task="vector-classification", shape=(4,), num_classes=2)
MODEL = MLP(hidden=(8,)).build_model(SPEC)
CLIENTS = [Client(id=number, num_examples=3 + 5 * number) for number in range(5)]


def updates_of(method: MethodSettings, state: State) -> list[Update]:
    updates = []
    for task in method.configure(MODEL, state, CLIENTS, Training()):
        draw = torch.Generator().manual_seed(task.client.id)
        delta = {n: 0.1 * torch.randn(t.shape, generator=draw) for n, t in task.params.items()}
        updates.append(
            Update(
                round=0,
                client=task.client.id,
                submodel=task.submodel,
                delta=delta,
                num_examples=task.client.num_examples,
                num_steps=1 + task.client.id,
                metrics={"accumulated_steps": 1.0 + task.client.id},
            )
        )
    return updates


def empty_sums(method: MethodSettings, state: State) -> list[Sums]:
    make = sums_of(MODEL, method, {client.id: client for client in CLIENTS}, state.params)
    return [make() for _ in range(4)]


@pytest.mark.parametrize(
    "method",
    [
        FedAvg(),
        HeteroFL(ratio=(0.5, 0.25, 1.0)),
        FedBRB(ratio=(0.5,), strict=False),
        HierFAVG(normalised=True),
    ],
    ids=lambda method: type(method).__name__,
)
def test_sums_of_sums_are_the_whole_to_the_bit(method: MethodSettings) -> None:
    state = method.init(MODEL, 0, 3)
    updates = updates_of(method, state)
    expected = method.aggregate(MODEL, state, CLIENTS, iter(updates))
    for split in ([0, 0, 0, 1, 1], [1, 0, 1, 0, 1], [2, 1, 0, 0, 2]):
        top, *edges = empty_sums(method, state)
        for edge, update in zip(split, updates, strict=True):
            edges[edge].add(update)
        edges[0].merge(edges[2])  # an edge below an edge
        for edge in edges[:2]:
            top.merge(edge)
        after = top.finish(state)
        assert sha256(after.params) == sha256(expected.params)
        assert after.round == 1


def test_which_methods_are_added_up_and_which_are_passed_on() -> None:
    for method, kind in ((FedAvg(), Added), (HierFAVG(normalised=True), Passed)):
        assert isinstance(empty_sums(method, method.init(MODEL, 0, 1))[0], kind)


def test_an_update_that_is_passed_on_is_a_copy() -> None:
    method = FedBRB(ratio=(0.5,), strict=False)
    state = method.init(MODEL, 0, 3)
    kept, spoilt, *_ = empty_sums(method, state)
    for update in updates_of(method, state):
        kept.add(update)
        again = replace(update, delta={n: t.clone() for n, t in update.delta.items()})
        spoilt.add(again)
        for tensor in again.delta.values():
            tensor.fill_(99.0)
    assert sha256(kept.finish(state).params) == sha256(spoilt.finish(state).params)


def test_bytes_of_what_is_handed_on() -> None:
    for method, each in ((FedAvg(), None), (FedBRB(ratio=(0.5,), strict=False), 5)):
        state = method.init(MODEL, 0, 3)
        total = empty_sums(method, state)[0]
        assert total.num_bytes == 0
        updates = updates_of(method, state)
        for update in updates:
            total.add(update)
        if each is None:  # integers of 8 bytes, however many were added
            assert total.num_bytes == 2 * num_bytes(state.params)
        else:
            assert total.num_bytes == sum(update.num_bytes for update in updates)


def test_an_edge_that_averaged_often_counts_where_it_was_trained() -> None:
    """Clients of an edge that train half leave the other half to those that train it."""
    method = HeteroFL(ratio=(1.0, 0.5), weighting="examples")
    state = method.init(MODEL, 0, 3)
    tasks = list(method.configure(MODEL, state, CLIENTS, Training()))
    top, wide, narrow, _ = empty_sums(method, state)
    for edge, number in ((wide, 0), (narrow, 1)):
        task = tasks[number]
        delta = {name: torch.full_like(t, 1.0 + number) for name, t in task.params.items()}
        update = replace(updates_of(method, state)[number], delta=delta)
        edge.add(update)
        after = edge.finish(state)
        top.add_change(state, after, edge.reported(), [CLIENTS[number]])
    change = {n: t - state.params[n] for n, t in top.finish(state).params.items()}
    bias = change["layers.0.bias"]
    # Units 0 to 3 by both, weights 3 and 8: (3 x 1 + 8 x 2) / 11; the others by one alone.
    assert bias[:4].tolist() == pytest.approx([19 / 11] * 4, rel=1e-5)
    assert bias[4:].tolist() == pytest.approx([1.0] * 4, rel=1e-5)


@pytest.mark.parametrize("weighting", ["examples", "uniform"])
def test_an_edge_that_is_passed_on_weighs_what_stands_below(weighting: str) -> None:
    method = HierFAVG(normalised=True, weighting=weighting)  # type: ignore[arg-type]
    state = method.init(MODEL, 0, 3)
    top, edge, _, _ = empty_sums(method, state)
    base = updates_of(method, state)
    members = CLIENTS[:3]
    for number in range(3):
        one = {"accumulated_steps": 1.0}
        delta = {name: torch.full_like(t, 1.0) for name, t in state.params.items()}
        edge.add(replace(base[number], delta=delta, metrics=one))
    top.add_change(state, edge.finish(state), edge.reported(), members)
    five = {name: torch.full_like(t, 5.0) for name, t in state.params.items()}
    top.add(replace(base[4], delta=five, metrics={"accumulated_steps": 1.0}))
    change = top.finish(state).params["head.bias"] - state.params["head.bias"]
    # 3 + 8 + 13 = 24 examples, or 3 devices, moved by 1; 23 examples, or 1 device, by 5.
    expected = (24 + 23 * 5) / 47 if weighting == "examples" else (3 + 5) / 4
    assert change.tolist() == pytest.approx([expected] * 2, rel=1e-5)


def test_a_method_that_cannot_speak_for_others_says_so() -> None:
    method = FedBRB(ratio=(0.5,), strict=False)
    state = method.init(MODEL, 0, 3)
    with pytest.raises(ConfigError, match="FedBRB looks at each update by itself"):
        empty_sums(method, state)[0].add_change(state, state, {}, CLIENTS[:1])
