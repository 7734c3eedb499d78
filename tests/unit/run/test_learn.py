"""Learning a policy by playing a job again and again."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tesserafl.cli import main
from tesserafl.core.decisions import Decision, Observation, decide, drawn, greedy
from tesserafl.core.errors import CheckpointError, ConfigError
from tesserafl.core.fit import Training
from tesserafl.core.metrics import Metrics
from tesserafl.core.policy import HEADER, TENSORS, Policy, read_policy
from tesserafl.core.schedule import Situation
from tesserafl.core.seeds import generator
from tesserafl.data import DataSettings
from tesserafl.engines.clock import ClockSettings
from tesserafl.engines.fleet import FleetSettings
from tesserafl.methods import FedAvg, HierFAVG, Hwamei, Tomtit
from tesserafl.models import MLP
from tesserafl.run.events import read_events
from tesserafl.run.experiment import Experiment, to_json
from tesserafl.run.learn import LearnSettings, learn, line_of
from tesserafl.run.runner import start
from tesserafl.run.setup import make_engine, prepare
from tesserafl.run.tuning import Episode, Gain, Price, TuningJob, Warm, tuning_job

METHOD = Tomtit(first_steps=1, first_rounds=1, most_steps=4, most_rounds=3)


FLEET = """
[[edges]]
name = "edge-0"

[[edges]]
name = "edge-1"

[[devices]]
count = 2
gflops = 0.002
edge = "edge-0"
idle_watts = 1.0
busy_watts = 5.0
load = { levels = [0.1, 0.8], minutes = 0.001 }

[[devices]]
count = 2
gflops = 0.001
edge = "edge-1"
idle_watts = 1.0
busy_watts = 3.0
load = { levels = [0.1, 0.8], minutes = 0.001 }
"""


@pytest.fixture
def fleet(tmp_path: Path) -> FleetSettings:
    """Four slow devices at two edges; their links take no time."""
    path = tmp_path / "fleet.toml"
    path.write_text(FLEET)
    return FleetSettings(file=path)


def experiment(
    fleet: FleetSettings, method: Tomtit | Hwamei = METHOD, **changes: Any
) -> Experiment:
    """About four rounds until the threshold time."""
    asked = Experiment(
        data=DataSettings(num_clients=4, partition="dirichlet", alpha=0.5),
        model=MLP(hidden=(4,)),
        method=method,
        training=Training(lr=0.2, batch_size=16),
        fleet=fleet,
        clock=ClockSettings(horizon_seconds=1.5),
        rounds=9,
        clients_per_round=4,
    )
    return replace(asked, **changes)


@contextlib.contextmanager
def job_of(
    asked: Experiment, gain: Gain = "likelihood"
) -> Iterator[tuple[TuningJob, Warm, Policy]]:
    setup = prepare(asked)
    with contextlib.closing(make_engine(setup)) as engine:
        job = tuning_job(setup, engine, gain)
        warm = job.warm_up(8)
        policy = Policy(
            method="tomtit",
            options=asdict(METHOD.options),
            edges=job.edges,
            actor=job.method.first_actor(warm.basis.num_components, job.edges, 0),
            basis=warm.basis,
        )
        yield job, warm, policy


def at_random(job: TuningJob, policy: Policy, seed: int) -> Any:
    def choose(observation: Observation, seen: Situation) -> Decision:
        rows, context = observation.rows[None], observation.context[None]
        present = torch.ones(rows.shape[:2], dtype=torch.bool)
        logits = job.method.logits(policy.actor, rows, present, context)[0]
        draw = generator(seed, seen.round, observation.agent, "choice")
        return decide(observation, logits, job.method.options, drawn(draw))

    return choose


def smallest(observation: Observation, seen: Situation) -> Decision:
    return decide(observation, torch.zeros(3, 4), METHOD.options, greedy)


def same(one: Episode, other: Episode) -> bool:
    return (one.total, one.metrics, one.joules) == (other.total, other.metrics, other.joules)


def reached(metrics: Metrics, gain: Gain) -> float:
    return 100 * (metrics.accuracy if gain == "accuracy" else math.exp(-metrics.loss))


@pytest.mark.slow
@pytest.mark.parametrize("gain", ["likelihood", "accuracy"])
def test_rewards_add_up_to_what_was_gained_and_spent(fleet: FleetSettings, gain: Gain) -> None:
    with job_of(experiment(fleet), gain) as (job, warm, policy):
        for price in (Price(joule=0.0), Price(joule=0.5), Price(joule=0.5, own=True)):
            for overrun in (True, False):
                asked = replace(price, overrun=overrun)
                episode = job.play(warm, policy, asked, at_random(job, policy, 1), 0)
                gained = reached(episode.metrics, gain) - reached(warm.metrics, gain)
                assert episode.total == pytest.approx(gained - price.joule * episode.joules, 1e-4)
                assert len(episode.moments) > 1
                each = torch.stack([moment.rewards for moment in episode.moments])
                alike = bool((each == each[:, :1]).all())
                assert alike != price.own  # agents of two edges, each with its own energy


def test_the_critic_is_told_what_the_next_reward_counts_from(fleet: FleetSettings) -> None:
    with job_of(experiment(fleet)) as (job, warm, policy):
        episode = job.play(warm, policy, Price(joule=0.0), at_random(job, policy, 1), 0)
        told = [100 * float(moment.seen[-1]) for moment in episode.moments]
        gains = [float(moment.rewards[0]) for moment in episode.moments]
        assert told[0] == pytest.approx(reached(warm.metrics, "likelihood"), rel=1e-5)
        for before, gain, after in zip(told, gains, told[1:], strict=False):
            assert before + gain == pytest.approx(after, rel=1e-5)


def test_a_round_that_ends_too_late_counts_up_to_the_end(fleet: FleetSettings) -> None:
    with job_of(experiment(fleet)) as (job, warm, policy):
        choose = at_random(job, policy, 1)

        def rounds(overrun: bool) -> tuple[list[float], list[float]]:
            """Of each round the points gained and the joules paid, from two prices."""
            gains, paid = (
                [
                    float(moment.rewards[0])
                    for moment in job.play(
                        warm, policy, Price(joule=price, overrun=overrun), choose, 0
                    ).moments
                ]
                for price in (0.0, 1.0)
            )
            return gains, [gain - less for gain, less in zip(gains, paid, strict=True)]

        gains, joules = rounds(overrun=True)
        free, all_joules = rounds(overrun=False)
        assert gains[:-1] == free[:-1] and joules[:-1] == all_joules[:-1]
        # The last one's gain comes too late, and only its joules before T are paid.
        assert gains[-1] == 0.0 != free[-1]
        assert 0.0 < joules[-1] < all_joules[-1]


def test_worlds_differ_and_each_repeats_itself(fleet: FleetSettings) -> None:
    with job_of(experiment(fleet)) as (job, warm, policy):
        price, choose = Price(joule=0.5), smallest
        first, again, other, own = (
            job.play(warm, policy, price, choose, world) for world in (0, 0, 1, None)
        )
        assert same(first, again)
        assert not same(first, other) and not same(first, own)


def test_all_rounds_begin_where_the_warm_up_ended(fleet: FleetSettings) -> None:
    with job_of(experiment(fleet)) as (job, warm, policy):
        state, reports = warm.state.params, dict(warm.reports)
        kept = {name: tensor.clone() for name, tensor in state.items()}
        episode = job.play(warm, policy, Price(joule=0.0), smallest, 0)
        assert job.tree.federation.round == 0 and job.tree.now == 0.0 and not job.tree.reports
        assert warm.reports == reports and warm.state.round == 1
        assert all(torch.equal(kept[name], state[name]) for name in kept)
        assert episode.moments[0].observations[0].context[-5] < 1  # some time was used
        assert warm.basis.num_components == 2 and all(warm.reports["edge-0"].sketch)


@pytest.mark.slow
def test_learning_repeats_its_bits_and_what_was_learnt_decides_alike(
    tmp_path: Path, fleet: FleetSettings
) -> None:
    settings = LearnSettings(episodes=4, update_every=2, imitate=1)
    # So much time that the rounds end the job: a run then ends where an episode does.
    asked = experiment(fleet, clock=ClockSettings(horizon_seconds=90.0), rounds=3)
    events: list[Any] = []
    result = learn(asked, tmp_path / "one", settings, events.append)
    learn(asked, tmp_path / "two", settings)
    learn(replace(asked, seed=1), tmp_path / "three", settings)
    one, two, three = (
        [(tmp_path / name / file).read_bytes() for file in (TENSORS, HEADER, "learning.jsonl")]
        for name in ("one", "two", "three")
    )
    assert one[:2] == two[:2] and one[0] != three[0]
    assert [event["kind"] for event in events] == [
        "start",
        "imitated",
        "update",
        "update",
        "finish",
    ]
    assert [event["episodes"] for event in events[1:4]] == [1, 2, 4]
    lines = [json.loads(line) for line in one[2].splitlines()]
    assert lines == events
    assert "jobs 2  return" in line_of(events[2]) and "--method.policy" in line_of(events[4])
    # A run with the policy is the episode in the experiment's own world, warm-up included.
    method = replace(METHOD, policy=tmp_path / "one")
    summary = start(replace(asked, method=method), tmp_path / "run")
    assert summary["accuracy"] == result["accuracy"]
    with job_of(asked) as (_, warm, _):
        assert summary["joules"] == pytest.approx(warm.joules + result["joules"])
    # And it is not what a policy that was not taught decides.
    untaught = read_policy(tmp_path / "three").actor
    assert any(
        not torch.equal(tensor, read_policy(tmp_path / "one").actor[name])
        for name, tensor in untaught.items()
    )


@pytest.mark.slow
def test_hwamei_learns_too(tmp_path: Path, fleet: FleetSettings) -> None:
    method = Hwamei(first_steps=1, first_rounds=1, most_steps=4, most_rounds=3)
    asked = experiment(fleet, method, clock=ClockSettings(horizon_seconds=90.0), rounds=3)
    result = learn(asked, tmp_path / "policy", LearnSettings(episodes=2, update_every=2, imitate=0))
    assert read_policy(tmp_path / "policy").edges == ("edge-0", "edge-1")
    run = replace(asked, method=replace(method, policy=tmp_path / "policy"))
    assert start(run, tmp_path / "run")["accuracy"] == result["accuracy"]


@pytest.mark.slow
@pytest.mark.parametrize("method", [METHOD, Hwamei(first_steps=1, first_rounds=1, most_steps=3)])
def test_where_a_joule_costs_everything_the_minimum_is_learnt(
    method: Tomtit | Hwamei, tmp_path: Path, fleet: FleetSettings
) -> None:
    # One decision a job, so that there is no round in which to save what another one spends.
    asked = experiment(fleet, method, clock=ClockSettings(horizon_seconds=90.0), rounds=2)
    settings = LearnSettings(episodes=160, update_every=10, joule_price=1e4, imitate=0)
    learn(asked, tmp_path / "policy", settings)
    run = replace(asked, method=replace(method, policy=tmp_path / "policy"))
    start(run, tmp_path / "run")
    events = read_events(tmp_path / "run" / "events.jsonl")
    rounds = [event for event in events if event["kind"] == "round"]
    last = rounds[-1]["periods"]
    assert all(each["rounds"] == 1 for each in last.values())
    assert {steps for each in last.values() for steps in each["steps"].values()} == {1}


def test_what_cannot_be_learnt_is_refused_and_leaves_no_folder(
    tmp_path: Path, fleet: FleetSettings
) -> None:
    cases = [
        (experiment(fleet, clock=ClockSettings()), "set clock.horizon_seconds"),
        (replace(experiment(fleet), method=HierFAVG()), "choose --method tomtit"),
        (replace(experiment(fleet), method=FedAvg()), "choose --method tomtit"),
        (
            experiment(fleet, clock=ClockSettings(horizon_seconds=0.01)),
            "nothing is left to decide on",
        ),
        (experiment(fleet, rounds=1), "nothing is left to decide on"),
        (experiment(fleet, replace(METHOD, policy=tmp_path)), "leave method.policy away"),
    ]
    for asked, text in cases:
        with pytest.raises(ConfigError, match=text):
            learn(asked, tmp_path / "policy", LearnSettings())
    assert not (tmp_path / "policy").exists()
    (tmp_path / "policy").mkdir()
    (tmp_path / "policy" / "mine").touch()
    with pytest.raises(CheckpointError, match="is not empty"):
        learn(experiment(fleet), tmp_path / "policy", LearnSettings())
    for values in ({"episodes": 0}, {"update_every": 0}, {"joule_price": -1.0}, {"imitate": -1}):
        with pytest.raises(ConfigError, match="must be"):
            LearnSettings(**values)  # type: ignore[arg-type]


@pytest.mark.slow
def test_the_command_learns_what_a_run_takes(
    tmp_path: Path, fleet: FleetSettings, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = experiment(fleet, rounds=3)
    (tmp_path / "job.json").write_text(json.dumps(to_json(asked)))
    policy, short = str(tmp_path / "policy"), ["--episodes", "2", "--update-every", "2"]
    main(["learn", str(tmp_path / "job.json"), "--out", policy, *short, "--json"])
    *lines, last = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("a joule costs") and lines[2].startswith("jobs 2  return")
    result = json.loads(last)
    assert read_policy(Path(result["policy"])).method == "tomtit"
    where = ["--out", str(tmp_path / "run"), "--method.policy", policy]
    main(["run", str(tmp_path / "job.json"), *where])
    assert json.loads((tmp_path / "run" / "config.json").read_text())["method"]["policy"] == policy
    with pytest.raises(SystemExit):
        main(["run", str(tmp_path / "job.json"), *where[2:], "--method.most-steps", "5"])
    assert "method.most_steps is 5, and the policy was learnt for 4" in capsys.readouterr().err


@pytest.mark.slow
def test_imitated_agents_decide_as_equal_finish_does(tmp_path: Path, fleet: FleetSettings) -> None:
    asked = experiment(fleet, rounds=6, clock=ClockSettings(horizon_seconds=90.0))
    asked = replace(asked, method=replace(METHOD, first_steps=2))
    events: list[Any] = []
    settings = LearnSettings(episodes=1, update_every=1, imitate=3, joule_price=0.0)
    learn(asked, tmp_path / "policy", settings, events.append)
    periods = []
    for method in (asked.method, replace(asked.method, policy=tmp_path / "policy")):  # type: ignore[type-var]
        start(replace(asked, method=method), tmp_path / f"run-{len(periods)}")
        rounds = read_events(tmp_path / f"run-{len(periods)}" / "events.jsonl")
        periods.append(
            [
                number
                for event in rounds
                if event["kind"] == "round"
                for each in event["periods"].values()
                for number in (each["rounds"], *each["steps"].values())
            ]
        )
    balanced, learnt = periods
    assert len(set(balanced)) > 2
    alike = sum(a == b for a, b in zip(balanced, learnt, strict=True)) / len(balanced)
    assert alike > 0.5  # by chance a third; what differs leads to other situations
