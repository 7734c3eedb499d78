"""Trees over edges elsewhere: the bits of `tessera run`, whatever is lost on the way."""

from __future__ import annotations

import json
import time

import edges_at_hand
import pyarrow as pa
import pytest
from devices_at_hand import PostAtHand, parts, prepare_once
from edges_at_hand import TreeAtHand, at_once, events_of, simulated
from pyarrow import parquet

from tesserafl.core.errors import ConfigError
from tesserafl.core.messages import Client
from tesserafl.core.method import State
from tesserafl.core.schedule import Situation
from tesserafl.data import DataSettings
from tesserafl.engines.attendance import Undelivered
from tesserafl.engines.compression import CompressionSettings
from tesserafl.engines.incoming import read_letter
from tesserafl.engines.network import NetworkSettings
from tesserafl.engines.orders import Answer, order_of, reply_of, sealed
from tesserafl.engines.parcels import Outgoing, letter_of
from tesserafl.engines.swept import Swept
from tesserafl.methods import EqualFinish, FedAvg, FedBRB, FedNova, HierFAVG, Tomtit
from tesserafl.models import MLP
from tesserafl.run import deployed, hosting, runner
from tesserafl.run.cloud_round import measured
from tesserafl.run.deployed import Deployment, begin, serve_over
from tesserafl.run.experiment import EngineSettings, Experiment
from tesserafl.run.holding import Local
from tesserafl.run.resident import Resident
from tesserafl.run.spool import Spool

ALIKE = ("state_sha256", "accuracy", "loss", "bytes_up", "bytes_down", "coverage", "flops")
ALIKE += ("params_largest_client", "params_trained", "rounds")


@pytest.fixture(autouse=True)
def _prepared_once(monkeypatch):
    prepare_once(monkeypatch)
    for module in (runner, edges_at_hand):
        monkeypatch.setattr(module, "prepare", deployed.prepare)
    # Reports are drawn in other tests.
    monkeypatch.setattr(runner, "write_report", lambda folder, setup: None)
    monkeypatch.setattr(hosting, "setup_without_data", cache_of(hosting.setup_without_data))


def cache_of(made):
    """Edges share what they probe of an experiment."""
    known = {}

    def setup(local, experiment, spec):
        key = json.dumps(experiment, sort_keys=True)
        if key not in known:
            known[key] = made(local, experiment, spec)
        return known[key]

    return setup


def _experiment(**changes):
    settings = {
        "data": DataSettings(num_clients=4, max_train=120, max_test=50),
        "model": MLP(hidden=(16, 16)),
        "method": HierFAVG(),
        "engine": EngineSettings(batching="sequential"),
        "rounds": 2,
        "clients_per_round": 4,
    }
    return Experiment(**(settings | changes))


@pytest.mark.parametrize(
    "method",
    [
        HierFAVG(),
        HierFAVG(ratio=(0.5, 1.0), local_steps=2, edge_rounds=3),
        HierFAVG(local_steps=2, edge_rounds=2, normalised=True),
        FedBRB(ratio=(0.25, 0.5)),
        FedNova(),
    ],
    ids=["once", "several", "normalised", "fedbrb", "fednova"],
)
def test_a_tree_elsewhere_has_the_bits_of_this_process(tmp_path, method):
    experiment = _experiment(method=method)
    tree = TreeAtHand(folder=tmp_path)
    served = serve_over(tree.post, tree.begin(experiment), watch=at_once)
    here = simulated(experiment, 2, tmp_path / "here")
    assert {key: served[key] for key in ALIKE} == {key: here[key] for key in ALIKE}
    found, wanted = events_of(tmp_path / "served"), events_of(tmp_path / "here")
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours["bytes_backhaul"] == theirs["bytes_backhaul"]
        assert ours.get("periods") == theirs.get("periods")
        told = ("client", "edge", "examples", "steps", "loss", "flops", "bytes_up", "bytes_down")
        rows = [[{k: row[k] for k in told} for row in e["clients"]] for e in (ours, theirs)]
        assert rows[0] == rows[1]
    assert "joules" not in found[0]["clients"][0]


def _lossy():
    """Devices remember what was lost of their changes: a round that is done again begins there."""
    return _experiment(
        method=HierFAVG(local_steps=2, edge_rounds=2),
        compression=CompressionSettings(deltas="int8", error_feedback=True),
        rounds=4,
    )


class Cut(Exception):
    pass


def test_a_cloud_that_is_cut_off_goes_on_with_the_same_bits(tmp_path):
    """Edges have done a round that the cloud never saved; their devices train nothing again."""
    experiment, tree = _lossy(), TreeAtHand(folder=tmp_path)
    here = simulated(experiment, 2, tmp_path / "here")

    def listen(event):
        if event["kind"] == "round" and event["round"] == 3:
            raise Cut  # before the checkpoint of the round

    folder = tree.begin(experiment)
    with pytest.raises(Cut):
        serve_over(tree.post, folder, listen, at_once)
    trained = tree.orders("work")
    assert trained == 3 * 2 * 4
    summary = serve_over(tree.post, folder, watch=at_once)
    assert summary["state_sha256"] == here["state_sha256"]
    assert tree.orders("work") == 4 * 2 * 4


def test_an_edge_that_starts_anew_goes_on_from_its_disk(tmp_path):
    experiment, tree = _lossy(), TreeAtHand(folder=tmp_path)
    here = simulated(experiment, 2, tmp_path / "here")

    def listen(event):
        if event["kind"] == "round" and event["round"] == 2:
            tree.restart(201)

    summary = serve_over(tree.post, tree.begin(experiment), listen, at_once)
    assert summary["state_sha256"] == here["state_sha256"]
    assert not any(event["failures"] for event in events_of(tmp_path / "served"))


def test_all_are_killed_in_the_middle_of_a_round_and_go_on_with_the_same_bits(tmp_path):
    """Of round 2 one edge is done; of the other one device is done, and one with half of it."""
    experiment, tree = _lossy(), TreeAtHand(folder=tmp_path)
    here = simulated(experiment, 2, tmp_path / "here")
    asked = []

    def killed(node, order):
        if order.kind == "work":
            asked.append(node)
            if len(asked) == 8:  # the last of the second average
                raise Cut
        return None

    tree.posts[201].loss = killed
    folder = tree.begin(experiment)
    with pytest.raises(Cut):
        serve_over(tree.post, folder, watch=at_once)
    tree.posts[201].waiting.clear()
    for node in (200, 201):
        tree.posts[node].residents = {
            there: replace_resident(resident)
            for there, resident in tree.posts[node].residents.items()
        }
        tree.restart(node)
    summary = serve_over(tree.post, folder, watch=at_once)
    assert summary["state_sha256"] == here["state_sha256"]


def replace_resident(resident):
    """Another process of a device, with what its disk has."""
    return Resident(name=resident.name, folder=resident.folder, local=resident.local)


def test_who_is_away_is_named(tmp_path):
    """In round 2 an edge is away, in round 3 all devices of one, in round 4 a device crashes."""
    experiment, tree = _experiment(rounds=4), TreeAtHand(folder=tmp_path)
    left = ["crashed"]

    def crashes(node, order):
        if order.kind == "work" and node == 100 and tree.rounds == 3 and left:
            return Undelivered(left.pop(), "as a test wants it")
        return None

    def listen(event):
        if event["kind"] == "round":
            tree.rounds = event["round"]
            tree.post.away = {201} if event["round"] == 1 else set()
            tree.posts[201].away = {102, 103} if event["round"] == 2 else set()

    tree.posts[200].loss = crashes
    serve_over(tree.post, tree.begin(experiment), listen, at_once)
    told = [
        [(f["client"], f["edge"], f["reason"], f["text"]) for f in event["failures"]]
        for event in events_of(tmp_path / "served")
    ]
    away = "edge 'edge-1': it is not connected"
    assert told == [
        [],
        [(2, "edge-1", "offline", away), (3, "edge-1", "offline", away)],
        [(n, "edge-1", "offline", "it is not connected") for n in (2, 3)],
        [(0, "edge-0", "crashed", "as a test wants it")],
    ]


def test_periods_that_follow_from_measured_time_can_be_played_again(tmp_path):
    """What a schedule sees is measured; given what it chose, `tessera run` has its bits."""
    for number, method in enumerate((EqualFinish(local_steps=2, most_rounds=3), Tomtit())):
        experiment, tree = _experiment(method=method), TreeAtHand(folder=tmp_path / str(number))
        slow = {"resident": tree.posts[200].residents[100]}

        class Slow:
            name = slow["resident"].name

            def answer(self, envelope, slow=slow):
                time.sleep(0.02)
                return slow["resident"].answer(envelope)

        tree.posts[200].residents[100] = Slow()
        folder = tree.begin(experiment)
        served = serve_over(tree.post, folder, watch=at_once)
        here = simulated(experiment, 2, tree.folder / "here", folder)
        assert served["state_sha256"] == here["state_sha256"]
        last = events_of(folder)[-1]["periods"]
        assert last.keys() == {"edge-0", "edge-1"}
        assert all(steps > 0 for each in last.values() for steps in each["steps"].values())


def test_an_edge_that_sends_rubbish_costs_its_devices_the_round(tmp_path):
    experiment, tree = _experiment(), TreeAtHand(folder=tmp_path)
    honest = tree.post.residents[201]

    class Liar:
        name = honest.name

        def answer(self, envelope):
            reply = reply_of(honest.answer(envelope))
            if reply.kind != "answer":
                return sealed(reply)
            letter = letter_of(reply.letter)
            spool = Spool(folder=honest.folder / order_of(envelope).run)
            header, groups = read_letter(letter, spool.answered)
            sums = {name: tensor + (1 << 61) for name, tensor in groups["sums"].items()}
            out = Outgoing(parts=(header, {"sums": sums}))
            found = {note.sha256: out.parcel(n) for n, note in enumerate(out.letter.parcels)}
            return sealed(Answer(letter=out.letter.model_dump(), seconds=0.1), found)

    tree.post.residents[201] = Liar()
    serve_over(tree.post, tree.begin(experiment), watch=at_once)
    for event in events_of(tmp_path / "served"):
        assert [row["client"] for row in event["clients"]] == [0, 1]
        assert [f["client"] for f in event["failures"]] == [2, 3]
        assert all("larger than what its devices" in f["text"] for f in event["failures"])


def _table(folder, classes, number):
    folder.mkdir(parents=True)
    images = [
        [[(7 * row + 3 * n) % 50 for _ in range(4)] for row in range(4)] for n in range(number)
    ]
    labels = [classes[n % len(classes)] for n in range(number)]
    parquet.write_table(pa.table({"image": images, "label": labels}), folder / "train.parquet")
    return folder


def test_devices_of_edges_may_have_data_of_their_own(tmp_path):
    """Edges that average once hand on: the bits of a star of the same devices."""
    experiment = _experiment(
        data=DataSettings(path=_table(tmp_path / "server", ["ant", "bee"], 24), partition="iid"),
        method=FedBRB(ratio=(0.25, 0.5)),
    )

    def devices(folder, names):
        return {
            100 + number: Resident(
                name=name,
                folder=folder / name,
                local=Local(data=tmp_path / "data" / name, device="cpu"),
            )
            for number, name in enumerate(names)
        }

    for number, name in enumerate("abcd"):
        _table(tmp_path / "data" / name, ["ant", "bee"][: 1 + number % 2], 8 + 2 * number)
    deployment = Deployment(devices=4, own_data=True)
    begin(experiment, deployment, tmp_path / "star")
    post = PostAtHand(residents=devices(tmp_path / "below the star", "abcd"))
    wanted = serve_over(post, tmp_path / "star", watch=at_once)
    tree = TreeAtHand(folder=tmp_path / "tree")
    for node, names in zip((200, 201), ("ba", "dc"), strict=True):
        tree.posts[node].residents = devices(tmp_path / "tree", names)

    def listen(event):
        if event["kind"] == "round" and event["round"] == 1:
            tree.restart(201)

    folder = tree.begin(experiment, own_data=True)
    found = serve_over(tree.post, folder, listen, at_once)
    assert {key: found[key] for key in ALIKE} == {key: wanted[key] for key in ALIKE}
    assert not any(event["failures"] for event in events_of(folder))
    seats = json.loads((folder / "devices.json").read_text())
    told = [(d["name"], d["client"]) for seat in seats.values() for d in seat["devices"]]
    assert told == [("a", 0), ("b", 1), ("c", 2), ("d", 3)]


def test_no_schedule_falls_over_what_an_edge_says_it_took():
    """Nothing that an edge sends may end a run: measures stay such that one can divide by them."""
    clients = tuple(Client(id=number, num_examples=10) for number in range(4))
    rows = [
        {"client": 0, "steps": 0},
        {"client": 1, "seconds": 5e-324, "change": 5e-324},
        {"client": 2, "seconds": 1e308, "link_seconds": 1e308, "change": 1e308},
        {"client": 3},
    ]
    plain = {"round": 0, "examples": 10, "steps": 4, "trained_entries": 1, "entries": 1}
    plain |= {"flops": 1.0, "seconds": 2.0, "link_seconds": 1.0, "bytes_up": 1, "bytes_down": 1}
    plain |= {"change": 1.0, "sketch": [], "part": 0, "metrics": {}}
    header = {"handed": {}, "failures": [], "parts": [], "sketch": [], "late": [], "heard": []}
    swept = Swept.model_validate({**header, "rows": [{**plain, **row} for row in rows]})
    for seconds in (0.0, 5e-324, 3.0, 1e308):
        report = measured(swept, 2, seconds, 4.0)
        assert [device.client for device in report.devices] == [1, 2, 3]
        assert max(each.compute_seconds for each in report.devices) == 4.0
        situation = Situation(
            round=1,
            seconds=8.0,
            horizon=None,
            accuracy=0.5,
            edges={"a": clients},
            reports={"a": report},
        )
        for method in (EqualFinish(), Tomtit()):
            state = State(params={}, seed=0, rounds=3)
            periods = method.periods(None, state, situation)
            assert all(steps >= 1 for steps in periods["a"].steps.values())


def test_who_is_no_edge_has_no_seat(tmp_path):
    experiment, tree = _experiment(rounds=1), TreeAtHand(folder=tmp_path, sizes=(2, 1))
    device = parts(tmp_path / "device", (3,))[103]
    double = TreeAtHand(folder=tmp_path / "double", sizes=(1,)).edge(200)
    double.name = "double"
    tree.post.residents |= {103: device, 300: double}
    tree.post.at_once = 9
    folder = tree.begin(experiment)
    serve_over(tree.post, folder, watch=at_once)
    told = dict(
        json.loads(line).values() for line in (folder / "guests.jsonl").read_text().splitlines()
    )
    assert told["edge-1"] == "has joined as an edge, with device-2"
    assert "client 0 is below edge 'edge-0' and below 'double'" in told["double"]
    assert [(f["client"], f["text"]) for f in events_of(folder)[0]["failures"]] == [
        (3, "no edge serves it")
    ]
    star = TreeAtHand(folder=tmp_path / "star", sizes=(1,))
    begin(_experiment(method=FedAvg(), rounds=1), Deployment(devices=1), tmp_path / "plain")
    waits = []

    def watch(remote):
        at_once(remote)
        waits.append(remote)

    with pytest.raises(ConfigError, match="no device has joined"):
        serve_over(star.post, tmp_path / "plain", watch=watch)
    assert list(waits[0].refused.values()) == [
        "'edge-0' is an edge, and this server is for devices"
    ]


def test_what_a_tree_elsewhere_cannot_do_is_refused(tmp_path):
    star = _experiment(network=NetworkSettings(topology="star"))
    with pytest.raises(ConfigError, match=r"a tree, and network\.topology is 'star'"):
        begin(star, Deployment(devices=4, edges=2), tmp_path / "r")
    with pytest.raises(ConfigError, match="say with --edges how many join"):
        begin(_experiment(), Deployment(devices=4), tmp_path / "r")
    assert not (tmp_path / "r").exists()
    with pytest.raises(ConfigError, match="on a tree needs edges"):
        runner.start(_experiment(network=NetworkSettings(topology="tree")), tmp_path / "r")
