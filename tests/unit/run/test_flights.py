"""A client's work in virtual time, by hand: when it ends, what it costs, where it breaks off."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from worlds import BYTES, Constant, Failing, costs_of, device, fleet_of, flops, setup_of, state_of

from tesserafl.core.fit import Training
from tesserafl.core.wire import pack, unpack
from tesserafl.engines.device import Chain, Device, Piece
from tesserafl.engines.federation import Traffic
from tesserafl.methods import FedAsync, FedAvg, HeteroFL, MethodSettings
from tesserafl.run.flights import Flight, flight_of, flight_parts, fly, joules_of
from tesserafl.run.rounds import Notes

WATTS = {"idle_watts": 1.0, "busy_watts": 10.0, "radio_watts": 3.0}
PLAIN = {"example": 0.5, "down": 2.0, "up": 4.0, **WATTS}
"""Of 4 examples: 2 s down, 2 s of work, 4 s up."""


def flown(
    *devices: Device,
    starts: dict[int, float] | None = None,
    engine: Any = None,
    training: Training | None = None,
    method: MethodSettings | None = None,
    **settings: Any,
) -> dict[int, Flight]:
    """Client -> its flight, of one task for each device."""
    setup = setup_of([4] * len(devices), training=training, method=method, **settings)
    state, used = state_of(setup), setup.experiment.method
    tasks = used.configure(setup.model, state, setup.clients, setup.experiment.training)
    begin = starts or dict.fromkeys(range(len(devices)), 0.0)
    fleet, engine = fleet_of(devices), engine or Constant()
    flights = fly(setup, engine, fleet, tasks, begin, state.params, costs_of(setup))
    return {flight.client: flight for flight in flights}


def leaving(seconds: float) -> Device:
    return device(**PLAIN, leaves_seconds=seconds)


def spans(flight: Flight) -> list[tuple[str, float, float]]:
    return [(kind, pytest.approx(a), pytest.approx(b)) for kind, a, b in flight.pieces]


def test_download_work_upload_one_after_another() -> None:
    flight = flown(device(**PLAIN), starts={0: 100.0})[0]
    assert list(flight.pieces) == [
        ("download", 100.0, pytest.approx(102.0)),
        ("compute", pytest.approx(102.0), pytest.approx(104.0)),
        ("upload", pytest.approx(104.0), pytest.approx(108.0)),
    ]
    assert (flight.start, flight.ends) == (100.0, pytest.approx(108.0))
    assert (flight.bytes_down, flight.bytes_up) == (BYTES, BYTES)
    assert flight.answered and flight.update is not None
    # 2 s and 4 s of radio at 3 W, 2 s of work at 10 W.
    assert flight.joules(device(**PLAIN)) == pytest.approx(2 * 3 + 2 * 10 + 4 * 3)


def test_waiting_costs_what_waiting_costs() -> None:
    flight = flown(device(**PLAIN), starts={0: 5.0})[0]
    waited = flight.waiting_since(3.0).waiting_until(20.0)
    assert waited.pieces[0] == ("wait", 3.0, 5.0)
    assert waited.pieces[-1] == ("wait", pytest.approx(13.0), 20.0)
    assert waited.pieces[1:-1] == flight.pieces
    extra = waited.joules(device(**PLAIN)) - flight.joules(device(**PLAIN))
    assert extra == pytest.approx((2 + 7) * 1.0)
    # Nobody waits for what was before it began or came before it ended.
    assert flight.waiting_since(5.0) == flight == flight.waiting_until(12.0)


def test_joules_are_watts_by_kind() -> None:
    watts = Device(gflops=1.0, **WATTS)
    kinds = {"download": 3.0, "upload": 3.0, "compute": 10.0, "wait": 1.0}
    for kind, each in kinds.items():
        assert joules_of(Piece(kind, 1.0, 3.0), watts) == 2 * each


@pytest.mark.parametrize(
    ("training", "examples"),
    [
        (Training(batch_size=4, epochs=3), 12),
        (Training(batch_size=3, epochs=1), 4),
        (Training(batch_size=2, steps=1), 2),
        (Training(batch_size=2, steps=5), 10),
    ],
)
def test_time_goes_by_the_examples_that_are_seen(training: Training, examples: int) -> None:
    flight = flown(device(example=0.5), training=training)[0]
    assert flight.ends == pytest.approx(0.5 * examples)
    assert flight.row["flops"] == flops() * examples


def test_a_load_slows_the_work_and_not_the_link() -> None:
    loaded = replace(device(**PLAIN), load=Chain(values=(0.75,), mean_seconds=(1.0,)))
    flight = flown(loaded)[0]
    assert [p.end - p.start for p in flight.pieces] == pytest.approx([2.0, 8.0, 4.0])


@pytest.mark.parametrize(
    ("seconds", "pieces", "down"),
    [
        (1.0, [("download", 0, 1)], BYTES),
        (3.0, [("download", 0, 2), ("compute", 2, 3)], BYTES),
    ],
)
def test_who_goes_at_its_work_has_trained_nothing(
    seconds: float, pieces: list[Any], down: int
) -> None:
    engine = Constant()
    flights = flown(leaving(seconds), device(**PLAIN), engine=engine)
    gone = flights[0]
    assert spans(gone) == pieces
    assert (gone.answered, gone.update, gone.bytes_up, gone.bytes_down) == (False, None, 0, down)
    assert gone.row == {"client": 0, "reason": "offline", "text": "went offline at its work"}
    assert engine.trained == [(1, 0)]
    assert flights[1].answered


def test_who_goes_while_it_sends_has_trained_for_nothing() -> None:
    engine = Constant()
    gone = flown(leaving(6.0), engine=engine)[0]
    assert engine.trained == [(0, 0)]
    assert spans(gone) == [("download", 0, 2), ("compute", 2, 4), ("upload", 4, 6)]
    assert (gone.answered, gone.update, gone.row["reason"]) == (False, None, "offline")
    assert gone.joules(device(**PLAIN)) == pytest.approx(2 * 3 + 2 * 10 + 2 * 3)


def test_who_stays_just_long_enough_has_answered() -> None:
    ends = flown(device(**PLAIN))[0].ends
    assert flown(leaving(ends))[0].answered
    assert not flown(leaving(ends * (1 - 1e-12)))[0].answered


def test_who_is_away_takes_nothing() -> None:
    away = device(**PLAIN, joins_seconds=50.0)
    flight = flown(away)[0]
    assert (flight.start, flight.ends, flight.bytes_down) == (0.0, 0.0, 0)
    assert flight.joules(away) == 0.0
    assert flight.row["reason"] == "offline"


def test_who_does_not_take_its_task_takes_no_time() -> None:
    flights = flown(*[device(**PLAIN)] * 8, dropout=0.5)
    silent = [flight for flight in flights.values() if not flight.answered]
    assert 0 < len(silent) < 8
    for flight in silent:
        assert (flight.start, flight.ends, flight.bytes_down) == (0.0, 0.0, 0)
        assert flight.row["text"] == "did not answer"


@pytest.mark.parametrize(
    "engine", [Constant(bad=lambda task: task.client.id == 0), Failing(client=0)]
)
def test_refused_work_took_its_time(engine: Constant) -> None:
    """The device trained: its time and its energy are gone."""
    flights = flown(device(**PLAIN), device(**PLAIN), engine=engine)
    assert flights[0].row["reason"] == "error"
    assert not flights[0].answered and flights[0].update is None
    assert spans(flights[0])[:2] == [("download", 0, 2), ("compute", 2, 4)]
    assert flights[0].bytes_down == BYTES
    assert flights[1].answered


def test_notes_add_up_what_flights_took() -> None:
    flights = flown(device(**PLAIN), leaving(6.0))
    notes = Notes()
    for client, flight in flights.items():
        flight.note_in(notes, device(**PLAIN), staleness=client)
    assert [row["client"] for row in notes.clients] == [0]
    assert [row["client"] for row in notes.failures] == [1]
    assert (notes.clients[0]["staleness"], notes.failures[0]["staleness"]) == (0, 1)
    assert notes.clients[0]["pieces"] == [list(piece) for piece in flights[0].pieces]
    assert notes.joules == pytest.approx(38 + 32)
    assert notes.joules == notes.clients[0]["joules"] + notes.failures[0]["joules"]
    assert notes.traffic == {0: Traffic(BYTES, BYTES), 1: Traffic(0, BYTES)}
    assert len(notes.trained) == 1
    flights[0].note_in(notes, device(**PLAIN))  # a second work of the same device
    assert notes.traffic[0] == Traffic(2 * BYTES, 2 * BYTES)


@pytest.mark.parametrize(
    "method", [FedAvg(), HeteroFL(ratio=(0.5,)), FedAsync(ratio=(0.5,))], ids=lambda m: str(m)[:8]
)
def test_a_flight_survives_a_checkpoint(method: MethodSettings) -> None:
    for flight in flown(device(**PLAIN), leaving(6.0), method=method).values():
        header, groups = flight_parts(flight)
        _, groups = unpack(pack({}, groups))
        again = flight_of(json.loads(json.dumps(header)), groups)
        assert replace(again, update=None, trained=None) == replace(
            flight, update=None, trained=None
        )
        assert (again.update is None) == (flight.update is None)
        if flight.update is None or again.update is None:
            assert again.trained is flight.trained is None
            continue
        for kind in ("delta", "extra"):
            one, other = getattr(flight.update, kind), getattr(again.update, kind)
            assert list(one) == list(other)
            assert all(torch.equal(one[name], other[name]) for name in one)
        assert again.update.metrics == flight.update.metrics
        assert again.trained is not None and flight.trained is not None
        keys = [{n: v.key for n, v in f.trained.views.items()} for f in (again, flight)]
        assert keys[0] == keys[1]


def test_an_update_that_lasts_is_a_copy() -> None:
    flight = flown(device(**PLAIN))[0]
    kept = flight.lasting()
    assert flight.update is not None and kept.update is not None
    before = {name: tensor.clone() for name, tensor in kept.update.delta.items()}
    for tensor in flight.update.delta.values():
        tensor.fill_(99.0)
    assert all(torch.equal(kept.update.delta[name], before[name]) for name in before)
