"""The way of one task: what a device may answer, and in which order."""

from __future__ import annotations

import pytest
import torch

from tesserafl.core.errors import MessageError, TesseraError
from tesserafl.core.fit import Training
from tesserafl.core.messages import Client, Task, Update
from tesserafl.core.params import sha256
from tesserafl.core.submodel import whole
from tesserafl.core.wire import task_parts, update_parts
from tesserafl.engines.errands import Errand
from tesserafl.engines.orders import (
    Answer,
    Envelope,
    Judged,
    Missing,
    Parcels,
    Profile,
    Refusal,
    Stranger,
    order_of,
    sealed,
)
from tesserafl.engines.parcels import Outgoing
from tesserafl.engines.steps import oldest

RUN = "b" * 32
LARGE, SMALL = 1 << 20, 400


def task():
    params = {"w": torch.arange(300.0).reshape(10, 30), "v": torch.arange(30.0)}
    return Task(
        round=2,
        client=Client(id=1, num_examples=20),
        submodel=whole({}, {name: tuple(p.shape) for name, p in params.items()}),
        params=params,
        training=Training(),
    )


def errand(most=LARGE, judge=False, **known):
    asked = task()
    return Errand(
        run=RUN,
        client=1,
        task=None if judge else asked,
        outgoing=Outgoing(parts=task_parts(asked, {}), most_bytes=most),
        remembers=None,
        **known,
    )


def outgoing(most=LARGE, memory=None, **changes):
    asked = task()
    fields = {
        "round": 2,
        "client": 1,
        "submodel": asked.submodel,
        "delta": {name: p + 1 for name, p in asked.params.items()},
        "num_examples": 20,
        "num_steps": 3,
        "metrics": {"loss": 1.0},
        "extra": {},
    }
    return Outgoing(parts=update_parts(Update(**(fields | changes)), memory or {}), most_bytes=most)


def answer(out, inline=True, **changes):
    letter = out.letter.model_dump() | changes
    parcels = {n.sha256: out.parcel(i) for i, n in enumerate(out.letter.parcels)} if inline else {}
    return sealed(Answer(letter=letter, seconds=0.5), parcels)


def kinds(step):
    return [order_of(envelope).kind for envelope in step.send]


def test_a_small_task_takes_one_message():
    found = errand()
    step = found.begin()
    assert kinds(step) == ["work"] and found.course.waiting == 1
    assert step.send[0].parcels.keys() == {n.sha256 for n in found.outgoing.letter.parcels}
    step = found.replied(answer(outgoing()))
    assert not step.send and step.result.client == 1 and step.result.seconds == 0.5
    assert sha256(step.result.update.delta) == sha256({n: p + 1 for n, p in task().params.items()})


def test_a_large_task_goes_in_several_messages_and_its_answer_is_fetched():
    found = errand(SMALL)
    step = found.begin()
    names = [note.sha256 for note in found.outgoing.letter.parcels]
    assert len(names) > 3
    assert kinds(step) == ["work"] and list(step.send[0].parcels) == names[:1]
    step = found.replied(sealed(Missing(parcels=names[1:])))
    # The last one goes with the order, when the others are there.
    assert kinds(step) == ["store"] * (len(names) - 2)
    assert [list(envelope.parcels) for envelope in step.send] == [[n] for n in names[1:-1]]
    for _ in names[2:-1]:
        assert not found.replied(sealed(Missing(parcels=[]))).send  # others are under way
    step = found.replied(sealed(Missing(parcels=[])))
    assert kinds(step) == ["work"] and list(step.send[0].parcels) == names[-1:]
    out = outgoing(SMALL)
    step = found.replied(answer(out, inline=False))
    wanted = [note.sha256 for note in out.letter.parcels]
    assert [order_of(envelope).parcels for envelope in step.send] == [[n] for n in wanted]
    for number, name in enumerate(wanted):
        assert step.result is None or number == len(wanted)
        step = found.replied(sealed(Parcels(), {name: out.parcel(number)}))
    assert step.result.update.metrics == {"loss": 1.0}


def parcels_of(out, *numbers):
    return sealed(Parcels(), {out.letter.parcels[n].sha256: out.parcel(n) for n in numbers})


def test_of_a_device_that_was_heard_everything_is_asked_at_once():
    out = outgoing(SMALL)
    messages = len(out.letter.parcels)
    found = errand(SMALL, ahead=messages)
    step = found.begin()
    names = [note.sha256 for note in found.outgoing.letter.parcels]
    assert len(names) > 3 and messages > 2
    assert kinds(step) == ["store"] * (len(names) - 1) + ["work"] + ["rest"] * (messages - 1)
    assert [list(e.parcels) for e in step.send[: len(names)]] == [[name] for name in names]
    rests = [order_of(envelope) for envelope in step.send[len(names) :]]
    assert [(r.round, r.number, r.most_bytes) for r in rests] == [
        (2, number, SMALL) for number in range(1, messages)
    ]
    for _ in names[1:]:
        assert not found.replied(sealed(Missing(parcels=[]))).send
    first = sealed(
        Answer(letter=out.letter.model_dump(), seconds=0.5),
        {out.letter.parcels[0].sha256: out.parcel(0)},
    )
    step = found.replied(first)
    for number in range(1, messages):
        assert step.result is None and not step.send
        step = found.replied(parcels_of(out, number))
    assert step.result.update.metrics == {"loss": 1.0}
    assert found.learnt({}) == {"ahead": messages, "has": set(names)} and not found.course.waiting
    # What a client's own model is measured with stays too, until the next task.
    judged = errand(SMALL, judge=True)
    assert judged.learnt({}) == {}
    assert judged.learnt({"ahead": 3, "has": {"x"}}) == {"ahead": 3, "has": {"x", *names}}


def test_what_the_device_had_for_its_last_task_is_not_sent_again():
    names = [note.sha256 for note in errand(SMALL).outgoing.letter.parcels]
    found = errand(SMALL, ahead=1, has=frozenset(names[1:]))
    step = found.begin()
    assert kinds(step) == ["work"] and list(step.send[0].parcels) == names[:1]
    found = errand(SMALL, ahead=2, has=frozenset(names))
    step = found.begin()
    assert kinds(step) == ["work", "rest"] and not step.send[0].parcels
    assert not found.replied(sealed(Missing(parcels=names[2:3]))).send  # it had not
    step = found.replied(sealed(Missing(parcels=[])))
    assert kinds(step) == ["work"] and list(step.send[0].parcels) == names[2:3]


def test_what_an_answer_has_beyond_what_was_asked_ahead_is_fetched():
    out = outgoing(SMALL)
    found = errand(ahead=2)
    found.begin()
    assert not found.replied(answer(out, inline=False)).send
    step = found.replied(parcels_of(out, 1))
    left = [n.sha256 for number, n in enumerate(out.letter.parcels) if number != 1]
    assert [order_of(envelope).parcels for envelope in step.send] == [[name] for name in left]
    for number in range(len(out.letter.parcels)):
        if number != 1:
            step = found.replied(parcels_of(out, number))
    assert step.result.update.metrics == {"loss": 1.0}


def test_an_answer_may_have_less_than_was_asked_ahead():
    found = errand(ahead=4)
    assert kinds(found.begin()) == ["work", "rest", "rest", "rest"]
    step = found.replied(answer(outgoing()))
    assert step.result is not None  # what is under way no longer matters


@pytest.mark.parametrize("stale", ["missing", "parcels"])
def test_a_device_that_lost_parcels_is_sent_them_when_nothing_is_under_way(stale):
    found = errand(SMALL, ahead=3)
    step = found.begin()
    names = [note.sha256 for note in found.outgoing.letter.parcels]
    old = outgoing(SMALL, delta={n: p - 1 for n, p in task().params.items()})
    replies = [sealed(Missing(parcels=[]))] * (len(names) - 1)
    replies += [sealed(Missing(parcels=names[1:2]))]  # to the order: one got lost
    replies += [sealed(Missing(parcels=[])) if stale == "missing" else parcels_of(old, 1)] * 2
    assert len(replies) == len(step.send)
    for reply in replies[:-1]:
        step = found.replied(reply)
        assert not step.send and step.result is None
    step = found.replied(replies[-1])
    assert kinds(step) == ["work"] and list(step.send[0].parcels) == names[1:2]
    step = found.replied(answer(outgoing()))
    assert step.result.update.metrics == {"loss": 1.0}


def test_a_parcel_that_is_named_twice_is_refused():
    found = errand()
    found.begin()
    notes = outgoing().letter.model_dump()["parcels"]
    with pytest.raises(MessageError, match="twice"):
        found.replied(answer(outgoing(), parcels=notes * 2))


def test_of_several_answers_only_the_last_ones_parcels_are_kept():
    found = errand(SMALL, ahead=9)
    count = len(found.begin().send)
    for number in range(count - 1):
        out = outgoing(SMALL, delta={n: p + 2 + number for n, p in task().params.items()})
        first = {out.letter.parcels[0].sha256: out.parcel(0)}
        found.replied(sealed(Answer(letter=out.letter.model_dump(), seconds=0.5), first))
    assert len(found._parcels) == 1


def test_a_device_that_lacks_nothing_and_does_nothing_is_given_up():
    found = errand()
    found.begin()
    for _ in range(10):
        assert kinds(found.replied(sealed(Missing(parcels=[])))) == ["work"]
    with pytest.raises(MessageError, match="does not do its task"):
        found.replied(sealed(Missing(parcels=[])))


def test_what_was_asked_ahead_may_come_to_nothing():
    found = errand(SMALL, ahead=0)
    count = len(found.begin().send)
    out = outgoing(SMALL)
    first = {out.letter.parcels[0].sha256: out.parcel(0)}
    found.replied(sealed(Answer(letter=out.letter.model_dump(), seconds=0.5), first))
    for _ in range(count - 2):  # to what was sent before
        assert not found.replied(sealed(Missing(parcels=[]))).send
    assert set(kinds(found.replied(sealed(Missing(parcels=[]))))) == {"fetch"}


def test_to_a_stranger_everything_is_said_again():
    found = errand(
        SMALL, ahead=2, has=frozenset(n.sha256 for n in errand(SMALL).outgoing.letter.parcels)
    )
    assert kinds(found.begin()) == ["work", "rest"]
    found.replied(sealed(Stranger()))
    assert found.replied(sealed(Stranger())).greet
    step = found.begin()
    assert kinds(step) == ["work"] and len(step.send[0].parcels) == 1


def test_the_oldest_messages_of_each_client_are_asked_for():
    messages = {f"{client}-{n}": client for n in range(5) for client in (1, 2)}
    messages["3-0"] = 3
    assert oldest(messages, 2) == ["1-0", "2-0", "1-1", "2-1", "3-0"]
    assert oldest(messages, 9) == list(messages)


def test_a_stranger_to_many_messages_is_one():
    found = errand(SMALL, ahead=9)
    count = len(found.begin().send)
    assert count > 9
    for _ in range(count - 1):
        assert not found.replied(sealed(Stranger())).greet
    assert found.replied(sealed(Stranger())).greet


def test_what_got_lost_is_sent_again_and_not_for_ever():
    found = errand(SMALL)
    found.begin()
    names = [note.sha256 for note in found.outgoing.letter.parcels]
    for _ in range(5):
        step = found.replied(sealed(Missing(parcels=names[:1])))
        assert kinds(step) == ["work"] and list(step.send[0].parcels) == names[:1]
    with pytest.raises(MessageError, match="keeps losing parcels"):
        found.replied(sealed(Missing(parcels=names[:1])))


def test_parcels_of_an_answer_that_do_not_come_are_given_up():
    found = errand()
    found.begin()
    step = found.replied(answer(outgoing(), inline=False))
    for _ in range(4):
        assert kinds(step) == ["fetch"]
        step = found.replied(sealed(Parcels()))
    with pytest.raises(MessageError, match="do not come"):
        found.replied(sealed(Parcels()))


def test_a_stranger_is_greeted_when_nothing_is_under_way():
    found = errand()
    found.begin()
    for _ in range(5):
        assert found.replied(sealed(Stranger())).greet
        assert kinds(found.begin()) == ["work"]
    with pytest.raises(MessageError, match="forgets the run"):
        found.replied(sealed(Stranger()))


def test_what_a_clients_own_model_reaches_ends_a_measurement():
    found = errand(judge=True)
    assert kinds(found.begin()) == ["judge"]
    assert found.replied(sealed(Judged(accuracy=0.5, share=None))).result.accuracy == 0.5
    found = errand(judge=True)
    found.begin()
    with pytest.raises(MessageError, match="'answer' where that answers nothing"):
        found.replied(answer(outgoing()))


HUGE = [{"sha256": f"{n:064x}", "bytes": 1 << 30} for n in range(4)]
WRONG = {
    "no JSON": (lambda: Envelope(head=b"\x00"), "head is wrong"),
    "no reply": (lambda: Envelope(head=b'{"kind": "work"}'), "head is wrong"),
    "a refusal": (lambda: sealed(Refusal(text="no memory")), "no memory"),
    "a measurement": (lambda: sealed(Judged(accuracy=1.0, share=None)), "answers nothing"),
    "a profile": (
        lambda: sealed(Profile(name="x", client=0, num_examples=1, memory_mib=None)),
        "'profile' where that answers nothing",
    ),
    "parcels before a letter": (lambda: sealed(Parcels()), "answers nothing"),
    "parcels of another task": (lambda: sealed(Missing(parcels=["0" * 64])), "another task"),
    "no letter": (lambda: sealed(Answer(letter={}, seconds=0.0)), "a letter is wrong"),
    "gigabytes": (lambda: answer(outgoing(), parcels=HUGE), "an answer to its task has"),
    "a damaged parcel": (
        lambda: Envelope(
            head=answer(outgoing()).head,
            parcels=dict.fromkeys(answer(outgoing()).parcels, b"other"),
        ),
        "send it again",
    ),
    "a piece too few": (
        lambda: answer(outgoing(), groups=["delta", "extra", "memory", "more"]),
        "group more",
    ),
    "another client": (lambda: answer(outgoing(client=2)), "answered for client 2 in round 2"),
    "another round": (lambda: answer(outgoing(round=1)), "client 1 in round 1"),
    "a memory": (lambda: answer(outgoing(memory={"m": torch.ones(1)})), "memories stay"),
    "another header": (lambda: answer(outgoing(), header={"round": 2}), "header is wrong"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_reply_is_a_named_error(what):
    reply, text = WRONG[what]
    found = errand()
    found.begin()
    with pytest.raises(TesseraError, match=text):
        found.replied(reply())


def test_an_answer_that_is_lost_between_its_parcels_is_an_error():
    found = errand()
    found.begin()
    found.replied(answer(outgoing(), inline=False))
    with pytest.raises(MessageError, match="has lost its answer"):
        found.replied(sealed(Missing(parcels=["0" * 64])))
