"""Tomtit by hand: Qi et al., INFOCOM 2024, as docs/methods/tomtit.md reconstructs it."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from trees import (
    EDGES,
    always,
    basis_for,
    experiment,
    params_of,
    played,
    rising,
    with_policy,
)
from worked import TRAINING, adapted, clients, mlp, state_of

from tesserafl.core.axis import Depth
from tesserafl.core.errors import CheckpointError, ConfigError
from tesserafl.core.messages import Update
from tesserafl.core.params import Params, sha256
from tesserafl.core.policy import Basis, Policy
from tesserafl.core.schedule import Periods, Report, Seen, Situation
from tesserafl.core.submodel import SubModel
from tesserafl.methods import EqualFinish, FedAvg, HierFAVG, Tomtit
from tesserafl.methods._actor import ordered
from tesserafl.methods._levels import size_of


def device(client: int, step: float, steps: int = 4, **more: object) -> Seen:
    values = {"link_seconds": 1.0, "joules": 2.0 * steps, "change": 1.0, **more}
    return Seen(client=client, steps=steps, compute_seconds=step * steps, **values)  # type: ignore[arg-type]


def report(seconds: float, link: float, *devices: Seen, rounds: int = 1) -> Report:
    return Report(rounds=rounds, seconds=seconds, link_seconds=link, joules=9.0, devices=devices)


def situation(horizon: float | None = 100.0, **reports: Report) -> Situation:
    one, two, three = clients(10, 30, 20)
    return Situation(
        round=1,
        seconds=20.0,
        horizon=horizon,
        accuracy=0.5,
        edges={"a": (one, two), "b": (three,)},
        reports=reports,
    )


MODEL = mlp(2)
BASIS = Basis(
    mean={name: torch.zeros(shape) for name, shape in sorted(MODEL.shapes.items())},
    components={
        name: torch.ones(1, *shape) if name == "head.bias" else torch.zeros(1, *shape)
        for name, shape in sorted(MODEL.shapes.items())
    },
    scale=0.5,
)
A = report(6.0, 1.0, device(0, 0.5, joules=4.0, change=2.0, sketch=(3.0,)), device(1, 2.0))
B = report(24.0, 8.0, device(2, 1.0, steps=8), rounds=2)


def policy(method: Tomtit, actor: Params | None = None) -> Policy:
    return Policy(
        method="tomtit",
        options={},
        edges=("a", "b"),
        actor=actor or method.first_actor(1, ("a", "b"), 0),
        basis=BASIS,
    )


def test_an_edge_sees_what_the_cloud_tells_all_and_its_own_devices() -> None:
    method = Tomtit(ratio=(1.0, 0.5), most_steps=8)
    state = state_of(MODEL, round=1, rounds=10, head_bias=[1.0, 0.25])
    a, b = method.observe(policy(method), MODEL, state, situation(a=A, b=B))
    # The cloud's model along (1, 1), in halves: 2.5. k / K, T_re / T, A.
    everybody = [math.asinh(2.5), 0.1, 0.8, 0.5]
    # Edges took 6 and 12 s for an average, sqrt(72) in the geometric mean; a step takes all devices
    # 1 s. Joules of a step: 1, 2 and 2; at edge a 12 J for 8 steps.
    mean, joule = 72**0.5, 4 ** (1 / 3)
    assert a.context.tolist() == pytest.approx(
        [*everybody, math.log(6 / mean), math.log1p(1 / mean), math.log(1.5 / joule)]
    )
    assert b.context.tolist() == pytest.approx(
        [*everybody, math.log(12 / mean), math.log1p(8 / mean), math.log(2 / joule)]
    )
    # Seen, t, link, E, steps of the most, |change|, examples, width, depth, the change's place.
    link, change = math.log1p(1.0), 2**0.5
    first = [1, math.log(0.5), link, math.log(1 / joule), 0.5, math.log(2 / change)]
    second = [1, math.log(2.0), link, math.log(2 / joule), 0.5, math.log(1 / change)]
    assert a.rows[0].tolist() == pytest.approx([*first, math.log(0.5), 1.0, 1.0, math.asinh(3.0)])
    assert a.rows[1].tolist() == pytest.approx([*second, math.log(1.5), 0.5, 1.0, 0.0])
    assert (a.agent, b.agent, b.rows.shape) == (0, 1, (1, 10))
    # What is left, and what work takes.
    (times,) = b.times
    assert (times.left_seconds, times.backhaul_seconds) == (80.0, 8.0)
    assert (times.step_seconds.tolist(), times.link_seconds.tolist()) == ([1.0], [1.0])


def test_devices_of_unequal_depth_and_width_by_hand() -> None:
    """Two blocks with an adapter each; device 0 trains the upper one alone, device 1 both."""
    plain = adapted(2, 1, 1, 1)
    model = replace(plain, depths={"layers": Depth(2, ("layers.",), last=1)})
    method = Tomtit(depth=(1, 2), ratio=(1.0, 0.5))
    state, people = state_of(model), clients(10, 30)
    tasks = list(method.configure(model, state, people, TRAINING))
    assert [task.trainable for task in tasks] == [
        {"layers.1.a", "layers.1.b"},
        {"layers.0.a", "layers.0.b", "layers.1.a", "layers.1.b"},
    ]
    assert [method.local(model, task, {}).trainable for task in tasks] == [  # type: ignore[arg-type]
        task.trainable for task in tasks
    ]
    updates = []
    for task, change in zip(tasks, (4.0, 8.0), strict=True):
        delta = {n: torch.full_like(task.params[n], change) for n in task.trainable or ()}
        updates.append(
            Update(
                round=0,
                client=task.client.id,
                submodel=task.submodel,
                delta=delta,
                num_examples=task.client.num_examples,
                num_steps=1,
                metrics={},
            )
        )
    after = method.aggregate(model, state, people, iter(updates)).params
    # Device 1 has half of the ranks: one of two. Below it is alone, above (10 x 4 + 30 x 8) / 40.
    assert after["layers.0.a"].flatten().tolist() == [8.0, 0.0]
    assert after["layers.1.a"].flatten().tolist() == [7.0, 4.0]
    assert after["layers.1.b"].flatten().tolist() == [7.0, 4.0]
    # b_j and a_j are what the edge sees of them.
    assert [size_of(method, model, client) for client in people] == [(1.0, 0.5), (0.5, 1.0)]
    assert size_of(Tomtit(), MODEL, people[0]) == (1.0, 1.0)


def test_no_edge_sees_another_ones_devices() -> None:
    """Decentralised execution: what changes at edge b's devices alone, a does not see."""
    method = Tomtit()
    state = state_of(MODEL)
    seen = [
        method.observe(policy(method), MODEL, state, situation(a=A, b=other))
        for other in (B, replace(B, devices=(replace(B.devices[0], change=9.0, sketch=(7.0,)),)))
    ]
    assert torch.equal(seen[0][0].rows, seen[1][0].rows)
    assert torch.equal(seen[0][0].context, seen[1][0].context)
    assert not torch.equal(seen[0][1].rows, seen[1][1].rows)


def test_a_device_that_was_not_seen_is_as_fast_as_the_others() -> None:
    method = Tomtit()
    half = report(6.0, 1.0, device(1, 2.0))
    a, b = method.observe(policy(method), MODEL, state_of(MODEL), situation(a=half))
    assert a.rows[0, 0] == 0 and a.rows[1, 0] == 1
    assert a.times[0].step_seconds.tolist() == [2.0, 2.0]
    assert b.context[-3:].tolist() == [0, 0, 0]
    assert not b.rows[:, :6].any()


def fast_devices_more(method: Tomtit) -> Params:
    """A device takes the more steps, the faster it is; edges average once."""
    actor = method.first_actor(1, ("a", "b"), 0)
    for name, tensor in actor.items():
        actor[name] = torch.zeros_like(tensor)
    actor["device.0.matrix"][0, 1] = -1.0  # -log t
    actor["device.1.matrix"][0, 0] = 1.0
    actor["steps.0.matrix"][0, 0] = 1.0
    actor["steps.1.matrix"][:, 0] = rising(torch.arange(method.most_steps) * 20.0)
    actor["steps.1.shift"] = rising(-((torch.arange(method.most_steps) - 1.0) ** 2))
    return actor


def test_the_policy_decides_by_its_most_probable_options(tmp_path: Path) -> None:
    method = Tomtit(most_steps=4, unit=5)
    method = with_policy(method, BASIS, fast_devices_more(method), tmp_path)  # type: ignore[assignment]
    state = state_of(MODEL)
    periods = method.periods(MODEL, state, situation(a=A, b=B))
    assert periods == {
        "a": Periods(rounds=1, steps={0: 20, 1: 5}),
        "b": Periods(rounds=1, steps={2: 10}),
    }
    # 0.5 s a step: with 5.9 s left two units fit behind 1 s each for both links.
    late = method.periods(MODEL, state, situation(horizon=27.9, a=A, b=B))
    assert dict(late["a"].steps) == {0: 10, 1: 5}


def test_options_are_numbers_and_what_is_learnt_of_one_holds_for_those_above() -> None:
    assert ordered(torch.tensor([0.0, 0.0, 0.0])).tolist() == [0.0, 0.0, 0.0]
    before, after = ordered(torch.tensor([[1.0, 0.5, -0.5, 0.0], [1.0, 0.5, 1.5, 0.0]]))
    # Two more for the third option: the options above rise as well, those below do not.
    assert (after - before).tolist() == [0.0, 0.0, 2.0, 2.0]
    assert ordered(rising(torch.tensor([3.0, -1.0, 2.0]))).tolist() == [3.0, -1.0, 2.0]


def test_a_policy_is_for_any_number_of_edges_and_devices(tmp_path: Path) -> None:
    method = Tomtit(most_steps=4, unit=5)
    method = with_policy(method, BASIS, fast_devices_more(method), tmp_path)  # type: ignore[assignment]
    people = clients(1, 1, 1, 1)
    three = report(1.0, 0.0, device(0, 0.5), device(1, 0.5), device(2, 2.0), device(3, 2.0))
    wide = replace(situation(zebra=three), edges={"zebra": tuple(people)})
    periods = method.periods(MODEL, state_of(MODEL), wide)
    assert periods == {"zebra": Periods(rounds=1, steps={0: 20, 1: 20, 2: 5, 3: 5})}


def test_the_first_round_is_fixed_and_without_a_policy_all_finish_together() -> None:
    method = Tomtit(first_steps=2, first_rounds=3, unit=5, most_steps=4)
    first = method.periods(MODEL, state_of(MODEL), situation())
    assert first == {
        "a": Periods(rounds=3, steps={0: 10, 1: 10}),
        "b": Periods(rounds=3, steps={2: 10}),
    }
    # a: the median device takes 1.25 s a step, so 2.5 s for two units: 5 units, 4 at most, and 1.
    # b's average takes 12 s and its link 8: a has 20 s, less 1 for its link, for averages of 6 s.
    later = method.periods(MODEL, state_of(MODEL), situation(a=A, b=B))
    assert later == {
        "a": Periods(rounds=3, steps={0: 20, 1: 5}),
        "b": Periods(rounds=1, steps={2: 10}),
    }
    plain = EqualFinish(local_steps=2, edge_rounds=3, most_steps=4)
    alike = Tomtit(first_steps=2, first_rounds=3, most_steps=4)
    for seen in (situation(), situation(a=A, b=B)):
        assert alike.periods(MODEL, state_of(MODEL), seen) == plain.periods(
            MODEL, state_of(MODEL), seen
        )


@pytest.mark.parametrize("normalised", [False, True])
def test_equal_periods_are_hierfavg_to_the_bit(normalised: bool, tmp_path: Path) -> None:
    method = Tomtit(first_steps=3, first_rounds=2, normalised=normalised)
    agents = played(experiment(always(method, 2, 3, tmp_path)))
    plain = played(experiment(HierFAVG(local_steps=3, edge_rounds=2, normalised=normalised)))
    assert sha256(params_of(agents)) == sha256(params_of(plain))
    assert agents.timed.now == plain.timed.now


def test_other_periods_are_other_bits(tmp_path: Path) -> None:
    method = Tomtit(first_steps=3, first_rounds=2)
    one, other = (
        params_of(played(experiment(always(method, rounds, 3, tmp_path / str(rounds)))))
        for rounds in (1, 2)
    )
    assert sha256(one) != sha256(other)


@pytest.mark.parametrize("edges", [1, 2])
def test_periods_of_one_are_fedavg_to_the_bit(edges: int, tmp_path: Path) -> None:
    method = always(Tomtit(first_steps=1, first_rounds=1), 1, 1, tmp_path)
    agents = played(experiment(method, edges=edges))
    star = played(experiment(FedAvg(), edges=0))
    assert sha256(params_of(agents)) == sha256(params_of(star))


def test_edges_and_devices_are_seen_in_the_policys_coordinates(tmp_path: Path) -> None:
    method = always(Tomtit(), 1, 2, tmp_path)
    tree = played(experiment(method)).timed
    assert tree.reports.keys() == set(EDGES)  # type: ignore[union-attr]
    for own in tree.reports.values():  # type: ignore[union-attr]
        assert len(own.sketch) == 2 and any(own.sketch)
        assert all(len(seen.sketch) == 2 and any(seen.sketch) for seen in own.devices)
        assert own.sketch != own.devices[0].sketch


def test_an_edges_model_is_the_mean_of_its_devices(tmp_path: Path) -> None:
    """An edge's place is the cloud's before the round, moved by its devices' mean change."""
    method = always(Tomtit(first_steps=1, first_rounds=1), 1, 2, tmp_path)
    asked = experiment(method)
    before = played(replace(asked, rounds=1))
    after = played(replace(asked, rounds=2))
    basis, examples = basis_for(method), after.timed.setup.clients
    start = basis.model(params_of(before))
    for own in after.timed.reports.values():  # type: ignore[union-attr]
        weights = [examples[seen.client].num_examples for seen in own.devices]
        for axis, place in enumerate(own.sketch):
            moved = sum(n * s.sketch[axis] for n, s in zip(weights, own.devices, strict=True))
            assert place == pytest.approx(start[axis] + moved / sum(weights), rel=1e-3, abs=1e-4)


def test_a_change_of_everything_is_a_difference_of_models() -> None:
    whole = SubModel({}, MODEL.whole().views)
    state = state_of(MODEL, head_bias=[1.0, 2.0])
    assert BASIS.model(state.params) == pytest.approx((6.0,))
    assert BASIS.change(state.params, whole) == pytest.approx((6.0,))


def test_a_policy_that_does_not_fit_is_refused_before_the_run(tmp_path: Path) -> None:
    method = Tomtit(most_steps=4)
    method = with_policy(method, BASIS, fast_devices_more(method), tmp_path)  # type: ignore[assignment]
    method.init(MODEL, 0, 1)
    with pytest.raises(ConfigError, match=r"method\.most_steps is 5, .* learnt for 4"):
        replace(method, most_steps=5).init(MODEL, 0, 1)
    with pytest.raises(ConfigError, match="learnt for another model"):
        method.init(mlp(3), 0, 1)
    actor = fast_devices_more(method)
    actor["rounds.0.shift"] = torch.zeros(7)
    wrong = with_policy(replace(method, policy=None), BASIS, actor, tmp_path / "wrong")
    with pytest.raises(ConfigError, match=r"'rounds\.0\.shift' is \(7,\) and should be \(32,\)"):
        wrong.init(MODEL, 0, 1)
    with pytest.raises(CheckpointError, match="holds no policy"):
        replace(method, policy=tmp_path / "nowhere").init(MODEL, 0, 1)


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"first_steps": 11}, r"first_steps must be from 1 to most_steps \(10\)"),
        ({"first_rounds": 0}, r"first_rounds must be from 1 to most_rounds \(5\)"),
        ({"unit": 0}, "unit must be at least 1"),
    ],
)
def test_impossible_first_periods_are_refused(values: dict[str, int], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        Tomtit(**values)  # type: ignore[arg-type]
