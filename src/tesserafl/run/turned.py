"""What peers say beside their letters: whether it can be true, and what is noted of it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from tesserafl.core.answers import MAX_METRIC, MAX_METRICS
from tesserafl.core.errors import MessageError, TesseraError, UpdateError
from tesserafl.core.messages import Client
from tesserafl.core.params import Params
from tesserafl.core.places import PartHeader, part_from_json
from tesserafl.core.submodel import SubModel, index_tensor
from tesserafl.engines.federation import Folded, Traffic
from tesserafl.engines.parcels import letter_of
from tesserafl.engines.turns import Lapse, Turned
from tesserafl.run.mailbag import Turns
from tesserafl.run.rounds import Notes, failure

_COUNTS = ("client", "examples", "steps", "entries", "trained_entries")
_NOTED = frozenset({*_COUNTS, "flops", "seconds"})
"""What every row has; see `rounds.note_answer`."""


def judged(
    client: Client, turned: Turned, shapes: Params, receivers: Sequence[int] | None
) -> Turned:
    """A turn; of a peer that cannot be believed without its training.

    Args:
        client: whose turn it is.
        turned: what it says.
        shapes: the model's parameters, on `meta`.
        receivers: of the one letter that it may write, the same to all; None: one to each.
    """
    try:
        _check_letters(client.id, turned, receivers)
        if turned.row is not None:
            _check_row(client, turned.row)
            if turned.part is None:
                raise UpdateError(f"peer {client.id} does not say what it has trained")
            part_of(turned.part, shapes)
    except TesseraError as error:
        lapse = Lapse(reason="error", text=str(error)[:10_000])
        without: dict[str, Any] = {"row": None, "part": None, "lapse": lapse}
        if receivers is not None:  # elsewhere others need what it keeps, not what it trained
            without["letters"] = []
        return turned.model_copy(update=without)
    return turned


def part_of(header: Mapping[str, Any], shapes: Params) -> SubModel:
    """The sub-model that a peer says it has trained; raises MessageError or UpdateError."""
    try:
        part = part_from_json(PartHeader.model_validate(header))
    except (ValidationError, RecursionError) as error:
        raise MessageError(f"what a peer says it has trained is wrong: {error}"[:1000]) from error
    for view in part.views.values():
        if view.name not in shapes or not view.fits(tuple(shapes[view.name].shape)):
            raise UpdateError(f"a peer says it trained {view.name[:80]!r}, as no model here has it")
        for index in view.index:
            if len(set(index_tensor(index).tolist())) < len(index_tensor(index)):
                raise UpdateError(f"a peer says it trained entries of {view.name[:80]!r} twice")
    return part


def noted(turns: Turns, clients: Sequence[Client], shapes: Params) -> Notes:
    """The rows of a round, and the bytes of its letters: sent once, received by each."""
    notes = Notes(failures=[failure(f.client, f.reason, f.text) for f in turns.failed])
    traffic = {client.id: [0, 0] for client in clients}
    for origin, turned in sorted(turns.found.items()):
        for addressed in turned.letters:
            size = letter_of(addressed.letter).num_bytes
            traffic[origin][0] += size
            for receiver in {*addressed.receivers} & traffic.keys():
                traffic[receiver][1] += size
        if turned.lapse is not None:
            notes.failures.append(failure(origin, turned.lapse.reason, turned.lapse.text))
    for client in turns.answered:
        turned = turns.found[client]
        assert turned.row is not None and turned.part is not None, "it has answered"
        row: dict[str, Any] = dict(turned.row)
        row |= {name: int(row[name]) for name in _COUNTS}
        row["bytes_up"], row["bytes_down"] = traffic[client]
        notes.clients.append(row)
        notes.trained.append(part_of(turned.part, shapes))
    notes.folded = Folded(traffic={peer: Traffic(*both) for peer, both in traffic.items()})
    return notes


def _check_letters(client: int, turned: Turned, receivers: Sequence[int] | None) -> None:
    for addressed in turned.letters:
        letter_of(addressed.letter)
    found = [receiver for each in turned.letters for receiver in each.receivers]
    if client in found or len(set(found)) < len(found):
        raise UpdateError(f"peer {client} writes to itself, or twice to another")
    # Who is told something else than others would part from them.
    if receivers is not None and turned.letters:
        if len(turned.letters) > 1 or sorted(found) != sorted(receivers):
            raise UpdateError(f"peer {client} writes something else to some than to others")
    elif receivers and turned.row is not None:
        raise UpdateError(f"peer {client} says that it has trained, and writes to nobody")


def _check_row(client: Client, row: Mapping[str, float]) -> None:
    if not row.keys() >= _NOTED or len(row) > MAX_METRICS + len(_NOTED):
        raise UpdateError(f"peer {client.id} does not say what a round's row holds: {_NOTED}")
    for name, value in row.items():
        if not name.isidentifier() or len(name) > MAX_METRICS or not abs(value) <= MAX_METRIC:
            raise UpdateError(f"peer {client.id} says that its {name[:80]!r} is {value:g}")
    counts = [row[name] for name in _NOTED]
    if min(counts) < 0 or int(row["client"]) != client.id or row["examples"] > client.num_examples:
        raise UpdateError(f"peer {client.id} says of itself what cannot be: {dict(row)}"[:1000])
    if math.isnan(sum(counts)):
        raise UpdateError(f"peer {client.id} says what is no number")
