"""Edges that do not wait for all of their devices: as the same tree in virtual time."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field, replace

import edges_at_hand
import pytest
from devices_at_hand import PostAtHand, prepare_once
from edges_at_hand import TreeAtHand, at_once, events_of

from tesserafl.core.errors import ConfigError
from tesserafl.data import DataSettings
from tesserafl.engines.clock import ClockSettings
from tesserafl.engines.compression import CompressionSettings
from tesserafl.engines.device import INSTANT, Device, Placed
from tesserafl.engines.fleet import Edge, Fleet, FleetSettings
from tesserafl.engines.incoming import read_letter
from tesserafl.engines.orders import Answer, order_of, reply_of, sealed
from tesserafl.engines.parcels import Outgoing, letter_of
from tesserafl.methods import FedBRB, FedNova, HierFAVG
from tesserafl.models import MLP
from tesserafl.run import deployed, runner
from tesserafl.run.begin import first_federation
from tesserafl.run.deployed import serve_over
from tesserafl.run.experiment import EngineSettings, Experiment, to_json
from tesserafl.run.files import write_json
from tesserafl.run.live import Waiting
from tesserafl.run.player import Clocked
from tesserafl.run.resident import Resident
from tesserafl.run.runner import play
from tesserafl.run.setup import make_engine
from tesserafl.run.spool import Spool
from tesserafl.run.tree import Tree

ALIKE = ("state_sha256", "accuracy", "loss", "bytes_up", "bytes_down", "coverage", "flops")


@pytest.fixture(autouse=True)
def _prepared_once(monkeypatch):
    prepare_once(monkeypatch)
    for module in (runner, edges_at_hand):
        monkeypatch.setattr(module, "prepare", deployed.prepare)
    for name in ("write_report", "export_model"):  # others test these
        monkeypatch.setattr(runner, name, lambda *_: None)


@dataclass(kw_only=True)
class Slow(PostAtHand):
    """What some nodes answer to orders of some kinds comes when they are let go."""

    held: set[int] = field(default_factory=set)
    kinds: tuple[str, ...] = ("work",)

    def pull(self, names):
        def comes(name):
            node, envelope = self.waiting[name]
            return node not in self.held or order_of(envelope).kind not in self.kinds

        return super().pull([name for name in names if comes(name)])


@dataclass(kw_only=True)
class SlowTree(TreeAtHand):
    """A tree whose devices may be late."""

    def __post_init__(self):
        super().__post_init__()
        for node, post in self.posts.items():
            self.posts[node] = Slow(residents=post.residents)
            self.restart(node)

    def hold(self, *devices):
        """These are slow from now on, and no others."""
        for post in self.posts.values():
            post.held = set(devices)


def _experiment(**changes):
    settings = {
        "data": DataSettings(num_clients=4, max_train=120, max_test=50, partition="iid"),
        "model": MLP(hidden=(16, 16)),
        "method": HierFAVG(),
        "engine": EngineSettings(batching="sequential"),
        "rounds": 4,
        "clients_per_round": 4,
    }
    return Experiment(**(settings | changes))


def simulated(experiment, folder, clock):
    """The same tree in virtual time, whose device 3 takes 2.6 times as long as the others."""
    fleet = FleetSettings(profiles=("phone",), edges=2)
    setup = deployed.prepare(replace(experiment, fleet=fleet, clock=clock))
    folder.mkdir(parents=True)
    write_json(folder / "config.json", to_json(setup.experiment))
    speeds = [1.0, 1.0, 1.0, 1.0 / 2.6]
    devices = [Placed(device=Device(gflops=speed), id=n, seed=0) for n, speed in enumerate(speeds)]
    edges = [Edge(name=f"edge-{n}", link=INSTANT) for n in range(2)]
    homes = ("edge-0", "edge-0", "edge-1", "edge-1")

    def player(setup, engine, federation, costs):
        tree = Tree(
            setup=setup,
            engine=engine,
            federation=federation,
            fleet=Fleet(devices=tuple(devices), edges=tuple(edges), homes=homes),
            costs=costs,
            schedule=getattr(experiment.method, "periods", None),
        )
        return Clocked(timed=tree)

    return play(setup, first_federation(setup), folder, make_engine(setup), None, player)


def _rows(folder):
    return [
        [(row["client"], row["edge"], row["staleness"]) for row in event["clients"]]
        for event in events_of(folder)
    ]


SEMI = ClockSettings(mode="semi-synchronous", quorum=0.5)


@pytest.mark.parametrize(
    ("method", "freed"),
    [
        (HierFAVG(), {2}),
        (FedNova(), {2}),
        (FedBRB(ratio=(0.5,)), {2}),
        (HierFAVG(local_steps=2, edge_rounds=2), {1, 3}),
        (HierFAVG(local_steps=2, edge_rounds=2, normalised=True), {1, 3}),
    ],
    ids=["once", "fednova", "fedbrb", "several", "normalised"],
)
def test_a_late_answer_counts_as_in_virtual_time(tmp_path, method, freed):
    """Device 3 takes 2.6 times as long: its answer is banked, and it is asked and late again.

    Here it is let go after those rounds.
    """
    experiment, tree = _experiment(method=method), SlowTree(folder=tmp_path)
    here = simulated(experiment, tmp_path / "here", SEMI)
    tree.hold(103)

    def listen(event):
        if event["kind"] == "round":
            tree.hold(*([] if event["round"] in freed else [103]))

    folder = tree.begin(experiment, waiting=Waiting(quorum=0.5))
    served = serve_over(tree.post, folder, listen, at_once)
    assert _rows(folder) == _rows(tmp_path / "here")
    late = [(c, stale) for row in _rows(folder) for c, _, stale in row if stale]
    assert {client for client, _ in late} == {3} and len(late) == len(freed)
    assert {key: served[key] for key in ALIKE} == {key: here[key] for key in ALIKE}


def test_who_is_late_may_be_refused(tmp_path):
    """It has done its work all the same: when it is asked again it begins with what it kept."""
    experiment, tree = _experiment(), SlowTree(folder=tmp_path)
    clock = replace(SEMI, late="refuse")
    here = simulated(experiment, tmp_path / "here", clock)
    tree.hold(103)

    def listen(event):
        if event["kind"] == "round":
            tree.hold(*([] if event["round"] == 2 else [103]))

    folder = tree.begin(experiment, waiting=Waiting(quorum=0.5, late="refuse"))
    served = serve_over(tree.post, folder, listen, at_once)
    assert served["state_sha256"] == here["state_sha256"]
    told = [
        [(f["client"], f["reason"], f["edge"]) for f in e["failures"]] for e in events_of(folder)
    ]
    assert told == [[], [], [(3, "expired", "edge-1")], []]
    orders = [order_of(sent) for node, sent in tree.posts[201].waiting.values() if node == 103]
    assert [order.remembers for order in orders if order.kind == "work"] == [0]


def test_an_edge_whose_devices_all_miss_the_deadline_hands_on_nothing(tmp_path):
    """The round counts without it; its devices count when they answer."""
    experiment, tree = _experiment(), SlowTree(folder=tmp_path)
    tree.hold(102, 103)

    def listen(event):
        if event["kind"] == "round" and event["round"] == 2:
            tree.hold(103)

    folder = tree.begin(experiment, waiting=Waiting(round_seconds=40.0))
    serve_over(tree.post, folder, listen, at_once)
    rows = [[(c, stale) for c, _, stale in row] for row in _rows(folder)]
    assert rows[:3] == [[(0, 0), (1, 0)], [(0, 0), (1, 0)], [(0, 0), (1, 0), (2, 2)]]
    assert rows[3][:3] == [(0, 0), (1, 0), (2, 0)]
    assert not any(event["failures"] for event in events_of(folder))


def test_an_edge_that_misses_the_deadline_itself_costs_its_devices_the_round(tmp_path):
    tree = SlowTree(folder=tmp_path)
    tree.post = Slow(residents=tree.post.residents, kinds=("sweep",))

    def listen(event):
        if event["kind"] == "round":
            tree.post.held = {201} if event["round"] == 1 else set()

    folder = tree.begin(_experiment(), waiting=Waiting(round_seconds=40.0))
    serve_over(tree.post, folder, listen, at_once)
    rounds = events_of(folder)
    assert [[row["client"] for row in event["clients"]] for event in rounds] == [
        [0, 1, 2, 3],
        [0, 1],
        [0, 1, 2, 3],
        [0, 1, 2, 3],
    ]
    assert [(f["client"], f["reason"], f["text"]) for f in rounds[1]["failures"]] == [
        (client, "expired", "edge 'edge-1': no answer within 70 s") for client in (2, 3)
    ]


class Cut(Exception):
    pass


@pytest.mark.parametrize("method", [HierFAVG(), FedNova()], ids=["summed", "passed"])
def test_a_cloud_that_is_cut_off_still_knows_who_is_late(tmp_path, method):
    experiment, tree = _experiment(method=method), SlowTree(folder=tmp_path)
    here = simulated(experiment, tmp_path / "here", SEMI)
    tree.hold(103)

    def listen(event):
        if event["kind"] == "round" and event["round"] == 2:
            raise Cut  # before its checkpoint

    def listen_again(event):
        if event["kind"] == "round":
            tree.hold(*([] if event["round"] == 2 else [103]))

    folder = tree.begin(experiment, waiting=Waiting(quorum=0.5))
    with pytest.raises(Cut):
        serve_over(tree.post, folder, listen, at_once)
    served = serve_over(tree.post, folder, listen_again, at_once)
    assert _rows(folder) == _rows(tmp_path / "here")
    assert served["state_sha256"] == here["state_sha256"]


@pytest.mark.parametrize(
    ("method", "freed"),
    [(HierFAVG(), {2}), (HierFAVG(local_steps=2, edge_rounds=2), {1, 3})],
    ids=["once", "several"],
)
def test_an_edge_that_starts_anew_asks_late_devices_again(tmp_path, monkeypatch, method, freed):
    """They have their answers on their disks, and train nothing twice."""
    compression = CompressionSettings(deltas="int8", error_feedback=True)  # devices remember
    experiment = _experiment(method=method, compression=compression)
    tree, trained, train = SlowTree(folder=tmp_path), [], Resident._train
    here = simulated(experiment, tmp_path / "here", SEMI)
    tree.hold(103)

    def counted(self, *given):
        trained.append(self.name)
        train(self, *given)

    monkeypatch.setattr(Resident, "_train", counted)

    def listen(event):
        if event["kind"] == "round":
            tree.hold(*([] if event["round"] in freed else [103]))
            post = tree.posts[201]
            for name in [name for name, (node, _) in post.waiting.items() if node == 103]:
                # It does its work, and nobody hears of it.
                post.residents[103].answer(post.waiting.pop(name)[1])
            tree.restart(201)

    folder = tree.begin(experiment, waiting=Waiting(quorum=0.5))
    served = serve_over(tree.post, folder, listen, at_once)
    assert _rows(folder) == _rows(tmp_path / "here")
    assert served["state_sha256"] == here["state_sha256"]
    assert not any(event["failures"] for event in events_of(folder))
    assert trained.count("device-3") == 2


def test_late_work_that_is_lost_is_named_and_asked_anew(tmp_path):
    tree = SlowTree(folder=tmp_path)
    tree.hold(103)

    def listen(event):
        if event["kind"] == "round" and event["round"] == 1:
            shutil.rmtree(next((tmp_path / "edge-1").glob("*/late")))
            tree.restart(201)
        if event["kind"] == "round" and event["round"] == 2:
            tree.hold()

    folder = tree.begin(_experiment(), waiting=Waiting(quorum=0.5))
    serve_over(tree.post, folder, listen, at_once)
    told = [[(f["client"], f["reason"]) for f in e["failures"]] for e in events_of(folder)]
    assert told == [[], [(3, "crashed")], [], []]
    assert (3, "edge-1", 0) in _rows(folder)[2]


def test_an_edge_that_was_to_wait_for_all_has_no_late_devices(tmp_path):
    tree = SlowTree(folder=tmp_path)
    honest = tree.post.residents[201]

    class Liar:
        name = honest.name

        def answer(self, envelope):
            reply = reply_of(honest.answer(envelope))
            if reply.kind != "answer":
                return sealed(reply)
            spool = Spool(folder=honest.folder / order_of(envelope).run)
            header, groups = read_letter(letter_of(reply.letter), spool.answered)
            out = Outgoing(parts=({**header, "late": [3]}, groups))
            found = {note.sha256: out.parcel(n) for n, note in enumerate(out.letter.parcels)}
            return sealed(Answer(letter=out.letter.model_dump(), seconds=0.1), found)

    tree.post.residents[201] = Liar()
    folder = tree.begin(_experiment(rounds=1))
    serve_over(tree.post, folder, watch=at_once)
    (event,) = events_of(folder)
    assert [row["client"] for row in event["clients"]] == [0, 1]
    assert [f["client"] for f in event["failures"]] == [2, 3]
    assert "was to wait for all its devices" in event["failures"][0]["text"]


def test_an_edge_asks_more_devices_than_it_needs(tmp_path):
    experiment = _experiment(clients_per_round=2, rounds=3)
    tree = SlowTree(folder=tmp_path)
    folder = tree.begin(experiment, waiting=Waiting(over_selection=0.5))
    serve_over(tree.post, folder, watch=at_once)
    assert [event["answered"] for event in events_of(folder)] == [3, 3, 3]
    with pytest.raises(ConfigError, match="simulates devices that do not answer"):
        other = SlowTree(folder=tmp_path / "other")
        serve_over(
            other.post,
            other.begin(replace(experiment, dropout=0.1), waiting=Waiting(quorum=0.5)),
            watch=at_once,
        )
