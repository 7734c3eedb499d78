"""Randomness is named by its purpose, and the global generators come back as they were."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tesserafl.core import seeds

KEYS = st.lists(st.integers(-5, 5) | st.sampled_from(["", "1", "batches", "a, b"]), max_size=4)


@given(st.integers(0, 3), KEYS, st.integers(0, 3), KEYS)
@settings(deadline=None)
def test_two_purposes_share_a_seed_only_if_they_are_the_same(
    seed: int, keys: list[int | str], other_seed: int, other_keys: list[int | str]
) -> None:
    same = (seed, keys) == (other_seed, other_keys)
    assert (seeds.derive(seed, *keys) == seeds.derive(other_seed, *other_keys)) is same


def test_the_order_of_keys_counts_and_numbers_are_not_their_text() -> None:
    orders = {seeds.derive(0, *keys) for keys in itertools.permutations((1, 2, "fit"))}
    assert len(orders) == 6
    assert seeds.derive(0, 1) != seeds.derive(0, "1")


def test_a_seed_is_the_same_on_every_machine_and_fits_63_bits() -> None:
    # The first 8 bytes of sha256(b"(7, 3, 'batches')"), big endian, halved.
    assert seeds.derive(7, 3, "batches") == 5977258356691988545
    assert all(0 <= seeds.derive(0, key) < 2**63 for key in range(200))


def test_generators_of_one_purpose_draw_alike() -> None:
    first, again = seeds.generator(1, 2, "fit"), seeds.generator(1, 2, "fit")
    other = seeds.generator(1, 3, "fit")
    draws = [torch.rand(4, generator=generator) for generator in (first, again, other)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_seeded_decides_global_draws_and_restores_the_generator() -> None:
    before = torch.get_rng_state()
    with seeds.seeded(1, "init"):
        first = torch.rand(4)
        inside = torch.get_rng_state()
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(inside, before)
    torch.rand(1)  # what happened outside in the meantime does not count
    with seeds.seeded(1, "init"):
        assert torch.equal(torch.rand(4), first)


def test_seeded_restores_the_generator_after_an_error() -> None:
    before = torch.get_rng_state()
    with pytest.raises(KeyError), seeds.seeded(1, "init"):
        torch.rand(1)
        raise KeyError
    assert torch.equal(torch.get_rng_state(), before)


def test_a_generator_leaves_the_global_one_alone() -> None:
    before = torch.get_rng_state()
    torch.rand(3, generator=seeds.generator(5, "cohort"))
    assert torch.equal(torch.get_rng_state(), before)
