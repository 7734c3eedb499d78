"""FedAdapter: groups that try a configuration each, and what they inherit, worked out by hand."""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from worked import TRAINING, adapted, answer, clients, state_of, values

from tesserafl.core.axis import Depth
from tesserafl.core.coverage import Coverage
from tesserafl.core.errors import ConfigError
from tesserafl.core.messages import Task, Update
from tesserafl.core.method import State
from tesserafl.core.model import Model
from tesserafl.core.params import Params, sha256
from tesserafl.core.submodel import cut
from tesserafl.data.examples import Examples, Spec
from tesserafl.engines.client import ClientWorker
from tesserafl.methods import FedAdapter, FedIT
from tesserafl.methods._trials import Group, scores_of, winner_of
from tesserafl.models import LoRA
from tesserafl.models.scaling import forward_of
from tesserafl.run.experiment import Experiment, from_json
from tesserafl.run.federate import federate
from tesserafl.run.rounds import Notes, play_round
from tesserafl.run.runner import resume, start
from tesserafl.run.setup import make_engine, prepare

SMALL = FedAdapter(start_depth=1, start_width=1, depth_step=1, width_step=2, window=2)


def tower(blocks: int = 3, rank: int = 4) -> Model:
    """Blocks with an adapter each, `layers.0` next to the input, and nothing else."""
    model = adapted(rank, *[1] * (blocks + 1))
    return replace(model, depths={"layers": Depth(blocks, ("layers.",), last=blocks - 1)})


def begun(method: FedAdapter, model: Model, rounds: int = 8) -> State:
    """Before the first round, all parameters zero."""
    state = replace(state_of(model, rounds=rounds), notes={"log": []})
    return method.begun(model, state, method.start_depth, method.start_width)


def tasks_of(
    method: FedAdapter, model: Model, state: State, num_examples: Sequence[int]
) -> list[Task]:
    return list(method.configure(model, state, clients(*num_examples), TRAINING))


def sizes_of(task: Task) -> tuple[str, int, int]:
    """The group's name, and how many blocks and ranks the client holds."""
    blocks = {name.rsplit(".", 1)[0] for name in task.params}
    (rank,) = {len(tensor) for name, tensor in task.params.items() if name.endswith(".a")}
    return task.options["group"], len(blocks), rank


def measuring(update: Update, right: int, seen: int, loss: float | None = None) -> Update:
    """The update of a client that answered so many of its validation examples rightly."""
    metrics = {} if loss is None else {"loss": loss}
    if seen:
        metrics |= {"validation_accuracy": right / seen, "validation_examples": float(seen)}
    return replace(update, metrics=metrics)


def test_three_groups_keep_widen_and_deepen_and_clients_take_turns() -> None:
    model = tower()
    state = begun(SMALL, model)
    found = [sizes_of(task) for task in tasks_of(SMALL, model, state, [1] * 4)]
    assert found == [("keep", 1, 1), ("wider", 1, 3), ("deeper", 2, 1), ("keep", 1, 1)]
    found = [sizes_of(task)[0] for task in tasks_of(SMALL, model, replace(state, round=1), [1] * 4)]
    assert found == ["wider", "deeper", "keep", "wider"]
    # Adapters next to the output come first, and all that is held is trained.
    deeper = tasks_of(SMALL, model, state, [1] * 3)[2]
    assert deeper.params.keys() == {"layers.1.a", "layers.1.b", "layers.2.a", "layers.2.b"}
    assert deeper.trainable == deeper.params.keys()


def first_round(weighting: Any = "examples") -> tuple[FedAdapter, Model, State]:
    """Clients of 1, 1, 1, 3 examples changed every entry by 1, 2, 3, 5."""
    method, model = replace(SMALL, weighting=weighting), tower()
    state = begun(method, model)
    tasks = tasks_of(method, model, state, [1, 1, 1, 3])
    updates = [answer(task, change) for task, change in zip(tasks, (1, 2, 3, 5), strict=True)]
    return method, model, method.aggregate(model, state, clients(1, 1, 1, 3), updates)


def test_every_group_has_a_mean_of_its_own() -> None:
    # keep: clients 0 and 3, (1 x 1 + 3 x 5) / 4 = 4, uniform (1 + 5) / 2 = 3.
    for weighting, mean in (("examples", 4.0), ("uniform", 3.0)):
        _, _, state = first_round(weighting)
        assert values(state.params, "layers_2_b") == [[mean, 0.0, 0.0, 0.0]]
        assert values(state.params, "layers_1_b") == [[0.0] * 4]
        assert state.extra["wider/layers.2.b"].tolist() == [[2.0, 2.0, 2.0, 0.0]]
        assert state.extra["deeper/layers.2.b"].tolist() == [[3.0, 0.0, 0.0, 0.0]]
        assert state.extra["deeper/layers.1.b"].tolist() == [[3.0, 0.0, 0.0, 0.0]]
        # What a group does not train is not kept twice.
        assert "wider/layers.1.b" not in state.extra
        assert "deeper/layers.0.b" not in state.extra


def test_a_group_goes_on_from_its_own_parameters() -> None:
    method, model, state = first_round()
    # In round 1 client 0 is in the wider group, client 1 in the deeper one.
    wider, deeper, keep = tasks_of(method, model, state, [1, 1, 1])
    assert values(wider.params, "layers_2_b") == [[2.0, 2.0, 2.0]]
    assert values(deeper.params, "layers_1_b") == [[3.0]]
    assert values(keep.params, "layers_2_b") == [[4.0]]
    # The second and last round of a window is measured, its first is not.
    for task in (wider, deeper, keep):
        assert task.options["judged"] and method.local(model, task, {}).validate
    assert not tasks_of(method, model, begun(method, model), [1])[0].options["judged"]


MEASURED = [
    # right of seen: of the wider, the deeper, the keeping client; then depth, width, row of B
    ((6, 10), (5, 10), (5, 10), 1, 3, [2.0, 2.0, 2.0, 0.0]),
    ((5, 10), (6, 10), (5, 10), 2, 1, [3.0, 0.0, 0.0, 0.0]),
    ((5, 10), (5, 10), (5, 10), 1, 1, [4.0, 0.0, 0.0, 0.0]),  # of equals the one that stays
    ((6, 10), (6, 10), (5, 10), 1, 3, [2.0, 2.0, 2.0, 0.0]),  # of equals the wider one
    ((2, 3), (3, 4), (1, 2), 2, 1, [3.0, 0.0, 0.0, 0.0]),
    ((9, 10), (9, 10), (0, 0), 1, 1, [4.0, 0.0, 0.0, 0.0]),  # nothing to compare with
    ((0, 0), (6, 10), (5, 10), 2, 1, [3.0, 0.0, 0.0, 0.0]),  # not measured: cannot win
]


@pytest.mark.parametrize(("wider", "deeper", "keep", "depth", "width", "row"), MEASURED)
def test_the_best_groups_configuration_and_parameters_are_inherited(
    wider: tuple[int, int],
    deeper: tuple[int, int],
    keep: tuple[int, int],
    depth: int,
    width: int,
    row: list[float],
) -> None:
    method, model, state = first_round()
    tasks, measured = tasks_of(method, model, state, [1, 1, 1]), (wider, deeper, keep)
    updates = [
        measuring(answer(task, 0.0), *each) for task, each in zip(tasks, measured, strict=True)
    ]
    orders = [
        method.aggregate(model, state, clients(1, 1, 1), order)
        for order in itertools.permutations(updates)
    ]
    after = orders[0]
    assert all(
        (other.notes, sha256(other.params), sha256(other.extra))
        == (after.notes, sha256(after.params), sha256(after.extra))
        for other in orders
    )
    assert values(after.params, "layers_2_b") == [row]
    configurations = [tuple(group) for group in after.notes["groups"]]
    assert configurations == [
        ("keep", depth, width),
        ("wider", depth, min(4, width + 2)),
        ("deeper", depth + 1, width),
    ]
    # All groups go on from there.
    assert after.extra["wider/layers.2.b"].tolist() == [row]
    assert after.extra["deeper/layers.2.b"].tolist() == [row]
    (entry,) = after.notes["log"]
    assert (entry[0], entry[2:4]) == (1, [depth, width])
    assert json.loads(json.dumps(dict(after.notes))) == after.notes


def test_accuracy_is_over_the_examples_of_all_clients_of_a_group() -> None:
    # keep: 1 of 1 and 0 of 9: 0.1, though its clients' mean is 0.5; deeper: 2 of 10.
    method, model, state = first_round()
    tasks = tasks_of(method, model, state, [1] * 6)
    right = {"wider": [(0, 5), (0, 5)], "deeper": [(1, 5), (1, 5)], "keep": [(1, 1), (0, 9)]}
    updates = [measuring(answer(t, 0.0), *right[t.options["group"]].pop()) for t in tasks]
    after = method.aggregate(model, state, clients(*[1] * 6), updates)
    assert after.notes["log"] == [[1, "deeper", 2, 1, {"keep": 0.1, "wider": 0.0, "deeper": 0.2}]]


def test_without_validation_examples_the_training_loss_decides() -> None:
    method, model, state = first_round()
    tasks = tasks_of(method, model, state, [1, 1, 1, 3])
    # wider: clients 0 and 3, (1 x 0.9 + 3 x 0.5) / 4 = 0.6; their plain mean would be 0.7
    losses = (0.9, 0.65, 0.8, 0.5)
    updates = [measuring(answer(t, 0.0), 0, 0, x) for t, x in zip(tasks, losses, strict=True)]
    after = method.aggregate(model, state, clients(1, 1, 1, 3), updates)
    ((_, winner, _, width, scores),) = after.notes["log"]
    assert (winner, width) == ("wider", 3)
    assert scores == pytest.approx({"keep": -0.8, "wider": -0.6, "deeper": -0.65})
    # One client with validation examples is enough for losses not to count.
    updates[1] = measuring(updates[1], 1, 2, 0.65)
    after = method.aggregate(model, state, clients(1, 1, 1, 3), updates)
    assert after.notes["log"] == [[1, "keep", 1, 1, {"keep": None, "wider": None, "deeper": 0.5}]]


def test_three_groups_are_judged_for_three_rounds() -> None:
    method, model = replace(SMALL, window=5), tower()
    state, judged = begun(method, model), []
    for right in (9, 9, 1, 2, 3):
        tasks = tasks_of(method, model, state, [1, 1, 1])
        judged.append({task.options["judged"] for task in tasks})
        own = {"keep": 1, "wider": right, "deeper": 0}
        updates = [measuring(answer(t, 0.0), own[t.options["group"]], 10) for t in tasks]
        state = method.aggregate(model, state, clients(1, 1, 1), updates)
    assert judged == [{False}, {False}, {True}, {True}, {True}]
    (entry,) = state.notes["log"]
    assert entry == [4, "wider", 1, 3, {"keep": 0.1, "wider": 0.2, "deeper": 0.0}]


def test_two_groups_are_judged_for_two_rounds_so_that_either_has_every_client() -> None:
    method, model = replace(SMALL, window=5, most_width=1), tower()
    state, judged = begun(method, model), []
    for _ in range(5):
        tasks = tasks_of(method, model, state, [1, 1])
        judged.append({task.options["judged"] for task in tasks})
        # Client 0 answers 9 of 10 rightly and client 1 one, whatever they are sent.
        updates = [measuring(answer(t, 0.0), (9, 1)[t.client.id], 10) for t in tasks]
        state = method.aggregate(model, state, clients(1, 1), updates)
    assert judged == [{False}, {False}, {False}, {True}, {True}]
    assert state.notes["log"] == [[4, "keep", 1, 1, {"keep": 0.5, "deeper": 0.5}]]


def test_scores_by_hand() -> None:
    groups = [Group("keep", 1, 8), Group("deeper", 2, 8)]
    assert scores_of(groups, {}) == [None, None]
    assert scores_of(groups, {"deeper": [0, 0, 3.0, 4]}) == [None, -0.75]
    assert winner_of(groups, [0.2, 0.3]).name == "deeper"
    assert winner_of(groups, [None, 0.3]).name == "keep"
    assert winner_of(groups[:1], [None]).name == "keep"


# --- Steps, caps and the rest of a run ------------------------------------------------------------


def configurations(method: FedAdapter, rounds: int = 100) -> list[tuple[str, int, int]]:
    state = begun(method, tower(blocks=3, rank=4), rounds)
    return [tuple(group) for group in state.notes["groups"]]


def test_sizes_stop_at_their_most_and_at_the_models() -> None:
    one = ("keep", 1, 1)
    assert configurations(SMALL) == [one, ("wider", 1, 3), ("deeper", 2, 1)]
    assert configurations(FedAdapter()) == [("keep", 1, 4), ("deeper", 2, 4)]  # the model's rank
    large = replace(SMALL, width_step=9, depth_step=9)
    assert configurations(large) == [one, ("wider", 1, 4), ("deeper", 3, 1)]
    assert configurations(replace(large, most_width=2)) == [one, ("wider", 1, 2), ("deeper", 3, 1)]
    assert configurations(replace(large, most_depth=1)) == [one, ("wider", 1, 4)]
    assert configurations(replace(SMALL, most_depth=1, most_width=1)) == [one]
    assert configurations(replace(SMALL, start_depth=5, most_depth=5))[0] == ("keep", 3, 1)


def test_what_is_left_of_a_run_is_no_trial_if_no_window_fits() -> None:
    assert len(configurations(SMALL, rounds=2)) == 3
    assert configurations(SMALL, rounds=1) == [("keep", 1, 1)]
    model = tower()
    state = begun(SMALL, model, rounds=3)
    for _ in range(3):
        tasks = tasks_of(SMALL, model, state, [1, 1, 1])
        state = SMALL.aggregate(model, state, clients(1, 1, 1), [answer(t, 1.0) for t in tasks])
    assert {task.options["group"] for task in tasks} == {"keep"}
    assert state.extra == {}


def test_a_late_answer_of_a_trial_that_is_over_counts_for_nothing() -> None:
    method, model, state = first_round()
    late = [answer(task, 7.0) for task in tasks_of(method, model, state, [1, 1, 1])]
    after = method.aggregate(model, state, clients(1, 1, 1), late)
    assert after.notes["begun"] == 2
    tasks = tasks_of(method, model, after, [1, 1, 1])
    fresh = [answer(task, 1.0) for task in tasks]
    one = method.aggregate(model, after, clients(1, 1, 1), fresh)
    other = method.aggregate(model, after, clients(1, 1, 1), [*late[:1], *fresh])
    assert (sha256(other.params), sha256(other.extra)) == (sha256(one.params), sha256(one.extra))
    nothing = method.aggregate(model, after, clients(1, 1, 1), late)
    assert (nothing.round, nothing.notes) == (3, after.notes)
    assert sha256(nothing.params) == sha256(after.params)


def test_a_client_trains_no_more_blocks_than_it_can_and_holds_those_of_its_group() -> None:
    method, model = replace(SMALL, start_depth=2), tower()
    (client,) = clients(1)
    weak = replace(client, depth=1)
    (task,) = method.configure(model, begun(method, model), [weak], TRAINING)
    assert sizes_of(task) == ("keep", 2, 1)
    assert task.trainable == {"layers.2.a", "layers.2.b"} == method.trained_in(model, 1)


def test_a_client_of_a_smaller_ratio_trains_a_share_of_the_groups_width() -> None:
    method, model = replace(SMALL, start_width=2, ratio=(1.0, 0.5)), tower()
    found = [sizes_of(task) for task in tasks_of(method, model, begun(method, model), [1] * 4)]
    assert found == [("keep", 1, 2), ("wider", 1, 2), ("deeper", 2, 2), ("keep", 1, 1)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"window": 1}, "method.window must be at least 2"),
        ({"start_depth": -1}, "method.start_depth must be at least 0"),
        ({"width_step": 0}, "method.width_step must be at least 1"),
        ({"start_width": 65}, "method.start_width must be at most method.most_width, 64; got 65"),
        ({"start_depth": 0}, "start_depth 0 trains nothing"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FedAdapter(**settings).init(tower(), 0, 9)


def test_adapters_that_have_learnt_already_are_refused() -> None:
    trained = replace(
        tower(), pretrained=lambda: {n: torch.ones(s) for n, s in tower().shapes.items()}
    )
    with pytest.raises(ConfigError, match=r"leave --model\.adapter away"):
        FedAdapter().init(trained, 0, 9)


# --- A transformer --------------------------------------------------------------------------------

pytest.importorskip("transformers")
pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

OPTIONS = {
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "patch_size": 2,
    "initializer_range": 0.3,
}


@functools.cache
def vit() -> Model:
    """Three adapted blocks of rank 4, and a classifier's output layer."""
    spec = Spec(kind="image", task="image-classification", shape=(1, 4, 4), num_classes=3)
    return LoRA(config="vit", options=OPTIONS, rank=4, alpha=8.0).build_model(spec)


def images(client: int) -> Examples:
    draw = torch.Generator().manual_seed(client)
    labels = torch.arange(4 + 2 * client) % 3
    inputs = torch.randint(0, 90, (len(labels), 1, 4, 4), generator=draw)
    return Examples(inputs=(inputs + 80 * labels[:, None, None, None]).byte(), labels=labels)


def played(method: FedAdapter | FedIT, model: Model, state: State, rounds: int) -> State:
    """The state after so many rounds of four clients."""
    asked = clients(4, 6, 8, 10)
    worker = ClientWorker(
        model=model, method=method, examples=images, validation=lambda c: images(9 + c), seed=0
    )
    training = replace(TRAINING, lr=0.2, batch_size=4, momentum=0.5)
    for _ in range(rounds):
        tasks = method.configure(model, state, asked, training)
        updates = [worker.work(task, {})[0] for task in tasks]
        state = method.aggregate(model, state, asked, updates)
    return state


def test_with_nothing_to_try_it_is_fedit_to_the_bit() -> None:
    still = FedAdapter(start_depth=3, start_width=4, most_depth=3, most_width=4, window=2)
    both = [played(m, vit(), m.init(vit(), 0, 5), 5) for m in (still, FedIT())]
    assert sha256(both[0].params) == sha256(both[1].params)
    assert both[0].notes["log"] == []


def test_a_configuration_that_stays_is_fedit_on_a_model_of_those_adapters_to_the_bit() -> None:
    method = FedAdapter(start_depth=2, start_width=3, most_depth=2, most_width=3, window=2)
    state = method.init(vit(), 0, 3)
    part = vit().slice({"rank": range(3), "layers": range(2)})
    small = vit().resized(part)
    fedit = replace(FedIT().init(small, 0, 3), params=cut(state.params, part))
    after, theirs = played(method, vit(), state, 3), played(FedIT(), small, fedit, 3)
    assert sha256(cut(after.params, part)) == sha256(theirs.params)
    # The others have learnt nothing, and change nothing.
    ups = [pair.up for pair in vit().low_rank]
    assert [bool(after.params[up][:, 3:].any()) for up in ups] == [False] * len(ups)
    assert sum(bool(after.params[up].any()) for up in ups) == 2 * len(ups) // 3


@torch.no_grad()
def answers(model: Model, params: Params, task: Task | None = None) -> torch.Tensor:
    part = model.whole() if task is None else task.submodel
    module = model.module(part.sizes).eval()
    return forward_of(model, part, module, "none")(params, images(7).inputs.float()).logits


def test_at_the_beginning_of_a_window_all_groups_answer_alike() -> None:
    method = FedAdapter(start_depth=1, start_width=2, width_step=2, window=2)
    state = played(method, vit(), method.init(vit(), 0, 9), 2)
    asked = clients(4, 6, 8)
    served = method.predictor(vit(), state)
    expected = answers(vit(), served.params)
    tasks = list(method.configure(vit(), state, asked, TRAINING))
    assert {task.options["group"] for task in tasks} == {"keep", "wider", "deeper"}
    for task in tasks:
        torch.testing.assert_close(answers(vit(), task.params, task), expected)
    # In the next round they do not.
    state = played(method, vit(), state, 1)
    tasks = list(method.configure(vit(), state, asked, TRAINING))
    found = [answers(vit(), task.params, task) for task in tasks]
    assert not any(torch.allclose(a, b) for a, b in itertools.combinations(found, 2))


# --- Whole runs -----------------------------------------------------------------------------------


def experiment(**changes: Any) -> Experiment:
    base: dict[str, Any] = {
        "data": {"num_clients": 5, "max_train": 100, "max_test": 20, "validation": 0.3},
        "model": {
            "name": "lora",
            "config": "vit",
            "rank": 4,
            "alpha": 8.0,
            "options": OPTIONS | {"patch_size": 4, "num_hidden_layers": 2},
        },
        "method": {
            "name": "fedadapter",
            "ratio": [1.0],
            "start_width": 2,
            "width_step": 2,
            "window": 3,
        },
        "training": {"lr": 0.1, "batch_size": 16},
        "engine": {"batching": "sequential"},
        "rounds": 7,
        "clients_per_round": 5,
        "checkpoint_every": 1,
    }
    return from_json({**base, **changes})


Tried = tuple[float, float]
"""Blocks and ranks."""


def tried(note: Notes) -> list[Tried]:
    """The configurations of a round's clients."""
    return sorted({(row["active_blocks"], row["group_width"]) for row in note.clients})


def accuracies(notes: Sequence[Notes]) -> dict[Tried, float]:
    """Configuration -> share of the validation examples that were answered rightly."""
    right, seen = Counter[Tried](), Counter[Tried]()
    for row in (row for note in notes for row in note.clients):
        key = row["active_blocks"], row["group_width"]
        right[key] += round(row["validation_accuracy"] * row["validation_examples"])
        seen[key] += round(row["validation_examples"])
    return {key: right[key] / seen[key] for key in seen}


def test_a_run_grows_as_its_rows_say() -> None:
    setup = prepare(experiment())
    federation = federate(setup, setup.experiment.method.init(setup.model, 0, 7))
    coverage, costs = Coverage(setup.model.shapes), setup.costs()
    with contextlib.closing(make_engine(setup)) as worker:
        notes = [play_round(setup, worker, federation, coverage, costs) for _ in range(7)]
    # Two windows of three rounds; the seventh round belongs to all.
    kept = [tried(notes[first])[0] for first in (0, 3, 6)]
    assert tried(notes[0]) == tried(notes[2]) == [(1, 2), (1, 4), (2, 2)]
    assert len(tried(notes[6])) == 1
    for window, winner in ((notes[1:3], kept[1]), (notes[4:6], kept[2])):
        found = accuracies(window)
        assert len(found) > 1 or found.keys() == {(2, 4)}
        assert found[winner] == max(found.values())
    assert all("validation_accuracy" not in row for row in notes[0].clients)
    # While groups go their own ways there is no one mean product to be far from.
    assert [note.error is None for note in notes] == [len(tried(note)) > 1 for note in notes]


@pytest.mark.slow
def test_a_run_killed_within_a_window_resumes_to_the_same_bits(tmp_path: Path) -> None:
    class Killed(Exception):
        pass

    def cut_off(event: dict[str, Any]) -> None:
        if event["kind"] == "round" and event["round"] == 5:
            raise Killed

    with pytest.raises(Killed):
        start(experiment(), tmp_path / "run", cut_off)
    resumed, whole = resume(tmp_path / "run"), start(experiment(), tmp_path / "whole")
    assert resumed["state_sha256"] == whole["state_sha256"]


def test_peers_that_may_miss_a_message_are_refused() -> None:
    setup = prepare(experiment(network={"topology": "peers", "exchange": "gossip"}))
    state = setup.experiment.method.init(setup.model, 0, 7)
    with pytest.raises(ConfigError, match="averages tensors beside the model's"):
        federate(setup, state)
