"""Peers on devices: letters that a server carries give the bits of the simulated network."""

from __future__ import annotations

import contextlib
import json
from dataclasses import replace

import pytest
from devices_at_hand import PostAtHand, parts, prepare_once

from tesserafl.core.errors import CheckpointError, ConfigError
from tesserafl.data import DataSettings
from tesserafl.engines import questions
from tesserafl.engines.attendance import Undelivered
from tesserafl.engines.network import NetworkSettings
from tesserafl.engines.orders import order_of, reply_of, sealed
from tesserafl.engines.parcels import Outgoing, letter_of, read_letter
from tesserafl.engines.turns import Addressed
from tesserafl.methods import DPSGD, FedAvg, FedRolex, MSfusion
from tesserafl.models import MLP
from tesserafl.run import begin as begin_module
from tesserafl.run import carried, carrying, mailbag, runner
from tesserafl.run.deployed import Deployment, begin, serve_over
from tesserafl.run.experiment import EngineSettings, Experiment
from tesserafl.run.live import Waiting
from tesserafl.run.parts import assemble
from tesserafl.run.runner import start
from tesserafl.run.setup import prepare

ALL = range(4)


@pytest.fixture(autouse=True)
def _prepared_once(monkeypatch):
    prepare_once(monkeypatch)


def _experiment(exchange="lean", graph="complete", **changes):
    settings = {
        "data": DataSettings(num_clients=4, max_train=120, max_test=50),
        "model": MLP(hidden=(16, 16)),
        "method": MSfusion(ratio=(0.5,)),
        "engine": EngineSettings(batching="sequential"),
        "network": NetworkSettings(topology="peers", exchange=exchange, graph=graph),
        "rounds": 3,
        "clients_per_round": 4,
    }
    return Experiment(**(settings | changes))


@pytest.fixture(autouse=True)
def _no_reports(monkeypatch):
    """Pictures take longer than these runs."""
    for module in (carrying, runner):
        monkeypatch.setattr(module, "write_report", lambda *_: None)
        monkeypatch.setattr(module, "write_partition", lambda *_: None)


def _served(tmp_path, experiment, post=None, **deployment):
    folder = tmp_path / "served"
    post = post or PostAtHand(residents=parts(tmp_path / "devices", ALL))
    begin(experiment, Deployment(devices=4, **deployment), folder)
    return serve_over(post, folder), post


def _kept(tmp_path, file):
    return sorted(tmp_path.glob(f"devices/*/model-*/{file}"))


@pytest.mark.parametrize("method", [FedAvg(), FedRolex(ratio=(0.5,)), MSfusion(ratio=(0.5,))])
@pytest.mark.parametrize("clients", [4, 3])
def test_copies_on_devices_have_the_bits_of_the_simulated_ones(tmp_path, method, clients):
    experiment = _experiment("all_gather", method=method, clients_per_round=clients)
    here = start(experiment, tmp_path / "here")
    served, _ = _served(tmp_path, experiment)
    assert served["state_sha256"] == here["state_sha256"]
    assert served["accuracy"] == here["accuracy"]
    assert len({peer["sha256"] for peer in served["peers"]}) == 1
    assert len(_kept(tmp_path, "model.safetensors")) == 4


@pytest.mark.parametrize("graph", ["complete", "ring"])
@pytest.mark.parametrize("clients", [4, 2])
def test_parts_on_devices_are_together_the_simulated_model(tmp_path, graph, clients):
    experiment = _experiment(graph=graph, clients_per_round=clients, rounds=4)
    here = start(experiment, tmp_path / "here")
    served, _ = _served(tmp_path, experiment)
    assert served["accuracy"] is None and served["state_sha256"] is None
    folders = [path.parent for path in _kept(tmp_path, "part.json")]
    assert len(folders) == 4
    found = assemble(folders, tmp_path / "whole")
    assert found["state_sha256"] == here["state_sha256"]
    with pytest.raises(CheckpointError, match="entries are in none of the parts"):
        assemble(folders[:1], tmp_path / "none")


def test_gossip_on_devices_has_the_copies_of_the_simulated_peers(tmp_path):
    experiment = _experiment("gossip", "ring", method=DPSGD())
    here = start(experiment, tmp_path / "here")
    served, _ = _served(tmp_path, experiment)
    assert served["accuracy_peers"] == here["accuracy_peers"]
    assert len({peer["sha256"] for peer in served["peers"]}) == 4


def _events(tmp_path, kind="round"):
    lines = (tmp_path / "served/events.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["kind"] == kind]


def _losing(node, order_kind, times, reason="crashed"):
    """Loses these deliveries of such an order to a node, counted from 0."""
    count = iter(range(10**6))

    def loss(at, order):
        if at == node and order.kind == order_kind and next(count) in times:
            return Undelivered(reason, "as a test wants it")
        return None

    return loss


def test_a_peer_that_does_not_train_is_left_out_and_has_the_same_copy(tmp_path):
    experiment = _experiment("all_gather", method=FedAvg())
    loss = _losing(102, "turn", {1}, "expired")
    post = PostAtHand(residents=parts(tmp_path / "devices", ALL), loss=loss)
    served, _ = _served(tmp_path, experiment, post)
    assert [e["answered"] for e in _events(tmp_path)] == [4, 3, 4]
    assert [f["reason"] for f in _events(tmp_path)[1]["failures"]] == ["expired"]
    assert len(served["peers"]) == 4
    assert served["state_sha256"] is not None  # all have the same
    assert served["state_sha256"] != start(experiment, tmp_path / "here")["state_sha256"]


@pytest.mark.parametrize(("exchange", "times"), [("all_gather", {0}), ("lean", {0, 1})])
def test_a_peer_that_misses_the_end_of_a_round_catches_up(tmp_path, exchange, times):
    experiment = _experiment(exchange)
    here = start(experiment, tmp_path / "here")
    post = PostAtHand(residents=parts(tmp_path / "devices", ALL), loss=_losing(103, "fold", times))
    served, _ = _served(tmp_path, experiment, post)
    assert [event["answered"] for event in _events(tmp_path)] == [4, 4, 4]
    _assert_same(tmp_path, served, here)


@pytest.mark.parametrize("exchange", ["all_gather", "lean"])
def test_large_letters_travel_in_parcels(tmp_path, exchange):
    experiment = _experiment(exchange, rounds=2)
    here = start(experiment, tmp_path / "here")
    served, post = _served(tmp_path, experiment, message_bytes=500)
    assert {"store", "fetch"} <= {kind for _, kind, _ in post.log}
    assert post.largest < 500 + 600  # with what safetensors adds
    _assert_same(tmp_path, served, here)


@pytest.mark.parametrize("exchange", ["all_gather", "lean"])
def test_server_and_peers_cut_off_anywhere_go_on_with_the_same_bits(tmp_path, exchange):
    experiment = _experiment(exchange, rounds=2)
    here = start(experiment, tmp_path / "here")
    begin(experiment, Deployment(devices=4), tmp_path / "served")
    left = 0

    class Cut(BaseException):
        pass

    def cut(node, order):
        nonlocal left
        left -= order.kind in ("turn", "fold", "examine")
        if left < 0:
            raise Cut
        return None

    served, cuts = None, 0
    while served is None:
        left = 5 if cuts else 2  # less than a round: the next one begins in the midst of it
        post = PostAtHand(residents=parts(tmp_path / "devices", ALL), loss=cut)
        try:
            served = serve_over(post, tmp_path / "served")
        except Cut:
            cuts += 1
        assert cuts < 50, "it does not get on"
    assert cuts >= 3
    assert [event["round"] for event in _events(tmp_path)] == [1, 2]
    _assert_same(tmp_path, served, here)


def _assert_same(tmp_path, served, here):
    if served["state_sha256"] is not None:
        assert served["state_sha256"] == here["state_sha256"]
        return
    folders = [path.parent for path in _kept(tmp_path, "part.json")]
    assert assemble(folders, tmp_path / "whole")["state_sha256"] == here["state_sha256"]


def test_what_a_peer_did_badly_is_left_out_by_all_and_by_itself(tmp_path):
    """One diverges: as in the simulation its change is left out, and copies stay equal."""
    experiment = _experiment("all_gather", method=FedAvg(), rounds=2)
    residents = parts(tmp_path / "devices", ALL)
    begin(experiment, Deployment(devices=4), tmp_path / "served")

    def spoil(node, order):
        if order.kind == "turn" and node == 101 and order.round == 0:
            worker = residents[101]._holding.worker
            monkey = worker.work

            def work(task, memory):
                worker.work = monkey
                update, memory = monkey(task, memory)
                name = next(iter(update.delta))
                return replace(update, delta={**update.delta, name: update.delta[name] / 0}), memory

            worker.work = work
        return None

    served = serve_over(PostAtHand(residents=residents, loss=spoil), tmp_path / "served")
    (failed,) = _events(tmp_path)[0]["failures"]
    assert failed["client"] == 1 and "allowed is a finite value" in failed["text"]
    assert served["state_sha256"] is not None


def test_a_peer_that_lies_is_left_out_by_all_others(tmp_path):
    """What it sends is not what it says: honest copies stay equal, since all look alike."""
    experiment = _experiment("all_gather", method=FedAvg(), rounds=1)
    residents = parts(tmp_path / "devices", ALL)
    begin(experiment, Deployment(devices=4), tmp_path / "served")
    truthful = residents[102].answer

    def lies(envelope):
        reply = truthful(envelope)
        if order_of(envelope).kind != "turn":
            return reply
        turned = reply_of(reply)
        (addressed,) = turned.letters
        header, groups = read_letter(letter_of(addressed.letter), reply.parcels.__getitem__)
        groups["delta"] = {name: t * float("inf") for name, t in groups["delta"].items()}
        false = Outgoing(parts=(header, groups))
        letter = Addressed(receivers=addressed.receivers, letter=false.letter.model_dump())
        parcels = {n.sha256: false.parcel(i) for i, n in enumerate(false.letter.parcels)}
        return sealed(turned.model_copy(update={"letters": [letter]}), parcels)

    residents[102].answer = lies
    served = serve_over(PostAtHand(residents=residents), tmp_path / "served")
    digests = {peer["peer"]: peer["sha256"] for peer in served["peers"]}
    assert digests[0] == digests[1] == digests[3] != digests[2]


def test_the_server_of_lean_peers_holds_no_model(tmp_path):
    """It keeps the letters of one round, in which no more values pass than are handed over; it
    makes no state and opens no letter."""
    experiment = _experiment(rounds=4)
    begin(experiment, Deployment(devices=4), tmp_path / "served")
    total = experiment.model.build_model(prepare(experiment).data.spec).num_entries
    mail, passed = tmp_path / "served/mail", []

    def look(node, order):
        rounds = sorted(path.name for path in mail.glob("*"))
        assert len(rounds) <= 1, rounds
        if order.kind == "fold":
            letters = [letter_of(each.letter) for each in order.letters]
            entries = [e for letter in letters for e in letter.entries if e.group == "values"]
            passed.append((order.round, sum(e.shape[0] for e in entries)))
        return None

    post = PostAtHand(residents=parts(tmp_path / "devices", ALL), loss=look)
    with _server_alone_may_not_open_letters():
        served = serve_over(post, tmp_path / "served")
    assert served["params_stored"] < total
    assert passed
    for round in range(4):
        assert sum(count for at, count in passed if at == round) < total
    held = [p.name for p in (tmp_path / "served").rglob("*.safetensors")]
    assert all(name.startswith("round-") for name in held)  # counts of what was trained
    assert not list(mail.glob("*"))


@contextlib.contextmanager
def _server_alone_may_not_open_letters():
    """Its modules know neither how to open a letter nor how to make a model."""
    for module in (carried, carrying, mailbag, questions):
        names = {"read_letter", "unpack", "load", "first_state", "merge", "ExactSum"}
        assert not names & vars(module).keys(), module
    with pytest.MonkeyPatch.context() as patch:

        def refuse(*_):
            raise AssertionError("the server made a model")

        patch.setattr(begin_module, "first_state", refuse)
        yield


@pytest.mark.parametrize(
    ("changes", "deployment", "text"),
    [
        ({"network": {"loss": 0.1, "exchange": "gossip"}}, {}, "network.loss"),
        ({}, {"waiting": Waiting(quorum=0.5)}, "waiting"),
        ({"finetune_epochs": 1}, {}, "finetune_epochs"),
    ],
)
def test_what_only_simulated_peers_can_do_is_refused(tmp_path, changes, deployment, text):
    experiment = _experiment()
    network = replace(experiment.network, **changes.pop("network", {}))
    experiment = replace(experiment, network=network, **changes)
    with pytest.raises(ConfigError, match=text):
        begin(experiment, Deployment(devices=4, **deployment), tmp_path / "served")
    assert not (tmp_path / "served").exists()
