"""What a client does with an expert of its own beside the frozen global one, and a gate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tesserafl.core.checks import MAX_ENTRY, check_entries
from tesserafl.core.errors import ConfigError, MessageError
from tesserafl.core.fit import Fit, Fitted
from tesserafl.core.messages import Memory, Task, Update, Wanted
from tesserafl.core.method import Predictor, Report, State
from tesserafl.core.model import Model
from tesserafl.core.params import Params
from tesserafl.core.submodel import SubModel
from tesserafl.methods._mixture import (
    BASE,
    CHOOSE,
    GLOBAL,
    NARROW,
    OFFSET,
    OWN,
    WIDEN,
    Gate,
    Mixture,
    MixtureLoss,
    named,
    new_adapter,
    new_choice,
    part_of,
)
from tesserafl.methods._own import part_like, resized_to

MAX_PARAMETER = 1e6
"""Beyond that an expert has diverged."""
FEATURES = "features"
"""Option of a task: entries of the features that the gate reads."""


@dataclass(frozen=True, kw_only=True)
class Experts:
    """The settings of a mixture, and the client's side of it; a method that has one inherits it."""

    stage_one: float = 0.5
    """share of the rounds that train the global expert; 0: it is the foundation model as it came"""
    gate: Literal["shared", "private", "linear", "half"] = "shared"
    """the gate's adapter is averaged in every round, or stays; or the gate has no adapter; or there
    is no gate, only halves"""
    gate_input: Literal["pretrained", "global"] = "pretrained"
    """whose features the gate reads: the foundation model's as it came, or the global expert's,
    which is run anyway"""
    gate_width: int = 32
    """b: bottleneck of the gate's adapter"""
    temperature: float = 1.0
    """T_g: the larger, the more alike the experts' shares"""
    own: float = 0.5
    """lambda_1: weight of the own expert's loss"""
    balance: float = 0.01
    """lambda_b: weight of the pull towards equal shares"""
    held_out: float = 0.2
    """share of a client's examples on which the gate learns and the expert does not; 0: both learn
    on all"""
    own_start: Literal["global", "pretrained"] = "global"
    """what a client's expert begins as: the global one, or the foundation model as it came"""

    @property
    def num_references(self) -> int:
        """Frozen sets of parameters that a client looks at beside those that it trains."""
        return 2 if self._reads == BASE else 1

    def check_experts(self) -> None:
        """Check the settings.

        Raises:
            ConfigError: one is outside of what it may be.
        """
        if not 0.0 <= self.stage_one <= 1.0:
            raise ConfigError(f"method.stage_one must be in [0, 1]; got {self.stage_one}")
        if not 0.0 <= self.held_out < 1.0:
            raise ConfigError(f"method.held_out must be in [0, 1); got {self.held_out}")
        if self.own < 0 or self.balance < 0:
            raise ConfigError(
                f"method.own and method.balance are weights of losses, 0 or more; got "
                f"{self.own} and {self.balance}"
            )
        if not self.temperature > 0 or self.gate_width < 1:
            raise ConfigError(
                f"method.temperature must be positive and method.gate_width at least 1; got "
                f"{self.temperature} and {self.gate_width}"
            )

    def is_second(self, round: int, rounds: int) -> bool:
        """Whether a round, counted from 0, is of the second stage."""
        return round >= rounds * self.stage_one - 1e-9

    def new_gate(self, model: Model, seed: int) -> tuple[Params, int]:
        """The gate's adapter, and how many features it reads.

        Raises:
            ConfigError: the model does not know.
        """
        if model.feature_size is None:
            raise ConfigError(
                "the method's gate reads features of a frozen model; choose --model lora"
            )
        size = model.feature_size()
        if self.gate in ("linear", "half"):
            return {}, size
        return new_adapter(size, self.gate_width, seed), size

    def own_wanted(self, gate: Params) -> Wanted:
        """What `own_report` holds; `gate` is the adapter that a task sends."""
        shared = {name: tuple(gate[name].shape) for name in self._shared(gate)}
        return Wanted(deltas=frozenset(), extra=shared)

    def own_fit(self, model: Model, task: Task, memory: Memory, validate: bool) -> Fit:
        """Train the own expert and the gate; the global expert is looked up."""
        expert, own, gate = self._held(model, task, memory)
        references = {GLOBAL: expert}
        if self._reads == BASE:
            references[BASE] = as_it_came(model, expert)
        trainable = frozenset(own) if task.trainable is None else task.trainable
        return Fit(
            params={**own, **gate},
            training=task.training,
            objective=MixtureLoss(self._gate, self.own, self.balance, self._reads),
            trainable=trainable.union(gate),
            beside=frozenset(gate),
            references=references,
            reference_logits=frozenset({GLOBAL}),
            held_out=0.0 if self.gate == "half" else self.held_out,
            validate=validate,
        )

    def own_report(self, model: Model, task: Task, fitted: Fitted, memory: Memory) -> Report:
        """What the gate's adapter changed by, if it is shared; the rest is kept."""
        expert, own, gate = self._held(model, task, memory)
        after = {**own, **gate, **fitted.params}
        kept = named(GLOBAL, expert) | named(OWN, {name: after[name] for name in own})
        shared = self._shared(gate)
        kept |= {name: after[name] for name in gate if name not in shared}
        changes = {name: after[name] - gate[name] for name in shared}
        # Here, where it costs this client's work alone; nor is nonsense to be remembered.
        check_entries(changes, MAX_ENTRY)
        check_entries(fitted.params, MAX_PARAMETER)
        update = Update(
            round=task.round,
            client=task.client.id,
            submodel=SubModel(task.submodel.sizes, {}),
            delta={},
            num_examples=fitted.num_examples,
            num_steps=fitted.num_steps,
            metrics=fitted.metrics,
            extra=changes,
        )
        return update, kept

    def mixture_of(self, model: Model, state: State, memory: Memory) -> Predictor:
        """The mixture; the global expert for a client that has none of its own."""
        expert, own = part_of(memory, GLOBAL), part_of(memory, OWN)
        if not own:
            return Predictor(model=model, params=state.params)
        small = resized_to(model, part_like(model, own))
        params = {**named(GLOBAL, expert), **named(OWN, own), **state.extra, **_private(memory)}
        if self._reads == BASE:
            params |= named(BASE, as_it_came(model, expert))
        return Predictor(model=small, params=params, rule=Mixture(self._gate, self._reads))

    @property
    def _gate(self) -> Gate:
        return Gate(self.temperature, learned=self.gate != "half")

    @property
    def _reads(self) -> str:
        return BASE if self.gate != "half" and self.gate_input == "pretrained" else GLOBAL

    def _shared(self, gate: Params) -> list[str]:
        return [n for n in (NARROW, WIDEN) if self.gate == "shared" and n in gate]

    def _held(self, model: Model, task: Task, memory: Memory) -> tuple[Params, Params, Params]:
        """The global expert, the own one and the gate, before a round."""
        expert = part_of(memory, GLOBAL) or task.params
        if not expert:
            raise MessageError(
                f"client {task.client.id} was sent the global expert in an earlier round and does "
                f"not remember it; give it back its memory, or begin the run anew"
            )
        own = part_of(memory, OWN)
        if not own:
            own = expert if self.own_start == "global" else as_it_came(model, expert)
        if self.gate == "half":
            return expert, own, {}
        fresh = new_choice(task.options[FEATURES])
        return expert, own, {**fresh, **task.extra, **_private(memory)}


def as_it_came(model: Model, expert: Params) -> Params:
    """The expert with adapters that change nothing: the foundation model, and the expert's head."""
    ups = {pair.up for pair in model.low_rank}
    return {n: torch.zeros_like(t) if n in ups else t for n, t in expert.items()}


def _private(memory: Mapping[str, Tensor]) -> Params:
    return {n: memory[n] for n in (NARROW, WIDEN, CHOOSE, OFFSET) if n in memory}
