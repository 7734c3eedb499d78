"""Which device is which client."""

from __future__ import annotations

import itertools
import json

import pytest

from tesserafl.core.errors import CheckpointError, ConfigError
from tesserafl.engines.orders import Profile
from tesserafl.run.seats import Seats


def device(name, client=None, examples=10):
    return Profile(name=name, client=client, num_examples=examples, memory_mib=None)


def seats(tmp_path, parts, number=3):
    return Seats(path=tmp_path / "devices.json", number=number, parts=parts)


def test_a_part_is_whose_device_asks_first(tmp_path):
    found = seats(tmp_path, parts=True)
    assert found.seat("", device("a", 2)) == 2
    assert found.seat("", device("a", 2)) == 2  # it came back
    assert "is the device 'a'" in found.seat("", device("b", 2))
    assert "does not exist" in found.seat("", device("b", 3))
    assert "--client" in found.seat("", device("b"))
    assert found.settle() == {2: 2}


def test_a_name_is_its_keys(tmp_path):
    found = seats(tmp_path, parts=True)
    assert "its key is 'a'" in found.seat("a", device("b", 0))
    assert found.seat("a", device("a", 0)) == 0
    assert set(found.taken) == {0}


@pytest.mark.parametrize("order", ["".join(order) for order in itertools.permutations("abc")])
def test_devices_with_data_of_their_own_are_numbered_by_name(tmp_path, order):
    found = seats(tmp_path, parts=False)
    given = {name: found.seat("", device(name)) for name in order}
    assert sorted(given.values()) == [0, 1, 2]
    assert found.seat("", device("a")) == given["a"]
    assert "all 3 seats" in found.seat("", device("d"))
    assert "leave --client away" in found.seat("", device("d", 0))
    new = found.settle()
    assert [new[given[name]] for name in "abc"] == [0, 1, 2]
    assert [found.taken[client].name for client in range(3)] == ["a", "b", "c"]


def test_who_came_is_the_number_of_clients(tmp_path):
    found = seats(tmp_path, parts=False, number=5)
    assert found.seat("", device("b")) == 0 and found.seat("", device("a")) == 1
    assert found.settle() == {0: 1, 1: 0}
    assert found.number == 2
    assert "may join the next run" in found.seat("", device("late"))


def test_a_resumed_run_knows_them_again(tmp_path):
    before = seats(tmp_path, parts=False)
    for name in "ba":
        before.seat("", device(name, examples=20))
    before.settle()
    again = seats(tmp_path, parts=False)
    assert again.settled
    assert again.seat("", device("b", examples=20)) == 1
    assert "came back with 21" in again.seat("", device("a", examples=21))
    assert again.settle() == {0: 0, 1: 1}
    (tmp_path / "devices.json").write_text('{"0": {"name": "a"}}')
    with pytest.raises(CheckpointError, match="damaged"):
        seats(tmp_path, parts=False)


def test_before_the_first_round_a_device_may_have_other_data(tmp_path):
    found = seats(tmp_path, parts=True)
    assert found.seat("", device("a", 0, examples=10)) == 0
    assert found.seat("", device("a", 0, examples=12)) == 0
    assert found.taken[0].num_examples == 12


def test_without_a_device_there_is_no_run(tmp_path):
    with pytest.raises(ConfigError, match="tessera join"):
        seats(tmp_path, parts=True).settle()
    assert not (tmp_path / "devices.json").exists()


def test_who_lacks_memory_has_no_seat_and_takes_none(tmp_path):
    """Here the odd numbers are dealt more than device b has, and all more than device c has."""
    found = seats(tmp_path, parts=False, number=4)
    found.deals = 2
    found.lacks = lambda number, profile: (
        "too little" if profile.name == "c" or (profile.name == "b" and number % 2) else None
    )
    given = {name: found.seat("", device(name)) for name in "cbad"}
    assert given == {"c": "too little", "b": 0, "a": 1, "d": 2}
    assert found.short == {"c": "too little"}
    assert found.settle() == {1: 0, 0: "too little", 2: 1}
    assert {client: found.taken[client].name for client in found.taken} == {0: "a", 1: "d"}
    assert found.number == 2 and found.short == {"c": "too little", "b": "too little"}
    told = (tmp_path / "guests.jsonl").read_text().splitlines()
    assert json.loads(told[-1]) == {"device": "b", "text": "too little"}


def test_where_all_lack_memory_there_is_no_run(tmp_path):
    found = seats(tmp_path, parts=False)
    found.lacks = lambda number, profile: "too little"
    found.seat("", device("a"))
    with pytest.raises(ConfigError, match="can take part; 'a': too little"):
        found.settle()
    found.lacks = lambda number, profile: None  # it came back with more
    assert found.seat("", device("a")) == 0 and not found.short
