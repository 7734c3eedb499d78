"""Runs on devices elsewhere: the same bits as in this process, whatever is lost on the way."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
from devices_at_hand import PostAtHand, experiment_for_four, parts, prepare_once, remote_at_hand

from tesserafl.core.errors import CheckpointError, ConfigError, UpdateError
from tesserafl.data import DataSettings
from tesserafl.engines.attendance import Disowned, Undelivered
from tesserafl.engines.fleet import FleetSettings
from tesserafl.engines.remote import Remote
from tesserafl.engines.seam import Done
from tesserafl.methods import FedAvg, FedBRB, FedRolex
from tesserafl.models import MLP
from tesserafl.run import deployed
from tesserafl.run.begin import first_federation
from tesserafl.run.deployed import Deployment, begin, serve_over
from tesserafl.run.runner import start
from tesserafl.run.setup import prepare

ALL = range(4)


@pytest.fixture(autouse=True)
def _prepared_once(monkeypatch):
    prepare_once(monkeypatch)


def _served(tmp_path, experiment, post=None, watch=lambda _: None, **deployment):
    folder = tmp_path / "served"
    post = post or PostAtHand(residents=parts(tmp_path / "devices", ALL))
    begin(experiment, Deployment(devices=4, **deployment), folder)
    return serve_over(post, folder, watch=watch), post


@pytest.mark.parametrize("method", [FedAvg(), FedBRB(ratio=(0.25, 0.5)), FedRolex(ratio=(0.5,))])
def test_devices_elsewhere_give_the_bits_of_this_process(tmp_path, method):
    experiment = experiment_for_four(method=method)
    here = start(experiment, tmp_path / "here")
    served, _ = _served(tmp_path, experiment)
    assert served["state_sha256"] == here["state_sha256"]
    assert served["accuracy"] == here["accuracy"]
    assert (served["bytes_down"], served["bytes_up"]) == (here["bytes_down"], here["bytes_up"])


def test_small_messages_give_the_same_bits(tmp_path):
    experiment = experiment_for_four()
    here = start(experiment, tmp_path / "here")
    served, post = _served(tmp_path, experiment, message_bytes=1500)
    assert served["state_sha256"] == here["state_sha256"]
    kinds = {kind for _, kind, _ in post.log}
    assert kinds == {"hello", "store", "work", "fetch", "rest", "bye"}
    assert post.largest < 1500 + 600  # with what safetensors adds


def test_parcels_that_a_device_has_are_not_sent_again(tmp_path):
    """In the second round only what changed: the device lost nothing of the first."""
    experiment = experiment_for_four(rounds=1)
    works = dict.fromkeys(range(100, 104), 0)

    def loses_the_last_work(node, order):
        if order.kind == "work":
            works[node] += 1
            if works[node] == 2:  # the first brought the first parcel
                return Undelivered("error", "lost")
        return None

    residents = parts(tmp_path / "devices", ALL)
    post = PostAtHand(residents=residents, loss=loses_the_last_work)
    with pytest.raises(UpdateError, match="the work of every client failed"):
        _served(tmp_path, experiment, post, message_bytes=1500)
    before = [kind for _, kind, _ in post.log].count("store")
    assert before > 8
    summary = serve_over(post, tmp_path / "served")
    assert [kind for _, kind, _ in post.log].count("store") == before
    assert summary["state_sha256"] == start(experiment, tmp_path / "here")["state_sha256"]


def test_a_device_that_fails_changes_only_who_took_part(tmp_path):
    reasons = ["offline", "crashed", "error", "expired"]
    left = list(reasons)

    def fails(node, order):
        if order.kind == "work" and node == 102:
            return Undelivered(left.pop(0), "as a test wants it")
        return None

    experiment = experiment_for_four(rounds=4)
    post = PostAtHand(residents=parts(tmp_path / "devices", ALL), loss=fails)
    served, _ = _served(tmp_path, experiment, post)
    lines = (tmp_path / "served/events.jsonl").read_text().splitlines()
    events = [json.loads(line) for line in lines]
    rounds = [event for event in events if event["kind"] == "round"]
    assert [[(f["client"], f["reason"]) for f in e["failures"]] for e in rounds] == [
        [(2, reason)] for reason in reasons
    ]
    # The same participants in this process: a client that fails there with an error of its own.
    post = PostAtHand(residents=parts(tmp_path / "three", (0, 1, 3)))
    begin(experiment, Deployment(devices=3), tmp_path / "absent")
    absent = serve_over(post, tmp_path / "absent")
    assert absent["state_sha256"] == served["state_sha256"]
    assert served["state_sha256"] != start(experiment, tmp_path / "here")["state_sha256"]


def test_a_device_that_comes_late_takes_part_from_then_on(tmp_path):
    post = PostAtHand(residents=parts(tmp_path / "devices", ALL), away={103}, at_once=9)
    rounds = []

    def listen(event):
        if event["kind"] == "round":
            rounds.append([row["client"] for row in event["clients"]])
            if len(rounds) == 2:
                post.away.clear()

    experiment = experiment_for_four(rounds=5)
    begin(experiment, Deployment(devices=3), tmp_path / "served")

    def at_once(remote: Remote) -> None:  # looks at who is there with every task
        remote.clock = iter(range(10**6)).__next__

    serve_over(post, tmp_path / "served", listen, at_once)
    assert rounds[:2] == [[0, 1, 2]] * 2
    assert rounds[-1] == [0, 1, 2, 3]  # greeted in between


def test_a_server_that_is_cut_off_goes_on_with_the_same_bits(tmp_path):
    """Devices have done a round that the server never heard of; it asks for it again."""
    experiment = experiment_for_four(method=FedBRB(ratio=(0.25, 0.5)), rounds=5)
    here = start(experiment, tmp_path / "here")
    post = PostAtHand(residents=parts(tmp_path / "devices", ALL))

    class Cut(Exception):
        pass

    def listen(event):
        if event["kind"] == "round" and event["round"] == 3:
            raise Cut  # before the checkpoint of the round

    begin(experiment, Deployment(devices=4), tmp_path / "served")
    with pytest.raises(Cut):
        serve_over(post, tmp_path / "served", listen)
    trained = [kind for _, kind, _ in post.log].count("work")
    assert trained == 12
    summary = serve_over(post, tmp_path / "served")
    assert summary["state_sha256"] == here["state_sha256"]


@pytest.mark.parametrize(
    ("disks", "greetings"), [("devices", 4), ("others", 8)], ids=["their disks", "disks lost"]
)
def test_devices_that_start_anew_go_on(tmp_path, disks, greetings):
    """From their disks; those that lost them are greeted again."""
    experiment = experiment_for_four()
    here = start(experiment, tmp_path / "here")
    residents = parts(tmp_path / "devices", ALL)
    post = PostAtHand(residents=residents)

    def listen(event):
        if event["kind"] == "round" and event["round"] == 2:
            residents.update(parts(tmp_path / disks, ALL))

    begin(experiment, Deployment(devices=4), tmp_path / "served")
    summary = serve_over(post, tmp_path / "served", listen)
    assert summary["state_sha256"] == here["state_sha256"]
    assert [kind for _, kind, _ in post.log].count("hello") == greetings


def test_a_round_waits_for_a_device_that_it_asks(tmp_path):
    """Else a run whose devices are away for a moment would be over in one."""
    post = PostAtHand(residents=parts(tmp_path / "devices", ALL))
    looks, rounds = [], []

    def nodes():
        looks.append(1)
        there = {node: resident.name for node, resident in post.residents.items()}
        return {} if rounds and len(looks) < 40 else there

    def listen(event):
        if event["kind"] == "round":
            rounds.append((event["answered"], len(looks)))

    post.nodes = nodes
    begin(experiment_for_four(), Deployment(devices=4), tmp_path / "served")

    def at_once(remote: Remote) -> None:
        remote.clock, remote.pause = iter(range(10**6)).__next__, lambda _: None

    serve_over(post, tmp_path / "served", listen, at_once)
    assert len(looks) >= 40
    assert all(answered for answered, _ in rounds), rounds


def test_a_device_has_one_seat(tmp_path):
    residents = parts(tmp_path / "devices", ALL)
    post = PostAtHand(residents=residents)

    def listen(event):  # the device of client 0 comes back as client 1, whose device is away
        if event["kind"] == "round" and event["round"] == 1:
            residents[100].local = replace(residents[100].local, client=1)
            residents.pop(101)
            post.away = {100}
        elif event["kind"] == "round":
            post.away = set()

    def at_once(remote: Remote) -> None:
        remote.clock, remote.pause = iter(range(10**6)).__next__, lambda _: None

    begin(experiment_for_four(rounds=6), Deployment(devices=4), tmp_path / "served")
    serve_over(post, tmp_path / "served", listen, at_once)
    guests = (tmp_path / "served/guests.jsonl").read_text().splitlines()
    assert json.loads(guests[-1]) == {
        "device": "device-0",
        "text": "the device 'device-0' is client 0 of this run",
    }
    lines = (tmp_path / "served/events.jsonl").read_text().splitlines()
    last = [event for event in map(json.loads, lines) if event["kind"] == "round"][-1]
    assert [row["client"] for row in last["clients"]] == [2, 3]
    assert {f["client"]: f["reason"] for f in last["failures"]} == {0: "offline", 1: "offline"}


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (ConfigError("no device has joined"), "no device has joined"),
        (
            RuntimeError("a fault"),
            r"process failed: RuntimeError\('a fault'\).*To go on: tessera resume",
        ),
        (Disowned("by Flower"), None),
        (SystemExit(1), None),
    ],
)
def test_who_serves_hears_why_a_run_ended(tmp_path, monkeypatch, error, text):
    """Of a process that Flower ended it hears nothing: the run may be begun again."""

    def fails(*_):
        assert (tmp_path / deployed.AT_WORK).exists()
        raise error

    monkeypatch.setattr(deployed, "serve_over", fails)
    monkeypatch.setattr(deployed, "die_with_parent", lambda _: None)
    with pytest.raises(type(error)):
        deployed.serve_noted(PostAtHand(residents={}), tmp_path)
    assert not (tmp_path / deployed.AT_WORK).exists()
    told = tmp_path / "error.json"
    assert told.exists() == (text is not None)
    if text is not None:
        assert re.search(text, json.loads(told.read_text())["text"], re.DOTALL)


def test_what_devices_cannot_run_is_refused_before_a_folder_is_made(tmp_path):
    for changes, text in (
        ({"fleet": FleetSettings(profiles=("phone",))}, "leave it away"),
        ({"finetune_epochs": 1, "data": DataSettings(num_clients=4, test=0.2)}, "set it to 0"),
    ):
        with pytest.raises(ConfigError, match=text):
            begin(experiment_for_four(**changes), Deployment(devices=4), tmp_path / "served")
    with pytest.raises(ConfigError, match="deals out 4 parts"):
        begin(experiment_for_four(), Deployment(devices=5), tmp_path / "served")
    assert not (tmp_path / "served").exists()
    begin(experiment_for_four(), Deployment(devices=4), tmp_path / "served")
    with pytest.raises(CheckpointError, match="is not empty"):
        begin(experiment_for_four(), Deployment(devices=4), tmp_path / "served")


def test_no_errand_lasts_longer_than_who_asks_has(tmp_path):
    """Of an edge, whose cloud waits for all of its devices together."""
    setup = prepare(experiment_for_four())
    remote = remote_at_hand(setup, tmp_path)
    remote.post.at_once = 0  # no answer is ever found
    remote.until = remote.clock() + 0.1
    tasks = first_federation(setup).tasks(setup.clients[:1], setup.experiment.training)
    remote.submit(list(tasks))
    (failed,) = remote.poll()
    assert failed.reason == "expired"


def test_from_the_second_round_on_a_large_task_is_asked_for_at_once(tmp_path, monkeypatch):
    prepare_once(monkeypatch)
    experiment = experiment_for_four(model=MLP(hidden=(64, 64)))
    setup = prepare(experiment)
    remote = remote_at_hand(setup, tmp_path)
    remote.most_bytes = 8_000
    state = experiment.method.init(setup.model, 0, 2)
    kinds: list[list[str]] = []
    for number in range(2):
        moved = {name: tensor + number for name, tensor in state.params.items()}
        state = replace(state, round=number, params=moved)
        asked = experiment.method.configure(
            setup.model, state, setup.clients[:1], experiment.training
        )
        remote.post.log.clear()
        remote.submit(list(asked))
        (done,) = remote.poll()
        assert isinstance(done, Done), done
        kinds.append([kind for _, kind, _ in remote.post.log])
    num = kinds[0].count("store") + 2
    assert num > 4 and kinds[0].count("work") == 2
    assert kinds[0][-1] == "fetch"  # another way in the first round
    assert kinds[1] == ["store"] * (num - 1) + ["work"] + ["rest"] * (num - 1)
    assert remote.post.largest < 9_000
