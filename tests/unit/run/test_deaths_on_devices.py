"""Devices die, come back and lose their disks, replies come twice and the server is cut off: who
took part changes, and nothing else."""

from __future__ import annotations

import itertools
import json
import random
import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from devices_at_hand import PostAtHand, parts, prepare_once

from tesserafl.core.messages import Memory, Task
from tesserafl.data import DataSettings
from tesserafl.engines.attendance import Undelivered
from tesserafl.engines.compression import CompressionSettings
from tesserafl.engines.local import InProcess
from tesserafl.engines.orders import Envelope, Work, order_of
from tesserafl.engines.remote import Remote
from tesserafl.engines.seam import Failed, Outcome, Reason
from tesserafl.methods import FedBRB
from tesserafl.models import MLP
from tesserafl.run import checkpoint, resident, runner
from tesserafl.run.deployed import Deployment, begin, serve_over
from tesserafl.run.experiment import EngineSettings, Experiment, from_json
from tesserafl.run.files import read_json
from tesserafl.run.runner import first_federation, play
from tesserafl.run.setup import client_worker, prepare

CLIENTS, ROUNDS = range(6), 10
SHARE = 0.3
"""Of the devices that die in a round."""
DEATHS = ("before it began", "after the work", "for a while", "and its disk", "restarted")


class Cut(Exception):
    """The server was killed."""


def experiment() -> Experiment:
    """Devices keep what compression lost of their changes, so a memory that is lost tells."""
    return Experiment(
        data=DataSettings(num_clients=len(CLIENTS), max_train=120, max_test=40),
        model=MLP(hidden=(16, 16)),
        method=FedBRB(ratio=(0.25, 0.5)),
        compression=CompressionSettings(deltas="int8"),
        engine=EngineSettings(batching="sequential"),
        rounds=ROUNDS,
        clients_per_round=len(CLIENTS),
        evaluate_every=ROUNDS,
        checkpoint_every=3,
    )


@dataclass(kw_only=True)
class Storm:
    """A post over devices of which some die in every round, once each."""

    post: PostAtHand
    disks: Path
    draw: random.Random
    cuts: set[int]
    """The calls at which the server is killed."""
    calls: int = 0
    died: list[str] = field(default_factory=list)
    emptied: set[int] = field(default_factory=set)
    """Clients whose disks were lost."""
    _asked: set[tuple[int, int]] = field(default_factory=set)
    """(round, node) whose fate was drawn."""
    _back: dict[int, int] = field(default_factory=dict)
    """Node that is away -> the round in which it is back."""
    _again: list[tuple[str, Envelope | Undelivered]] = field(default_factory=list)
    """Replies that came already."""

    def nodes(self) -> Mapping[int, str]:
        self._call()
        return self.post.nodes()

    def push(self, node: int, envelope: Envelope, seconds: float) -> str:
        self._call()
        return self.post.push(node, envelope, seconds)

    def pull(self, names: Collection[str]) -> list[tuple[str, Envelope | Undelivered]]:
        self._call()
        names = self.draw.sample(sorted(names), k=min(2, len(names)))
        found = [
            (name, self._die(*self.post.waiting.pop(name)))
            for name in names
            if name in self.post.waiting
        ]
        self._again += found
        if self._again and self.draw.random() < 0.5:
            found.append(self.draw.choice(self._again))
        self.draw.shuffle(found)
        return found

    def begin(self, round: int) -> None:
        """Some come back."""
        for node in [node for node, back in self._back.items() if back <= round]:
            self.post.away.discard(node)
            del self._back[node]

    def _call(self) -> None:
        self.calls += 1
        if self.calls in self.cuts:
            for name in sorted(self.post.waiting):  # some devices do what nobody waits for
                asked = self.post.waiting.pop(name)
                if self.draw.random() < 0.5:
                    self._die(*asked)
            raise Cut

    def _die(self, node: int, envelope: Envelope) -> Envelope | Undelivered:
        order = order_of(envelope)
        if node in self.post.away:
            return Undelivered("offline", "it is away")
        if not isinstance(order, Work):
            return self.post.deliver(node, envelope)
        round = order.letter["header"]["round"]
        if (round, node) in self._asked or self.draw.random() >= SHARE:
            self._asked.add((round, node))
            return self.post.deliver(node, envelope)
        self._asked.add((round, node))
        how = self.draw.choice(DEATHS)
        self.died.append(how)
        if how == "for a while":
            self.post.away.add(node)
            self._back[node] = round + 2
            return Undelivered("offline", "it is gone")
        if how == "after the work":
            self.post.deliver(node, envelope)
        if how == "and its disk":
            shutil.rmtree(self.disks / f"device-{node - 100}")
            self.emptied.add(node - 100)
        self.post.residents.update(parts(self.disks, [node - 100]))
        if how in ("before it began", "after the work"):
            return Undelivered("crashed", "it was killed")
        return self.post.deliver(node, envelope)


@dataclass(kw_only=True)
class Same:
    """In this process, whose clients are lost and forget as others did."""

    engine: InProcess
    lost: Mapping[tuple[int, int], Reason]
    forgot: Collection[tuple[int, int]]
    capacity: int = 1
    group: int = 1
    _failed: list[Outcome] = field(default_factory=list)

    @property
    def memories(self) -> Mapping[int, Memory]:
        return self.engine.memories

    def restore(self, memories: Mapping[int, Memory]) -> None:
        raise AssertionError("it is not cut off")

    def submit(self, tasks: Sequence[Task]) -> None:
        (task,) = tasks
        key = (task.round, task.client.id)
        if key in self.lost:
            failed = Failed(client=task.client.id, reason=self.lost[key], text="as there")
            self._failed.append(failed)
            return
        if key in self.forgot:
            self.engine.memories.pop(task.client.id)
        self.engine.submit(tasks)

    def poll(self) -> list[Outcome]:
        found, self._failed = self._failed, []
        return found or self.engine.poll()

    def close(self) -> None:
        pass


@pytest.mark.parametrize("seed", [1, *(pytest.param(n, marks=pytest.mark.slow) for n in (2, 3))])
def test_whoever_dies_only_does_not_take_part(tmp_path, monkeypatch, seed):
    prepare_once(monkeypatch)
    monkeypatch.setattr(runner, "write_report", lambda *_: None)
    forgot: set[tuple[int, int]] = set()
    recalled = resident._recalled

    def noted(order, spool):
        key = (order.letter["header"]["round"], order.client)
        lost = spool.recall(order.remembers) is None
        (forgot.add if lost else forgot.discard)(key)
        return recalled(order, spool)

    monkeypatch.setattr(resident, "_recalled", noted)
    folder, disks = tmp_path / "served", tmp_path / "disks"
    begin(experiment(), Deployment(devices=len(CLIENTS), message_bytes=4000), folder)
    draw, halves = random.Random(seed), []
    post = PostAtHand(residents=parts(disks, CLIENTS))
    cuts = {draw.randrange(40, 80), draw.randrange(100, 140)}
    storm = Storm(post=post, disks=disks, draw=draw, cuts=cuts)

    def listen(event):
        if event["kind"] == "round":
            storm.begin(event["round"])
            if event["round"] == 4:
                halves.append(checkpoint.latest(folder / "checkpoints").coverage)

    def hurry(remote: Remote) -> None:
        ticks = itertools.count()
        remote.clock, remote.pause = lambda: 0.2 * next(ticks), lambda _: None

    killed = 0
    while True:
        try:
            summary = serve_over(storm, folder, listen, hurry)
            break
        except Cut:
            killed += 1
    assert killed == 2 and set(storm.died) == set(DEATHS), (killed, storm.calls, storm.died)
    # Nobody failed for another reason, and somebody for each.
    lines = map(json.loads, (folder / "events.jsonl").read_text().splitlines())
    lost = {
        (event["round"] - 1, failure["client"]): failure["reason"]
        for event in lines
        if event["kind"] == "round"
        for failure in event["failures"]
    }
    assert set(lost.values()) == {"offline", "crashed"} and len(lost) >= 5
    # Nobody else forgot anything.
    assert {client for _, client in forgot} <= storm.emptied < set(CLIENTS)
    # Every parameter keeps being trained, also after the third round.
    whole = checkpoint.latest(folder / "checkpoints").coverage
    assert summary["coverage"] == 1.0
    assert all(torch.all(whole[name] > half) for name, half in halves[-1].items())
    # The same participants in this process.
    setup = prepare(from_json(read_json(folder / "config.json")))
    engine = Same(engine=InProcess(worker=client_worker(setup)), lost=lost, forgot=forgot)
    (tmp_path / "same").mkdir()
    same = play(setup, first_federation(setup), tmp_path / "same", engine)
    assert same["state_sha256"] == summary["state_sha256"]
    # What devices forget is told by the bits: with it the model is another one.
    if forgot - lost.keys():
        (tmp_path / "other").mkdir()
        engine = InProcess(worker=client_worker(setup))
        other = Same(engine=engine, lost=lost, forgot=())
        found = play(setup, first_federation(setup), tmp_path / "other", other)
        assert found["state_sha256"] != summary["state_sha256"]
