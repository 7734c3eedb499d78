"""FLM by hand: layers are matched in order, similar ones averaged, dissimilar ones put in."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from worked import TRAINING, blocks_of, clients, deep

from tesserafl.core import seeds
from tesserafl.core.errors import ConfigError
from tesserafl.core.messages import Client, Task, Update
from tesserafl.core.method import PUBLIC_INPUTS, PUBLIC_LABELS, State
from tesserafl.core.model import Model
from tesserafl.core.params import Params, sha256
from tesserafl.core.submodel import cut
from tesserafl.data.examples import Spec
from tesserafl.methods import FLM, FedAvg, _look
from tesserafl.methods._blockscale import Scales
from tesserafl.methods._handback import weighed
from tesserafl.methods._public import Public, accuracy_of, calibrated, part_of, public_of
from tesserafl.methods._stack import Stack, noted, stacks_of
from tesserafl.models import Residual, ResNet
from tesserafl.models.scaling import forward_of

MODEL = deep(5)
EIGHT = clients(*[10] * 8)
GROWING = FLM(depth=(3,), warmup=2, cooldown=2, policy="persistent", weighting="uniform")

Change = Callable[[int, str, Tensor], Tensor]
"""(client, the parameter's small name, its value) -> by how much it changes."""


def noise(client: int, name: str, value: Tensor, *, round: int = 0) -> Tensor:
    draw = seeds.generator(0, round, client, name)
    return 0.01 * torch.randn(value.shape, generator=draw)


def alike(client: int, name: str, value: Tensor) -> Tensor:
    return noise(0, name, value)


def two_kinds(client: int, name: str, value: Tensor) -> Tensor:
    """Clients 2 and 5 move the middle block against the others, far."""
    if not name.startswith("blocks.1."):
        return alike(client, name, value)
    away = 0.5 + 0.5 * alike(0, name, value).abs()
    return (-1.0 if client in (2, 5) else 0.5) * away + noise(client, name, value)


def update(task: Task, change: Change) -> Update:
    return Update(
        round=task.round,
        client=task.client.id,
        submodel=task.submodel,
        delta={n: change(task.client.id, n, t) for n, t in task.params.items()},
        num_examples=task.client.num_examples,
        num_steps=1,
        metrics={},
    )


def played(
    method: FLM | FedAvg,
    model: Model,
    state: State,
    change: Change,
    asked: Sequence[Client] = EIGHT,
    backwards: bool = False,
) -> State:
    tasks = list(method.configure(model, state, asked, TRAINING))
    answers = [update(task, change) for task in (tasks[::-1] if backwards else tasks)]
    return method.aggregate(model, state, asked, iter(answers))


def run(method: FLM, change: Change, rounds: int, model: Model = MODEL) -> State:
    state = with_public(method.init(model, 0, rounds))
    for _ in range(rounds):
        state = played(method, model, state, change)
    return state


def with_public(state: State, number: int = 40) -> State:
    draw = seeds.generator(0, "public")
    labels = torch.arange(number) % 2
    inputs = torch.randn(number, 2, generator=draw) + 2.0 * labels[:, None]
    return replace(state, extra={PUBLIC_INPUTS: inputs, PUBLIC_LABELS: labels})


def order_of(state: State) -> list[int]:
    found: list[int] = state.notes["stacks"]["blocks"]["order"]
    return found


def block(params: Params, slot: int) -> Tensor:
    return torch.cat([t.flatten() for n, t in params.items() if n.startswith(f"blocks.{slot}.")])


@pytest.mark.parametrize("measure", ["parameters", "updates", "functions"])
def test_identical_clients_are_fedavg_to_the_bit_and_nothing_grows(measure: str) -> None:
    method = replace(GROWING, measure=measure)
    shallow, plain = deep(3), FedAvg(weighting="uniform")
    expected = plain.init(shallow, 0, 8)
    state = with_public(method.init(MODEL, 0, 8))
    for _ in range(8):
        expected = played(plain, shallow, expected, alike)
        state = played(method, MODEL, state, alike)
        assert order_of(state) == [0, 1, 2]
        predictor = method.predictor(MODEL, state)
        assert predictor.model.shapes == shallow.shapes
        assert sha256(predictor.params) == sha256(expected.params)


@pytest.mark.parametrize("measure", ["parameters", "updates"])
def test_two_unlike_clients_make_one_block_behind_the_one_they_left(measure: str) -> None:
    method = replace(GROWING, measure=measure)
    state = with_public(method.init(MODEL, 0, 20))
    while order_of(state) == [0, 1, 2] and state.round < 6:
        before, state = state, played(method, MODEL, state, two_kinds)
    assert order_of(state) == [0, 1, 3, 2]
    _, kind, axis, slot, after, members = state.notes["log"][-1]
    assert (kind, axis, slot, after, members) == ("insert", "blocks", 3, 1, [2, 5])
    # Each of the two is the mean of those who made it.
    tasks = list(method.configure(MODEL, before, EIGHT, TRAINING))
    moved = {t.client.id: block(t.params, 1) + block(update(t, two_kinds).delta, 1) for t in tasks}
    new = torch.stack([moved[c] for c in (2, 5)]).mean(dim=0)
    old = torch.stack([moved[c] for c in (0, 1, 3, 4, 6, 7)]).mean(dim=0)
    torch.testing.assert_close(block(state.params, 3), new)
    torch.testing.assert_close(block(state.params, 1), old)
    # From now on the two hold the new block, the others the old one.
    held = {
        task.client.id: blocks_of(MODEL, task)
        for task in method.configure(MODEL, state, EIGHT, TRAINING)
    }
    assert held == {c: [0, 3, 2] if c in (2, 5) else [0, 1, 2] for c in range(8)}


def test_a_lone_client_is_averaged_not_put_in() -> None:
    def lone(client: int, name: str, value: Tensor) -> Tensor:
        return two_kinds(2 if client == 4 else 0, name, value)

    method = replace(GROWING, measure="parameters")
    state = with_public(method.init(MODEL, 0, 9))
    for _ in range(6):
        before, state = state, played(method, MODEL, state, lone)
    assert order_of(state) == [0, 1, 2]
    # No update is thrown away: the mean is over all eight.
    change = torch.stack(
        [block(update(t, lone).delta, 1) for t in method.configure(MODEL, before, EIGHT, TRAINING)]
    ).mean(dim=0)
    torch.testing.assert_close(block(state.params, 1) - block(before.params, 1), change)


POLICIES = ["persistent", "resampled", "importance", "slots", "pilot"]
MEASURES = ["parameters", "updates", "functions"]


@pytest.mark.parametrize(
    ("policy", "measure"),
    [
        pytest.param(
            policy,
            measure,
            marks=pytest.mark.slow if policy != "pilot" and measure != "updates" else (),
        )
        for policy in POLICIES
        for measure in MEASURES
    ],
)
def test_no_order_of_arrival_changes_a_bit(policy: str, measure: str) -> None:
    method = replace(
        GROWING, policy=policy, measure=measure, pilot_rounds=2, threshold=0.5, merge=0.01
    )
    one = other = with_public(method.init(MODEL, 0, 12))
    for _ in range(12):
        one = played(method, MODEL, one, two_kinds)
        other = played(method, MODEL, other, two_kinds, backwards=True)
        assert json.dumps(one.notes) == json.dumps(other.notes)
        assert sha256(one.params) == sha256(other.params)
        assert sha256(one.extra) == sha256(other.extra)
    assert len(order_of(one)) > 3 or measure == "functions"


@pytest.mark.parametrize("policy", ["persistent", "resampled", "importance", "slots"])
@pytest.mark.parametrize("measure", ["parameters", "updates"])
def test_paths_are_increasing_and_as_long_as_clients_can_train(policy: str, measure: str) -> None:
    method = replace(
        GROWING,
        depth=(3, 2),
        policy=policy,
        measure=measure,
        warmup=0,
        cooldown=1,
        threshold=0.2,
        support=0.0,
    )
    state, grown = with_public(method.init(MODEL, 0, 15)), 0
    for round in range(15):
        order = order_of(state)
        assert sorted(set(order)) == sorted(order) and len(order) <= 5
        for task in method.configure(MODEL, state, EIGHT, TRAINING):
            places = [order.index(slot) for slot in blocks_of(MODEL, task)]
            assert places == sorted(set(places)) and len(places) == (3, 2)[task.client.id % 2]
            torch.testing.assert_close(task.params, cut(state.params, task.submodel))
        state = played(
            method,
            MODEL,
            state,
            lambda c, n, t, r=round: two_kinds(c, n, t) + 5 * noise(c, n, t, round=r),
        )
        grown = max(grown, len(order_of(state)))
    assert grown > 3


def test_nothing_is_put_in_before_the_warmup_nor_between_two_rests() -> None:
    method = replace(GROWING, warmup=4, cooldown=3, support=0.0)
    state = run(method, two_kinds, 12)
    rounds = [entry[0] for entry in state.notes["log"]]
    assert rounds and rounds[0] > 4
    assert all(later - former >= 3 for former, later in itertools.pairwise(rounds))


def test_support_is_asked_for() -> None:
    assert order_of(run(replace(GROWING, support=0.5), two_kinds, 8)) == [0, 1, 2]


def test_a_matched_block_is_summed_where_it_belongs() -> None:
    """A client whose first block became the second, to the digit, is averaged into the second."""
    method = replace(GROWING, depth=(2,), measure="parameters", warmup=99)
    state = with_public(method.init(MODEL, 0, 3))
    model = deep(5)
    lonely = clients(10)
    stack = state.notes["stacks"]["blocks"] | {"order": [0, 1, 2], "paths": {"0": [0, 2]}}
    state = replace(state, notes={**state.notes, "stacks": {"blocks": stack}})
    params = dict(state.params)
    for name in params:
        if name.startswith("blocks.1."):
            params[name] = params[name.replace("blocks.1.", "blocks.0.")] + 3.0
        elif name.startswith("blocks.2."):
            params[name] = params[name.replace("blocks.2.", "blocks.0.")] - 5.0
    state = replace(state, params=params)

    def moves(client: int, name: str, value: Tensor) -> Tensor:
        return torch.full_like(value, 2.5 if name.startswith("blocks.0.") else 0.0)

    after = played(method, model, state, moves, lonely)
    assert after.notes["paths"] == {"0": {"blocks": [1, 2]}}
    torch.testing.assert_close(block(after.params, 0), block(params, 0))
    torch.testing.assert_close(block(after.params, 1), block(params, 0) + 2.5)
    assert after.notes["stacks"]["blocks"]["paths"]["0"] == [1, 2]


def answers(model: Model, params: Params, inputs: Tensor) -> Tensor:
    return forward_of(model, model.whole(), model.module().eval(), "none")(params, inputs).logits


def test_the_server_scales_what_a_block_adds_by_who_held_it() -> None:
    state = run(GROWING, two_kinds, 3)
    assert order_of(state) == [0, 1, 3, 2]
    shares = GROWING.scales(MODEL, state, stacks_of(state))["blocks"]
    assert shares[0] == shares[2] == 1.0
    assert shares[1] == pytest.approx(0.75) and shares[3] == pytest.approx(0.25)
    predictor = GROWING.predictor(MODEL, state)
    assert predictor.model.sizes["blocks"] == 4 and predictor.part is not None
    inputs = torch.randn(6, 2, generator=seeds.generator(0, "inputs"))
    # By the definition: h <- h + s f(h).
    module = predictor.model.module().eval()
    plain = cut(state.params, predictor.part)
    stream = torch.nn.functional.linear(inputs, plain["stem.weight"], plain["stem.bias"])
    for place, slot in enumerate(order_of(state)):
        own = {
            n.removeprefix(f"blocks.{place}."): t
            for n, t in plain.items()
            if n.startswith(f"blocks.{place}.")
        }
        inside = torch.func.functional_call(module.blocks[place], own, (stream,))
        stream = stream + shares[slot] * (inside - stream)
    normed = torch.nn.functional.layer_norm(
        stream, (2,), plain["exits.0.norm.weight"], plain["exits.0.norm.bias"]
    ).relu()
    logits = torch.nn.functional.linear(
        normed, plain["exits.0.head.weight"], plain["exits.0.head.bias"]
    )
    torch.testing.assert_close(answers(predictor.model, predictor.params, inputs), logits)


def test_a_new_block_adds_little_where_paths_are_drawn() -> None:
    persistent = run(GROWING, two_kinds, 3)
    drawn = run(replace(GROWING, policy="resampled"), two_kinds, 3)
    assert order_of(drawn) == order_of(persistent) == [0, 1, 3, 2]
    for name, value in persistent.params.items():
        if name.startswith("blocks.3."):
            factor = 0.1 if ".narrow." in name else 1.0
            torch.testing.assert_close(drawn.params[name], factor * value)


def test_by_families_every_client_holds_one_of_each() -> None:
    method = replace(GROWING, policy="slots")
    state = run(method, two_kinds, 3)
    seen = set()
    for round in range(3, 15):
        for task in method.configure(MODEL, replace(state, round=round), EIGHT, TRAINING):
            seen.add(tuple(blocks_of(MODEL, task)))
    assert seen == {(0, 1, 2), (0, 3, 2)}
    scales = method.scales(MODEL, state, stacks_of(state))["blocks"]
    assert scales == {0: 1.0, 1: 0.5, 3: 0.5, 2: 1.0}


def test_by_importance_large_blocks_are_held_more_often() -> None:
    method = replace(GROWING, depth=(1,), policy="importance")
    state = method.init(MODEL, 0, 99)
    stack = state.notes["stacks"]["blocks"] | {"order": [0, 1]}
    params = {
        n: torch.full_like(t, 0.5 if n.startswith("blocks.1.") else 1.0)
        for n, t in state.params.items()
    }
    stacks = weighed(MODEL, params, {"blocks": Stack.from_notes(stack)})
    notes = {**state.notes, **noted(stacks)}
    held = []
    for round in range(100):
        now = replace(state, round=round + 50, params=params, notes=notes)
        held += [blocks_of(MODEL, t)[0] for t in method.configure(MODEL, now, EIGHT, TRAINING)]
    # Norms are halved, so the weight is 2^-4: 1 in 17 of 800 draws, deviation 6.7.
    assert 25 <= held.count(1) <= 70


def test_the_pilot_keeps_what_does_better_on_public_examples(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from tesserafl.methods import _pilot

    for found, chosen in (([0.9, 0.3], "persistent"), ([0.3, 0.9], "importance")):
        scripted = iter(found)
        monkeypatch.setattr(_pilot, "accuracy_of", lambda *args, s=scripted: next(s))
        method = replace(GROWING, policy="pilot", pilot_rounds=3, guard=0.0)
        state = with_public(method.init(MODEL, 0, 30))
        trials: list[str] = []
        reached: list[str] = []
        while state.notes["pilot"] is None or not state.notes["pilot"]["done"]:
            state = played(method, MODEL, state, two_kinds)
            if state.notes["pilot"] is not None:
                trials.append(state.notes["policy"])
                reached.append(sha256(state.params))
        assert trials == ["persistent"] * 3 + ["importance"] * 3 + [chosen]
        assert state.notes["policy"] == chosen and state.notes["pilot"]["found"] == found
        assert not [n for n in state.extra if n.startswith(("fork/", "kept/"))]
        # Both trials began from one state but for the new block's size.
        assert reached[0] != reached[3]
        if chosen == "persistent":  # what its three rounds had reached
            assert len(set(order_of(state))) == 4


def test_without_public_examples_what_needs_them_is_refused() -> None:
    for changed in (
        {"policy": "pilot"},
        {"measure": "functions"},
        {"calibrate": 5},
        {"prune": 0.1},
    ):
        method = replace(GROWING, **changed)
        with pytest.raises(ConfigError, match=r"--data\.public"):
            next(method.configure(MODEL, method.init(MODEL, 0, 9), EIGHT, TRAINING))


@pytest.mark.parametrize(("shallow", "served"), [(0.9, {"blocks": [0, 1, 2]}), (0.505, None)])
def test_the_guard_serves_a_path_that_is_better(
    shallow: float, served: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    def accuracy(
        model: Model, params: Params, orders: dict[str, list[int]], *rest: object
    ) -> float:
        return shallow if len(orders["blocks"]) == 3 else 0.5

    monkeypatch.setattr(_look, "accuracy_of", accuracy)
    method = replace(GROWING, cooldown=4, guard=0.01)
    state, sizes = with_public(method.init(MODEL, 0, 16)), []
    for _ in range(16):
        state = played(method, MODEL, state, two_kinds)
        sizes.append(len(order_of(state)))
    assert state.notes["served"] == served
    # Growth rests while a path is served.
    assert sizes[3] == 4 and (sizes[-1] == 4) == (served is not None)
    predictor = method.predictor(MODEL, state)
    assert predictor.model.sizes["blocks"] == (sizes[-1] if served is None else 3)


def test_the_guard_measures_on_public_examples() -> None:
    state = run(GROWING, two_kinds, 6)
    stacks, public = stacks_of(state), public_of(state, "the guard")
    for orders in ({"blocks": [0, 1, 2]}, {"blocks": order_of(state)}):
        scales = GROWING.scales(MODEL, state, stacks)
        small, params = part_of(MODEL, state.params, orders, scales)
        right = answers(small, params, _inputs(state)).argmax(dim=1) == state.extra[PUBLIC_LABELS]
        found = accuracy_of(MODEL, state.params, orders, scales, public)
        assert found == pytest.approx(float(right.double().mean()))


def _inputs(state: State) -> Tensor:
    return state.extra[PUBLIC_INPUTS]


def test_calibration_lowers_the_loss_and_changes_scales_alone() -> None:
    params, orders = MODEL.init(3), {"blocks": [4, 0, 2]}
    part = MODEL.slice(orders)
    inputs = torch.randn(60, 2, generator=seeds.generator(0, "inputs"))
    labels = answers(MODEL.resized(part), cut(params, part), inputs).argmax(dim=1)
    public, before = Public(inputs, labels), sha256(params)
    wrong = {"blocks": dict.fromkeys((4, 0, 2), -1.0)}
    found = calibrated(MODEL, params, orders, wrong, public, steps=60)
    assert sha256(params) == before and set(found["blocks"]) == {4, 0, 2}

    def loss(scales: Scales) -> float:
        small, values = part_of(MODEL, params, orders, scales)
        logits = answers(small, values, inputs)[1::2]
        return float(torch.nn.functional.cross_entropy(logits, labels[1::2]))

    assert loss(found) < loss(wrong)
    assert calibrated(MODEL, params, orders, wrong, public, steps=0) == {
        "blocks": dict.fromkeys((4, 0, 2), pytest.approx(-1.0))
    }


def test_a_run_keeps_its_calibrated_scales_until_it_grows_again() -> None:
    plain = run(replace(GROWING, guard=0.0), two_kinds, 4)
    tuned = run(replace(GROWING, guard=0.0, calibrate=20), two_kinds, 4)
    assert sha256(plain.params) == sha256(tuned.params)
    assert plain.notes["calibrated"] is None
    assert set(tuned.notes["calibrated"]["blocks"]) == {"0", "1", "2", "3"}


def test_neighbours_that_stay_alike_become_one() -> None:
    method = replace(GROWING, merge=1e9, cooldown=1, warmup=2)
    state, sizes = with_public(method.init(MODEL, 0, 12)), []
    for _ in range(12):
        before, state = state, played(method, MODEL, state, two_kinds)
        sizes.append(len(order_of(state)))
        if len(order_of(state)) < len(order_of(before)):
            break
    kind, gone, kept = (state.notes["log"][-1][i] for i in (1, 3, 4))
    assert kind == "merge" and gone not in order_of(state) and kept in order_of(state)
    assert len(order_of(state)) >= 3  # every client still finds its three


def test_a_block_that_adds_nothing_is_taken_out() -> None:
    method = replace(GROWING, prune=1e-6, cooldown=3, guard=0.0)
    state = run(method, two_kinds, 5)
    assert len(order_of(state)) == 4
    params = {
        n: torch.zeros_like(t) if n.startswith("blocks.3.narrow.") else t
        for n, t in state.params.items()
    }
    state = replace(state, params=params, round=5)
    after = played(method, MODEL, state, lambda c, n, t: torch.zeros_like(t))
    assert order_of(after) == [0, 1, 2] and after.notes["log"][-1][1] == "prune"


def test_unlike_functions_make_a_block() -> None:
    """By CKA: the two turn what the middle block gives around."""

    def turned(client: int, name: str, value: Tensor) -> Tensor:
        if not name.startswith("blocks.1."):
            return torch.zeros_like(value)
        return (40.0 if client in (2, 5) else 0.001) * (noise(1, name, value) + 0.05)

    method = replace(GROWING, measure="functions", guard=0.0, cutoff=0.02)
    state = run(method, turned, 4)
    assert state.notes["log"] and state.notes["log"][0][5] == [2, 5]


def test_a_stages_first_block_stays_where_it_is() -> None:
    spec = Spec(kind="image", task="image-classification", shape=(1, 8, 8), num_classes=2)
    model = ResNet(channels=(4, 8), blocks=(3, 3)).build_model(spec)
    method = replace(GROWING, depth=(2,), warmup=0, cooldown=1, support=0.0, policy="resampled")
    state = method.init(model, 0, 8)
    for _ in range(8):
        for task in method.configure(model, state, EIGHT, TRAINING):
            first = next(n for n in task.submodel.views if ".shortcut." in n)
            assert task.submodel.views[first].name == first
        state = played(
            method,
            model,
            state,
            lambda c, n, t: (1.0 if c in (2, 5) else -1.0) * noise(0, n, t) + noise(c, n, t),
        )
    orders = {axis: stack["order"] for axis, stack in state.notes["stacks"].items()}
    assert orders["blocks2"][0] == 0 and sum(map(len, orders.values())) > 4
    predictor = method.predictor(model, state)
    assert answers(predictor.model, predictor.params, torch.randn(2, 1, 8, 8)).isfinite().all()


def resnet() -> Model:
    spec = Spec(kind="image", task="image-classification", shape=(1, 8, 8), num_classes=2)
    return ResNet(channels=(4, 8), blocks=(3, 3)).build_model(spec)


@pytest.mark.parametrize("measure", ["parameters", "functions"])
def test_blocks_that_are_built_otherwise_are_matched_to_themselves(measure: str) -> None:
    """Two kinds of clients in a stage's first block: it cannot be put in a second time."""
    model = resnet()
    method = replace(
        GROWING, depth=(2,), measure=measure, cutoff=1e-6, warmup=0, cooldown=1, merge=1e-9
    )

    def first(client: int, name: str, value: Tensor) -> Tensor:
        if not name.startswith("stages.1.0."):
            return 1e-9 * noise(0, name, value)
        return (3.0 if client in (2, 5) else -1.0) * noise(0, name, value)

    state = method.init(model, 0, 4)
    draw = seeds.generator(0, "public")
    pictures = torch.randn(20, 1, 8, 8, generator=draw)
    state = replace(state, extra={PUBLIC_INPUTS: pictures, PUBLIC_LABELS: torch.arange(20) % 2})
    for _ in range(4):
        state = played(method, model, state, first)
    assert state.notes["stacks"]["blocks2"]["order"][0] == 0
    assert not [e for e in state.notes["log"] if e[2] == "blocks2" and e[4] == 0 and e[3] == 0]


def test_a_drop_in_the_pilot_leaves_nothing_behind() -> None:
    """Scales tuned in the second trial go with it."""
    method = replace(GROWING, policy="pilot", pilot_rounds=3, cooldown=2, calibrate=3, guard=0.0)
    state = with_public(method.init(MODEL, 0, 40))
    while state.notes["pilot"] is None or len(state.notes["pilot"]["found"]) < 1:
        state = played(method, MODEL, state, two_kinds)
    kept = state.notes["pilot"]["first"]
    log = state.notes["pilot"]["firsts"]
    assert state.notes["policy"] == "importance"
    pilot = {**state.notes["pilot"], "found": [2.0]}  # better than any that can follow
    state = replace(state, notes={**state.notes, "pilot": pilot})
    while not state.notes["pilot"]["done"]:
        state = played(method, MODEL, state, two_kinds)
    assert state.notes["policy"] == "persistent"
    assert state.notes["log"][:-1] == log
    if state.round % 2:  # no look in the same round
        assert state.notes["calibrated"] is None and state.notes["stacks"] == kept
    assert {int(s) for s in (state.notes["calibrated"] or {"blocks": {}})["blocks"]} <= set(
        kept["blocks"]["order"]
    )


def test_an_identity_is_put_in_without_a_change_of_the_function() -> None:
    method = replace(GROWING, insertion="identity", scaling=False, guard=0.0)
    inputs = torch.randn(6, 2, generator=seeds.generator(0, "inputs"))
    state = with_public(method.init(MODEL, 0, 9))
    while len(order_of(state)) == 3:
        state = played(method, MODEL, state, two_kinds)
    assert order_of(state) == [0, 1, 3, 2]
    grown = method.predictor(MODEL, state)
    part = MODEL.slice({"blocks": [0, 1, 2]})
    without = answers(MODEL.resized(part), cut(state.params, part), inputs)
    assert torch.equal(answers(grown.model, grown.params, inputs), without)


def test_updates_that_hardly_differ_split_nothing() -> None:
    def nearly(client: int, name: str, value: Tensor) -> Tensor:
        return alike(client, name, value) + 1e-3 * noise(client, name, value)

    assert order_of(run(GROWING, nearly, 9)) == [0, 1, 2]
    assert order_of(run(replace(GROWING, cutoff=0.99), two_kinds, 9)) == [0, 1, 2]


def test_every_member_of_a_new_block_holds_it() -> None:
    """Even where two of a client's blocks had been matched to neighbours."""
    for measure, threshold in itertools.product(("parameters", "updates"), (0.0, 0.5, 2.5)):
        method = replace(
            GROWING, measure=measure, threshold=threshold, warmup=0, cooldown=1, support=0.0
        )
        state = with_public(method.init(MODEL, 0, 12))
        for round in range(12):
            before, state = (
                state,
                played(
                    method,
                    MODEL,
                    state,
                    lambda c, n, t, r=round: two_kinds(c, n, t) + 8 * noise(c, n, t, round=r),
                ),
            )
            for entry in state.notes["log"][len(before.notes["log"]) :]:
                held = {
                    task.client.id: blocks_of(MODEL, task)
                    for task in method.configure(MODEL, state, EIGHT, TRAINING)
                }
                assert all(entry[3] in held[client] for client in entry[5])
            shares = stacks_of(state)["blocks"].shares(3)
            assert all(0.0 <= share <= 1.0 for share in shares.values())


def test_a_block_is_averaged_as_it_was_matched() -> None:
    """With align: a copy of the second block, units reversed, moves the second block by nothing."""
    method = replace(GROWING, depth=(1,), measure="parameters", align=True, warmup=99)
    state = method.init(MODEL, 0, 3)
    stack = state.notes["stacks"]["blocks"] | {"order": [0, 1], "paths": {"0": [0]}}
    params = dict(state.params)
    draw = seeds.generator(3, "second")
    for name in params:
        if name.startswith("blocks.1."):
            params[name] = 3.0 * torch.randn(params[name].shape, generator=draw)
        elif not name.startswith("blocks."):  # so large that the stream's units stay in their order
            params[name] = 100.0 * torch.randn(params[name].shape, generator=draw)
    state = replace(state, params=params, notes={**state.notes, "stacks": {"blocks": stack}})

    def becomes_second(client: int, name: str, value: Tensor) -> Tensor:
        if not name.startswith("blocks.0."):
            return torch.zeros_like(value)
        other = params[name.replace("blocks.0.", "blocks.1.")]
        if ".widen." in name:
            other = other.flip(0)
        return (other.flip(1) if name.endswith(".narrow.weight") else other) - value

    after = played(method, MODEL, state, becomes_second, clients(10))
    assert after.notes["paths"] == {"0": {"blocks": [1]}}
    torch.testing.assert_close(block(after.params, 1), block(params, 1), atol=1e-5, rtol=1e-5)


def test_the_last_round_is_looked_at_even_if_nobody_answers() -> None:
    method = replace(GROWING, policy="pilot", pilot_rounds=50, cooldown=2)
    state = with_public(method.init(MODEL, 0, 8))
    for _ in range(7):
        state = played(method, MODEL, state, two_kinds)
    assert not state.notes["pilot"]["done"]
    ended = method.aggregate(MODEL, state, EIGHT, iter(()))
    assert ended.round == 8 and ended.notes["pilot"]["done"]
    assert not [name for name in ended.extra if name.startswith(("fork/", "kept/"))]


def test_a_model_that_is_too_shallow_is_refused() -> None:
    with pytest.raises(ConfigError, match="6 blocks, but axis 'blocks' of the model has only 5"):
        FLM(depth=(6,)).init(MODEL, 0, 3)
    with pytest.raises(ConfigError, match=r"method\.support must be in \[0, 0\.5\]; got 0\.7"):
        replace(GROWING, support=0.7).init(MODEL, 0, 3)
    with pytest.raises(ConfigError, match=r"method\.cooldown must be at least 1; got 0"):
        replace(GROWING, cooldown=0).init(MODEL, 0, 3)


def test_clients_of_unequal_depths_share_blocks_at_equal_distances() -> None:
    method = replace(GROWING, depth=(5, 3, 1))
    state = method.init(MODEL, 0, 3)
    held = [blocks_of(MODEL, t) for t in method.configure(MODEL, state, EIGHT[:3], TRAINING)]
    assert held == [[0, 1, 2, 3, 4], [0, 2, 4], [0]]


def test_the_family_makes_no_difference() -> None:
    spec = Spec(kind="image", task="image-classification", shape=(1, 4, 4), num_classes=2)
    model = Residual(stream=4, inner=4, blocks=4).build_model(spec)
    state = GROWING.init(model, 0, 5)
    for _ in range(5):
        state = played(GROWING, model, state, two_kinds)
    assert order_of(state) == [0, 1, 3, 2]


def test_clients_that_began_apart_are_aligned() -> None:
    """Units in another order, else equal: with align the mean is what it was."""
    method = replace(GROWING, depth=(3,), measure="parameters", align=True, warmup=99)
    state = method.init(MODEL, 0, 3)

    def turned(client: int, name: str, value: Tensor) -> Tensor:
        if client % 2 == 0 or not name.startswith("blocks."):
            return torch.zeros_like(value)
        if ".widen." in name:
            return value.flip(0) - value
        return value.flip(1) - value if name.endswith(".narrow.weight") else torch.zeros_like(value)

    after = played(method, MODEL, state, turned)
    plain = played(replace(method, align=False), MODEL, state, turned)
    for name in MODEL.shapes:
        torch.testing.assert_close(after.params[name], state.params[name])
    assert any(not torch.allclose(plain.params[n], state.params[n]) for n in MODEL.shapes)


def test_own_starts_are_told_from_the_shared_model() -> None:
    method = replace(GROWING, start="own")
    state = method.init(MODEL, 7, 3)
    tasks = list(method.configure(MODEL, state, EIGHT[:2], TRAINING))
    starts = [method.local(MODEL, task, {}).params for task in tasks]
    assert sha256(starts[0]) != sha256(starts[1]) != sha256(tasks[1].params)
    later = next(method.configure(MODEL, replace(state, round=1), EIGHT[:1], TRAINING))
    assert method.local(MODEL, later, {}).params is later.params


def test_a_report_can_tell_what_happened() -> None:
    state = run(GROWING, two_kinds, 3)
    told = json.loads(json.dumps(GROWING.described(MODEL, state)))
    assert told["axes"]["blocks"]["order"] == [0, 1, 3, 2]
    assert told["axes"]["blocks"]["families"] == [[0], [1, 3], [2]]
    assert told["axes"]["blocks"]["scales"] == [1.0, pytest.approx(0.75), pytest.approx(0.25), 1.0]
    assert told["paths"]["2"] == {"blocks": [0, 1, 2]} and told["log"][0][1] == "insert"
