"""Proximal policy optimisation, against hand computations and problems with a known best."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from tesserafl.core import seeds
from tesserafl.core.decisions import (
    Decision,
    Observation,
    Times,
    decide,
    drawn,
    followed,
    greedy,
)
from tesserafl.core.params import sha256
from tesserafl.core.schedule import Periods
from tesserafl.methods import Tomtit
from tesserafl.run.agents import Agents, Learning, Moment, advantages

TOMTIT = Tomtit(most_steps=8, most_rounds=4)
SPEEDS = (1.0, 2.0, 4.0)
"""Seconds of a step; the devices are dealt one of them anew in every job."""
QUICK = Learning(actor_lr=1e-2, passes=6, parts=2)
Reward = Callable[[Observation, Decision], float]


def test_advantages_by_hand() -> None:
    # gamma = 1/2, lambda = 1/2: delta_2 = 4 - 2, delta_1 = 2 + 2/2 - 1, delta_0 = 1 + 1/2 - 3
    # A_2 = 2, A_1 = 2 + 2/4, A_0 = -3/2 + 2.5/4
    rewards = torch.tensor([[1.0], [2.0], [4.0]])
    values = torch.tensor([[3.0], [1.0], [2.0]])
    halves = [0.5, 0.5, 0.5]
    assert advantages(rewards, values, halves, 0.5)[:, 0].tolist() == [-0.875, 2.5, 2.0]
    # lambda = 1: what was gained, discounted, less what was expected; of each agent by itself
    both = torch.cat([rewards, 2 * rewards], dim=1)
    none = torch.zeros(3, 2)
    assert advantages(both, none, halves, 1.0).tolist() == [[3.0, 6.0], [4.0, 8.0], [4.0, 8.0]]
    # lambda = 0: the surprise of one round
    assert advantages(rewards, values, halves, 0.0)[:, 0].tolist() == [-1.5, 2.0, 2.0]


def test_the_worth_of_what_follows_goes_by_time_and_not_by_rounds() -> None:
    """Ten points after half of the job are worth the same in one long round and in ten short."""

    def moment(gain: float, length: float) -> Moment:
        gained = torch.tensor([gain])
        return Moment(
            seen=torch.zeros(1), observations=(), decisions=(), rewards=gained, length=length
        )

    actor = TOMTIT.first_actor(0, ("edge",), 0)
    agents = Agents(logits=TOMTIT.logits, actor=actor, agents=1, seed=0)
    nothing = torch.zeros(11, 1)
    long = agents._advantages([moment(0, 10.0), moment(10, 10.0)], nothing[:2], 1.0)
    short = agents._advantages(
        [*(moment(0, 1.0) for _ in range(10)), moment(10, 10.0)], nothing, 1.0
    )
    assert float(long[0]) == pytest.approx(10 * 0.95**10)
    assert float(short[0]) == pytest.approx(float(long[0]))


def seen(kinds: list[int], left: float = math.inf) -> Observation:
    """An edge whose devices have these speeds, and say so."""
    rows = torch.zeros(len(kinds), 9)
    speeds = torch.tensor([SPEEDS[kind] for kind in kinds], dtype=torch.float64)
    rows[:, 1] = speeds.log().float()
    times = Times(
        edge="edge",
        first=0,
        clients=tuple(range(len(kinds))),
        step_seconds=speeds,
        link_seconds=torch.zeros_like(speeds),
        backhaul_seconds=0.0,
        left_seconds=left,
    )
    return Observation(agent=0, rows=rows, context=torch.zeros(6), times=(times,))


def job(number: int, seed: int = 0, left: float = math.inf) -> Observation:
    """Two devices, or three, of other speeds each time."""
    draw = seeds.generator(seed, number, "job")
    count = 2 + int(torch.randint(0, 2, (), generator=draw))
    return seen(torch.randint(0, 3, (count,), generator=draw).tolist(), left)


def taught(
    reward: Reward,
    updates: int,
    seed: int = 0,
    left: float = math.inf,
    jobs: int = 40,
    learning: Learning = QUICK,
) -> Agents:
    """Agents that learnt from jobs of one round."""
    actor = TOMTIT.first_actor(0, ("edge",), seed)
    agents = Agents(logits=TOMTIT.logits, actor=actor, agents=1, seed=seed, learning=learning)
    for update in range(updates):
        episodes = []
        for number in range(jobs):
            observation = job(update * jobs + number, seed, left)
            draw = seeds.generator(seed, update, number, "choice")
            decision = decide(observation, agents.one(observation), TOMTIT.options, drawn(draw))
            moment = Moment(
                seen=observation.rows[:2, 1],
                observations=(observation,),
                decisions=(decision,),
                rewards=torch.tensor([reward(observation, decision)]),
            )
            episodes.append([moment])
        agents.update(episodes)
    return agents


def chosen(agents: Agents, observation: Observation) -> list[int]:
    """Averages, then the steps of every device."""
    decision = decide(observation, agents.one(observation), TOMTIT.options, greedy)
    return (decision.chosen + 1).tolist()


def together(observation: Observation, decision: Decision) -> float:
    """All devices should take 8 s, and the edge average three times."""
    rounds, *steps = (decision.chosen + 1).tolist()
    speeds = observation.times[0].step_seconds.tolist()
    late = [abs(step * speed - 8) / 8 for step, speed in zip(steps, speeds, strict=True)]
    return -sum(late) - abs(rounds - 3)


@pytest.mark.slow
def test_agents_find_periods_for_every_speed() -> None:
    agents = taught(together, updates=30, learning=Learning(actor_lr=3e-3))
    # 8 s are 8, 4 and 2 steps.
    assert chosen(agents, seen([0, 1, 2])) == [3, 8, 4, 2]
    jobs = [job(number, seed=9) for number in range(60)]

    def mean(choose: Callable[[Observation], list[int]]) -> float:
        each = [
            together(own, Decision(chosen=torch.tensor(choose(own)) - 1, allowed=torch.ones(1)))
            for own in jobs
        ]
        return sum(each) / len(each)

    # Whoever does not look at the speeds gets this at most.
    blind = max(mean(lambda own, s=steps: [3] + [s] * len(own.rows)) for steps in range(1, 9))  # type: ignore[misc]
    assert mean(lambda own: [3, *(8 / own.times[0].step_seconds).int().tolist()]) == 0.0
    assert mean(lambda own: chosen(agents, own)) > blind / 2


def test_where_energy_is_all_that_counts_the_minimum_is_chosen() -> None:
    def dear(observation: Observation, decision: Decision) -> float:
        rounds, *steps = (decision.chosen + 1).tolist()
        return together(observation, decision) - 1e6 * rounds * sum(steps)

    agents = taught(dear, updates=10)
    assert chosen(agents, seen([0, 1, 2])) == [1, 1, 1, 1]
    assert chosen(agents, seen([2, 0])) == [1, 1, 1]


def test_nobody_learns_to_end_too_late() -> None:
    # As much as possible, but a job has 8 s: one average with 8 steps, four with 2, ...
    def much(observation: Observation, decision: Decision) -> float:
        return float((decision.chosen[1:] + 1).sum())

    agents = taught(much, updates=20, left=8.0)
    rounds, *steps = chosen(agents, seen([0, 1, 2], left=8.0))
    assert all(rounds * n * s <= 8 for n, s in zip(steps, SPEEDS, strict=True))
    assert (rounds, steps) == (1, [8, 4, 2])


def test_learning_repeats_its_bits() -> None:
    once, again, other = (taught(together, 3, seed=seed, jobs=12) for seed in (0, 0, 1))
    assert sha256(once.actor) == sha256(again.actor)
    assert sha256(once.actor) != sha256(other.actor)


def test_before_the_first_step_no_ratio_differs_from_one() -> None:
    """What was noted of a decision is what the actor gives for it now: padding counts nothing."""
    agents = taught(together, updates=1, jobs=8)
    moments = []
    for number in range(8):  # of two and of three devices
        observation = job(number)
        draw = seeds.generator(3, number, "choice")
        decision = decide(observation, agents.one(observation), TOMTIT.options, drawn(draw))
        moments.append(
            Moment(
                seen=torch.zeros(2),
                observations=(observation,),
                decisions=(decision,),
                rewards=torch.zeros(1),
            )
        )
    together_ = agents._batch(moments, torch.zeros(8, 1)).before
    for place, moment in enumerate(moments):
        (observation,), (decision,) = moment.observations, moment.decisions
        logits = agents.one(observation)
        by_hand = sum(
            float(torch.log_softmax(row.masked_fill(~mask, -math.inf), 0)[choice])
            for row, mask, choice in zip(logits, decision.allowed, decision.chosen, strict=True)
        )
        assert float(together_[place]) == pytest.approx(by_hand, rel=1e-4)
    assert {len(moment.observations[0].rows) for moment in moments} == {2, 3}


@pytest.mark.slow
def test_each_agent_is_judged_by_its_own_reward() -> None:
    """Two agents, the second of which is paid for many averages, the first for few."""
    actor = TOMTIT.first_actor(0, ("a", "b"), 0)
    agents = Agents(
        logits=TOMTIT.logits,
        actor=actor,
        agents=2,
        seed=0,
        learning=Learning(actor_lr=1e-2, parts=2),
    )

    def of(agent: int) -> Observation:
        plain = seen([1])
        rows = plain.rows.clone()
        rows[:, 2] = agent
        return Observation(agent=agent, rows=rows, context=plain.context, times=plain.times)

    for update in range(20):
        episodes = []
        for number in range(24):
            observations = (of(0), of(1))
            decisions = tuple(
                decide(
                    own,
                    agents.one(own),
                    TOMTIT.options,
                    drawn(seeds.generator(update, number, own.agent, "choice")),
                )
                for own in observations
            )
            counts = [float(decision.chosen[0]) for decision in decisions]
            moment = Moment(
                seen=torch.zeros(1),
                observations=observations,
                decisions=decisions,
                rewards=torch.tensor([-counts[0], counts[1]]),
            )
            episodes.append([moment])
        agents.update(episodes)
    assert [chosen(agents, of(agent))[0] for agent in (0, 1)] == [1, 4]


def test_the_critic_learns_what_a_state_is_worth() -> None:
    actor = TOMTIT.first_actor(0, ("edge",), 0)
    learning = Learning(critic_lr=1e-2, parts=1)
    agents = Agents(logits=TOMTIT.logits, actor=actor, agents=1, seed=0, learning=learning)
    observation = seen([1])
    for update in range(15):
        episodes = []
        for number in range(8):
            state = float(number % 2)
            draw = seeds.generator(update, number, "choice")
            decision = decide(observation, agents.one(observation), TOMTIT.options, drawn(draw))
            moment = Moment(
                seen=torch.tensor([state]),
                observations=(observation,),
                decisions=(decision,),
                rewards=torch.tensor([30.0 + 10 * state]),
            )
            episodes.append([moment])
        agents.update(episodes)
    with torch.no_grad():
        values = agents._values(torch.tensor([[0.0], [1.0]]))[:, 0].tolist()
    assert values == pytest.approx([30.0, 40.0], abs=1.0)


def test_the_critic_sees_a_point_of_accuracy_beside_inputs_that_differ_more() -> None:
    """Of two states a point apart, the better one has a point less to gain."""
    actor = TOMTIT.first_actor(0, ("edge",), 0)
    agents = Agents(logits=TOMTIT.logits, actor=actor, agents=1, seed=0)
    observation = seen([1])
    for update in range(6):
        episodes = []
        for number in range(40):
            draw = seeds.generator(update, number, "state")
            accuracy = 0.7 + 0.01 * (number % 2)
            other = torch.randn(3, generator=draw)
            decision = decide(observation, agents.one(observation), TOMTIT.options, drawn(draw))
            moment = Moment(
                seen=torch.cat([torch.tensor([accuracy]), other]),
                observations=(observation,),
                decisions=(decision,),
                rewards=torch.tensor([100 * (0.75 - accuracy)]),
            )
            episodes.append([moment])
        agents.update(episodes)
    with torch.no_grad():
        values = agents._values(torch.tensor([[0.70, 0, 0, 0], [0.71, 0, 0, 0]]))[:, 0]
    assert float(values[0] - values[1]) == pytest.approx(1.0, abs=0.3)


def test_an_actor_imitates_and_stays_curious() -> None:
    actor = TOMTIT.first_actor(0, ("edge",), 0)
    agents = Agents(logits=TOMTIT.logits, actor=actor, agents=1, seed=0)

    def rule(kinds: list[int]) -> list[int]:
        return [2, *(int(8 / SPEEDS[kind]) for kind in kinds)]

    moments = []
    for number in range(60):
        observation = job(number)
        kinds = [SPEEDS.index(speed) for speed in observation.times[0].step_seconds.tolist()]
        rounds, *steps = rule(kinds)
        periods = {"edge": Periods(rounds=rounds, steps=dict(enumerate(steps)))}
        decision = followed(observation, periods, 1 + len(kinds), TOMTIT.options)
        moment = Moment(
            seen=torch.zeros(1),
            observations=(observation,),
            decisions=(decision,),
            rewards=torch.zeros(1),
        )
        moments.append(moment)
    agents.imitate([[moment] for moment in moments])
    for kinds in ([0, 1, 2], [2, 2], [0, 0, 1]):
        assert chosen(agents, seen(kinds)) == rule(kinds)
    probabilities = agents.one(seen([0, 1, 2])).softmax(dim=1).max(dim=1).values
    assert bool((probabilities < 0.99).all())
