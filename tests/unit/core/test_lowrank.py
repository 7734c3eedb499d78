"""Products of low-rank factors against the dense matrices that are never made."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tesserafl.core.axis import LowRank, Tie, Width
from tesserafl.core.errors import ConfigError, UpdateError
from tesserafl.core.lowrank import (
    Collected,
    aggregation_error,
    check_adapted,
    factors_of,
    product_norm,
    stacked,
    truncated,
)
from tesserafl.core.messages import Update
from tesserafl.core.model import Model
from tesserafl.core.params import Params, sha256
from tesserafl.core.submodel import cut

fast = settings(deadline=None, max_examples=60)
small = st.integers(1, 6)
PAIR = LowRank("down", "up", 1.0)


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def model_of(rank: int = 4, inputs: int = 5, outputs: int = 3, pairs: int = 2) -> Model:
    """Pairs `0.down`, `0.up` and so on, and a vector `bias` that is no factor."""
    shapes: dict[str, tuple[int, ...]] = {"bias": (outputs,)}
    ties: dict[str, tuple[Tie | None, ...]] = {"bias": (None,)}
    for i in range(pairs):
        shapes |= {f"{i}.down": (rank, inputs + i), f"{i}.up": (outputs + i, rank)}
        ties |= {f"{i}.down": (Tie("rank", (1,)), None), f"{i}.up": (None, Tie("rank", (1,)))}
    return Model(
        build=lambda sizes: nn.Identity(),
        sizes={"rank": rank},
        widths={"rank": Width(units=rank, quantum=1, size="rank")},
        depths={},
        ties=ties,
        shapes=shapes,
        low_rank=tuple(LowRank(f"{i}.down", f"{i}.up", 1.0) for i in range(pairs)),
    )


def params_of(model: Model, seed: int) -> Params:
    return {n: drawn(seed + i, *shape) for i, (n, shape) in enumerate(model.shapes.items())}


def shares_of(ranks: Sequence[int], inputs: int, outputs: int) -> list[tuple[Params, float]]:
    """Factors of unequal ranks, each with a share of the weight."""
    total = sum(range(1, len(ranks) + 1))
    return [
        (
            {"down": drawn(2 * i, rank, inputs), "up": drawn(2 * i + 1, outputs, rank)},
            (i + 1) / total,
        )
        for i, rank in enumerate(ranks)
    ]


def dense(shares: Sequence[tuple[Params, float]], pair: LowRank = PAIR) -> Tensor:
    products = [share * v[pair.up].double() @ v[pair.down].double() for v, share in shares]
    return torch.stack(products).sum(dim=0)


# --- Products -------------------------------------------------------------------------------------


def test_a_stack_by_hand() -> None:
    # 1/4 (1 2)^T (4 0) + 3/4 (0 1)^T (0 4) = (1 0; 2 3)
    shares = [
        ({"up": torch.tensor([[1.0], [2.0]]), "down": torch.tensor([[4.0, 0.0]])}, 0.25),
        ({"up": torch.tensor([[0.0], [1.0]]), "down": torch.tensor([[0.0, 4.0]])}, 0.75),
    ]
    up, down = stacked(PAIR, shares)
    assert up.tolist() == [[0.25, 0.0], [0.5, 0.75]]
    assert down.tolist() == [[4.0, 0.0], [0.0, 4.0]]
    assert (up @ down).tolist() == [[1.0, 0.0], [2.0, 3.0]]


@fast
@given(st.lists(small, min_size=1, max_size=4), small, small)
def test_the_product_of_stacks_is_the_mean_product(
    ranks: list[int], inputs: int, outputs: int
) -> None:
    shares = shares_of(ranks, inputs, outputs)
    up, down = stacked(PAIR, shares)
    assert up.shape == (outputs, sum(ranks))
    assert down.shape == (sum(ranks), inputs)
    assert up.dtype == down.dtype == torch.float64
    torch.testing.assert_close(up @ down, dense(shares), rtol=1e-12, atol=1e-12)


@fast
@given(small, small, small)
def test_the_norm_of_a_product(rank: int, inputs: int, outputs: int) -> None:
    up, down = drawn(0, outputs, rank).double(), drawn(1, rank, inputs).double()
    norm = product_norm(up, down)
    torch.testing.assert_close(norm, torch.linalg.norm(up @ down), rtol=1e-10, atol=1e-12)


def test_a_norm_by_hand_and_of_what_cancels() -> None:
    # (3)(1 0) + (4)(0 1) = (3 4)
    assert float(product_norm(torch.tensor([[3.0, 4.0]]), torch.eye(2))) == 5.0
    # u v - u v: rounding may leave a little less than nothing
    up, down = drawn(0, 50, 8), drawn(1, 8, 50)
    norm = product_norm(torch.cat([up, -up], dim=1), torch.cat([down, down]))
    assert 0.0 <= float(norm) < 1e-3 * float(product_norm(up, down))


# --- Truncation -----------------------------------------------------------------------------------


@fast
@given(small, small, small, small)
def test_a_truncation_is_the_best_of_its_rank(
    ranks: int, rank: int, inputs: int, outputs: int
) -> None:
    up, down = drawn(0, outputs, ranks).double(), drawn(1, ranks, inputs).double()
    old = drawn(2, rank, inputs)
    new_up, new_down = truncated(up, down, old)
    assert (new_up.shape, new_down.shape) == ((outputs, rank), (rank, inputs))
    u, s, vh = torch.linalg.svd(up @ down, full_matrices=False)
    best = u[:, :rank] * s[:rank] @ vh[:rank]
    torch.testing.assert_close(new_up @ new_down, best, rtol=0, atol=1e-9 * float(s[0]))
    # The singular values are in `up`, in order; rows of `down` are unit vectors.
    kept = min(rank, ranks, inputs, outputs)
    torch.testing.assert_close(
        new_up.norm(dim=0)[:kept], s[:kept], rtol=1e-9, atol=1e-9 * float(s[0])
    )
    eye = torch.eye(kept, dtype=torch.float64)
    torch.testing.assert_close(new_down[:kept] @ new_down[:kept].T, eye, rtol=0, atol=1e-10)
    # What is free: nothing yet, and free to learn
    assert torch.equal(new_down[kept:], old[kept:].double())
    assert not bool(new_up[:, kept:].any())


def test_a_truncation_by_hand() -> None:
    # diag(1, 3) at rank 1: (0 3)^T (0 1), up to the sign
    up, down = truncated(
        torch.diag(torch.tensor([1.0, 3.0])).double(), torch.eye(2).double(), torch.ones(1, 2)
    )
    torch.testing.assert_close(up.abs(), torch.tensor([[0.0], [3.0]]).double())
    torch.testing.assert_close(down.abs(), torch.tensor([[0.0, 1.0]]).double())


@pytest.mark.parametrize("rank", [1, 3, 5])
@pytest.mark.parametrize("real", [0, 1, 2])
def test_zero_singular_values_are_no_directions(rank: int, real: int) -> None:
    # The stack has six columns, but the product has rank `real`.
    up, down = drawn(0, 7, 6).double(), drawn(1, 6, 8).double()
    up = up[:, :real] @ drawn(2, real, 6).double()
    old = drawn(3, rank, 8)
    new_up, new_down = truncated(up, down, old)
    if real <= rank:
        torch.testing.assert_close(new_up @ new_down, up @ down, rtol=0, atol=1e-10)
    assert torch.equal(new_down[real:], old[real:].double())
    assert not bool(new_up[:, real:].any())


def test_arguments_are_left_alone() -> None:
    given = (drawn(0, 4, 3).double(), drawn(1, 3, 5).double(), drawn(2, 6, 5).double())
    before = [tensor.clone() for tensor in given]
    truncated(*given)
    assert all(torch.equal(one, other) for one, other in zip(given, before, strict=True))


# --- The error of an aggregate --------------------------------------------------------------------


@fast
@given(st.lists(small, min_size=1, max_size=4), small, small)
def test_the_error_is_that_of_dense_matrices(ranks: list[int], inputs: int, outputs: int) -> None:
    model = model_of(6, inputs, outputs, pairs=2)
    params, shares = params_of(model, 99), []
    for i, rank in enumerate(ranks):
        factors: Params = {}
        for down, up, *_ in model.low_rank:
            factors[down] = drawn(3 * i, rank, model.shapes[down][1])
            factors[up] = drawn(3 * i + 1, model.shapes[up][0], rank)
        shares.append((factors, 1 / len(ranks)))
    off = size = 0.0
    for pair in model.low_rank:
        mean = dense(shares, pair)
        found = params[pair.up].double() @ params[pair.down].double()
        off += float((found - mean).square().sum())
        size += float(mean.square().sum())
    error = aggregation_error(model, params, shares)
    assert error == pytest.approx((off / size) ** 0.5, rel=1e-6)


def test_an_error_by_hand() -> None:
    # New product 3, mean product 1/2 2 x 2 + 1/2 4 x 1 = 4: 1/4
    model = model_of(1, 1, 1, pairs=1)
    one, two, three, four = (torch.full((1, 1), float(n)) for n in (1, 2, 3, 4))
    shares = [({"0.up": two, "0.down": two}, 0.5), ({"0.up": four, "0.down": one}, 0.5)]
    assert aggregation_error(model, {"0.up": three, "0.down": one}, shares) == 0.25
    assert aggregation_error(model, {"0.up": two, "0.down": two}, shares) == 0.0


def test_a_pair_counts_for_those_that_trained_it() -> None:
    """Shares are of those alone; a pair that nobody trained is left out."""
    model = model_of(1, 1, 1, pairs=3)

    def factors(pair: int, up: float) -> Params:
        shapes = {name: model.shapes[f"{pair}.{name}"] for name in ("up", "down")}
        return {
            f"{pair}.up": torch.full(shapes["up"], up),
            f"{pair}.down": torch.ones(shapes["down"]),
        }

    # The first pair: mean 1/4 1 + 3/4 5 = 4. The second was trained by the second client alone.
    shares = [(factors(0, 1.0), 0.25), (factors(0, 5.0) | factors(1, 1.0), 0.75)]
    exact = factors(0, 4.0) | factors(1, 1.0)
    # What the third is, which nobody trained, is of no interest.
    assert aggregation_error(model, exact | factors(2, 99.0), shares) == 0.0
    # Off by 1 of 4 in the first, by nothing in the second, whose product has 4 entries of 1.
    off = exact | factors(0, 3.0) | factors(2, 99.0)
    assert aggregation_error(model, off, shares) == pytest.approx((1 / (16 + 4)) ** 0.5)
    # Who trained nothing changes nothing; if that is everybody, there is no error.
    assert aggregation_error(model, exact, [(exact, 0.5), ({}, 0.5)]) == 0.0
    assert aggregation_error(model, exact | factors(2, 0.0), [({}, 1.0)]) is None


def test_where_the_mean_is_zero_there_is_no_relative_error() -> None:
    model = model_of(pairs=1)
    params = params_of(model, 0)
    nothing = {"0.down": params["0.down"], "0.up": torch.zeros_like(params["0.up"])}
    assert aggregation_error(model, params, [(nothing, 1.0)]) is None


# --- What is kept as updates pass by --------------------------------------------------------------

RANKS = (4, 2, 3)
WEIGHTS = {0: 1, 1: 2, 2: 5}


def round_of(model: Model) -> tuple[Params, list[Update], dict[int, Params]]:
    """Parameters of before, updates, and every client's trained factors."""
    params, updates, trained = params_of(model, 50), [], {}
    for client, rank in enumerate(RANKS):
        submodel = model.slice({"rank": range(rank)})
        small = cut(params, submodel)
        delta = {n: drawn(7 * client + i, *t.shape) for i, (n, t) in enumerate(small.items())}
        own = factors_of(model)
        trained[client] = {n: t + delta[n] for n, t in small.items() if n in own}
        updates.append(
            Update(
                round=0,
                client=client,
                submodel=submodel,
                delta=delta,
                num_examples=1,
                num_steps=1,
                metrics={},
            )
        )
    return params, updates, trained


def reusing(updates: Sequence[Update]) -> Iterator[Update]:
    """As engines do: an update's memory serves the next one."""
    for update in updates:
        passed = replace(update, delta={n: t.clone() for n, t in update.delta.items()})
        yield passed
        for tensor in passed.delta.values():
            tensor.fill_(99.0)


def same(found: Params, expected: Params) -> bool:
    return sha256(found) == sha256(expected)


def test_a_watcher_passes_updates_on_as_they_are() -> None:
    model = model_of()
    params, updates, trained = round_of(model)
    before, digests = sha256(params), [sha256(update.delta) for update in updates]
    kept = Collected(model, WEIGHTS)
    passed = list(kept.watching(params, updates))
    assert all(one is other for one, other in zip(passed, updates, strict=True))
    assert [sha256(update.delta) for update in updates] == digests
    assert sha256(params) == before
    assert kept.values.keys() == trained.keys()
    assert all(same(kept.values[client], trained[client]) for client in trained)


def test_a_watcher_takes_updates_one_at_a_time() -> None:
    model = model_of()
    params, updates, _ = round_of(model)
    asked: list[int] = []

    def live() -> Iterator[Update]:
        for update in updates:
            asked.append(update.client)
            yield update

    passing = Collected(model, WEIGHTS).watching(params, live())
    for number in range(len(updates)):
        assert next(passing).client == number
        assert asked == list(range(number + 1))


@pytest.mark.parametrize("way", ["watching", "apart"])
def test_what_is_kept_outlasts_the_update(way: str) -> None:
    model = model_of()
    params, updates, trained = round_of(model)
    kept = Collected(model, WEIGHTS)
    for _ in getattr(kept, way)(params, reusing(updates)):
        pass
    for tensor in params.values():  # nor is it a view of what was there before
        tensor.fill_(77.0)
    assert all(same(kept.values[client], trained[client]) for client in trained)


def test_updates_come_apart_into_factors_and_the_rest() -> None:
    model = model_of()
    params, updates, trained = round_of(model)
    kept = Collected(model, WEIGHTS)
    for update, rest in zip(updates, kept.apart(params, updates), strict=True):
        assert rest.delta.keys() == {"bias"}
        assert rest.delta["bias"] is update.delta["bias"]
        assert replace(rest, delta=update.delta) == update
    assert all(same(kept.values[client], trained[client]) for client in trained)


def test_a_factor_that_is_not_reported_is_the_one_that_was_sent() -> None:
    model = model_of(pairs=1)
    params, updates, trained = round_of(model)
    silent = [
        replace(u, delta={n: d for n, d in u.delta.items() if n != "0.down"}) for u in updates
    ]
    kept = Collected(model, WEIGHTS)
    list(kept.watching(params, silent))
    for client, rank in enumerate(RANKS):
        assert torch.equal(kept.values[client]["0.down"], params["0.down"][:rank])
        assert torch.equal(kept.values[client]["0.up"], trained[client]["0.up"])


def test_pairs_that_a_client_did_not_train_are_not_kept() -> None:
    """Clients that train one block, both, and none."""
    model = model_of()
    params, updates, trained = round_of(model)
    mine = {0: ("0.",), 1: ("0.", "1."), 2: ()}
    partial = [
        replace(
            u, delta={n: d for n, d in u.delta.items() if n.startswith(("bias", *mine[u.client]))}
        )
        for u in updates
    ]
    for way in ("watching", "apart"):
        kept = Collected(model, WEIGHTS)
        list(getattr(kept, way)(params, partial))
        for client, prefixes in mine.items():
            names = {n for n in trained[client] if n.startswith(prefixes)}
            assert kept.values[client].keys() == names
            assert same(kept.values[client], {n: trained[client][n] for n in names})
    # A product is the mean over its own clients: weights 1 and 2, and client 1 alone.
    means = {
        "0": [(trained[0], 1 / 3), (trained[1], 2 / 3)],
        "1": [(trained[1], 1.0)],
    }
    difference = size = 0.0
    for pair in model.low_rank:
        mean = dense(means[pair.down[0]], pair)
        difference += float(
            (params[pair.up].double() @ params[pair.down].double() - mean).square().sum()
        )
        size += float(mean.square().sum())
    error = aggregation_error(model, params, kept.shares)
    assert error == pytest.approx((difference / size) ** 0.5, rel=1e-6)


def test_shares_go_by_the_weights_of_those_that_answered() -> None:
    model = model_of()
    params, updates, trained = round_of(model)
    kept = Collected(model, WEIGHTS)
    list(kept.watching(params, [updates[2], updates[0]]))
    assert [share for _, share in kept.shares] == [1 / 6, 5 / 6]
    values = [values for values, _ in kept.shares]
    assert [same(v, trained[c]) for v, c in zip(values, (0, 2), strict=True)] == [True, True]
    assert Collected(model, WEIGHTS).shares == []


def test_the_order_of_updates_changes_no_bit() -> None:
    model = model_of()
    params, updates, _ = round_of(model)
    found = set()
    for order in itertools.permutations(updates):
        kept = Collected(model, WEIGHTS)
        list(kept.watching(params, order))
        pair = model.low_rank[1]
        up, down = truncated(*stacked(pair, kept.shares), params[pair.down])
        error = aggregation_error(model, params, kept.shares)
        found.add((sha256({"up": up, "down": down}), error))
    assert len(found) == 1


@pytest.mark.parametrize("way", ["watching", "apart"])
@pytest.mark.parametrize("name", ["0.up", "1.down"])
def test_factors_that_are_not_finite_are_refused(way: str, name: str) -> None:
    model = model_of()
    params, updates, _ = round_of(model)
    broken = updates[1].delta | {name: torch.full_like(updates[1].delta[name], torch.nan)}
    kept = Collected(model, WEIGHTS)
    passing = getattr(kept, way)(params, [updates[0], replace(updates[1], delta=broken)])
    next(passing)
    with pytest.raises(UpdateError, match="finite"):
        next(passing)
    assert kept.values.keys() == {0}


def test_only_a_model_with_adapters_is_adapted() -> None:
    model = model_of()
    assert factors_of(model) == {"0.down", "0.up", "1.down", "1.up"}
    check_adapted(model, "fedit")
    with pytest.raises(ConfigError, match=r"fedit averages low-rank adapters.*--model lora"):
        check_adapted(replace(model, low_rank=()), "fedit")
