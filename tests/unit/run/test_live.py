"""Rounds on devices that do not wait for all."""

from __future__ import annotations

import json

import pytest
from devices_at_hand import PostAtHand, experiment_for_four, parts, prepare_once

from tesserafl.core.errors import ConfigError
from tesserafl.data import DataSettings
from tesserafl.engines.attendance import Undelivered
from tesserafl.engines.orders import Work
from tesserafl.methods import FedBRB
from tesserafl.run.deployed import Deployment, begin, serve_over
from tesserafl.run.live import Waiting
from tesserafl.run.runner import start


@pytest.fixture(autouse=True)
def _prepared_once(monkeypatch):
    prepare_once(monkeypatch)


class Slow(PostAtHand):
    """The work of node 103 takes until somebody sets it free."""

    free = False

    def pull(self, names):
        order = {name: self.waiting[name] for name in names}
        ready = [n for n, (node, _) in order.items() if node != 103 or self.free or "hello" in n]
        return super().pull(ready) if ready else []

    def push(self, node, envelope, seconds):
        name = super().push(node, envelope, seconds)
        if b'"kind":"hello"' in envelope.head:
            self.waiting[f"hello-{name}"] = self.waiting.pop(name)
            return f"hello-{name}"
        return name


def _served(tmp_path, experiment, post, waiting, listener=None, **deployment):
    folder = tmp_path / "served"
    begin(experiment, Deployment(devices=4, waiting=waiting, **deployment), folder)

    def fast(remote):  # a clock that every look advances by a tenth of a second
        ticks = iter(range(10**7))
        remote.clock = lambda: next(ticks) / 10
        remote.pause = lambda seconds: None

    summary = serve_over(post, folder, listener, fast)
    lines = (folder / "events.jsonl").read_text().splitlines()
    rounds = [event for event in map(json.loads, lines) if event["kind"] == "round"]
    return summary, rounds


def _answered(rounds):
    return [[(row["client"], row["staleness"]) for row in event["clients"]] for event in rounds]


def test_a_quorum_of_all_gives_the_bits_of_a_synchronous_run(tmp_path):
    experiment = experiment_for_four(method=FedBRB(ratio=(0.5,)))
    here = start(experiment, tmp_path / "here")
    post = PostAtHand(residents=parts(tmp_path / "devices", range(4)))
    served, rounds = _served(tmp_path, experiment, post, Waiting(round_seconds=1e6))
    assert _answered(rounds) == [[(c, 0) for c in range(4)]] * 3
    assert served["state_sha256"] == here["state_sha256"]
    assert served["bytes_up"] == here["bytes_up"]


def test_at_a_quorum_a_round_ends_and_who_is_late_counts_later(tmp_path):
    post = Slow(residents=parts(tmp_path / "devices", range(4)))

    def listen(event):
        post.free = event["kind"] == "round" and event["round"] >= 2

    served, rounds = _served(tmp_path, experiment_for_four(), post, Waiting(quorum=0.75), listen)
    answered = _answered(rounds)
    assert answered[:2] == [[(0, 0), (1, 0), (2, 0)]] * 2
    assert (3, 2) in answered[2]
    assert served["rounds"] == 3
    assert [event["asked"] for event in rounds[:2]] == [3, 3]


def test_who_is_late_may_be_refused(tmp_path):
    post = Slow(residents=parts(tmp_path / "devices", range(4)))

    def listen(event):
        post.free = event["kind"] == "round" and event["round"] >= 2

    waiting = Waiting(quorum=0.75, late="refuse")
    _, rounds = _served(tmp_path, experiment_for_four(), post, waiting, listen)
    assert all(staleness == 0 for row in _answered(rounds) for _, staleness in row)
    assert [(f["client"], f["reason"]) for f in rounds[2]["failures"]] == [(3, "expired")]


def test_at_its_deadline_a_round_ends_with_what_it_has(tmp_path):
    post = Slow(residents=parts(tmp_path / "devices", range(4)))
    _, rounds = _served(tmp_path, experiment_for_four(), post, Waiting(round_seconds=60.0))
    assert [[c for c, _ in row] for row in _answered(rounds)] == [[0, 1, 2]] * 3


def test_a_task_that_expires_frees_its_device_for_the_next(tmp_path):
    post = Slow(residents=parts(tmp_path / "devices", range(4)))
    waiting = Waiting(quorum=0.5)
    _, rounds = _served(tmp_path, experiment_for_four(rounds=30), post, waiting, task_seconds=5.0)
    failed = [(f["client"], f["reason"]) for event in rounds for f in event["failures"]]
    assert failed.count((3, "expired")) >= 2  # asked again after the first


def test_a_round_may_begin_with_an_answer_that_is_late(tmp_path):
    """All devices are late: nobody can be asked before one of them has answered."""
    post = Slow(residents=parts(tmp_path / "devices", [3]), away=set())
    experiment = experiment_for_four(
        data=DataSettings(num_clients=4, max_train=120, max_test=50), clients_per_round=1
    )
    folder = tmp_path / "served"
    waiting = Waiting(round_seconds=2.0)
    begin(experiment, Deployment(devices=1, waiting=waiting), folder)
    looks = iter(range(10**7))

    def slow(remote):
        def clock():
            post.free = (now := next(looks) / 10) > 30.0
            return now

        remote.clock, remote.pause = clock, lambda seconds: None

    summary = serve_over(post, folder, None, slow)
    assert summary["rounds"] == 3
    lines = (folder / "events.jsonl").read_text().splitlines()
    rounds = [event for event in map(json.loads, lines) if event["kind"] == "round"]
    assert (3, 1) in _answered(rounds)[1] or (3, 1) in _answered(rounds)[2]
    assert sum(map(len, _answered(rounds))) >= 2


def test_more_are_asked_than_a_round_needs(tmp_path):
    post = PostAtHand(residents=parts(tmp_path / "devices", range(4)))
    experiment = experiment_for_four(clients_per_round=2)
    waiting = Waiting(over_selection=0.5)
    _served(tmp_path, experiment, post, waiting)
    asked = [node for node, kind, _ in post.log if kind == "work"]
    assert len(asked) >= 7  # three in the first round; later ones may still be at work


def test_rounds_wait_for_a_device_that_can_be_asked(tmp_path):
    post = PostAtHand(residents=parts(tmp_path / "devices", range(4)))
    looks = []

    def nodes():
        looks.append(1)
        there = {n: r.name for n, r in post.residents.items()}
        return {} if 10 < len(looks) < 20 else there

    post.nodes = nodes
    served, rounds = _served(
        tmp_path, experiment_for_four(rounds=6), post, Waiting(round_seconds=30.0)
    )
    assert len(looks) > 20
    assert served["rounds"] == 6 and all(event["answered"] for event in rounds)


def test_who_answers_is_all_that_changes_the_bits(tmp_path):
    """The same three in each round: whether the fourth was late or lost is the same."""
    post = Slow(residents=parts(tmp_path / "devices", range(4)))
    late, _ = _served(tmp_path, experiment_for_four(), post, Waiting(quorum=0.75))

    def lost(node, order):
        is_work = isinstance(order, Work) and node == 103
        return Undelivered("crashed", "as a test wants it") if is_work else None

    post = PostAtHand(residents=parts(tmp_path / "others", range(3)))
    begin(experiment_for_four(), Deployment(devices=3), tmp_path / "three")
    three = serve_over(post, tmp_path / "three")
    post = PostAtHand(residents=parts(tmp_path / "more", range(4)), loss=lost)
    begin(experiment_for_four(), Deployment(devices=4), tmp_path / "four")
    four = serve_over(post, tmp_path / "four")
    assert three["state_sha256"] == four["state_sha256"]
    assert late["accuracy"] == three["accuracy"]
    assert late["state_sha256"] == three["state_sha256"]


def test_what_makes_no_sense_is_refused(tmp_path):
    for values, text in (
        ({"quorum": 0.0}, "quorum is a share"),
        ({"round_seconds": -1.0}, "round_seconds must be positive"),
        ({"over_selection": -0.5}, "over_selection must be 0 or more"),
    ):
        with pytest.raises(ConfigError, match=text):
            Waiting(**values)
    begin(
        experiment_for_four(dropout=0.1),
        Deployment(devices=4, waiting=Waiting(quorum=0.5)),
        tmp_path / "dropout",
    )
    post = PostAtHand(residents=parts(tmp_path / "devices", range(4)))
    with pytest.raises(ConfigError, match="simulates devices"):
        serve_over(post, tmp_path / "dropout")
