"""Letters of peers: what cannot be true is left out, and the server opens none."""

from __future__ import annotations

import contextlib
from dataclasses import replace

import pytest
from devices_at_hand import PostAtHand, parts, prepare_once
from own_data import write
from peers_at_hand import ALL, events_of, experiment_of, served_to

from tesserafl.core.errors import ConfigError
from tesserafl.data import DataSettings
from tesserafl.engines import questions
from tesserafl.engines.incoming import read_letter
from tesserafl.engines.orders import order_of, reply_of, sealed
from tesserafl.engines.parcels import Outgoing, letter_of
from tesserafl.engines.turns import Addressed, Standing
from tesserafl.methods import DPSGD, FedAvg
from tesserafl.run import begin as begin_module
from tesserafl.run import carried, carrying, mailbag
from tesserafl.run.deployed import Deployment, begin, serve_over
from tesserafl.run.holding import Local
from tesserafl.run.live import Waiting
from tesserafl.run.resident import Resident
from tesserafl.run.setup import prepare
from tesserafl.run.shown import show


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    prepare_once(monkeypatch)


def test_what_a_peer_did_badly_is_left_out_by_all_and_by_itself(tmp_path):
    """One diverges: as in the simulation its change is left out, and copies stay equal."""
    experiment = experiment_of("all_gather", method=FedAvg(), rounds=2)
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
    (failed,) = events_of(tmp_path)[0]["failures"]
    assert failed["client"] == 1 and "allowed is a finite value" in failed["text"]
    assert served["state_sha256"] is not None


def test_a_peer_that_lies_is_left_out_by_all_others(tmp_path):
    """What it sends is not what it says: honest copies stay equal, since all look alike."""
    experiment = experiment_of("all_gather", method=FedAvg(), rounds=1)
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


@pytest.mark.parametrize("exchange", ["lean", "all_gather"])
def test_a_run_among_peers_has_a_report(tmp_path, exchange):
    """A lean one is not tested: nobody holds what could be."""
    served, _ = served_to(tmp_path, experiment_of(exchange, rounds=1))
    page = (tmp_path / "served/report.html").read_text()
    assert "msfusion" in page and (served["accuracy"] is None) == (exchange == "lean")
    show(served, tmp_path / "served", as_json=False)


def test_the_server_of_lean_peers_holds_no_model(tmp_path):
    """It keeps the letters of one round, in which no more values pass than are handed over; it
    makes no state and opens no letter."""
    experiment = experiment_of(rounds=4)
    begin(experiment, Deployment(devices=4), tmp_path / "served")
    total = experiment.model.build_model(prepare(experiment).data.spec).num_entries
    mail, passed = tmp_path / "served/mail", []

    def look(node, order):
        rounds = sorted(path.name for path in mail.glob("*"))
        assert len(rounds) <= 2, rounds  # the last one and this
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


def _lying(tmp_path, exchange, lie, graph="complete", rounds=2):
    """A run whose peer 2 answers Turn with what `lie` makes of its answer."""
    experiment = experiment_of(exchange, graph, method=_METHODS[exchange], rounds=rounds)
    residents = parts(tmp_path / "devices", ALL)
    begin(experiment, Deployment(devices=4), tmp_path / "served")
    truthful = residents[102].answer

    def answer(envelope):
        reply, order = truthful(envelope), order_of(envelope)
        found = reply_of(reply)
        if order.kind != "turn" or found.kind != "turned":
            return reply
        return lie(found, reply)

    residents[102].answer = answer
    return serve_over(PostAtHand(residents=residents), tmp_path / "served")


_METHODS = {"all_gather": FedAvg(), "gossip": DPSGD(ratio=(1.0,))}


def _to_one_alone(turned, reply):
    letters = [each.model_copy(update={"receivers": [0]}) for each in turned.letters]
    return sealed(turned.model_copy(update={"letters": letters}), reply.parcels)


def _without_a_row(turned, reply):
    return sealed(turned.model_copy(update={"row": {}}), reply.parcels)


def _of_much_training(turned, reply):
    row = {**turned.row, "examples": 1e9}
    return sealed(turned.model_copy(update={"row": row}), reply.parcels)


def _standing_still(turned, reply):
    return sealed(Standing(round=turned.round))


@pytest.mark.parametrize("lie", [_to_one_alone, _without_a_row, _of_much_training, _standing_still])
def test_a_peer_that_cannot_be_believed_is_left_out_and_the_others_go_on(tmp_path, lie):
    served = _lying(tmp_path, "all_gather", lie)
    assert [event["answered"] for event in events_of(tmp_path)] == [3, 3]
    assert all(f["client"] == 2 for event in events_of(tmp_path) for f in event["failures"])
    digests = {peer["peer"]: peer["sha256"] for peer in served["peers"]}
    assert digests[0] == digests[1] == digests[3]


def test_neighbours_leave_out_who_did_not_train_and_writes_as_if_it_had(tmp_path, caplog):
    """Whether somebody trained is the same for everybody: the server says it."""

    def lie(turned, reply):
        return sealed(turned.model_copy(update={"row": None, "part": None}), reply.parcels)

    served = _lying(tmp_path, "gossip", lie, "ring")
    assert [event["answered"] for event in events_of(tmp_path)] == [3, 3]
    said = [line for line in caplog.messages if "did not train, and says that it has" in line]
    assert len(said) == 2 * 2 and all("peer 2 is left out" in line for line in said)
    assert len(served["peers"]) == 4


def test_neighbours_leave_out_a_letter_of_what_is_not_in_the_model(tmp_path):
    def lie(turned, reply):
        (addressed,) = turned.letters
        header, groups = read_letter(letter_of(addressed.letter), reply.parcels.__getitem__)
        header["submodel"]["views"] = {
            f"no-{name}": [f"no-{view[0]}", view[1]]
            for name, view in header["submodel"]["views"].items()
        }
        groups["delta"] = {f"no-{name}": tensor for name, tensor in groups["delta"].items()}
        false = Outgoing(parts=(header, groups))
        letter = Addressed(receivers=addressed.receivers, letter=false.letter.model_dump())
        parcels = {n.sha256: false.parcel(i) for i, n in enumerate(false.letter.parcels)}
        return sealed(turned.model_copy(update={"letters": [letter]}), parcels)

    served = _lying(tmp_path, "gossip", lie, "ring")
    assert [peer["peer"] for peer in served["peers"]] == [0, 1, 2, 3]


def test_peers_with_data_of_their_own(tmp_path):
    """Each tests on its own examples; weights go by what each has."""
    folders = [write(tmp_path / f"own-{n}", ["ant", "bee", "cat"] * (4 + 4 * n)) for n in range(3)]
    data = DataSettings(path=folders[2], num_clients=3, partition="iid", test=0.25)
    experiment = experiment_of("all_gather", method=FedAvg(), data=data, clients_per_round=3)
    residents = {
        n: Resident(
            name=f"peer-{n}",
            folder=tmp_path / f"devices/peer-{n}",
            local=Local(data=folder, device="cpu"),
        )
        for n, folder in enumerate(folders)
    }
    begin(experiment, Deployment(devices=3, own_data=True), tmp_path / "served")
    served = serve_over(PostAtHand(residents=residents), tmp_path / "served")
    assert served["state_sha256"] is not None and served["accuracy"] > 0
    (first, *_) = events_of(tmp_path)
    assert [row["examples"] for row in first["clients"]] == [9, 18, 27]


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
    experiment = experiment_of()
    network = replace(experiment.network, **changes.pop("network", {}))
    experiment = replace(experiment, network=network, **changes)
    with pytest.raises(ConfigError, match=text):
        begin(experiment, Deployment(devices=4, **deployment), tmp_path / "served")
    assert not (tmp_path / "served").exists()
