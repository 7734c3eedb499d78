"""Decisions on periods: what an agent sees, what it may choose, and what it chose.

An agent decides for one edge or for several. For each it chooses how often the edge averages, and
how many units of steps its devices train: one number for all, or one each. Every number is a factor
of the decision, with the options 1, 2, ..., numbered from 0. A factor is chosen after the number of
averages, so what is ruled out is exactly what would end too late.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from tesserafl.core.method import State
from tesserafl.core.model import Model
from tesserafl.core.params import Params
from tesserafl.core.policy import Policy
from tesserafl.core.schedule import Periods, Situation

NOBODY = -1
"""The option of a factor that decides on nothing: its edge or its device takes no part."""
Pick = Callable[[Tensor], Tensor]
"""From log-probabilities [factors, options] the option of each factor, int64 [factors]."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What can be chosen."""

    most_rounds: int
    """Gamma_2: averages of an edge"""
    most_steps: int
    """Gamma_1: units of steps of a device"""
    unit: int
    """u: steps in a unit"""
    each: bool
    """whether every device has its own steps, or all of an edge the same"""

    @property
    def size(self) -> int:
        """Options of a factor, those that some factors do not have included."""
        return max(self.most_rounds, self.most_steps)


@dataclass(frozen=True, kw_only=True)
class Times:
    """What an edge's work would take, as far as it was measured."""

    edge: str
    first: int
    """Number of the decision's factor on its averages; those on steps come next."""
    clients: tuple[int, ...]
    step_seconds: Tensor
    """Of a step, [clients]."""
    link_seconds: Tensor
    """Down and up, [clients]."""
    backhaul_seconds: float
    """Of its own link, down and up."""
    left_seconds: float
    """Until the job ends."""


@dataclass(frozen=True, kw_only=True)
class Observation:
    """What one agent sees."""

    agent: int
    """Its number among all."""
    rows: Tensor
    """Of each of its devices, [devices, features]."""
    context: Tensor
    """Of everything else, [features]."""
    times: tuple[Times, ...]
    """Of the edges that it decides for."""


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What an agent chose."""

    chosen: Tensor
    """int64 [factors]; NOBODY where there was nothing to choose"""
    allowed: Tensor
    """bool [factors, options], what it could choose from"""


class Deciding(Protocol):
    """A method whose periods a policy decides; what those who learn the policy need of it."""

    learns: ClassVar[bool]
    """Whether a policy of it can be learnt."""

    @property
    def options(self) -> Options:
        """What can be chosen."""
        ...

    def agents(self, edges: Sequence[str]) -> int:
        """How many agents there are on a tree with these edges."""
        ...

    def first_actor(self, components: int, edges: Sequence[str], seed: int) -> Params:
        """An actor that was taught nothing; models have so many coordinates."""
        ...

    def observe(
        self, policy: Policy, model: Model, state: State, seen: Situation
    ) -> list[Observation]:
        """What each agent sees."""
        ...

    def overview(self, policy: Policy, state: State, seen: Situation) -> Tensor:
        """What a central critic sees, [features]."""
        ...

    def logits(self, actor: Params, rows: Tensor, present: Tensor, context: Tensor) -> Tensor:
        """Of many observations together, [batch, factors, options].

        Args:
            actor: its parameters.
            rows: [batch, devices, features], zeros behind an agent's last device.
            present: bool [batch, devices].
            context: [batch, features].
        """
        ...


def log_probabilities(logits: Tensor, allowed: Tensor) -> Tensor:
    """Of the options that are allowed, [..., options]; -infinity of the others.

    Args:
        logits: [..., options].
        allowed: bool [..., options], one option at least of every factor.
    """
    return torch.log_softmax(logits.masked_fill(~allowed, -math.inf), dim=-1)


def entropy(log_probs: Tensor) -> Tensor:
    """Of each factor, [...], from its options' log-probabilities [..., options]."""
    finite = log_probs.masked_fill(log_probs == -math.inf, 0.0)
    return -(log_probs.exp() * finite).sum(dim=-1)


def greedy(log_probs: Tensor) -> Tensor:
    """The most probable option of each factor; the smallest of equals."""
    best = log_probs.max(dim=-1, keepdim=True).values
    return (log_probs == best).int().argmax(dim=-1)


def drawn(draw: torch.Generator) -> Pick:
    """Options at random, as probable as they are."""
    return lambda log_probs: torch.multinomial(log_probs.exp(), 1, generator=draw)[:, 0]


def decide(observation: Observation, logits: Tensor, options: Options, pick: Pick) -> Decision:
    """The agent's decision, from its logits [factors, options].

    An option is ruled out whose work would end after the time that is left; where all would, the
    smallest stays.
    """
    chosen = torch.full((len(logits),), NOBODY)
    allowed = torch.ones(len(logits), options.size, dtype=torch.bool)
    for times in observation.times:
        rounds = _allowed(options.size, options.most_rounds, times, _slowest(times, options.unit))
        place = times.first
        allowed[place] = rounds
        chosen[place] = pick(log_probabilities(logits[place], rounds)[None])[0]
        averages = int(chosen[place]) + 1
        # gamma_i (gamma_ij u t_j + link_j) + Tc_i <= what is left
        count = torch.arange(1, options.size + 1, dtype=torch.float64)
        each = times.step_seconds[:, None] * options.unit * count + times.link_seconds[:, None]
        fits = averages * each + times.backhaul_seconds <= times.left_seconds
        fits = fits if options.each else fits.all(dim=0, keepdim=True)
        fits[:, options.most_steps :] = False
        fits[:, 0] = True
        steps = slice(place + 1, place + 1 + len(fits))
        allowed[steps] = fits
        chosen[steps] = pick(log_probabilities(logits[steps], fits))
    return Decision(chosen=chosen, allowed=allowed)


def periods_of(
    observation: Observation, decision: Decision, options: Options
) -> Mapping[str, Periods]:
    """Edge -> its periods, as the agent decided."""
    periods = {}
    for times in observation.times:
        rounds, *steps = (decision.chosen[times.first :] + 1).tolist()
        units = steps if options.each else [steps[0]] * len(times.clients)
        each = {c: options.unit * n for c, n in zip(times.clients, units, strict=False)}
        periods[times.edge] = Periods(rounds=rounds, steps=each)
    return periods


def followed(
    observation: Observation, periods: Mapping[str, Periods], factors: int, options: Options
) -> Decision:
    """The decision, of so many factors, that comes nearest to periods from elsewhere.

    Where devices train alike they take the median of their units, the higher of two.
    """
    chosen = torch.full((factors,), NOBODY)
    allowed = torch.zeros(factors, options.size, dtype=torch.bool)
    allowed[:, 0] = True
    for times in observation.times:
        own = periods[times.edge]
        units = [max(1, own.steps[client] // options.unit) for client in times.clients]
        if not options.each:
            units = [sorted(units)[len(units) // 2]]
        place, end = times.first, times.first + 1 + len(units)
        chosen[place] = min(own.rounds, options.most_rounds) - 1
        chosen[place + 1 : end] = torch.tensor(units).clamp(max=options.most_steps) - 1
        allowed[place, : options.most_rounds] = True
        allowed[place + 1 : end, : options.most_steps] = True
    return Decision(chosen=chosen, allowed=allowed)


def _slowest(times: Times, unit: int) -> float:
    """Seconds of an average in which every device trains a unit."""
    return float((times.step_seconds * unit + times.link_seconds).max())


def _allowed(size: int, most: int, times: Times, seconds: float) -> Tensor:
    count = torch.arange(1, size + 1, dtype=torch.float64)
    fits = count * seconds + times.backhaul_seconds <= times.left_seconds
    fits[most:] = False
    fits[0] = True
    return fits
