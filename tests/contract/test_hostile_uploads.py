"""Uploads that an enemy wrote: each is refused by name, and costs nothing but its own bytes."""

from __future__ import annotations

import gc
import json
import random
import time
from collections import Counter
from pathlib import Path

import hostile
import pytest

from tesserafl.core.params import sha256

CASES = hostile.cases()
CHANGES = hostile.changes()
each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


@each_case
def test_what_an_honest_client_sends_is_accepted(case: hostile.Case) -> None:
    hostile.must_be_honest(case, case.receive(case.honest))
    assert hostile.Message.of(case.honest).bytes()  # what the changes start from is whole
    hostile.must_be_honest(case, case.receive(hostile.Message.of(case.honest).bytes()))


def attack(count: int, seed: int) -> tuple[Counter[tuple[str, str]], float]:
    """Send so many malformed uploads; (kind, outcome) -> how many, and the slowest's seconds."""
    found: Counter[tuple[str, str]] = Counter()
    kinds, slowest = sorted(CHANGES), 0.0
    for number in range(count):
        kind, case = kinds[number % len(kinds)], CASES[(number // len(kinds)) % len(CASES)]
        data = CHANGES[kind](random.Random(seed * 1_000_003 + number), case)
        begun = time.perf_counter()
        try:
            update = case.receive(data)
        except hostile.REFUSED as error:
            assert 0 < len(str(error)) < 2000 and str(error).isprintable(), (kind, number)
            found[kind, type(error).__name__] += 1
        else:
            hostile.must_be_honest(case, update)
            found[kind, "accepted"] += 1
        slowest = max(slowest, time.perf_counter() - begun)
    return found, slowest


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


NEVER_WELL_FORMED = {
    "truncated",
    "another client's",
    "another round's",
    "type sent",
    "tensors missing",
    "keys twice",
}


def must_hold(found: Counter[tuple[str, str]]) -> None:
    assert {kind for kind, _ in found} == set(CHANGES)
    for kind in CHANGES:
        refused = found[kind, "MessageError"] + found[kind, "UpdateError"]
        assert refused, f"no upload of kind {kind!r} was refused"
        assert not (kind in NEVER_WELL_FORMED and found[kind, "accepted"]), kind


def test_malformed_uploads_are_refused_by_name_and_leave_the_model_alone() -> None:
    before = [sha256(case.state.params) for case in CASES]
    found, _ = attack(2000, seed=1)
    must_hold(found)
    assert [sha256(case.state.params) for case in CASES] == before


@pytest.mark.slow
def test_a_hundred_thousand_malformed_uploads() -> None:
    attack(2000, seed=2)  # caches fill, pools grow
    before = [sha256(case.state.params) for case in CASES]
    gc.collect()
    begun = resident_bytes()
    found, slowest = attack(100_000, seed=3)
    gc.collect()
    grown = resident_bytes() - begun
    table = {kind: {o: n for (k, o), n in found.items() if k == kind} for kind in sorted(CHANGES)}
    print(json.dumps(table, indent=1))
    print(
        f"resident {begun / 2**20:.1f} MiB, grown by {grown / 2**20:.2f}; slowest {slowest:.3f} s"
    )
    must_hold(found)
    assert [sha256(case.state.params) for case in CASES] == before
    assert grown < 16 << 20 and slowest < 5.0
