"""Compiled, eager and plain formulas give the same bits; blocks leave no full-size temporary."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tesserafl.core import kernels
from tesserafl.core import params as params_module
from tesserafl.core.coverage import Coverage
from tesserafl.core.errors import UpdateError
from tesserafl.core.exactsum import ExactSum
from tesserafl.core.layout import layout_of, weights_of
from tesserafl.core.params import Params, sha256
from tesserafl.core.submodel import Index, SubModel, View, cut, index_tensor, merge, whole
from tesserafl.methods import _broadcast

pytest.importorskip("numba")
some = settings(deadline=None, max_examples=60)
FORMS = ("compiled", "eager", "blocks of 4")


@contextmanager
def form(which: str) -> Iterator[None]:
    """One of the forms that the loops have, whatever the model's size."""
    with pytest.MonkeyPatch.context() as patch:
        if which == "compiled":
            patch.setattr(kernels, "MIN_ENTRIES", 0)
        else:
            patch.setattr(kernels, "_load", lambda: None)
        if which == "blocks of 4":
            patch.setattr(kernels, "BLOCK", 4)
            patch.setattr(params_module, "MOST_PACKED", 0)
        yield


@st.composite
def indices(draw: st.DrawFn, size: int) -> Index:
    """A slice, a window that wraps in cyclic or ascending order, or scattered entries."""
    kind = draw(st.sampled_from(["whole", "slice", "wrapped", "sorted", "scattered"]))
    count = draw(st.integers(1, size))
    if kind == "whole":
        return slice(0, size)
    if kind == "slice":
        start = draw(st.integers(0, size - count))
        return slice(start, start + count)
    if kind == "scattered":
        return torch.tensor(draw(st.permutations(range(size)))[:count])
    cyclic = (torch.arange(count) + draw(st.integers(0, size - 1))) % size
    return cyclic if kind == "wrapped" else cyclic.sort().values


@st.composite
def cohorts(draw: st.DrawFn) -> tuple[Params, list[tuple[SubModel, Params, int]]]:
    """A tensor of 1 to 4 dimensions with a vector, and some clients' parts, deltas and weights."""
    shape = tuple(draw(st.lists(st.integers(1, 6), min_size=1, max_size=4)))
    kind = draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
    draws = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    params = {
        "w": torch.randn(shape, generator=draws).to(kind),
        "b": -torch.zeros(3).to(kind),
    }
    clients = []
    for _ in range(draw(st.integers(1, 4))):
        views = {
            "w": View("w", tuple(draw(indices(size)) for size in shape)),
            "b": View("b", (draw(indices(3)),)),
        }
        spread = draw(st.sampled_from([1e-40, 1e-9, 0.01, 20.0]))
        delta = {
            name: (torch.randn(view.shape, generator=draws) * spread).clamp(-256, 256).to(kind)
            for name, view in views.items()
        }
        clients.append((SubModel({}, views), delta, draw(st.integers(1, 1000))))
    return params, clients


Results = tuple[str, str, str, str]


def results(params: Params, clients: list[tuple[SubModel, Params, int]]) -> Results:
    """Bits of what was cut, of the sums, the merged parameters and the coverage."""
    total, coverage = ExactSum(max_weight=5000), Coverage({n: t.shape for n, t in params.items()})
    parts = {}
    for number, (submodel, delta, weight) in enumerate(clients):
        parts |= {f"{number}{name}": part for name, part in cut(params, submodel).items()}
        total.fold(submodel, delta, weight, params)
    coverage.add(submodel for submodel, _, _ in clients)
    return sha256(parts), sha256(total.sums), sha256(merge(params, total)), sha256(coverage.counts)


def by_formula(params: Params, clients: list[tuple[SubModel, Params, int]]) -> Results:
    """The same from the definitions, with NumPy's own indexing and whole tensors."""
    scale, parts = ExactSum(max_weight=5000).scale, {}
    sums = {n: torch.zeros(t.shape, dtype=torch.int64) for n, t in params.items()}
    weights = {n: torch.zeros(t.shape, dtype=torch.int64) for n, t in params.items()}
    counts = {n: torch.zeros(t.shape, dtype=torch.int32) for n, t in params.items()}
    for number, (submodel, delta, weight) in enumerate(clients):
        for name, view in submodel.views.items():
            mesh = np.ix_(*(index_tensor(index).numpy() for index in view.index))
            parts[f"{number}{name}"] = params[name][mesh]
            fixed = (delta[name].double() * 2.0**scale).round().to(torch.int64) * weight
            sums[name].numpy()[mesh] += fixed.numpy()
            weights[name].numpy()[mesh] += weight
            counts[name].numpy()[mesh] += 1
    merged = {}
    for name, old in params.items():
        mean = sums[name].double().mul_(2.0**-scale).div_(weights[name].clamp(min=1))
        merged[name] = (old.double() + mean).to(old.dtype)
    return sha256(parts), sha256(sums), sha256(merged), sha256(counts)


@given(cohorts())
@some
def test_every_form_gives_the_bits_of_the_formulas(
    cohort: tuple[Params, list[tuple[SubModel, Params, int]]],
) -> None:
    expected = by_formula(*cohort)
    for which in FORMS:
        with form(which):
            assert results(*cohort) == expected, which


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("shape", [(1500, 1024), (400, 500, 3, 3), (2_000_003,)])
def test_large_tensors_in_every_form(shape: tuple[int, ...], threads: int) -> None:
    draws = torch.Generator().manual_seed(0)
    params = {"w": torch.randn(shape, generator=draws)}

    def window(size: int, start: int) -> Tensor:
        return ((torch.arange(size // 2) + start) % size).sort().values

    clients = []
    for start in (1, shape[0] - 3):
        index = [slice(0, size) for size in shape]
        cuts = [window(size, start % size) for size in shape[:2]]
        view = View("w", (*cuts, *index[2:]))
        clients.append((SubModel({}, {"w": view}), {"w": view.read(params["w"])}, start))
    everything = whole({}, {"w": shape})
    clients.append((everything, {"w": torch.randn(shape, generator=draws)}, 7))
    params_and_clients = (params, [(s, d, min(w, 900)) for s, d, w in clients])
    expected, before = by_formula(*params_and_clients), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for which in FORMS[:2]:
            with form(which):
                assert results(*params_and_clients) == expected, which
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, 258.0, -300.0])
@pytest.mark.parametrize("which", FORMS)
@pytest.mark.parametrize("kind", [torch.float32, torch.float64, torch.bfloat16])
def test_a_fold_that_is_refused_takes_back_what_it_added(
    kind: torch.dtype, which: str, bad: float
) -> None:
    params = {"a": torch.zeros(6, 5), "b": torch.zeros(4), "c": torch.zeros(3)}
    everything = whole({}, {name: tuple(p.shape) for name, p in params.items()})
    delta = {name: torch.randn(p.shape).to(kind) for name, p in params.items()}
    with form(which):
        total = ExactSum(max_weight=100)
        total.fold(everything, {"a": delta["a"]}, 3, params)
        before = sha256(total.sums), set(total.sums)
        spoilt = {name: tensor.clone() for name, tensor in delta.items()}
        spoilt["b"][2] = bad
        with pytest.raises(UpdateError, match="'b' reaches"):
            total.fold(everything, spoilt, 5, params)
        assert (sha256(total.sums), set(total.sums), total.weight) == (*before, 3)
        total.fold(everything, delta, 97, params)


def test_a_wrapped_window_is_two_runs_and_whole_trailing_dimensions_belong_to_them() -> None:
    index = (torch.tensor([0, 5]), torch.tensor([0, 1, 6, 7]), slice(0, 3), slice(0, 3))
    layout = layout_of(index, (6, 8, 3, 3))
    assert layout.rows.tolist() == [0, 5 * 72] and layout.planes.tolist() == [0]
    assert layout.starts.tolist() == [0, 54] and layout.lengths.tolist() == [18, 18]


def test_a_table_that_would_be_large_is_made_for_some_rows_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    draws = torch.Generator().manual_seed(0)
    views = [
        (tuple(torch.randperm(20, generator=draws)[:9] for _ in range(2)), weight)
        for weight in (1, 2, 4, 8, 16, 32)
    ]
    expected = np.zeros((20, 20), np.int64)
    for index, weight in views:
        expected[np.ix_(*(i.numpy() for i in index))] += weight
    for table in (1 << 18, 50, 1):
        monkeypatch.setattr("tesserafl.core.layout._TABLE", table)
        blocks = list(weights_of(views, (20, 20)))
        assert (len(blocks) > 1) == (table < 1 << 18)
        pieces = list(kernels.expanded(blocks))
        assert [low for low, _, _ in pieces] == [0, *(high for _, high, _ in pieces[:-1])]
        assert np.concatenate([w for _, _, w in pieces]).tolist() == expected.reshape(-1).tolist()


@pytest.mark.parametrize("of_updates", [True, False])
@pytest.mark.parametrize("grouped", [(True, True), (True, False), (False, True), (False, False)])
@pytest.mark.parametrize("block", [1, 7, 1000, 4096])
def test_the_broadcast_in_blocks_has_the_same_bits(
    monkeypatch: pytest.MonkeyPatch, block: int, grouped: tuple[bool, bool], of_updates: bool
) -> None:
    draws = torch.Generator().manual_seed(0)
    shape = (60, 52, 3)
    order = [torch.randperm(n, generator=draws).reshape(4, -1) for n in shape[:2]]
    groups = [*(o if g else None for o, g in zip(order, grouped, strict=True)), None]
    old, mean = torch.randn(shape, generator=draws), torch.randn(shape, generator=draws).double()
    weights = torch.randint(0, 3, shape, generator=draws)

    def spread() -> Tensor:
        return _broadcast.broadcast_mean(
            old, mean, weights, groups, beta=0.3, of_updates=of_updates, similarity=False
        )

    at_once = spread()
    monkeypatch.setattr(_broadcast, "BLOCK", block)
    assert torch.equal(spread(), at_once)


MEMORY = """
import sys, threading, torch
from tesserafl.core import kernels
from tesserafl.core import params as params_module
from tesserafl.core.exactsum import ExactSum
from tesserafl.core.submodel import View, SubModel, merge
torch.set_num_threads(1)
if sys.argv[1] == "eager":
    kernels._load = lambda: None
rows = 1 << 13

def peak():
    lines = open("/proc/self/status").read().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024

def run(rows):
    shape = (rows, 2048)
    params, total = {"w": torch.zeros(shape)}, ExactSum(max_weight=9)
    for start in range(3):
        half = ((torch.arange(rows // 2) + start * rows // 3) % rows).sort().values
        view = View("w", (half, slice(0, 2048)))
        total.fold(SubModel({}, {"w": view}), {"w": torch.ones(view.shape)}, 2, params)
    return params, total

merge(*run(512))  # code loaded
params, total = run(rows)
open("/proc/self/clear_refs", "w").write("5")
before = peak()
new = merge(params, total)
print(peak() - before, new["w"].nbytes / 2**20)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
@pytest.mark.parametrize("which", ["compiled", "eager"])
def test_merge_needs_no_memory_beyond_its_result(which: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, which], capture_output=True, text=True, check=True
    )
    grown, result = map(float, done.stdout.split())
    assert result == 64.0
    assert grown < result + 24.0  # MiB; one more full-size tensor of doubles would be 128


def test_a_small_model_does_not_load_numba() -> None:
    program = (
        "import sys, torch; from tesserafl.core.exactsum import ExactSum; "
        "from tesserafl.core.submodel import cut, merge, whole; p = {'w': torch.ones(9)}; "
        "s = whole({}, {'w': (9,)}); t = ExactSum(1); t.fold(s, cut(p, s), 1, p); merge(p, t); "
        "import tesserafl.cli; assert 'numba' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize("which", FORMS)
def test_a_grid_finer_than_float32_reaches_is_exact(which: str) -> None:
    params, everything = {"w": torch.zeros(3)}, whole({}, {"w": (3,)})
    with form(which):
        total = ExactSum(max_weight=1, max_entry=2.0**-100)
        assert total.scale > 127
        total.fold(everything, {"w": torch.tensor([2.0**-100, -(2.0**-101), 0.0])}, 1, params)
    assert total.sums["w"].tolist() == [2 ** (total.scale - 100), -(2 ** (total.scale - 101)), 0]
