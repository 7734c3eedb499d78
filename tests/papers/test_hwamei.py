"""Hwamei by hand: Qi et al., ICDCS 2023, Section 3."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from trees import EDGES, always, experiment, params_of, played, rising, with_policy
from worked import clients, mlp, state_of

from tesserafl.core.errors import ConfigError
from tesserafl.core.params import Params, sha256
from tesserafl.core.policy import Basis, Policy
from tesserafl.core.schedule import Periods, Report, Seen, Situation
from tesserafl.methods import HierFAVG, Hwamei

MODEL = mlp(2)
BASIS = Basis(
    mean={name: torch.zeros(shape) for name, shape in sorted(MODEL.shapes.items())},
    components={
        name: torch.ones(2, *shape) if name == "head.bias" else torch.zeros(2, *shape)
        for name, shape in sorted(MODEL.shapes.items())
    },
    scale=1.0,
)


def device(client: int, step: float) -> Seen:
    return Seen(
        client=client,
        steps=4,
        compute_seconds=4 * step,
        link_seconds=1.0,
        joules=8.0,
        change=1.0,
    )


def situation(*names: str, horizon: float | None = 100.0) -> Situation:
    one, two, three = clients(10, 30, 20)
    edges = {EDGES[0]: (one, two), EDGES[1]: (three,)}
    reports = {
        EDGES[0]: Report(
            rounds=1,
            seconds=6.0,
            link_seconds=1.0,
            joules=20.0,
            devices=(device(0, 0.5), device(1, 2.0)),
            sketch=(1.0, -2.0),
        ),
        EDGES[1]: Report(
            rounds=2,
            seconds=24.0,
            link_seconds=8.0,
            joules=5.0,
            devices=(device(2, 1.0),),
            sketch=(0.5, 4.0),
        ),
    }
    return Situation(
        round=1,
        seconds=20.0,
        horizon=horizon,
        accuracy=0.5,
        edges={name: edges[name] for name in names or EDGES},
        reports=reports,
    )


def policy(method: Hwamei) -> Policy:
    actor = method.first_actor(2, EDGES, 0)
    return Policy(method="hwamei", options={}, edges=EDGES, actor=actor, basis=BASIS)


def test_the_state_matrix() -> None:
    # Rows: the cloud and both edges; columns: two coordinates, then k, T_re, A, or T^SGD, T^ec, E.
    # Averages took 6 and 12 s, sqrt(72) in the mean; edges took 20 and 5 J, 10 in the mean.
    method = Hwamei()
    state = state_of(MODEL, round=1, rounds=10, head_bias=[1.0, 0.5])
    (seen,) = method.observe(policy(method), MODEL, state, situation())
    mean = 72**0.5
    expected = [
        [math.asinh(1.5), math.asinh(1.5), 0.1, 0.8, 0.5],
        [math.asinh(1), math.asinh(-2), math.log(6 / mean), math.log1p(1 / mean), math.log(2)],
        [math.asinh(0.5), math.asinh(4), math.log(12 / mean), math.log1p(8 / mean), -math.log(2)],
    ]
    assert seen.context.view(3, 5).tolist() == [pytest.approx(row) for row in expected]
    # It is what Tomtit's central critic sees, too.
    assert torch.equal(seen.context, method.overview(policy(method), state, situation()))
    assert (seen.agent, seen.rows.numel(), len(seen.times)) == (0, 0, 2)


def chooses(method: Hwamei, *choices: tuple[int, int]) -> Params:
    """An actor that gives every edge these averages and units, whatever it sees."""
    actor = method.first_actor(2, EDGES, 0)
    for name, tensor in actor.items():
        actor[name] = torch.zeros_like(tensor)
    for edge, (rounds, steps) in enumerate(choices):
        for name, choice in (("rounds", rounds), ("steps", steps)):
            own = actor[f"{name}.0.shift"].view(len(choices), -1)[edge]
            own[:] = rising(torch.eye(len(own))[choice - 1])
    return actor


def test_one_agent_chooses_for_every_edge(tmp_path: Path) -> None:
    method = Hwamei(unit=2)
    method = with_policy(method, BASIS, chooses(method, (3, 4), (1, 9)), tmp_path)  # type: ignore[assignment]
    state = state_of(MODEL)
    periods = method.periods(MODEL, state, situation(horizon=None))
    assert periods == {
        EDGES[0]: Periods(rounds=3, steps={0: 8, 1: 8}),
        EDGES[1]: Periods(rounds=1, steps={2: 18}),
    }
    # An edge that takes no part in the round changes nothing for the other.
    alone = method.periods(MODEL, state, situation(EDGES[1], horizon=None))
    assert alone == {EDGES[1]: periods[EDGES[1]]}
    # 30 s are left. Edge 0: 3 (2 s x 2 gamma_1 + 1) + 1 <= 30, so gamma_1 <= 2: the smallest of
    # equals, one. Edge 1: 2 gamma_1 + 1 + 8 <= 30, so all but the tenth.
    late = method.periods(MODEL, state, situation(horizon=50.0))
    assert late == {
        EDGES[0]: Periods(rounds=3, steps={0: 2, 1: 2}),
        EDGES[1]: Periods(rounds=1, steps={2: 18}),
    }


def test_equal_periods_are_hierfavg_to_the_bit(tmp_path: Path) -> None:
    method = always(Hwamei(first_steps=3, first_rounds=2), 2, 3, tmp_path)
    agent = played(experiment(method))
    plain = played(experiment(HierFAVG(local_steps=3, edge_rounds=2)))
    assert sha256(params_of(agent)) == sha256(params_of(plain))
    assert agent.timed.now == plain.timed.now


def test_a_tree_with_other_edges_is_refused() -> None:
    method = Hwamei()
    people = tuple(clients(1))
    other = Situation(
        round=1,
        seconds=0.0,
        horizon=None,
        accuracy=None,
        edges={"annex": people},
        reports=situation().reports,
    )
    with pytest.raises(ConfigError, match=r"'annex' is none of those .* \(edge-0, edge-1\)"):
        method.observe(policy(method), MODEL, state_of(MODEL), other)
