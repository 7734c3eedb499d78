"""PFL-MoE: a federated expert and a client's own, mixed by a gate that reads features (PFL-MF).

Guo et al., "PFL-MoE: Personalized Federated Learning Based on Mixture of Experts", APWeb-WAIM 2021.
https://arxiv.org/abs/2012.15589

Stage one is FedAvg. In stage two nothing is sent: every client trains a copy of the global expert
and a linear gate, answer = g global(x) + (1 - g) own(x).

Departures from the paper: the experts are adapters on a frozen model, and the gate reads the frozen
model's features; own expert and gate are trained together, by the settings of `Experts`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from tesserafl.core.fit import Fit, Fitted, Training
from tesserafl.core.messages import Client, Memory, Task, Update
from tesserafl.core.method import (
    Predictor,
    Report,
    State,
    Topology,
    Weighting,
    average_trained,
    predict_whole,
    report_deltas,
)
from tesserafl.core.model import Model
from tesserafl.methods._adapters import first_ranks, init_adapters
from tesserafl.methods._experts import FEATURES, Experts


@dataclass(frozen=True, kw_only=True)
class PFLMoE(Experts):
    """FedAvg of adapters, then a mixture of two experts on every client."""

    ratio: tuple[float, ...] = (1.0,)
    """share of the rank that each client class trains, dealt to the clients in turn"""
    weighting: Weighting = "examples"
    """weight of a client in the mean: its number of examples, or one each"""
    gate: Literal["linear", "half"] = "linear"
    """a linear gate, or only halves"""
    own: float = 1.0
    """weight of the own expert's loss beside that of the mixture"""
    balance: float = 0.0
    """weight of a pull towards equal shares"""
    held_out: float = 0.0
    """share of a client's examples on which the gate learns and the expert does not; 0: both learn
    on all"""

    topology: ClassVar[Topology] = "star"
    entrywise: ClassVar[bool] = False

    def init(self, model: Model, seed: int, rounds: int) -> State:
        """Adapters that change nothing."""
        self.check_experts()
        state = init_adapters(self, model, seed, rounds)
        return replace(state, notes={FEATURES: self.new_gate(model, seed)[1], "served": []})

    def configure(
        self, model: Model, state: State, clients: Sequence[Client], training: Training
    ) -> Iterator[Task]:
        """The adapters; in stage two once."""
        second = self.is_second(state.round, state.rounds)
        options = {"second": second, FEATURES: state.notes[FEATURES]}
        for task in first_ranks(self, model, state, clients, training):
            served = task.client.id in state.notes["served"]
            params = {} if served else task.params
            wanted = self.own_wanted({}) if second else task.wanted
            yield replace(task, params=params, options=options, wanted=wanted)

    def local(self, model: Model, task: Task, memory: Memory) -> Fit:
        """All adapters; in stage two those of the own expert, and the gate."""
        if task.options["second"]:
            return self.own_fit(model, task, memory, validate=False)
        return Fit(params=task.params, training=task.training)

    def report(self, model: Model, task: Task, fitted: Fitted, memory: Memory) -> Report:
        """What the adapters changed by; in stage two nothing."""
        if task.options["second"]:
            return self.own_report(model, task, fitted, memory)
        return report_deltas(self, model, task, fitted, memory)

    def aggregate(
        self, model: Model, state: State, clients: Sequence[Client], updates: Iterable[Update]
    ) -> State:
        """Mean of the adapters, in stage one."""
        answered = set(state.notes["served"])
        second = self.is_second(state.round, state.rounds)

        def noted() -> Iterator[Update]:
            for update in updates:
                if update.num_steps:  # peers hear of those too that did not train
                    answered.add(update.client)
                yield update

        after = average_trained(self, model, state, clients, noted())
        served = sorted(answered) if second else []
        return replace(after, notes={**state.notes, "served": served})

    predictor = predict_whole

    def personal(self, model: Model, state: State, memory: Memory) -> Predictor:
        """Both experts under the client's gate; for unknown clients the global expert."""
        return self.mixture_of(model, state, memory)
