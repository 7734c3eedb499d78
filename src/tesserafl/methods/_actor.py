"""Actors as pure functions, and what methods with a learnt policy share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from tesserafl.core.decisions import Deciding, decide, greedy, periods_of
from tesserafl.core.dense import first_layers, through
from tesserafl.core.errors import ConfigError
from tesserafl.core.method import State
from tesserafl.core.model import Model
from tesserafl.core.params import Params
from tesserafl.core.policy import Policy, read_policy
from tesserafl.core.schedule import Periods, Situation, Sketch
from tesserafl.methods._balance import equal_finish
from tesserafl.methods._observed import context_size, matrix_size, row_size

_HIDDEN = 32
"""Units of every hidden layer."""


class Scheduled(Deciding, Protocol):
    """A method that may have a policy."""

    name: ClassVar[str]

    @property
    def policy(self) -> Path | None: ...
    @property
    def unit(self) -> int: ...
    @property
    def most_steps(self) -> int: ...
    @property
    def most_rounds(self) -> int: ...
    @property
    def first_steps(self) -> int: ...
    @property
    def first_rounds(self) -> int: ...


def check_first(self: Scheduled) -> None:
    """Raise ConfigError unless the first round's periods are among the options."""
    if self.unit < 1:
        raise ConfigError(f"{type(self).__name__}: unit must be at least 1; got {self.unit}")
    for name, most in (("first_steps", "most_steps"), ("first_rounds", "most_rounds")):
        value, limit = getattr(self, name), getattr(self, most)
        if not 1 <= value <= limit:
            raise ConfigError(
                f"{type(self).__name__}: {name} must be from 1 to {most} ({limit}); got {value}"
            )


def policy_of(self: Scheduled, model: Model) -> Policy | None:
    """The policy in the method's folder; None: it has none.

    Raises:
        CheckpointError: it is missing or damaged.
        ConfigError: it was learnt for other settings, or for another model.
    """
    if self.policy is None:
        return None
    policy = read_policy(self.policy)
    policy.check(self.name, asdict(self.options), model.shapes)
    actor = self.first_actor(policy.basis.num_components, policy.edges, 0)
    found, expected = ({n: tuple(t.shape) for n, t in p.items()} for p in (policy.actor, actor))
    if found != expected:
        wrong = [name for name in sorted(found | expected) if found.get(name) != expected.get(name)]
        raise ConfigError(
            f"the policy in {self.policy} has an actor of another form: {wrong[0]!r} is "
            f"{found.get(wrong[0])} and should be {expected.get(wrong[0])}; learn it anew with: "
            f"tessera learn"
        )
    return policy


def sketched(self: Scheduled, model: Model) -> Sketch | None:
    """The coordinates that the policy sees models in."""
    policy = policy_of(self, model)
    return None if policy is None else policy.basis


def scheduled(
    self: Scheduled, model: Model, state: State, seen: Situation
) -> Mapping[str, Periods]:
    """By the policy's most probable options; without one, or before the first, so that all finish
    together."""
    policy = None if not seen.reports else policy_of(self, model)
    if policy is None:
        return equal_finish(
            seen,
            steps=self.first_steps,
            rounds=self.first_rounds,
            most_steps=self.most_steps,
            most_rounds=self.most_rounds,
            unit=self.unit,
        )
    periods: dict[str, Periods] = {}
    for own in self.observe(policy, model, state, seen):
        present = torch.ones(1, len(own.rows), dtype=torch.bool)
        logits = self.logits(policy.actor, own.rows[None], present, own.context[None])[0]
        decision = decide(own, logits, self.options, greedy)
        periods |= periods_of(own, decision, self.options)
    return periods


def first_edge_actor(components: int, most_rounds: int, most_steps: int, seed: int) -> Params:
    """Of an edge's agent, which knows any number of devices."""
    context, row, unit = context_size(components), row_size(components), _HIDDEN
    return {
        **first_layers("device", (row + context, unit, unit), 1.0, seed),
        **first_layers("rounds", (unit + context, unit, most_rounds), 0.01, seed),
        **first_layers("steps", (2 * unit + context, unit, most_steps), 0.01, seed),
    }


def edge_logits(
    actor: Params, rows: Tensor, present: Tensor, context: Tensor, options: int
) -> Tensor:
    """Of an edge's averages and its devices' steps, [batch, 1 + devices, options].

    One perceptron encodes every device; their mean is what the number of averages goes by.
    """
    around = context[:, None].expand(-1, rows.shape[1], -1)
    encoded = torch.tanh(through(actor, "device", torch.cat([rows, around], dim=2)))
    shown = encoded * present[..., None]
    pooled = shown.sum(dim=1) / present.sum(dim=1, keepdim=True).clamp(min=1)
    rounds = through(actor, "rounds", torch.cat([pooled, context], dim=1))
    all_devices = pooled[:, None].expand(-1, rows.shape[1], -1)
    steps = through(actor, "steps", torch.cat([encoded, all_devices, around], dim=2))
    rounds, steps = ordered(rounds[:, None]), ordered(steps)
    return torch.cat([_padded(rounds, options), _padded(steps, options)], dim=1)


def first_cloud_actor(
    components: int, edges: int, most_rounds: int, most_steps: int, seed: int
) -> Params:
    """Of one agent for all edges."""
    sizes = (matrix_size(components, edges), 2 * _HIDDEN, 2 * _HIDDEN)
    return {
        **first_layers("state", sizes, 1.0, seed),
        **first_layers("rounds", (sizes[-1], edges * most_rounds), 0.01, seed),
        **first_layers("steps", (sizes[-1], edges * most_steps), 0.01, seed),
    }


def cloud_logits(actor: Params, context: Tensor, most_rounds: int, options: int) -> Tensor:
    """Of every edge's averages and its devices' steps in turn, [batch, 2 edges, options]."""
    encoded = torch.tanh(through(actor, "state", context))
    edges = len(actor["rounds.0.shift"]) // most_rounds
    rounds, steps = (
        _padded(ordered(through(actor, name, encoded).view(len(context), edges, -1)), options)
        for name in ("rounds", "steps")
    )
    return torch.stack([rounds, steps], dim=2).flatten(1, 2)


def ordered(outputs: Tensor) -> Tensor:
    """Logits of options that are numbers, [..., options], from as many outputs.

    An output is what an option has more than the one below: what is learnt of seven steps is learnt
    of eight too (Tang and Agrawal, "Discretizing Continuous Action Space for On-Policy
    Optimization", AAAI 2020, Section 4.3; their logits are these, but for a constant).
    """
    return outputs.cumsum(dim=-1)


def _padded(logits: Tensor, options: int) -> Tensor:
    """Options that a factor does not have are never allowed."""
    missing = logits.new_zeros(*logits.shape[:-1], options - logits.shape[-1])
    return torch.cat([logits, missing], dim=-1)
