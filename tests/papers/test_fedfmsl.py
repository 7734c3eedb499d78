"""FedFMSL: activation, masked means, two experts and a gate, worked out by hand."""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tesserafl.core.errors import ConfigError, MessageError, ModelError, UpdateError
from tesserafl.core.fit import HELD_OUT, IGNORED, Training, logits_of
from tesserafl.core.messages import Client, Memory, Task, Update
from tesserafl.core.method import Predictor, State
from tesserafl.core.model import Model, Output
from tesserafl.core.params import sha256
from tesserafl.data.examples import Examples, Spec
from tesserafl.engines.client import ClientWorker
from tesserafl.methods import FedFMSL, FedIT
from tesserafl.methods import _mixture as mixture
from tesserafl.methods._activation import Activation, most_blocks, trained_of
from tesserafl.methods._experts import as_it_came
from tesserafl.models import LoRA
from tesserafl.models.costs import frozen_entries
from tesserafl.models.scaling import forward_of

pytest.importorskip("transformers")
pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

IMAGES = Spec(kind="image", task="image-classification", shape=(1, 4, 4), num_classes=3)
TRAINING = Training(lr=0.2, batch_size=4)
CLIENTS = [Client(id=i, num_examples=n) for i, n in enumerate((6, 10, 8, 7))]
OPTIONS = {
    "hidden_size": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "patch_size": 2,
    "initializer_range": 0.3,
}


@functools.cache
def vit() -> Model:
    """Four adapted blocks."""
    return LoRA(config="vit", options=OPTIONS, rank=2, alpha=4.0).build_model(IMAGES)


@functools.cache
def examples_of(client: int, salt: int = 0) -> Examples:
    draw = torch.Generator().manual_seed(100 * salt + client)
    labels = torch.arange(CLIENTS[client].num_examples) % 2 + client % 2
    inputs = (
        torch.randint(0, 90, (len(labels), 1, 4, 4), generator=draw)
        + 80 * labels[:, None, None, None]
    )
    return Examples(inputs=inputs.clamp(max=255).to(torch.uint8), labels=labels)


def block_of(name: str) -> int | None:
    """The number of the block that a parameter lies in."""
    place = vit().depths["layers"].locate(name)
    return None if place is None else 3 - place[1]


class Run:
    """Rounds of a method, with clients that remember."""

    def __init__(self, method: FedFMSL | FedIT, rounds: int = 4) -> None:
        self.method = method
        self.state = method.init(vit(), 0, rounds)
        self.memories: dict[int, Memory] = {}
        self.worker = ClientWorker(
            model=vit(),
            method=method,
            examples=examples_of,
            validation=lambda client: examples_of(client, 1),
            seed=0,
        )

    def tasks(self, clients: list[Client] = CLIENTS) -> list[Task]:
        return list(self.method.configure(vit(), self.state, clients, TRAINING))

    def updates(self, tasks: list[Task]) -> list[Update]:
        found = []
        for task in tasks:
            update, memory = self.worker.work(task, self.memories.get(task.client.id, {}))
            self.memories[task.client.id] = memory
            found.append(update)
        return found

    def fold(self, updates: list[Update], clients: list[Client] = CLIENTS) -> State:
        self.state = self.method.aggregate(vit(), self.state, clients, iter(updates))
        return self.state

    def play(self, rounds: int = 1, clients: list[Client] = CLIENTS) -> list[Update]:
        for _ in range(rounds):
            updates = self.updates(self.tasks(clients))
            self.fold(updates, clients)
        return updates


@torch.no_grad()
def answers(predictor: Predictor, inputs: Tensor) -> Tensor:
    module = predictor.model.module().eval()
    forward = forward_of(predictor.model, predictor.model.whole(), module, "none")
    if predictor.rule is not None:
        return predictor.rule(forward, predictor.params, inputs).logits
    return forward(predictor.params, inputs).logits


def some_inputs() -> Tensor:
    return examples_of(0).batch(torch.arange(6))[0]


# Activation


def active(plan: Activation, accuracies: list[float | None], most: int = 12) -> list[int]:
    """Active blocks before the first round and after each."""
    notes = plan.begin(most)
    found = [notes["active"]]
    for accuracy in accuracies:
        notes = plan.after(notes, most, accuracy)
        found.append(notes["active"])
    return found


def test_blocks_are_activated_exactly_where_accuracy_is_flat() -> None:
    plan = Activation(start=2, step=2, patience=3, tolerance=0.005)
    rising = [0.10, 0.20, 0.30]
    flat = [0.400, 0.402, 0.404]
    #                       rising     flat: the third makes a plateau     again rising
    assert active(plan, [*rising, *flat, *rising]) == [2, 2, 2, 2, 2, 2, 4, 4, 4, 4]
    # After that the queue begins anew: two more flat ones are no plateau.
    assert active(plan, [0.5] * 8) == [2, 2, 2, 4, 4, 4, 6, 6, 6]
    # A difference of exactly epsilon is no plateau.
    assert active(plan, [0.400, 0.405, 0.400]) == [2, 2, 2, 2]


def test_no_more_blocks_are_activated_than_there_are() -> None:
    plan = Activation(start=2, step=3, patience=2)
    assert active(plan, [0.5] * 6, most=6) == [2, 2, 5, 5, 6, 6, 6]
    assert active(Activation(start=9), [0.5], most=6) == [6, 6]


def test_where_nobody_measures_nothing_is_activated() -> None:
    assert active(Activation(patience=2), [None] * 9) == [2] * 10
    assert active(Activation(patience=2), [0.5, None, 0.5, None]) == [2, 2, 2, 4, 4]


def test_schedules_that_do_not_look_at_accuracy() -> None:
    linear = Activation(schedule="linear", start=2, ramp=5)
    assert active(linear, [None] * 6) == [2, 4, 6, 8, 10, 12, 12]
    manual = Activation(schedule="manual", depths=(1, 1, 5))
    assert active(manual, [None] * 3) == [1, 1, 5, 5]
    assert active(Activation(schedule="all"), [None]) == [12, 12]
    assert linear.validates is manual.validates is False and Activation().validates


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"start": 0}, "method.start must be at least 1; got 0"),
        ({"patience": 1}, "method.patience must be at least 2"),
        ({"tolerance": -0.1}, "method.tolerance"),
        ({"schedule": "manual"}, "method.depths"),
        ({"caps": (2, 0)}, "method.caps"),
        ({"window": -1}, "method.window"),
        ({"stage_one": 1.5}, "method.stage_one"),
        ({"held_out": 1.0}, "method.held_out"),
        ({"own": -1.0}, "method.own"),
        ({"temperature": 0.0}, "method.temperature"),
        ({"gate_width": 0}, "method.gate_width"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FedFMSL(**settings).init(vit(), 0, 4)


def blocks(names: frozenset[str]) -> set[int | None]:
    return {block_of(name) for name in names}


def test_who_trains_which_blocks() -> None:
    model = vit()
    assert blocks(trained_of(model, 2, 0, "output")) == {None, 3, 2}
    assert blocks(trained_of(model, 2, 0, "input")) == {None, 0, 1}
    assert blocks(trained_of(model, 3, 1, "output")) == {None, 1}
    assert blocks(trained_of(model, 3, 2, "input")) == {None, 1, 2}
    assert trained_of(model, 4, 0, "output") == model.shapes.keys()


def test_a_client_trains_no_more_blocks_than_it_can() -> None:
    method = FedFMSL(schedule="all", caps=(4, 1))
    run = Run(method)
    clients = [*CLIENTS[:2], replace(CLIENTS[2], depth=2)]
    tasks = run.tasks(clients)
    assert [blocks(task.trainable) - {None} for task in tasks] == [{0, 1, 2, 3}, {3}, {2, 3}]
    for task, update in zip(tasks, run.updates(tasks), strict=True):
        assert update.delta.keys() == task.trainable
        assert update.metrics["active_blocks"] == len(blocks(task.trainable)) - 1


def test_blocks_without_adapters_are_not_waited_for() -> None:
    """Of blocks 0 to 3 only 1 and 2 are adapted: there is something to activate in every round."""
    targets = (r".*layers?\.(1|2)\..*q_proj",)
    model = LoRA(config="vit", options=OPTIONS, rank=2, targets=targets).build_model(IMAGES)
    assert most_blocks(model) == 2
    for order, first in (("output", 2), ("input", 1)):
        assert blocks(trained_of(model, 1, 0, order)) == {None, first}
        assert blocks(trained_of(model, 2, 0, order)) == {None, 1, 2}
        assert blocks(trained_of(model, 2, 1, order)) == {None, 3 - first}
    linear = Activation(schedule="linear", start=1, ramp=2)
    notes = [linear.begin(most_blocks(model))]
    for _ in range(2):
        notes.append(linear.after(notes[-1], most_blocks(model), None))
    assert [each["active"] for each in notes] == [1, 1, 2]


def test_a_model_without_numbered_blocks_is_refused() -> None:
    targets = (r".*classifier",)
    model = LoRA(config="vit", options=OPTIONS, targets=targets, train_head=False)
    with pytest.raises(ModelError, match="no adapters in numbered blocks"):
        FedFMSL().init(model.build_model(IMAGES), 0, 4)


# Stage one


def test_a_block_is_averaged_over_those_that_trained_it() -> None:
    run = Run(FedFMSL(schedule="all", caps=(4, 1, 2, 1)))
    before = run.state
    updates = run.updates(run.tasks())
    after = run.fold(updates)
    for name, old in before.params.items():
        trained = [u for u in updates if name in u.delta]
        number = block_of(name)
        owners = {None: {0, 1, 2, 3}, 3: {0, 1, 2, 3}, 2: {0, 2}, 1: {0}, 0: {0}}[number]
        assert {u.client for u in trained} == owners
        total = sum(u.num_examples for u in trained)
        mean = sum(u.delta[name].double() * u.num_examples for u in trained) / total
        torch.testing.assert_close(after.params[name].double(), old + mean, rtol=0, atol=1e-7)


def test_a_block_that_nobody_trained_is_as_it_was_and_is_not_sent() -> None:
    run = Run(FedFMSL(schedule="manual", depths=(1, 3)))
    before = run.state
    (task, *_) = run.tasks()
    assert blocks(frozenset(task.params)) == {None, 3}
    run.play()
    for name, old in before.params.items():
        if block_of(name) in (0, 1, 2):
            assert torch.equal(run.state.params[name], old)
    assert blocks(frozenset(run.tasks()[0].params)) == {None, 1, 2, 3}


def test_what_was_active_stays_applied_where_a_window_moves_on() -> None:
    run = Run(FedFMSL(schedule="manual", depths=(1, 2, 3), window=1, stage_one=1.0))
    run.play(2)
    (task, *_) = run.tasks()
    assert blocks(frozenset(task.params)) == {None, 1, 2, 3}
    assert blocks(task.trainable) == {None, 1}
    ups = {pair.up for pair in vit().low_rank}
    changed = {block_of(n) for n in ups if run.state.params[n].any()}
    assert changed == {2, 3}


def test_a_newly_active_block_changes_no_answer() -> None:
    run = Run(FedFMSL(schedule="manual", depths=(1, 4), stage_one=1.0))
    run.play()
    before = answers(run.method.predictor(vit(), run.state), some_inputs())
    task = run.tasks()[0]  # of the round in which all blocks are active
    module = vit().module(task.submodel.sizes).eval()
    forward = forward_of(vit(), task.submodel, module, "none")
    with torch.no_grad():
        assert torch.equal(forward(task.params, some_inputs()).logits, before)


def test_with_everything_active_it_is_fedit_to_the_bit() -> None:
    ours, theirs = Run(FedFMSL(schedule="all", stage_one=1.0)), Run(FedIT())
    ours.play(3)
    theirs.play(3)
    assert sha256(ours.state.params) == sha256(theirs.state.params)


def test_clients_accuracy_decides() -> None:
    run = Run(FedFMSL(start=1, step=2, patience=2, tolerance=1.0, stage_one=1.0))
    updates = run.play(2)
    heard = [u.metrics["validation_accuracy"] for u in updates]
    weights = [c.num_examples for c in CLIENTS]
    mean = sum(a * w for a, w in zip(heard, weights, strict=True)) / sum(weights)
    assert run.state.notes["active"] == 3 and run.state.notes["recent"] == []
    updates = run.play()
    heard = [u.metrics["validation_accuracy"] for u in updates]
    mean = sum(a * w for a, w in zip(heard, weights, strict=True)) / sum(weights)
    assert run.state.notes["recent"] == [pytest.approx(mean)]


# Stage two


def in_stage_two(**settings: object) -> Run:
    run = Run(FedFMSL(schedule="all", **settings))
    run.play(2)
    return run


def test_the_global_expert_is_sent_once_and_then_the_gate_alone() -> None:
    run = in_stage_two()
    first = run.tasks()
    assert all(task.params.keys() == vit().shapes.keys() for task in first)
    before = sha256(run.state.params)
    updates = run.play(1, CLIENTS[:3])
    assert all(not u.delta and u.extra.keys() == run.state.extra.keys() for u in updates)
    again = run.tasks()
    assert [bool(task.params) for task in again] == [False, False, False, True]
    assert sum(t.num_bytes for t in again[:1]) == 4 * 2 * 32 * 16
    assert sha256(run.state.params) == before


def test_the_own_expert_begins_as_the_global_one_and_so_does_the_mixture() -> None:
    run = in_stage_two()
    task = run.tasks()[0]
    fit = run.method.local(vit(), task, {})
    assert all(torch.equal(fit.params[n], run.state.params[n]) for n in vit().shapes)
    memory = run.method.own_report(vit(), task, worker_fitted(run, task, fit.params), {})[1]
    mixed = answers(run.method.personal(vit(), run.state, memory), some_inputs())
    whole = answers(run.method.predictor(vit(), run.state), some_inputs())
    torch.testing.assert_close(mixed, whole, rtol=0, atol=1e-6)


def worker_fitted(run: Run, task: Task, params: dict[str, Tensor]) -> object:
    from tesserafl.core.fit import Fitted

    return Fitted(
        params=params, num_examples=6, num_steps=0, metrics={}, classes=torch.tensor([0, 1])
    )


def test_experts_stay_and_differ_and_unknown_clients_get_the_global_one() -> None:
    run = in_stage_two()
    run.play(2, CLIENTS[:3])
    own = [run.method.personal(vit(), run.state, run.memories[i]) for i in range(3)]
    found = [answers(each, some_inputs()) for each in own]
    assert all(not torch.allclose(a, b) for a, b in itertools.combinations(found, 2))
    unknown = run.method.personal(vit(), run.state, {})
    whole = answers(run.method.predictor(vit(), run.state), some_inputs())
    assert torch.equal(answers(unknown, some_inputs()), whole)


def test_the_gates_mean_is_exact_and_knows_no_order() -> None:
    run = in_stage_two()
    run.play()
    before, updates = run.state, run.updates(run.tasks())
    found = set()
    for order in itertools.permutations(updates):
        after = run.method.aggregate(vit(), before, CLIENTS, iter(order))
        found.add((sha256(after.extra), str(sorted(after.notes.items()))))
    assert len(found) == 1
    for name, old in before.extra.items():
        mean = sum(u.extra[name].double() * u.num_examples for u in updates) / 31
        torch.testing.assert_close(after.extra[name].double(), old + mean, rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    ("gate", "sent", "kept"),
    [
        ("shared", {"gate/narrow", "gate/widen"}, {"gate/choose", "gate/offset"}),
        ("private", set(), {"gate/narrow", "gate/widen", "gate/choose", "gate/offset"}),
        ("linear", set(), {"gate/choose", "gate/offset"}),
        ("half", set(), set()),
    ],
)
def test_what_of_the_gate_is_sent_and_what_is_kept(gate: str, sent: set, kept: set) -> None:
    run = in_stage_two(gate=gate)
    updates = run.play(2)
    assert updates[0].extra.keys() == sent
    assert {name for name in run.memories[0] if name.startswith("gate/")} == kept
    if gate == "private":
        assert not run.tasks()[0].extra  # it has been sent once
        assert not torch.equal(run.memories[0]["gate/choose"], run.memories[1]["gate/choose"])


def test_in_stage_two_a_client_trains_its_active_blocks_alone() -> None:
    run = Run(FedFMSL(schedule="manual", depths=(2, 2), stage_one=0.5))
    run.play(2)
    glob = run.state.params
    run.play()
    own = mixture.part_of(run.memories[0], "own")
    changed = {block_of(name) for name in own if not torch.equal(own[name], glob[name])}
    assert changed == {None, 2, 3}


def test_an_expert_may_begin_as_the_foundation_model() -> None:
    run = in_stage_two(own_start="pretrained")
    fit = run.method.local(vit(), run.tasks()[0], {})
    assert all(not fit.params[pair.up].any() for pair in vit().low_rank)
    assert any(fit.references["global"][pair.up].any() for pair in vit().low_rank)


def test_without_stage_one_the_global_expert_is_the_foundation_model() -> None:
    run = Run(FedFMSL(schedule="all", stage_one=0.0))
    start = sha256(run.state.params)
    run.play(2)
    assert sha256(run.state.params) == start
    assert mixture.part_of(run.memories[0], "own")


def test_with_fewer_ranks_a_client_has_smaller_experts() -> None:
    run = in_stage_two(ratio=(1.0, 0.5))
    run.play()
    predictor = run.method.personal(vit(), run.state, run.memories[1])
    assert predictor.model.sizes["rank"] == 1
    assert answers(predictor, some_inputs()).shape == (6, 3)


# The gate and the loss


def test_a_gate_by_hand() -> None:
    params = {
        "gate/narrow": torch.tensor([[1.0, 0.0]]),
        "gate/widen": torch.tensor([[0.5], [0.0]]),
        "gate/choose": torch.tensor([[0.0, 0.0], [1.0, 1.0]]),
        "gate/offset": torch.tensor([0.0, 0.3]),
    }
    # Features (5, 3) have mean 4 and deviation 1: z = (1, -1), z' = (1 + tanh(1) / 2, -1).
    score = 0.5 * math.tanh(1.0) + 0.3
    expected = 1 / (1 + math.exp(-score / 2))
    shares = mixture.Gate(temperature=2.0)(params, torch.tensor([[5.0, 3.0]]))
    assert shares[0, 1].item() == pytest.approx(expected, abs=1e-5)
    assert shares.sum().item() == pytest.approx(1.0)


def test_a_new_gate_says_one_half() -> None:
    params = {**mixture.new_adapter(6, 3, 0), **mixture.new_choice(6)}
    shares = mixture.Gate()(params, torch.randn(5, 6))
    assert torch.equal(shares, torch.full((5, 2), 0.5))


def fixed(logits: Tensor):
    return lambda params, inputs: Output(logits * params["own"], None)


def loss_of(held: list[bool] | None, labels: list[int], **settings: float) -> dict[str, Tensor]:
    """Loss and gradients for logits of two experts and three examples."""
    params = {
        "own": torch.ones((), requires_grad=True),
        "gate/choose": torch.zeros(2, 2),
        "gate/offset": torch.zeros(2, requires_grad=True),
    }
    extra = {
        "base": torch.tensor([[1.0, 0.0], [0.0, 1.0], [3.0, 1.0]]),
        logits_of("global"): torch.tensor([[2.0, 0.0], [0.0, 2.0], [2.0, 0.0]]),
    }
    if held is not None:
        extra[HELD_OUT] = torch.tensor(held)
    logits = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.0, 3.0]])
    objective = mixture.MixtureLoss(
        mixture.Gate(), own=settings.get("own", 0.0), balance=settings.get("balance", 0.0)
    )
    loss = objective(fixed(logits), params, torch.zeros(3, 1), torch.tensor(labels), extra)
    leaves = [params["own"], params["gate/offset"]]
    own, gate = torch.autograd.grad(loss, leaves, materialize_grads=True)
    return {"loss": loss.detach(), "own": own, "gate": gate}


def test_the_loss_by_hand() -> None:
    # Mixed logits: (1, .5), (.5, 1), (1, 1.5); labels 0, 1, 1: each is ahead by one half.
    expected = math.log(1 + math.exp(-0.5))
    assert float(loss_of(None, [0, 1, 1])["loss"]) == pytest.approx(expected)
    # The own expert alone: behind by 1, behind by 1, ahead by 3.
    alone = (2 * math.log(1 + math.e) + math.log(1 + math.exp(-3))) / 3
    assert float(loss_of(None, [0, 1, 1], own=0.5)["loss"]) == pytest.approx(expected + 0.5 * alone)
    assert float(loss_of(None, [0, 1, 1], balance=7.0)["loss"]) == pytest.approx(expected)


def test_held_out_examples_train_the_gate_and_the_others_the_expert() -> None:
    all_held = loss_of([True] * 3, [0, 1, 1], own=0.5)
    assert all_held["own"] == 0 and all_held["gate"].abs().sum() > 0
    none_held = loss_of([False] * 3, [0, 1, 1], own=0.5)
    assert none_held["own"] != 0 and none_held["gate"].abs().sum() == 0
    # Each half is the mean over its own examples, whatever is in the batch beside them.
    mixed = loss_of([True, False, False], [0, 1, 1])
    only = loss_of([True, True, True], [0, IGNORED, IGNORED])
    torch.testing.assert_close(mixed["gate"], only["gate"])


def test_padding_counts_for_nothing() -> None:
    padded = loss_of([True, False, True], [0, 1, IGNORED], own=0.5, balance=0.1)
    assert all(torch.isfinite(value).all() for value in padded.values())
    nothing = loss_of([True, False, True], [IGNORED] * 3, own=0.5, balance=0.1)
    assert nothing["loss"] == 0


def test_the_pull_towards_equal_shares_is_a_divergence() -> None:
    gate, features = mixture.Gate(), torch.ones(2, 2)
    params = {**mixture.new_choice(2), "gate/offset": torch.tensor([0.0, math.log(3.0)])}
    shares = gate(params, features)  # 1/4 and 3/4 for everybody
    objective = mixture.MixtureLoss(gate, own=0.0, balance=1.0)
    expected = 0.25 * math.log(0.5) + 0.75 * math.log(1.5)
    found = objective._unequal(shares, torch.tensor([0, 0]), torch.tensor([True, True]))
    assert float(found) == pytest.approx(expected, abs=1e-6)


def test_the_foundation_model_as_it_came_has_adapters_that_change_nothing() -> None:
    run = in_stage_two()
    came = as_it_came(vit(), run.state.params)
    fresh = FedFMSL(schedule="all").init(vit(), 0, 4).params
    head = {name: run.state.params[name] for name in fresh if block_of(name) is None}
    predictor = Predictor(model=vit(), params=came)
    start = Predictor(model=vit(), params=fresh | head)
    assert torch.equal(answers(predictor, some_inputs()), answers(start, some_inputs()))


# What a review found


def test_a_saved_adapter_is_applied_where_it_is_not_yet_active() -> None:
    """Clients train the model that the server has, whatever is active."""
    saved = dict(vit().init(0))
    draw = torch.Generator().manual_seed(3)
    for pair in vit().low_rank:
        saved[pair.up] = torch.randn(saved[pair.up].shape, generator=draw)
    model = replace(vit(), pretrained=lambda: saved)
    method = FedFMSL(schedule="manual", depths=(1,), stage_one=1.0)
    state = method.init(model, 0, 4)
    (task,) = method.configure(model, state, CLIENTS[:1], TRAINING)
    assert task.params.keys() == model.shapes.keys()
    assert blocks(task.trainable) == {None, 3}


def test_absent_classes_are_masked_in_stage_two() -> None:
    """Class 2 has the largest logits and is not the client's: it must not count."""
    params = {"own": torch.ones(()), "gate/choose": torch.zeros(2, 2)}
    params["gate/offset"] = torch.zeros(2)
    extra = {
        "base": torch.tensor([[1.0, 0.0]]),
        logits_of("global"): torch.tensor([[1.0, 0.0, 9.0]]),
        "classes": torch.tensor([0, 1]),
    }
    objective = mixture.MixtureLoss(mixture.Gate(), own=0.0, balance=0.0)
    forward = fixed(torch.tensor([[3.0, 0.0, 9.0]]))
    loss = objective(forward, params, torch.zeros(1, 1), torch.tensor([0]), extra)
    # Mixed and masked: (2, 0, 0).
    assert float(loss) == pytest.approx(math.log(math.exp(2) + 2) - 2)


def test_an_expert_that_diverged_is_not_remembered() -> None:
    run = in_stage_two(gate="half")
    task = run.tasks()[0]
    fit = run.method.local(vit(), task, {})
    spoilt = {name: torch.full_like(value, torch.nan) for name, value in fit.params.items()}
    with pytest.raises(UpdateError, match="finite"):
        run.method.own_report(vit(), task, worker_fitted(run, task, spoilt), {})


def test_a_peer_that_did_not_train_has_not_been_served() -> None:
    run = in_stage_two()
    updates = run.updates(run.tasks())
    idle = replace(updates[1], num_steps=0, extra={})
    run.fold([updates[0], idle])
    assert run.state.notes["served"] == [0]


def test_a_client_that_lost_its_memory_is_told() -> None:
    run = in_stage_two()
    run.play()
    with pytest.raises(MessageError, match="does not remember it"):
        run.worker.work(run.tasks()[0], {})


# The budget


@pytest.mark.slow
def test_of_a_clip_of_the_papers_size_fewer_than_three_in_a_thousand_are_trained() -> None:
    """Rank 4 on queries and values of both towers: docs/methods/fedfmsl.md, the paper's claim.

    Of class names in bytes, and so without 49,149 rows of the vocabulary: the whole model has more.
    """
    names = ("cat", "dog", "owl")
    spec = replace(IMAGES, shape=(3, 224, 224), class_names=names)
    model = LoRA(config="clip", rank=4, alpha=8.0, prompt="a photo of a {}").build_model(spec)
    assert model.num_entries == 4 * 61_440  # 24 blocks, two weights of each, 2 x width a rank
    gate = mixture.new_adapter(512, FedFMSL().gate_width, 0) | mixture.new_choice(512)
    trained = model.num_entries + sum(tensor.numel() for tensor in gate.values())
    assert trained == 245_760 + 2 * 32 * 512 + 2 * 512 + 2
    assert 126_000_000 < frozen_entries(model) < 151_277_313
    assert trained / frozen_entries(model) < 0.003
