"""Agents that learn together: proximal policy optimisation with one critic that sees everything.

Schulman et al., "Proximal Policy Optimization Algorithms", 2017, https://arxiv.org/abs/1707.06347;
for several agents Yu et al., "The Surprising Effectiveness of PPO in Cooperative Multi-Agent
Games", NeurIPS 2022, https://arxiv.org/abs/2103.01955

    rho = pi(a | o) / pi_old(a | o)         log pi of a decision is the sum over its factors
    actor    maximises  min(rho A, clip(rho, 1 - c, 1 + c) A) + entropy
    critic   minimises  (V(s) - R)^2 / 2, R = A + V_old
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from tesserafl.core import seeds
from tesserafl.core.decisions import NOBODY, Decision, Observation, entropy, log_probabilities
from tesserafl.core.dense import first_layers, through
from tesserafl.core.params import Params

Logits = Callable[[Params, Tensor, Tensor, Tensor], Tensor]
"""`Deciding.logits`."""
_SMALL = 1e-8
_LEAST = 1e-2
"""An input that hardly differs is not blown up."""
_IMITATION_LR, _IMITATION_PASSES, _FIRST_PASSES = 5e-3, 60, 60
_CURIOUS = 0.2
"""Worth of entropy in imitation: enough is left to chance to find better."""


@dataclass(frozen=True, kw_only=True)
class Moment:
    """One decision of all agents, and what came of it."""

    seen: Tensor
    """What the critic sees, [features]."""
    observations: tuple[Observation, ...]
    """Of the agents that decided."""
    decisions: tuple[Decision, ...]
    rewards: Tensor
    """Of all agents, [agents]."""
    length: float = 1.0
    """Of the round, in twentieths of the job."""


@dataclass(frozen=True, kw_only=True)
class Learning:
    """How agents learn; Tomtit's own settings are not known, these are usual ones."""

    discount: float = 0.95
    """gamma_d: worth of a reward that comes a twentieth of the job later"""
    trace: float = 0.95
    """lambda of the advantages"""
    clip: float = 0.2
    """by how much a probability may change and still be rewarded"""
    entropy: float = 0.01
    """worth of a factor's mean entropy, in units of a standardised advantage"""
    actor_lr: float = 1e-3
    """Adam's rate for the actor"""
    critic_lr: float = 1e-3
    """Adam's rate for the critic"""
    passes: int = 8
    """passes over the decisions of an update"""
    parts: int = 4
    """steps that a pass is cut into"""
    gradient: float = 0.5
    """largest norm of a gradient"""


def advantages(rewards: Tensor, values: Tensor, kept: Sequence[float], trace: float) -> Tensor:
    """Generalised advantages of an episode, [rounds, agents] (Schulman et al., 2016, Eq. 16).

    Agents decide how long a round takes. Discounted by rounds, short ones would make all that
    follows worth less.

    Args:
        rewards: [rounds, agents].
        values: what the critic expected before each round, alike; after the last it is 0.
        kept: of each round, worth of what comes after it: gamma_d to the power of its length.
        trace: lambda.
    """
    following = torch.cat([values[1:], torch.zeros_like(values[:1])])
    surprises = rewards + torch.tensor(kept)[:, None] * following - values
    result, later = torch.zeros_like(values), torch.zeros_like(values[0])
    for step in range(len(rewards) - 1, -1, -1):
        later = surprises[step] + kept[step] * trace * later
        result[step] = later
    return result


class _Batch(NamedTuple):
    """Decisions one after another, whatever agent and round they are of."""

    rows: Tensor
    present: Tensor
    context: Tensor
    chosen: Tensor
    allowed: Tensor
    worth: Tensor
    """Standardised advantage."""
    before: Tensor
    """Log-probability when it was chosen."""

    def take(self, places: Tensor) -> _Batch:
        return _Batch(*(tensor[places] for tensor in self))


@dataclass(kw_only=True)
class Agents:
    """An actor that all agents share, and a critic."""

    logits: Logits
    actor: Params
    agents: int
    seed: int
    learning: Learning = field(default_factory=Learning)
    updates: int = 0
    """Updates so far."""
    _critic: Params = field(default_factory=dict)
    _mean: Tensor = field(default_factory=lambda: torch.zeros(()))
    _scale: Tensor = field(default_factory=lambda: torch.ones(()))
    """The critic's outputs are returns in these units, which the first update settles."""
    _centre: Tensor = field(default_factory=lambda: torch.zeros(()))
    _spread: Tensor = field(default_factory=lambda: torch.ones(()))
    """Likewise its inputs: a point of accuracy is as much to see as a round."""
    _optimisers: tuple[torch.optim.Adam, torch.optim.Adam] | None = None

    def one(self, observation: Observation) -> Tensor:
        """The actor's logits for one observation, [factors, options]."""
        present = torch.ones(1, len(observation.rows), dtype=torch.bool)
        rows, context = observation.rows[None], observation.context[None]
        with torch.no_grad():
            return self.logits(self.actor, rows, present, context)[0]

    def update(self, episodes: Sequence[Sequence[Moment]]) -> None:
        """Learn from episodes that were played with the actor as it is now."""
        self._begin(episodes)
        moments = [moment for episode in episodes for moment in episode]
        seen = torch.stack([moment.seen for moment in moments])
        with torch.no_grad():
            values = self._values(seen)
        worth, start = [], 0
        for episode in episodes:
            own = values[start : start + len(episode)]
            worth.append(self._advantages(episode, own, self.learning.trace))
            start += len(episode)
        gained = torch.cat(worth)
        returns = gained + values
        batch = self._batch(moments, gained)
        for number in range(self.learning.passes):
            draw = seeds.generator(self.seed, self.updates, number, "passes")
            self._teach_actor(batch, draw)
            self._teach_critic(seen, returns, draw)
        self.updates += 1

    def imitate(self, episodes: Sequence[Sequence[Moment]]) -> None:
        """Become an actor that decides as it was decided in these episodes, nearly always."""
        self._begin(episodes)
        moments = [moment for episode in episodes for moment in episode]
        batch = self._batch(moments, torch.zeros(len(moments), self.agents))
        factors = (batch.chosen != NOBODY).sum(dim=1)
        optimiser = torch.optim.Adam(list(self.actor.values()), lr=_IMITATION_LR)
        for number in range(_IMITATION_PASSES):
            draw = seeds.generator(self.seed, number, "imitation")
            order = torch.randperm(len(factors), generator=draw)
            for places in order.chunk(self.learning.parts):
                log_probs, spread = self._judge(batch.take(places))
                loss = -(log_probs / factors[places] + _CURIOUS * spread).mean()
                self._step(optimiser, loss, self.actor)

    def _begin(self, episodes: Sequence[Sequence[Moment]]) -> None:
        """Before the first lesson: the critic learns what rounds were worth in these episodes.

        Without it the first updates would take early rounds for good decisions.
        """
        if self._optimisers is not None:
            return
        seen = torch.stack([moment.seen for episode in episodes for moment in episode])
        features = seen.shape[1]
        self._critic = first_layers("value", (features, 64, 64, self.agents), 0.0, self.seed)
        self.actor = {name: tensor.clone() for name, tensor in self.actor.items()}
        for tensor in (*self.actor.values(), *self._critic.values()):
            tensor.requires_grad_(True)
        self._optimisers = (
            torch.optim.Adam(list(self.actor.values()), lr=self.learning.actor_lr, eps=1e-5),
            torch.optim.Adam(list(self._critic.values()), lr=self.learning.critic_lr, eps=1e-5),
        )
        self._centre, self._spread = seen.mean(dim=0), seen.std(dim=0, correction=0) + _LEAST
        nothing = torch.zeros(self.agents)
        worth = torch.cat(
            [self._advantages(own, nothing.expand(len(own), -1), 1.0) for own in episodes]
        )
        self._mean, self._scale = worth.mean(), worth.std(correction=0) + _SMALL
        for number in range(_FIRST_PASSES):
            self._teach_critic(seen, worth, seeds.generator(self.seed, number, "first"))

    def _advantages(self, episode: Sequence[Moment], values: Tensor, trace: float) -> Tensor:
        rewards = torch.stack([moment.rewards for moment in episode])
        kept = [self.learning.discount**moment.length for moment in episode]
        return advantages(rewards, values, kept, trace)

    def _expected(self, seen: Tensor) -> Tensor:
        """What the critic answers, in its units."""
        return through(self._critic, "value", (seen - self._centre) / self._spread)

    def _values(self, seen: Tensor) -> Tensor:
        return self._expected(seen) * self._scale + self._mean

    def _batch(self, moments: Sequence[Moment], gained: Tensor) -> _Batch:
        observations, decisions, worth = [], [], []
        for place, moment in enumerate(moments):
            for observation, decision in zip(moment.observations, moment.decisions, strict=True):
                observations.append(observation)
                decisions.append(decision)
                worth.append(gained[place, observation.agent])
        rows = pad_sequence([own.rows for own in observations], batch_first=True)
        counts = torch.tensor([len(own.rows) for own in observations])
        each = torch.stack(worth)
        batch = _Batch(
            rows=rows,
            present=torch.arange(rows.shape[1]) < counts[:, None],
            context=torch.stack([own.context for own in observations]),
            chosen=pad_sequence([d.chosen for d in decisions], True, NOBODY),
            allowed=pad_sequence([d.allowed for d in decisions], True, True),
            worth=(each - each.mean()) / (each.std(correction=0) + _SMALL),
            before=torch.zeros(len(each)),
        )
        with torch.no_grad():
            return batch._replace(before=self._judge(batch)[0])

    def _judge(self, batch: _Batch) -> tuple[Tensor, Tensor]:
        """Log-probabilities of the decisions, and the mean entropy of their factors, [batch]."""
        logits = self.logits(self.actor, batch.rows, batch.present, batch.context)
        log_probs = log_probabilities(logits, batch.allowed)
        decided = batch.chosen != NOBODY
        own = log_probs.gather(2, batch.chosen.clamp(min=0)[..., None])[..., 0]
        # Not a product: what was not decided may be impossible.
        total = own.masked_fill(~decided, 0.0).sum(dim=1)
        spread = (entropy(log_probs) * decided).sum(dim=1) / decided.sum(dim=1).clamp(min=1)
        return total, spread

    def _teach_actor(self, batch: _Batch, draw: torch.Generator) -> None:
        assert self._optimisers is not None
        order = torch.randperm(len(batch.worth), generator=draw)
        for places in order.chunk(self.learning.parts):
            part = batch.take(places)
            log_probs, spread = self._judge(part)
            ratio = (log_probs - part.before).exp()
            low, high = 1 - self.learning.clip, 1 + self.learning.clip
            gain = torch.minimum(ratio * part.worth, ratio.clamp(low, high) * part.worth)
            loss = -(gain + self.learning.entropy * spread).mean()
            self._step(self._optimisers[0], loss, self.actor)

    def _teach_critic(self, seen: Tensor, returns: Tensor, draw: torch.Generator) -> None:
        assert self._optimisers is not None
        targets = (returns - self._mean) / self._scale
        for places in torch.randperm(len(seen), generator=draw).chunk(self.learning.parts):
            error = self._expected(seen[places]) - targets[places]
            self._step(self._optimisers[1], 0.5 * error.square().mean(), self._critic)

    def _step(self, optimiser: torch.optim.Adam, loss: Tensor, params: Params) -> None:
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(params.values(), self.learning.gradient)
        optimiser.step()
