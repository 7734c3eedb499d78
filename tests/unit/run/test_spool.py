"""What a device keeps on its disk: whole, or as if it were not there."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load

from tesserafl.core.errors import MessageError
from tesserafl.engines.parcels import Outgoing, sha256
from tesserafl.run.spool import Spool


@pytest.fixture
def spool(tmp_path):
    return Spool(folder=tmp_path / "run")


def outgoing(value=1.0):
    return Outgoing(parts=({"round": 0}, {"delta": {"w": torch.full((50,), value)}}), most_bytes=80)


def kept(spool):
    return {int(path.stem) for path in (spool.folder / "memory").iterdir()}


def test_a_parcel_is_kept_under_its_digest_alone(spool):
    data = b"something"
    name = sha256(data)
    spool.store({name: data})
    assert spool.missing([name, "0" * 64]) == ["0" * 64]
    assert spool.fetch(name) == data
    with pytest.raises(MessageError, match="send it again"):
        spool.store({"0" * 64: data})
    assert spool.missing(["0" * 64]) == ["0" * 64]
    spool.keep_only([])
    assert spool.missing([name]) == [name]


def test_a_piece_is_read_from_its_parcel(spool):
    answer = outgoing()
    data = answer.parcel(1)
    name = sha256(data)
    spool.store({name: data})
    assert torch.equal(spool.piece(name, "0.1"), torch.ones(len(load(data)["0.1"])))
    path = spool.folder / "parcels" / name
    for wrong in (lambda: path.write_bytes(data[:20]), path.unlink):
        wrong()
        with pytest.raises(MessageError, match="damaged"):
            spool.piece(name, "0.1")


def test_an_answer_is_there_when_all_of_it_is(spool):
    answer = outgoing()
    spool.write_answer("task", answer, 1.5)
    assert spool.answer("another") is None
    assert spool.answer("task")["seconds"] == spool.answer()["seconds"] == 1.5
    names = [note.sha256 for note in answer.letter.parcels]
    assert len(names) > 2
    assert [spool.answered(name) for name in names] == list(map(answer.parcel, range(len(names))))
    # The next takes its place, parcels and all.
    other = outgoing(2.0)
    spool.write_answer("next", other, 1.0)
    assert spool.answer("task") is None
    gone = set(names) - {note.sha256 for note in other.letter.parcels}
    assert gone and not any(map(spool.answered, gone))


@pytest.mark.parametrize("damage", ["letter torn", "parcel torn", "parcel gone", "other JSON"])
def test_a_damaged_answer_is_none(spool, damage):
    answer = outgoing()
    spool.write_answer("task", answer, 1.0)
    folder = spool.folder / "answer"
    parcel, letter = folder / answer.letter.parcels[1].sha256, folder / "letter.json"
    if damage == "letter torn":
        letter.write_bytes(letter.read_bytes()[:-20])
    elif damage == "other JSON":
        letter.write_text("[1]")
    elif damage == "parcel torn":
        parcel.write_bytes(parcel.read_bytes()[:-1])
    else:
        parcel.unlink()
    assert spool.answer("task") is None
    spool.write_answer("task", answer, 2.0)  # trained for again
    assert spool.answer("task")["seconds"] == 2.0


def test_memories_of_the_round_and_of_the_one_it_began_with_are_kept(spool):
    assert spool.recall(None) == {}
    assert spool.recall(4) is None
    for begun, round in ((None, 0), (0, 1), (1, 4)):
        spool.remember(begun, round, {"m": torch.tensor([float(round)])})
    assert kept(spool) == {1, 4}
    assert spool.recall(4)["m"].item() == 4.0 and spool.recall(1)["m"].item() == 1.0
    assert spool.recall(0) is None
    # The server has not heard of round 4: it asks for round 6 from round 1.
    spool.remember(1, 6, {})
    assert kept(spool) == {1, 6} and spool.recall(6) == {}


def test_the_memory_of_the_last_checkpoint_is_kept_until_the_next(spool):
    """The server may be cut off in any round, and goes on from its checkpoint before rounds 0, 4
    and 8; nothing that it could ask for then is gone."""
    begun = None
    for round in (0, 1, 2, 4, 5, 7, 8, 9):
        spool.remember(begun, round, {}, every=4)
        begun = round
        wanted = {7: 2, 5: 2, 4: 2, 8: 7, 9: 7}.get(round)
        assert wanted is None or wanted in kept(spool), round
        assert len(kept(spool)) <= 3
    # Cut off: round 8 once more, from what was known before it.
    spool.remember(7, 8, {}, every=4)
    assert kept(spool) == {7, 8}
    # A round that the server never heard of goes, and not the one that it remembers.
    spool.remember(7, 10, {}, every=4)
    spool.remember(10, 11, {}, every=4)
    assert kept(spool) == {7, 10, 11}


def test_a_damaged_memory_is_a_lost_one(spool):
    spool.remember(None, 0, {"m": torch.ones(3)})
    (path,) = (spool.folder / "memory").iterdir()
    path.write_bytes(path.read_bytes()[:-3])
    assert spool.recall(0) is None
