"""Answers of those that stay, devices and edges: each is made once, kept, and given again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from tesserafl.core.errors import MessageError
from tesserafl.core.wire import Parts
from tesserafl.engines.incoming import Later, read_letter
from tesserafl.engines.orders import Answer, Envelope, Fetch, Missing, Parcels, Rest, sealed
from tesserafl.engines.parcels import Letter, Outgoing, letter_of
from tesserafl.run.spool import Spool


def answered_once(
    letter: Letter, asked: str, spool: Spool, most_bytes: int, work: Callable[[], None]
) -> Envelope:
    """The answer to an order, with as many of its parcels as one message may hold.

    Args:
        letter: what the order needs.
        asked: digest of the order: one that is given again is answered from the disk.
        spool: the disk.
        most_bytes: of parcels in one message.
        work: does the order, when all of its parcels are here, and keeps the answer.
    """
    if (kept := spool.answer(asked)) is None:
        if (lacks := lacking(letter, spool)) is not None:
            return lacks
        spool.keep_only([note.sha256 for note in letter.parcels])
        work()
        kept = spool.answer(asked)
        assert kept is not None
    inline = spool.answered_in(letter_of(kept["letter"]).parcels, most_bytes)
    return sealed(Answer(letter=kept["letter"], seconds=kept["seconds"]), inline)


def told(values: Mapping[str, Any], seconds: float) -> Envelope:
    """An answer of plain values, which nobody keeps: to measure again gives the same."""
    letter = Outgoing(parts=(dict(values), {})).letter
    return sealed(Answer(letter=letter.model_dump(), seconds=seconds))


def lacking(letter: Letter, spool: Spool) -> Envelope | None:
    """What is answered if parcels are not here; None: all are."""
    missing = spool.missing(note.sha256 for note in letter.parcels)
    return sealed(Missing(parcels=missing)) if missing else None


def read_kept(letter: Letter, spool: Spool, later: Later | None = None) -> Parts:
    """The message of a letter, all of whose parcels are on the disk; `later`: what stays there."""
    try:
        return read_letter(letter, spool.fetch, later)
    except MessageError:
        spool.keep_only(())  # damaged on the disk, perhaps: let it be sent again
        raise


def fetched(order: Fetch, spool: Spool) -> Envelope:
    """Parcels of the answer that is kept."""
    found = {name: spool.answered(name) for name in order.parcels}
    if missing := [name for name, data in found.items() if data is None]:
        return sealed(Missing(parcels=missing))
    return sealed(Parcels(), {name: data for name, data in found.items() if data is not None})


def rest_of(order: Rest, spool: Spool) -> Envelope:
    """Further parcels of the answer that is kept, if it is that round's."""
    kept = spool.answer()
    if kept is None or kept.get("letter", {}).get("header", {}).get("round") != order.round:
        return sealed(Missing(parcels=[]))
    notes = letter_of(kept["letter"]).parcels
    return sealed(Parcels(), spool.answered_in(notes, order.most_bytes, order.number))
