"""Peers without a server: the same model as with one, on networks that lose nothing or a lot."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from tesserafl.core.coverage import Coverage
from tesserafl.core.errors import CheckpointError, ConfigError
from tesserafl.core.method import State
from tesserafl.core.params import sha256
from tesserafl.engines.federation import Federation, Folded
from tesserafl.engines.lean import Lean
from tesserafl.engines.replicas import Replicas
from tesserafl.engines.seam import Engine
from tesserafl.run import runner
from tesserafl.run.begin import first_federation
from tesserafl.run.events import read_events
from tesserafl.run.experiment import Experiment, from_json
from tesserafl.run.federate import exchange_of, federate, topology_of
from tesserafl.run.rounds import play_round
from tesserafl.run.runner import resume, start
from tesserafl.run.setup import Setup, make_engine, prepare

Settings = dict[str, Any]

MSFUSION: Settings = {"name": "msfusion", "ratio": [0.5, 0.25], "contrast": 0.5}
HETEROFL: Settings = {"name": "heterofl", "ratio": [0.5, 0.25]}
AGAINST_ALL: Settings = {
    **MSFUSION,
    "negatives": "both",
    "overlap_schedule": "adaptive",
    "momentum": "carry",
}
LOSSY: Settings = {"loss": 0.3, "delay": 0.3, "failure": 0.1}


@pytest.fixture(autouse=True)
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take most of a small run's time, and are tested elsewhere."""
    monkeypatch.setattr(runner, "write_report", lambda folder, setup: None)
    monkeypatch.setattr(runner, "write_partition", lambda folder, setup: None)


def small(network: Settings | None = None, **changes: Any) -> Experiment:
    base = {
        "data": {"num_clients": 6, "max_train": 300, "max_test": 100},
        "model": {"name": "mlp", "hidden": [16, 16]},
        "method": MSFUSION,
        "training": {"momentum": 0.5},
        "rounds": 4,
        "clients_per_round": 6,
        "network": {"topology": "peers", **(network or {})},
        "evaluate_every": 100,
        "checkpoint_every": 100,
    }
    return from_json({**base, **changes})


def played(experiment: Experiment, folder: Path) -> tuple[Settings, list[Settings]]:
    """The summary and the rounds' events."""
    summary = start(experiment, folder)
    events = read_events(folder / "events.jsonl")
    return summary, [event for event in events if event["kind"] == "round"]


@contextlib.contextmanager
def begun(experiment: Experiment) -> Iterator[tuple[Setup, Engine, Federation]]:
    """A federation before its first round."""
    setup = prepare(experiment)
    with contextlib.closing(make_engine(setup)) as engine:
        yield setup, engine, first_federation(setup)


def without_time(summary: Settings) -> Settings:
    return {key: value for key, value in summary.items() if key not in ("seconds", "run")}


def step(setup: Setup, engine: Engine, federation: Federation) -> Folded:
    costs, coverage = setup.costs(), Coverage(setup.model.shapes)
    return play_round(setup, engine, federation, coverage, costs).folded


def kept_by_all(lean: Lean) -> npt.NDArray[np.bool_]:
    """[peers, entries of the model]"""
    masks = [lean.shares.keeps(number).numpy() for number in range(len(lean.shares.strips))]
    return np.concatenate(masks, axis=1)


LOSSLESS: dict[str, Settings] = {
    "star": {"topology": "star"},
    "complete": {},
    "ring": {"graph": "ring"},
    "random": {"graph": "erdos_renyi", "probability": 0.5},
    "lean": {"exchange": "lean"},
    "lean ring": {"exchange": "lean", "graph": "ring"},
}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"method": HETEROFL},
        {"method": {**MSFUSION, "layer_phase": "staggered", "stride": 3}},
        {"dropout": 0.4},
        {"clients_per_round": 3},
        {"clients_per_round": 4, "dropout": 0.3, "method": HETEROFL},
        {"training": {"mask_absent_classes": True}},
    ],
    ids=["msfusion", "heterofl", "staggered", "dropout", "cohorts", "both", "masked"],
)
def test_without_losses_it_does_not_matter_who_holds_the_model(
    tmp_path: Path, changes: Settings
) -> None:
    chosen = LOSSLESS if not changes else ["star", "complete", "ring", "lean"]
    runs = {name: played(small(LOSSLESS[name], **changes), tmp_path / name) for name in chosen}
    assert len({summary["state_sha256"] for summary, _ in runs.values()}) == 1
    assert len({(summary["accuracy"], summary["coverage"]) for summary, _ in runs.values()}) == 1
    for name, (summary, rounds) in runs.items():
        assert "accuracy_peers" not in summary
        stored = [event.get("params_stored") for event in rounds]
        consensus = [event.get("consensus") for event in rounds]
        if name == "star":
            assert stored == consensus == [None] * 4
        elif name.startswith("lean"):
            assert consensus == [None] * 4
            assert max(stored) < summary["params_full"]
        else:
            assert (stored, consensus) == ([summary["params_full"]] * 4, [0.0] * 4)
        if name != "star":  # what is sent arrives
            assert summary["bytes_up"] == summary["bytes_down"] > 0
    lean, gathered = runs["lean"][0], runs["complete"][0]
    assert lean["bytes_up"] < gathered["bytes_up"]
    # Handed on: as many copies as receivers.
    assert runs["ring"][0]["bytes_up"] == gathered["bytes_up"]


def test_everybody_sends_its_part_to_all_others(tmp_path: Path) -> None:
    _, (first, *_) = played(small(), tmp_path / "run")
    for row in first["clients"]:
        assert row["bytes_up"] == 5 * 4 * row["entries"]
        others = [other["entries"] for other in first["clients"] if other is not row]
        assert row["bytes_down"] == 4 * sum(others)
    assert {row["entries"] for row in first["clients"]} == {
        64 * w + w + w * w + w + 10 * w + 10 for w in (8, 4)
    }


def copies(state: State, count: int) -> list[State]:
    return [copy.deepcopy(state) for _ in range(count)]


@pytest.mark.parametrize("method", [MSFUSION, HETEROFL, AGAINST_ALL], ids=["own", "plain", "all"])
@pytest.mark.parametrize("graph", ["complete", "ring"])
def test_separate_copies_stay_equal_to_the_bit(method: Settings, graph: str) -> None:
    with begun(small({"graph": graph}, method=method, dropout=0.2)) as (setup, engine, shared):
        assert isinstance(shared, Replicas)
        apart = Replicas(
            model=shared.model,
            method=shared.method,
            network=shared.network,
            gossip=False,
            begin=shared.begin,
            states=copies(shared.states[0], 6),
            copy_of=list(range(6)),
        )
        begin = sha256(apart.states[0].params)
        for round in range(4):
            folded = step(setup, engine, apart)
            own = [state for _, state in sorted(apart.copies().items())]
            assert len(own) == 6
            assert len({id(state.params["head.weight"]) for state in own}) == 6
            assert len({sha256(state.params) for state in own}) == 1
            assert len({sha256(state.extra) for state in own}) == 1
            assert all(s.notes == own[0].notes and s.round == round + 1 for s in own)
            assert folded.consensus == 0.0
            assert sha256(apart.assembled().params) == sha256(own[0].params)
        assert sha256(apart.assembled().params) != begin
    # Values were sent in place of changes: the same run up to rounding.
    with begun(small({"graph": graph}, method=method, dropout=0.2)) as (setup, engine, shared):
        for _ in range(4):
            step(setup, engine, shared)
        for name, tensor in shared.assembled().params.items():
            torch.testing.assert_close(tensor, own[0].params[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"clients_per_round": 3},
        {"method": {**HETEROFL, "ratio": [0.25]}},
        {"method": {"name": "msfusion", "ratio": [0.25], "overlap": 0.0, "overlap_end": 0.0}},
    ],
    ids=["msfusion", "cohorts", "heterofl", "disjoint"],
)
def test_lean_peers_keep_a_part_and_together_the_whole(changes: Settings) -> None:
    with begun(small({"exchange": "lean"}, **changes)) as (setup, engine, lean):
        assert isinstance(lean, Lean)
        method, total = setup.experiment.method, setup.model.num_entries
        for round in range(5):
            assert lean.round == round
            assert all(t.is_meta for t in lean.shares.state.params.values())
            keeps = kept_by_all(lean)
            assert keeps.shape == (6, total)
            assert keeps.any(axis=0).all()
            assert [len(s) for s in lean.stores] == keeps.sum(axis=1).tolist()
            assert all(s.untyped_storage().nbytes() == 4 * len(s) for s in lean.stores)
            assert max(map(len, lean.stores)) < total
            # Those who share an entry agree on it.
            flat = torch.cat([t.reshape(-1) for t in lean.assembled().params.values()])
            for mask, store in zip(keeps, lean.stores, strict=True):
                assert torch.equal(flat[torch.from_numpy(mask)], store)
            if round < 4:
                cohort = setup.cohort(round)
                for task in method.configure(
                    setup.model, lean.shares.state, cohort, setup.experiment.training
                ):
                    assert task.submodel.num_entries <= int(keeps[task.client.id].sum())
                folded = step(setup, engine, lean)
                assert folded.stored == max(map(len, lean.stores))


def test_disjoint_windows_cost_lean_peers_their_own_part_and_no_more() -> None:
    # 4 windows of a quarter, side by side and never moved: after the first round entries inside
    # the windows stay where they are, and only what all have in common is sent.
    method = {
        "name": "msfusion",
        "ratio": [0.25],
        "overlap": 0.0,
        "overlap_end": 0.0,
        "stride": 0,
        "contrast": 0.0,
    }
    experiment = small(
        {"exchange": "lean"}, method=method, data={"num_clients": 4}, clients_per_round=4
    )
    with begun(experiment) as (setup, engine, lean):
        assert isinstance(lean, Lean)
        first = kept_by_all(lean)
        parts = [4 * 64 + 4 + 16 + 4 + 40 + 10] * 4
        trained = np.array(
            [
                task.submodel.num_entries
                for task in lean.tasks(setup.cohort(0), setup.experiment.training)
            ]
        )
        assert trained.tolist() == parts
        folded = step(setup, engine, lean)
        assert np.array_equal(kept_by_all(lean), first)
        # The head's bias is all that windows share: 10 entries from each of 3 others.
        assert {peer: tuple(t) for peer, t in folded.traffic.items()} == {
            peer: (3 * 10 * 4, 3 * 10 * 4) for peer in range(4)
        }


@pytest.mark.parametrize("method", [MSFUSION, HETEROFL, AGAINST_ALL], ids=["own", "plain", "all"])
@pytest.mark.parametrize("graph", ["complete", "ring"])
def test_a_run_bears_losses_delays_and_broken_links(
    tmp_path: Path, method: Settings, graph: str
) -> None:
    network = {"graph": graph, **LOSSY}
    summary, rounds = played(small(network, method=method), tmp_path / "lossy")
    lossless, _ = played(small({"graph": graph}, method=method), tmp_path / "lossless")
    assert all(event["consensus"] > 0 for event in rounds)
    if method is AGAINST_ALL:
        # Peers measure their own disagreement, so that their windows are no longer of one plan.
        assert summary["coverage"] > 0.95 * lossless["coverage"]
    else:
        assert summary["coverage"] == lossless["coverage"] > 0.4
    assert summary["state_sha256"] != lossless["state_sha256"]
    assert len(summary["accuracy_peers"]) == 6
    assert len(set(summary["accuracy_peers"])) > 1
    for before, after in zip([{"bytes_up": 0, "bytes_down": 0}, *rounds], rounds, strict=False):
        sent = after["bytes_up"] - before["bytes_up"]
        assert sent > after["bytes_down"] - before["bytes_down"] > 0
    assert rounds[-1]["params_stored"] == summary["params_full"]
    assert summary["loss"] < 5.0


def test_where_nothing_arrives_everybody_trains_alone(tmp_path: Path) -> None:
    network = {"loss": 1.0}
    summary, rounds = played(small(network, method=HETEROFL), tmp_path / "run")
    assert summary["bytes_down"] == 0 < summary["bytes_up"]
    consensus = [event["consensus"] for event in rounds]
    assert consensus == sorted(consensus)  # they drift apart


def test_a_message_that_is_late_counts_in_a_later_round() -> None:
    # Peer 1 misses the messages that are late now and has them afterwards.
    with begun(small({"delay": 0.5}, method=HETEROFL)) as (setup, engine, federation):
        assert isinstance(federation, Replicas)
        step(setup, engine, federation)
        waiting = list(federation._late)
        assert waiting
        assert all(late.due > 0 for late in waiting)
        heard: list[set[tuple[int, int]]] = []
        aggregate = type(federation)._aggregate

        def noting(self: Replicas, cohort: Any, inboxes: Any) -> None:
            heard.append({(m.client, m.round) for m in inboxes[1]})
            aggregate(self, cohort, inboxes)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Replicas, "_aggregate", noting)
            while federation.round < 4:
                step(setup, engine, federation)
        now = [{client for client, round in each if round == n + 1} for n, each in enumerate(heard)]
        assert any(round <= n for n, each in enumerate(heard) for _, round in each)
        for n, each in enumerate(heard):
            assert (1, n + 1) in each  # its own is never late
            senders = [client for client, _ in each]
            assert len(senders) == len(set(senders))  # of one sender the newest
            assert all(round <= n + 1 for _, round in each)
            late = {m.client for due, receivers, m in waiting if due == n + 1 and 1 in receivers}
            assert late <= set(senders)
        assert all(1 in each for each in now)


@pytest.mark.slow
def test_two_workers_give_the_same_bits_as_one(tmp_path: Path) -> None:
    chosen = {"method": AGAINST_ALL, "rounds": 3}
    one, _ = played(small(LOSSY, **chosen), tmp_path / "one")
    two, _ = played(small(LOSSY, **chosen, engine={"workers": 2}), tmp_path / "two")
    assert without_time(one) == without_time(two)


class Killed(Exception):
    """Stands for a power cut in the middle of a run."""


RESUMED: dict[str, Settings] = {
    "gathered": {"network": {"topology": "peers", **LOSSY}, "method": AGAINST_ALL},
    "lean": {"network": {"topology": "peers", "exchange": "lean"}, "clients_per_round": 4},
    "gossip": {
        "network": {"topology": "peers", "exchange": "gossip", "graph": "ring", **LOSSY},
        "method": {"name": "dpsgd", "ratio": [1.0, 0.5]},
    },
}


@pytest.mark.parametrize("name", RESUMED)
def test_a_run_cut_at_any_checkpoint_goes_on_with_the_same_bits(tmp_path: Path, name: str) -> None:
    experiment = small(**{**RESUMED[name], "dropout": 0.2, "checkpoint_every": 1, "rounds": 5})
    whole, rounds = played(experiment, tmp_path / "whole")
    for cut in (2, 4, 5):
        folder, seen = tmp_path / f"cut {cut}", []

        def listen(event: Settings, cut: int = cut, seen: list[Settings] = seen) -> None:
            seen.append(event)
            if event["kind"] == "round" and event["round"] == cut:
                raise Killed

        with pytest.raises(Killed):
            start(experiment, folder, listen)
        newest = max(path.stem for path in (folder / "checkpoints").glob("*.json"))
        assert newest == f"round-{cut - 1:06d}"
        again = resume(folder)
        assert without_time(again) == without_time(whole)
        events = [e for e in read_events(folder / "events.jsonl") if e["kind"] == "round"]
        kept = ("consensus", "params_stored", "loss", "bytes_up", "bytes_down", "failures")
        assert [[e.get(k) for k in kept] for e in events] == [
            [e.get(k) for k in kept] for e in rounds
        ]


def test_messages_under_way_are_in_the_checkpoint() -> None:
    """Or the test above would not tell."""
    with begun(small({"delay": 0.5})) as (setup, engine, federation):
        assert isinstance(federation, Replicas)
        step(setup, engine, federation)
        states, values, tensors = federation.held()
        assert len(values["late"]) == len(federation._late) > 2
        assert len(tensors) >= len(values["late"])
        again = federate(setup, states[0])
        again.restore((states, values, tensors))
        step(setup, engine, federation)


@pytest.mark.parametrize("exchange", ["all_gather", "lean"])
def test_a_checkpoint_of_other_peers_is_refused(exchange: str) -> None:
    with begun(small({"exchange": exchange})) as (_, _, six):
        held = six.held()
    fewer = {"num_clients": 5, "max_train": 300, "max_test": 100}
    with (
        begun(small({"exchange": exchange}, data=fewer, clients_per_round=5)) as (_, _, five),
        pytest.raises(CheckpointError, match=r"is of 6 peers, config\.json says 5"),
    ):
        five.restore(held)


@pytest.mark.parametrize("network", [{}, LOSSY, {"exchange": "lean"}, {"exchange": "gossip"}])
def test_where_nobody_answers_nothing_changes(tmp_path: Path, network: Settings) -> None:
    summary, rounds = played(small(network, dropout=0.999999, rounds=2), tmp_path / "run")
    setup = prepare(small())
    initial = setup.experiment.method.init(setup.model, 0, 4)
    assert summary["state_sha256"] == sha256(initial.params)
    assert summary["coverage"] == 0.0
    assert [event["answered"] for event in rounds] == [0, 0]


@pytest.mark.parametrize("network", [LOSSY, {"exchange": "lean"}, {"exchange": "gossip", **LOSSY}])
def test_a_run_bears_peers_that_do_not_answer(tmp_path: Path, network: Settings) -> None:
    summary, rounds = played(small(network, dropout=0.5), tmp_path / "run")
    offline = [{row["client"] for row in event["failures"]} for event in rounds]
    assert any(offline)
    assert any(event["answered"] for event in rounds)
    for event, missing in zip(rounds, offline, strict=True):
        assert {row["client"] for row in event["clients"]} == set(range(6)) - missing
    assert summary["loss"] == summary["loss"]
    again, _ = played(small(network, dropout=0.5), tmp_path / "again")
    assert again["state_sha256"] == summary["state_sha256"]


def test_in_gossip_who_is_offline_still_says_where_it_stands(tmp_path: Path) -> None:
    network = {"exchange": "gossip", "graph": "ring"}
    method = {"name": "dpsgd", "ratio": [1.0]}
    _, rounds = played(small(network, method=method, dropout=0.5), tmp_path / "run")
    _, everybody = played(small(network, method=method), tmp_path / "everybody")
    assert [event["bytes_up"] for event in rounds] == [event["bytes_up"] for event in everybody]


def test_gossip_keeps_copies_apart_and_near(tmp_path: Path) -> None:
    method = {"name": "dpsgd", "ratio": [1.0]}
    consensus = {}
    for graph in ("complete", "ring"):
        network = {"exchange": "gossip", "graph": graph}
        summary, rounds = played(small(network, method=method), tmp_path / graph)
        consensus[graph] = rounds[-1]["consensus"]
        entries = 64 * 16 + 16 + 16 * 16 + 16 + 160 + 10
        links = {"complete": 30, "ring": 12}[graph]
        assert summary["bytes_up"] == summary["bytes_down"] == 4 * 4 * entries * links
    # On the complete graph one averaging is all it takes.
    assert consensus["complete"] < 1e-6 < consensus["ring"]


def test_gossip_on_a_complete_graph_is_fedavg_of_equal_weights_up_to_rounding() -> None:
    network = {"exchange": "gossip"}
    with begun(small(network, method={"name": "dpsgd", "ratio": [1.0]})) as (setup, engine, gossip):
        for _ in range(3):
            step(setup, engine, gossip)
    star = {"topology": "star"}
    plain = {"name": "fedavg", "ratio": [1.0], "weighting": "uniform"}
    with begun(small(star, method=plain)) as (setup, engine, fedavg):
        for _ in range(3):
            step(setup, engine, fedavg)
    for name, tensor in fedavg.assembled().params.items():
        torch.testing.assert_close(gossip.assembled().params[name], tensor, rtol=1e-4, atol=1e-5)


def test_what_methods_are_made_for() -> None:
    def chosen(method: str, **network: Any) -> tuple[str, str]:
        experiment = from_json({"method": method, "network": network})
        return topology_of(experiment), exchange_of(experiment)

    assert chosen("msfusion") == ("peers", "all_gather")
    assert chosen("dpsgd") == ("peers", "gossip")
    assert chosen("fedrolex")[0] == "star"
    assert chosen("dpsgd", exchange="all_gather") == ("peers", "all_gather")
    assert chosen("msfusion", topology="star")[0] == "star"
    assert chosen("fedrolex", topology="peers", exchange="lean") == ("peers", "lean")


@pytest.mark.parametrize(
    ("network", "changes", "message"),
    [
        ({"exchange": "lean", "loss": 0.1}, {}, r"every message.*\(they are 0\.1, 0\.0, 0\.0\)"),
        ({"exchange": "lean", "delay": 0.1}, {}, "every message"),
        ({"exchange": "lean", "failure": 0.1}, {}, "every message"),
        ({"exchange": "lean"}, {"method": {"name": "fedbrb"}}, "'fedbrb' with these settings"),
        ({"exchange": "lean"}, {"method": AGAINST_ALL}, "'msfusion' with these settings"),
        ({"exchange": "gossip"}, {"clients_per_round": 5}, r"set clients_per_round to 6 \(it is 5"),
    ],
)
def test_what_does_not_go_together_is_refused_before_anything_is_written(
    tmp_path: Path, network: Settings, changes: Settings, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        start(small(network, **changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("exchange", ["all_gather", "lean"])
def test_a_graph_in_pieces_is_for_gossip_alone(tmp_path: Path, exchange: str) -> None:
    (tmp_path / "links.txt").write_text("0 1\n1 2\n3 4\n4 5\n")
    links = {"graph": "file", "file": str(tmp_path / "links.txt")}
    with pytest.raises(ConfigError, match="the graph is in pieces; add links, or use"):
        start(small({**links, "exchange": exchange}), tmp_path / "run")
    network = {**links, "exchange": "gossip"}
    summary, _ = played(small(network, method={"name": "dpsgd", "ratio": [1.0]}), tmp_path / "run")
    assert len(summary["accuracy_peers"]) == 6


def test_links_without_peers_are_refused() -> None:
    experiment = small({"topology": "star", "loss": 0.3})
    with pytest.raises(ConfigError, match=r"--network\.topology peers"):
        first_federation(prepare(experiment))


def test_a_method_that_cannot_work_leaves_no_folder(tmp_path: Path) -> None:
    experiment = small(method={**MSFUSION, "momentum": "carry"}, training={"momentum": 0.0})
    with pytest.raises(ConfigError, match="carry"):
        start(experiment, tmp_path / "run")
    assert not (tmp_path / "run").exists()
