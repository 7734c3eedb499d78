"""A device that answers with whatever it likes: its own work is lost, and nothing else."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from devices_at_hand import PostAtHand, parts, prepare_once

from tesserafl.core.wire import Parts
from tesserafl.data import DataSettings
from tesserafl.engines import remote
from tesserafl.engines.incoming import read_letter
from tesserafl.engines.orders import (
    Answer,
    Envelope,
    Judged,
    Missing,
    Order,
    Parcels,
    Profile,
    Refusal,
    Stranger,
    order_of,
    reply_of,
    sealed,
)
from tesserafl.engines.parcels import Outgoing, letter_of
from tesserafl.methods import FedAvg
from tesserafl.models import MLP
from tesserafl.run import runner
from tesserafl.run.deployed import Deployment, begin, serve_over
from tesserafl.run.experiment import EngineSettings, Experiment
from tesserafl.run.resident import Resident

FOREIGN = "0" * 64
HOSTILE = 2

Attack = Callable[["Hostile", Order, Envelope], Envelope]
"""Who attacks, what it was asked, what an honest device answers -> what is answered instead."""


@dataclass(kw_only=True)
class Hostile:
    """Answers tasks honestly in its mind, and says another thing."""

    honest: Resident
    others: Mapping[int, Resident]
    attack: Attack
    draw: random.Random
    last: Envelope | None = None

    @property
    def name(self) -> str:
        return self.honest.name

    def answer(self, envelope: Envelope) -> Envelope:
        honest, order = self.honest.answer(envelope), order_of(envelope)
        if order.kind in ("hello", "bye"):
            return honest
        said = self.attack(self, order, honest)
        self.last = honest
        return said


def experiment() -> Experiment:
    return Experiment(
        data=DataSettings(num_clients=4, max_train=120, max_test=50),
        model=MLP(hidden=(16, 16)),
        method=FedAvg(),
        engine=EngineSettings(batching="sequential"),
        rounds=2,
        clients_per_round=4,
    )


@pytest.fixture(scope="module")
def quick() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        prepare_once(patch)
        patch.setattr(runner, "write_report", lambda *_: None)
        patch.setattr(remote, "_PAUSE", 0.0)
        yield


def served(post: PostAtHand, folder: Path, devices: int) -> tuple[str, list[Any]]:
    """The model's hash, and who failed in each round, why and with which text."""
    begin(experiment(), Deployment(devices=devices, message_bytes=3000), folder)
    summary = serve_over(post, folder)
    events = map(json.loads, (folder / "events.jsonl").read_text().splitlines())
    return summary["state_sha256"], [e["failures"] for e in events if e["kind"] == "round"]


@pytest.fixture(scope="module")
def without(quick: None, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The model's hash of a run in which the hostile device is not there."""
    folder = tmp_path_factory.mktemp("without")
    digest, failures = served(PostAtHand(residents=parts(folder, (0, 1, 3))), folder / "run", 3)
    assert [[f["reason"] for f in each] for each in failures] == [["offline"]] * 2
    return digest


def changed(
    honest: Envelope, change: Callable[[dict[str, Any]], object], **parcels: bytes
) -> Envelope:
    """An honest answer with another letter."""
    reply = reply_of(honest)
    if not isinstance(reply, Answer):
        return honest
    letter = json.loads(json.dumps(reply.letter))
    change(letter)
    return sealed(reply.model_copy(update={"letter": letter}), {**honest.parcels, **parcels})


def rewritten(honest: Envelope, hostile: Hostile, change: Callable[[Parts], Parts]) -> Envelope:
    """Another message, whose letter and parcels are right."""
    reply = reply_of(honest)
    if not isinstance(reply, Answer):
        return honest
    (answers,) = hostile.honest.folder.glob("*/answer")
    letter = letter_of(reply.letter)
    parts = change(read_letter(letter, lambda name: (answers / name).read_bytes()))
    outgoing = Outgoing(parts=parts, most_bytes=1 << 20)
    notes = outgoing.letter.parcels
    parcels = {note.sha256: outgoing.parcel(number) for number, note in enumerate(notes)}
    return sealed(Answer(letter=outgoing.letter.model_dump(), seconds=0.0), parcels)


def noise(hostile: Hostile, order: Order, honest: Envelope) -> Envelope:
    return Envelope(head=hostile.draw.randbytes(hostile.draw.randrange(400)))


def torn(hostile: Hostile, order: Order, honest: Envelope) -> Envelope:
    return Envelope(head=honest.head[: len(honest.head) // 2], parcels=honest.parcels)


def flipped(hostile: Hostile, order: Order, honest: Envelope) -> Envelope:
    parcels = {n: bytes([data[0] ^ 1]) + data[1:] for n, data in honest.parcels.items()}
    return Envelope(head=honest.head, parcels=parcels)


def unasked(hostile: Hostile, order: Order, honest: Envelope) -> Envelope:
    return sealed(Parcels(), {FOREIGN: b"x"})


def instead(hostile: Hostile, order: Order, honest: Envelope) -> Envelope:
    """Parcels, but others than those that were asked for."""
    return sealed(Parcels(), {FOREIGN: b"x"}) if order.kind == "fetch" else honest


def besides(hostile: Hostile, order: Order, honest: Envelope) -> Envelope:
    """What was asked for, and more, which nobody would read."""
    if not isinstance(reply_of(honest), Answer):
        return honest
    return Envelope(head=honest.head, parcels={**honest.parcels, FOREIGN: b"x"})


def smuggled(hostile: Hostile, order: Order, honest: Envelope) -> Envelope:
    return sealed(Missing(parcels=[]), {FOREIGN: b"x"})


def wordy(hostile: Hostile, order: Order, honest: Envelope) -> Envelope:
    """JSON that is many times as large when it is read."""
    return changed(honest, lambda v: v["header"].update(metrics=[[]] * (1 << 19)))


def huge(hostile: Hostile, order: Order, honest: Envelope) -> Envelope:
    """A terabyte in one tensor."""
    return changed(honest, lambda v: v["entries"][0].update(shape=[1 << 38]))


def endless(hostile: Hostile, order: Order, honest: Envelope) -> Envelope:
    """Parcels without end, which the server would keep until the letter is whole."""
    more = [{"sha256": f"{n:064x}", "bytes": 1 << 20} for n in range(100)]
    return changed(honest, lambda v: v["parcels"].extend(more))


def of_another(hostile: Hostile, order: Order, honest: Envelope) -> Envelope:
    """What another device was asked and answered."""
    if not isinstance(reply_of(honest), Answer):
        return honest
    (path,) = hostile.others[1].folder.glob("*/answer")
    kept = json.loads((path / "letter.json").read_text())
    notes = letter_of(kept["letter"]).parcels
    parcels = {note.sha256: (path / note.sha256).read_bytes() for note in notes}
    return sealed(Answer(letter=kept["letter"], seconds=0.0), parcels)


def for_another(hostile: Hostile, order: Order, honest: Envelope) -> Envelope:
    """Its own update in another's name."""
    return changed(honest, lambda v: v["header"].update(client=1))


def of_a_later_round(hostile: Hostile, order: Order, honest: Envelope) -> Envelope:
    return changed(honest, lambda v: v["header"].update(round=v["header"]["round"] + 1))


def memories(hostile: Hostile, order: Order, honest: Envelope) -> Envelope:
    def change(parts: Parts) -> Parts:
        header, groups = parts
        return header, {**groups, "memory": {"m": torch.zeros(3)}}

    return rewritten(honest, hostile, change)


def not_finite(hostile: Hostile, order: Order, honest: Envelope) -> Envelope:
    def change(parts: Parts) -> Parts:
        header, groups = parts
        delta = {name: tensor * float("nan") for name, tensor in groups["delta"].items()}
        return header, {**groups, "delta": delta}

    return rewritten(honest, hostile, change)


def too_many_examples(hostile: Hostile, order: Order, honest: Envelope) -> Envelope:
    return changed(honest, lambda v: v["header"].update(num_examples=1 << 40))


def forgetful(hostile: Hostile, order: Order, honest: Envelope) -> Envelope:
    return sealed(Stranger())


def losing(hostile: Hostile, order: Order, honest: Envelope) -> Envelope:
    """It lacks a parcel for ever."""
    if isinstance(reply_of(honest), Answer):
        return sealed(Missing(parcels=[order.letter["parcels"][0]["sha256"]]))
    return honest


def greedy(hostile: Hostile, order: Order, honest: Envelope) -> Envelope:
    return sealed(Missing(parcels=[FOREIGN]))


def judged(hostile: Hostile, order: Order, honest: Envelope) -> Envelope:
    return sealed(Judged(accuracy=1.0, share=None))


def refusing(hostile: Hostile, order: Order, honest: Envelope) -> Envelope:
    return sealed(Refusal(text="no"))


ATTACKS: dict[Attack, str] = {
    noise: "head is wrong",
    torn: "head is wrong",
    flipped: "send it again",
    unasked: "answers nothing",
    instead: "parcels of no answer",
    besides: "parcels of no answer",
    smuggled: "sent parcels with its",
    wordy: "a message's head has",
    huge: "claims",
    endless: "answer to its task has",
    of_another: "answered for client 1",
    for_another: "answered for client 1",
    of_a_later_round: "asked was client 2",
    memories: "memories stay on devices",
    not_finite: "finite",
    too_many_examples: "examples",
    forgetful: "forgets the run",
    losing: "keeps losing",
    greedy: "parcels of another task",
    judged: "answers nothing",
    refusing: "no",
}


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.__name__)
def test_an_attack_costs_who_attacks_its_round_and_nobody_else(
    tmp_path: Path, without: str, attack: Attack
) -> None:
    residents: dict[int, Any] = dict(parts(tmp_path / "devices", range(4)))
    others = {client: residents[100 + client] for client in range(4)}
    # Asked last, so that it knows what the others answered.
    residents[100 + HOSTILE] = Hostile(
        honest=others[HOSTILE], others=others, attack=attack, draw=random.Random(1)
    )
    digest, failures = served(PostAtHand(residents=residents), tmp_path / "run", 4)
    assert [[(f["client"], f["reason"]) for f in each] for each in failures] == [
        [(HOSTILE, "error")]
    ] * 2
    assert all(ATTACKS[attack] in each[0]["text"] for each in failures), failures
    assert digest == without


def test_an_answer_of_the_round_before_is_refused(tmp_path: Path, quick: None) -> None:
    """Honest in the first round, and then the same again."""

    def replay(hostile: Hostile, order: Order, honest: Envelope) -> Envelope:
        reply = reply_of(honest)
        if not isinstance(reply, Answer) or reply.letter["header"]["round"] == 0:
            return honest
        return hostile.first

    @dataclass(kw_only=True)
    class Replaying(Hostile):
        first: Envelope | None = None

        def answer(self, envelope: Envelope) -> Envelope:
            said = super().answer(envelope)
            if isinstance(reply_of(said), Answer) and self.first is None:
                self.first = said
            return said

    residents: dict[int, Any] = dict(parts(tmp_path / "devices", range(4)))
    residents[102] = Replaying(
        honest=residents[102], others={}, attack=replay, draw=random.Random(1)
    )
    _, failures = served(PostAtHand(residents=residents), tmp_path / "run", 4)
    assert [[(f["client"], f["reason"]) for f in each] for each in failures] == [
        [],
        [(2, "error")],
    ]


@pytest.mark.parametrize(
    ("claims", "text"),
    [
        ({"client": 1}, "client 1 is the device 'device-1'"),
        ({"client": 4}, "client 4 does not exist"),
        ({"client": None}, "--client"),
        ({"name": "device-3", "client": 3}, "is the device"),
        (None, "head is wrong"),
    ],
)
def test_a_device_that_claims_anothers_place_has_none(
    tmp_path: Path, without: str, claims: dict[str, Any] | None, text: str
) -> None:
    """Its key, or who came first, tells whose place it is."""
    residents: dict[int, Any] = dict(parts(tmp_path / "devices", range(4)))

    @dataclass(kw_only=True)
    class Claiming:
        honest: Resident
        name: str = "device-2"
        """For which its key vouches."""

        def answer(self, envelope: Envelope) -> Envelope:
            reply = reply_of(self.honest.answer(envelope))
            if isinstance(reply, Profile):
                if claims is None:
                    return Envelope(head=b"\xff\x00")
                return sealed(reply.model_copy(update=claims))
            return sealed(reply)

    residents[102] = Claiming(honest=residents[102])
    folder, refused = tmp_path / "run", {}
    begin(experiment(), Deployment(devices=3, message_bytes=3000), folder)

    def watch(engine: remote.Remote) -> None:
        refused["by"] = engine.refused

    summary = serve_over(PostAtHand(residents=residents), folder, watch=watch)
    assert summary["state_sha256"] == without
    if claims is None or claims.get("name") != "device-3":
        assert text in refused["by"][102]
    else:
        assert "its key is 'device-2'" in refused["by"][102]


def test_noise_to_a_device_is_refused_and_it_lives_on(tmp_path: Path) -> None:
    """The other way round: what a hostile server says."""
    (resident,) = parts(tmp_path, [0]).values()
    draw = random.Random(3)
    for _ in range(200):
        envelope = Envelope(head=draw.randbytes(draw.randrange(60)), parcels={FOREIGN: b"x"})
        reply = reply_of(resident.answer(envelope))
        assert isinstance(reply, Refusal)
    assert not list(tmp_path.glob("**/parcels/*"))
