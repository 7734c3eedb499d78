"""Peers on devices: letters that a server carries give the bits of the simulated network."""

from __future__ import annotations

import pytest
from devices_at_hand import PostAtHand, parts, prepare_once
from peers_at_hand import (
    ALL,
    assert_same,
    copies_of,
    events_of,
    experiment_of,
    kept_by_peers,
    served_to,
)

from tesserafl.core.errors import CheckpointError, TesseraError
from tesserafl.core.fit import Training
from tesserafl.core.params import num_entries
from tesserafl.engines.attendance import Undelivered
from tesserafl.methods import DPSGD, FedAvg, FedRolex, MSfusion, Progressive
from tesserafl.models import Residual
from tesserafl.run.deployed import Deployment, begin, serve_over
from tesserafl.run.parts import assemble
from tesserafl.run.runner import start


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    prepare_once(monkeypatch)


@pytest.mark.parametrize(
    ("method", "clients"),
    [(FedAvg(), 4), (FedRolex(ratio=(0.5,)), 3), (MSfusion(ratio=(0.5,)), 4)],
)
def test_copies_on_devices_have_the_bits_of_the_simulated_ones(tmp_path, method, clients):
    experiment = experiment_of("all_gather", method=method, clients_per_round=clients)
    here = start(experiment, tmp_path / "here")
    served, _ = served_to(tmp_path, experiment)
    assert served["state_sha256"] == here["state_sha256"]
    assert served["accuracy"] == here["accuracy"]
    assert len({peer["sha256"] for peer in served["peers"]}) == 1
    assert len(kept_by_peers(tmp_path, "model.safetensors")) == 4


@pytest.mark.parametrize("exchange", ["all_gather", "gossip"])
def test_a_peer_with_a_copy_holds_the_model_once(tmp_path, exchange):
    residents, held = parts(tmp_path / "devices", ALL), []

    def look(node, order):
        if order.kind == "examine":
            copy = residents[node]._peer.peer.copy
            params = [copy.begin, *(state.params for state in copy.states)]
            tensors = {id(t): t.numel() for each in params for t in each.values()}
            held.append((sum(tensors.values()), num_entries(copy.shapes)))
        return None

    post = PostAtHand(residents=residents, loss=look)
    served_to(tmp_path, experiment_of(exchange, method=DPSGD(), rounds=1), post)
    assert held and all(entries == model for entries, model in held)


@pytest.mark.parametrize(("graph", "clients"), [("complete", 4), ("ring", 2)])
def test_parts_on_devices_are_together_the_simulated_model(tmp_path, graph, clients):
    experiment = experiment_of(graph=graph, clients_per_round=clients, rounds=4)
    here = start(experiment, tmp_path / "here")
    served, _ = served_to(tmp_path, experiment)
    assert served["accuracy"] is None and served["state_sha256"] is None
    folders = [path.parent for path in kept_by_peers(tmp_path, "part.json")]
    assert len(folders) == 4
    found = assemble(folders, tmp_path / "whole")
    assert found["state_sha256"] == here["state_sha256"]
    _refuses_what_is_missing(folders, tmp_path)


def _refuses_what_is_missing(folders, tmp_path):
    """By the peers' numbers, and with the place that was looked at."""
    none, told = tmp_path / "none", "the parts of peers 1, 3 of 4 are missing"
    with pytest.raises(CheckpointError, match=rf"entries are in none .*{told}"):
        assemble([folders[0], folders[2]], none)
    place = folders[1].parent / "model-*"  # as a shell leaves it that finds nothing
    with pytest.raises(CheckpointError) as caught:
        assemble([folders[0], place, folders[2]], none)
    text = str(caught.value)
    assert f"{place}/part.json" in text and "peers 1, 3 of 4" in text and "run folder" not in text
    with pytest.raises(CheckpointError, match="holds no part of a peer"):
        assemble([tmp_path / "here"], none)
    whole = folders[0].with_name("model-whole")
    whole.mkdir()
    (whole / "model.safetensors").touch()
    with pytest.raises(CheckpointError, match="holds the whole model"):
        assemble([whole], none)
    with pytest.raises(CheckpointError, match="parts of all 4 peers are here"):
        assemble([*folders, whole], none)
    (folders[3] / "part.safetensors").rename(none)
    with pytest.raises(CheckpointError, match=rf"peer 3 cannot be read: .*{folders[3]}"):
        assemble(folders, none)
    none.rename(folders[3] / "part.safetensors")
    assert not none.exists()


def test_gossip_on_devices_has_the_copies_of_the_simulated_peers(tmp_path):
    experiment = experiment_of("gossip", "ring", method=DPSGD())
    here = start(experiment, tmp_path / "here")
    served, _ = served_to(tmp_path, experiment)
    assert served["accuracy_peers"] == here["accuracy_peers"]
    assert len({peer["sha256"] for peer in served["peers"]}) == 4


@pytest.mark.parametrize(
    "changes",
    [
        {"method": DPSGD(ratio=(1.0, 0.5))},
        {"method": DPSGD(), "training": Training(mask_absent_classes=True)},
        {"method": Progressive(), "model": Residual(blocks=4)},
    ],
    ids=["parts", "masked", "frozen"],
)
def test_in_gossip_on_devices_who_does_not_train_says_where_it_stands(tmp_path, changes):
    """All of its part, also where those that train tell of some of it alone."""
    experiment = experiment_of("gossip", "ring", dropout=0.4, **changes)
    start(experiment, tmp_path / "here")
    served, _ = served_to(tmp_path, experiment)
    assert min(event["answered"] for event in events_of(tmp_path)) < 4
    assert [peer["sha256"] for peer in served["peers"]] == copies_of(tmp_path / "here")


def _losing(node, order_kind, times, reason="crashed"):
    """Loses these deliveries of such an order to a node, counted from 0."""
    count = iter(range(10**6))

    def loss(at, order):
        if at == node and order.kind == order_kind and next(count) in times:
            return Undelivered(reason, "as a test wants it")
        return None

    return loss


def test_a_peer_that_does_not_train_is_left_out_and_has_the_same_copy(tmp_path):
    experiment = experiment_of("all_gather", method=FedAvg())
    loss = _losing(102, "turn", {1}, "expired")
    post = PostAtHand(residents=parts(tmp_path / "devices", ALL), loss=loss)
    served, _ = served_to(tmp_path, experiment, post)
    assert [e["answered"] for e in events_of(tmp_path)] == [4, 3, 4]
    assert [f["reason"] for f in events_of(tmp_path)[1]["failures"]] == ["expired"]
    assert len(served["peers"]) == 4
    assert served["state_sha256"] is not None  # all have the same
    assert served["state_sha256"] != start(experiment, tmp_path / "here")["state_sha256"]


@pytest.mark.parametrize(("exchange", "times"), [("all_gather", {0}), ("lean", {0, 1})])
def test_a_peer_that_misses_the_end_of_a_round_catches_up(tmp_path, exchange, times):
    experiment = experiment_of(exchange)
    here = start(experiment, tmp_path / "here")
    post = PostAtHand(residents=parts(tmp_path / "devices", ALL), loss=_losing(103, "fold", times))
    served, _ = served_to(tmp_path, experiment, post)
    assert [event["answered"] for event in events_of(tmp_path)] == [4, 4, 4]
    assert_same(tmp_path, served, here)


@pytest.mark.parametrize("exchange", ["all_gather", "lean"])
def test_large_letters_travel_in_parcels(tmp_path, exchange):
    experiment = experiment_of(exchange, rounds=2)
    here = start(experiment, tmp_path / "here")
    served, post = served_to(tmp_path, experiment, message_bytes=500)
    assert {"store", "fetch"} <= {kind for _, kind, _ in post.log}
    assert post.largest < 500 + 600  # with what safetensors adds
    assert_same(tmp_path, served, here)


@pytest.mark.parametrize("exchange", ["all_gather", "lean"])
def test_server_and_peers_cut_off_anywhere_go_on_with_the_same_bits(tmp_path, exchange):
    experiment = experiment_of(exchange, rounds=2, evaluate_every=1)
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
        left = 3 + cuts % 4  # less than a round: the next one begins in the midst of it
        post = PostAtHand(residents=parts(tmp_path / "devices", ALL), loss=cut)
        try:
            served = serve_over(post, tmp_path / "served")
        except Cut:
            cuts += 1
        assert cuts < 50, "it does not get on"
    assert cuts >= 4
    assert [event["round"] for event in events_of(tmp_path)] == [1, 2]
    assert_same(tmp_path, served, here)


def test_a_part_that_was_not_written_is_asked_for_again(tmp_path):
    """Nobody else has it, and a device that hears goodbye keeps nothing else."""
    experiment = experiment_of(rounds=1)
    here = start(experiment, tmp_path / "here")
    post = PostAtHand(
        residents=parts(tmp_path / "devices", ALL), loss=_losing(102, "examine", {0, 1})
    )
    served, _ = served_to(tmp_path, experiment, post)
    assert len(served["peers"]) == 4
    assert_same(tmp_path, served, here)


@pytest.mark.parametrize("exchange", ["all_gather", "lean"])
def test_letters_that_a_disk_has_damaged_are_sent_again(tmp_path, exchange):
    experiment = experiment_of(exchange, rounds=2)
    here = start(experiment, tmp_path / "here")
    spoilt = []

    def spoil(node, order):
        if order.kind == "fold" and node == 101 and not spoilt:
            spoilt.append(order.round)
            (name, *_) = [n["sha256"] for each in order.letters for n in each.letter["parcels"]]
            path = tmp_path / f"devices/device-1/{order.run}/parcels/{name}"
            path.write_bytes(b"")
        return None

    post = PostAtHand(residents=parts(tmp_path / "devices", ALL), loss=spoil)
    served, _ = served_to(tmp_path, experiment, post)
    assert spoilt and sum(node == 101 and kind == "fold" for node, kind, _ in post.log) == 3
    assert_same(tmp_path, served, here)


@pytest.mark.parametrize("exchange", ["all_gather", "lean"])
def test_a_peer_that_lost_what_it_trained_does_not_go_on_without(tmp_path, exchange):
    def lose(node, order):
        if order.kind == "fold" and node == 101 and order.round == 1:
            for path in tmp_path.glob(f"devices/device-1/{order.run}/turn/*"):
                path.unlink()
        return None

    post = PostAtHand(residents=parts(tmp_path / "devices", ALL), loss=lose)
    if exchange == "lean":
        with pytest.raises(TesseraError, match="has lost what it trained in round 1"):
            served_to(tmp_path, experiment_of(), post)
        return
    served, _ = served_to(tmp_path, experiment_of(exchange), post)
    assert [peer["peer"] for peer in served["peers"]] == [0, 2, 3]
    assert served["state_sha256"] is not None


def test_a_peer_that_lost_its_disk_is_left_out(tmp_path):
    """Of copies; of parts nobody has another."""
    residents = parts(tmp_path / "devices", ALL)

    def lose(node, order):
        if order.kind == "turn" and node == 101 and order.round == 2:
            residents[101]._peer = None
            for path in tmp_path.glob(f"devices/device-1/{order.run}/ends/*"):
                path.unlink()
        return None

    post = PostAtHand(residents=residents, loss=lose)
    served, _ = served_to(tmp_path, experiment_of("all_gather", rounds=4, evaluate_every=1), post)
    assert [event["answered"] for event in events_of(tmp_path)] == [4, 4, 3, 3]
    assert "it has lost what it held" in events_of(tmp_path)[2]["failures"][0]["text"]
    assert [peer["peer"] for peer in served["peers"]] == [0, 2, 3]
