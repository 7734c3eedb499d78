"""The way of an order to a peer: its letters come whole, or the device is given up."""

from __future__ import annotations

import pytest
import torch

from tesserafl.core.errors import MessageError
from tesserafl.engines.orders import Missing, Parcels, Refusal, Stranger, order_of, sealed
from tesserafl.engines.parcels import Outgoing
from tesserafl.engines.questions import Question
from tesserafl.engines.turns import Addressed, Turn, Turned

RUN = "b" * 32
OUT = Outgoing(parts=({}, {"change": {"part": torch.arange(100.0)}}), most_bytes=150)
PARCELS = {note.sha256: OUT.parcel(i) for i, note in enumerate(OUT.letter.parcels)}
TURN = Turn(run=RUN, client=1, roster=[], round=0, most_bytes=150)
TURNED = Turned(
    round=0,
    row=None,
    part=None,
    letters=[Addressed(receivers=[0], letter=OUT.letter.model_dump())],
)


def asked(**given):
    kept = {}
    question = Question(
        run=RUN,
        client=1,
        order=TURN,
        most_bytes=150,
        largest=10_000,
        kept=kept.__contains__,
        keep=lambda note, data: kept.update({note.sha256: data}),
        **given,
    )
    assert kinds(question.begin()) == ["turn"]
    return question, kept


def kinds(step):
    return [order_of(envelope).kind for envelope in step.send]


def test_letters_that_did_not_come_with_the_answer_are_fetched_and_kept():
    question, kept = asked()
    (first, *others) = PARCELS
    step = question.replied(sealed(TURNED, {first: PARCELS[first]}))
    assert [order_of(envelope).parcels for envelope in step.send] == [[name] for name in others]
    for number, name in enumerate(others):
        step = question.replied(sealed(Parcels(), {name: PARCELS[name]}))
        assert (step.result is None) == (number + 1 < len(others))
    assert step.result == TURNED and kept == PARCELS


@pytest.mark.parametrize(
    ("reply", "sends", "text"),
    [
        (Stranger(), [], "forgets the run"),
        (Missing(parcels=["0" * 64]), None, "keeps losing parcels"),
        (TURNED, ["fetch"] * len(PARCELS), "do not come"),
    ],
    ids=["stranger", "missing", "letters"],
)
def test_what_is_said_again_and_again_is_given_up(reply, sends, text):
    note = OUT.letter.parcels[0].model_copy(update={"sha256": "0" * 64})
    question, _ = asked(parcels=[note] if sends is None else [])
    for _ in range(5):
        step = question.replied(sealed(reply))
        assert kinds(step) == (["turn"] if sends is None else sends)
        assert step.greet == isinstance(reply, Stranger)
        if step.greet:
            question.begin()
        for _ in step.send[1:]:
            assert not question.replied(sealed(Parcels())).send  # others are under way
    with pytest.raises(MessageError, match=text):
        question.replied(sealed(reply))


def test_a_device_that_refuses_is_not_asked_again():
    question, _ = asked()
    with pytest.raises(MessageError, match="no room"):
        question.replied(sealed(Refusal(text="no room")))
