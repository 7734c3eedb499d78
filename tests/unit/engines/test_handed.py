"""What an edge hands on: the bits of the sums that it stands for, and nothing that cannot be."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from test_sums import CLIENTS, MODEL, updates_of

from tesserafl.core.answers import MAX_METRIC
from tesserafl.core.errors import MessageError, TesseraError
from tesserafl.core.fit import Training
from tesserafl.core.method import State
from tesserafl.core.params import Params, num_bytes, sha256
from tesserafl.core.wire import Parts
from tesserafl.engines.handed import Below, handed_change, handed_sums
from tesserafl.engines.incoming import read_letter
from tesserafl.engines.parcels import Outgoing, letter_of
from tesserafl.engines.sums import Sums, sums_of
from tesserafl.engines.swept import swept_of
from tesserafl.methods import FedBRB, FedNova, HeteroFL, HierFAVG, MethodSettings
from tesserafl.run.averages import Several

OWN = (1, 3)
"""The edge's clients; the others report to the cloud."""
COHORT = {client.id: client for client in CLIENTS}


def below(method: MethodSettings, state: State, rounds: int) -> Below:
    return Below(
        model=MODEL,
        method=method,
        state=state,
        clients={client: COHORT[client] for client in OWN},
        rounds=rounds,
        tasks=lambda: [
            task
            for task in method.configure(MODEL, state, CLIENTS, Training(epochs=9, batch_size=1))
            if task.client.id in OWN
        ],
    )


def empty(method: MethodSettings, state: State) -> Sums:
    return sums_of(MODEL, method, COHORT, state.params)()


def sent(parts: Parts) -> Parts:
    """Through letters and parcels, as JSON and bytes."""
    out = Outgoing(parts=parts, most_bytes=200)
    letter = letter_of(json.loads(out.letter.model_dump_json()))
    found = {note.sha256: out.parcel(number) for number, note in enumerate(letter.parcels)}
    return read_letter(letter, found.__getitem__)


def at_the_edge(method: MethodSettings, state: State, rounds: int) -> tuple[Parts, Sums]:
    """What the edge hands on, and the cloud's sum with it added where no message is needed."""
    own = [update for update in updates_of(method, state) if update.client in OWN]
    cloud = empty(method, state)
    if rounds == 1:
        total = empty(method, state)
        for update in own:
            total.add(update)
        parts = handed_sums(total)
        cloud.merge(total)
        return parts, cloud
    several = Several(model=state)
    for _ in range(rounds):
        total = empty(method, state)
        for update in own:
            total.add(update)
        several.average(total)
    cloud.add_change(state, several.model, several.covered, [COHORT[c] for c in OWN])
    return handed_change(state, several.model, several.covered), cloud


CASES = [
    (HierFAVG(), 1),
    (HierFAVG(), 3),
    (HeteroFL(ratio=(0.5, 0.25, 1.0)), 1),
    (HierFAVG(ratio=(0.5, 0.25, 1.0)), 2),
    (HierFAVG(normalised=True), 1),
    (HierFAVG(normalised=True), 2),
    (FedBRB(ratio=(0.5,), strict=False), 1),
]
NAMES = [f"{type(method).__name__}-{number}" for number, (method, _) in enumerate(CASES)]


@pytest.mark.parametrize(("method", "rounds"), CASES, ids=NAMES)
def test_a_message_adds_the_bits_of_what_it_stands_for(method: MethodSettings, rounds: int) -> None:
    state = method.init(MODEL, 0, 3)
    parts, wanted = at_the_edge(method, state, rounds)
    found = empty(method, state)
    asked = below(method, state, rounds)
    out = Outgoing(parts=parts)
    assert out.letter.num_bytes <= asked.most_bytes
    size = asked.fold(found, sent(parts), OWN)
    assert size == sum(num_bytes(group) for group in parts[1].values())
    for total in (found, wanted):
        for update in updates_of(method, state):
            if update.client not in OWN:
                total.add(update)
    assert sha256(found.finish(state).params) == sha256(wanted.finish(state).params)
    assert found.num_bytes == wanted.num_bytes


Spoil = Callable[[dict[str, Any], dict[str, Params]], object]


def first(groups: dict[str, Params], kind: str) -> torch.Tensor:
    return next(iter(groups[kind].values()))


def widened(header: dict[str, Any], groups: dict[str, Params]) -> None:
    header["reported"]["part"]["views"]["0"][1][0] = [0, 10**6]


def twice(header: dict[str, Any], groups: dict[str, Params]) -> None:
    header["reported"]["part"]["lists"].append([0, 0])
    views = header["reported"]["part"]["views"]
    views["0"][1][0] = len(header["reported"]["part"]["lists"]) - 1


SUMMED: dict[str, Spoil] = {
    "larger than what its devices": lambda h, g: first(g, "sums").fill_(1 << 61),
    "larger than what": lambda h, g: first(g, "sums").fill_(-(1 << 63)),
    "int64": lambda h, g: g["sums"].update({n: t.int() for n, t in g["sums"].items()}),
    r"torch.int64 \[5\]; expected": lambda h, g: g["sums"].update(
        {n: torch.zeros(5, dtype=torch.int64) for n in g["sums"]}
    ),
    "other parameters than were reported": lambda h, g: g["sums"].popitem(),
    "other parameters than": lambda h, g: g["sums"].update({"more": first(g, "sums").clone()}),
    "counts? 10": lambda h, g: h["reported"].update(weights=[10**6] * 4),
    "the model has not got": widened,
    "has not got, in": twice,
    "places and 1 weights": lambda h, g: h["reported"].update(weights=[1]),
    "is wrong": lambda h, g: h.update(kind="unknown"),
    "greater than 0": lambda h, g: h["reported"].update(weights=[-1] * 4),
    "hands on something changed": lambda h, g: h.update(
        kind="changed", covered=h.pop("reported"), notes={}
    ),
    "expected are": lambda h, g: g.update(more={}),
}
CHANGED: dict[str, Spoil] = {
    "reaches nan": lambda h, g: first(g, "params").fill_(float("nan")),
    "reaches 1000": lambda h, g: first(g, "params").fill_(1000.0),
    "other parameters than the cloud's": lambda h, g: g["params"].popitem(),
    "the cloud's is": lambda h, g: g["params"].update(
        {n: t.double() for n, t in g["params"].items()}
    ),
    "counts? 10": lambda h, g: h["covered"].update(weights=[10**6] * 4),
    "hands on something summed": lambda h, g: (
        h.update(kind="summed", reported=h.pop("covered"), **{"notes": h.pop("notes")})
        or h.pop("notes")
    ),
}
NORMED: dict[str, Spoil] = {
    "is nan|is wrong": lambda h, g: h["notes"].update(steps=float("nan")),
    "does not say what its model is worth": lambda h, g: h["notes"].clear(),
    "'accumulated_steps' is 0": lambda h, g: h["notes"].update(steps=0.0),
    "'accumulated_steps' is 2.18": lambda h, g: h["notes"].update(steps=2 * MAX_METRIC + 2e17),
}
PASSED: dict[str, Spoil] = {
    "hands on 1 updates of 2 devices": lambda h, g: (
        h["updates"].pop(),
        g.pop("1/delta"),
        g.pop("1/extra"),
    ),
    "no update of client": lambda h, g: h["updates"][0].update(client=2),
    "no update of": lambda h, g: h["updates"][0].update(client=[1]),
    "in round 5": lambda h, g: h["updates"][0].update(round=5),
    "reaches inf": lambda h, g: first(g, "1/delta").fill_(float("inf")),
    "it may be|saw 99": lambda h, g: h["updates"][0].update(num_examples=99),
    "'accumulated_steps' is 0": lambda h, g: h["updates"][0]["metrics"].update(
        accumulated_steps=0.0
    ),
    "expected are": lambda h, g: g.pop("0/extra"),
}
SPOILT = [
    *((HierFAVG(), 1, text, spoil) for text, spoil in SUMMED.items()),
    *((HierFAVG(), 2, text, spoil) for text, spoil in CHANGED.items()),
    *((HierFAVG(normalised=True), 2, text, spoil) for text, spoil in NORMED.items()),
    *((FedNova(), 1, text, spoil) for text, spoil in PASSED.items()),
]


@pytest.mark.parametrize(
    ("method", "rounds", "text", "spoil"), SPOILT, ids=[str(n) for n in range(len(SPOILT))]
)
def test_what_cannot_be_is_refused_and_adds_nothing(
    method: MethodSettings, rounds: int, text: str, spoil: Spoil
) -> None:
    state = method.init(MODEL, 0, 3)
    header, groups = sent(at_the_edge(method, state, rounds)[0])
    header = copy.deepcopy(header)
    groups = {kind: {n: t.clone() for n, t in group.items()} for kind, group in groups.items()}
    spoil(header, groups)
    total = empty(method, state)
    with pytest.raises(TesseraError, match=text):
        below(method, state, rounds).fold(total, (header, groups), OWN)
    assert sha256(total.finish(state).params) == sha256(state.params)
    assert total.num_bytes == 0


def test_of_devices_that_did_not_answer_nothing_is_added() -> None:
    """The weight of what comes is bounded by who was heard, not by who is below."""
    state = HierFAVG().init(MODEL, 0, 3)
    parts, _ = at_the_edge(HierFAVG(), state, 1)
    with pytest.raises(TesseraError, match="count"):
        below(HierFAVG(), state, 1).fold(empty(HierFAVG(), state), sent(parts), OWN[:1])


def test_an_update_counts_only_beside_its_task() -> None:
    """Of a client that was asked in a round before, the cloud may not know what."""
    method = FedNova()
    state = method.init(MODEL, 0, 3)
    parts, _ = at_the_edge(method, state, 1)
    known = below(method, state, 1)
    fewer = replace(known, tasks=lambda: [t for t in known.tasks() if t.client.id == OWN[0]])
    total = empty(method, state)
    with pytest.raises(MessageError, match=f"client {OWN[1]}, whose task is not known"):
        fewer.fold(total, sent(parts), OWN)
    assert sha256(total.finish(state).params) == sha256(state.params)


@pytest.mark.parametrize(("method", "rounds"), CASES, ids=NAMES)
def test_an_edge_that_heard_nobody_adds_nothing(method: MethodSettings, rounds: int) -> None:
    state = method.init(MODEL, 0, 3)
    several = Several(model=state)
    several.average(empty(method, state))
    parts = handed_sums(empty(method, state))
    if rounds > 1:
        parts = handed_change(state, several.model, several.covered)
    total = empty(method, state)
    below(method, state, rounds).fold(total, sent(parts), ())
    assert sha256(total.finish(state).params) == sha256(state.params)


ROW = {
    "client": 1,
    "round": 0,
    "examples": 3,
    "steps": 1,
    "trained_entries": 4,
    "entries": 4,
    "flops": 1.0,
    "seconds": 0.1,
    "link_seconds": 0.1,
    "bytes_up": 4,
    "bytes_down": 4,
    "change": 0.5,
    "sketch": [],
    "part": 0,
    "metrics": {"loss": 1.0},
}
PART = {"sizes": {}, "lists": [], "views": {"a": ["a", [[0, 2]]]}}


def told(**changes: Any) -> dict[str, Any]:
    row = {**ROW, **changes.pop("row", {})}
    return {
        "handed": {},
        "rows": [row],
        "failures": [],
        "parts": [PART],
        "sketch": [],
        "late": [],
        "heard": [],
        **changes,
    }


def test_what_an_edge_says_of_its_devices_is_looked_at() -> None:
    clients = {client: COHORT[client] for client in OWN}
    assert swept_of(told(), clients, 1).rows[0].noted["loss"] == 1.0
    loss = {"client": 3, "reason": "offline", "text": "away"}
    assert swept_of(told(failures=[loss]), clients, 1).failures[0].reason == "offline"
    for header, text in (
        (told(row={"client": 2}), "client 2, which is not below it"),
        (told(row={"examples": 10**6}), "saw 1000000 examples"),
        (told(row={"seconds": float("nan")}), "finite"),
        (told(row={"seconds": -1.0}), "greater than or equal"),
        (told(row={"part": 1}), "wrong in what it measured"),
        (told(row={"metrics": {"seconds": 1.0}}), "wrong in what it measured"),
        (told(row={"metrics": {"loss": float("inf")}}), "less than or equal"),
        (told(rows=[ROW] * 3), "it tells of more"),
        (told(failures=[{**loss, "reason": "asleep"}]), "Input should be"),
        (told(failures=[{**loss, "client": 7}]), "client 7, which is not below it"),
        (told(late=[2]), "client 2, which is not below it"),
        (told(late=[-1]), "greater than or equal"),
        (told(heard=[[2, 0]]), "client 2, which is not below it"),
        (told(heard=[[1]]), "at least 2 items"),
        (told(more=1), "Extra inputs"),
    ):
        with pytest.raises(MessageError, match=text):
            swept_of(header, clients, 1)


def test_what_devices_trained_must_be_of_the_model() -> None:
    shapes = {"a": torch.zeros(2)}
    clients = {client: COHORT[client] for client in OWN}
    (part,) = swept_of(told(), clients, 1).trained(shapes)
    assert part.views["a"].shape == (2,)
    with pytest.raises(MessageError, match="which the model has not got there"):
        swept_of(told(), clients, 1).trained({"a": torch.zeros(1)})
    with pytest.raises(MessageError, match="which the model has not got there"):
        swept_of(told(), clients, 1).trained({"b": torch.zeros(2)})
