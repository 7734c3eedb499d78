"""FedFMSL: a global expert, then a client's own beside it, mixed by a gate; adapters activated step
by step.

Wu et al., FedFMSL, IEEE TMC 23(12), 2024, pp. 15167-15181; its preprint is "FedMS: Federated
Learning with Mixture of Sparsely Activated Foundations Models": https://arxiv.org/abs/2312.15926

Stage one averages the active adapters: the global expert. In stage two it is frozen; every client
trains an expert of its own, which stays there, and the gate; the gate's adapter alone is averaged.

Departures from the paper: its text could not be had; docs/methods/fedfmsl.md says step by step what
is sourced and what is ours.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from tesserafl.core.fit import Fit, Fitted, Training
from tesserafl.core.messages import Client, Memory, Task, Update, Wanted
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
from tesserafl.core.submodel import cut
from tesserafl.methods._activation import Activation, Heard, counts_of, most_blocks
from tesserafl.methods._adapters import init_adapters
from tesserafl.methods._experts import FEATURES, Experts
from tesserafl.methods._extra import ExtraSum
from tesserafl.methods._products import average_products
from tesserafl.methods._width import ratio_of


@dataclass(frozen=True, kw_only=True)
class FedFMSL(Activation, Experts):
    """Two stages, two experts, one gate."""

    ratio: tuple[float, ...] = (1.0,)
    """share of the rank that each client class trains, dealt to the clients in turn"""
    weighting: Weighting = "examples"
    """weight of a client in the mean: its number of examples, or one each"""
    averaging: Literal["fedit", "ffa_lora", "flexlora"] = "fedit"
    """how stage one averages adapters, as the method of that name: each factor by itself; one
    factor, the other is frozen; or the products of both, decomposed again"""

    topology: ClassVar[Topology] = "star"
    entrywise: ClassVar[bool] = False

    @property
    def rewrites(self) -> bool:
        """Whether a round leaves factors in another basis than it found them in."""
        return self.averaging == "flexlora"

    def init(self, model: Model, seed: int, rounds: int) -> State:
        """Adapters that change nothing, and the gate's adapter, likewise."""
        self.check_schedule()
        self.check_experts()
        state = init_adapters(self, model, seed, rounds)
        gate, size = self.new_gate(model, seed)
        most = most_blocks(model)
        notes = {**self.begin(most), FEATURES: size, "served": []}
        if any(bool(state.params[pair.up].any()) for pair in model.low_rank):
            notes["reached"] = most  # a saved adapter: what is not active is applied as well
        return replace(state, extra=gate, notes=notes)

    def configure(
        self, model: Model, state: State, clients: Sequence[Client], training: Training
    ) -> Iterator[Task]:
        """Stage one: the active adapters. Stage two: the global expert, once, and the gate."""
        second = self.is_second(state.round, state.rounds)
        for client in clients:
            part = self.held_by(model, state.notes, ratio_of(self.ratio, client), second)
            served = client.id in state.notes["served"]
            gates = second and (self.gate == "shared" or not served)
            trained = self.trained_by(model, state.notes, client).intersection(part.views)
            if self.averaging == "ffa_lora" and not second:
                trained -= {pair.down for pair in model.low_rank}
            yield Task(
                round=state.round,
                client=client,
                submodel=part,
                params={} if served else cut(state.params, part),
                training=training,
                trainable=trained,
                extra=dict(state.extra) if gates else {},
                options={"second": second, FEATURES: state.notes[FEATURES]},
                wanted=self.own_wanted(state.extra) if second else Wanted(),
            )

    def local(self, model: Model, task: Task, memory: Memory) -> Fit:
        """The active adapters; in stage two those of the own expert, and the gate."""
        if task.options["second"]:
            return self.own_fit(model, task, memory, self.validates)
        return Fit(
            params=task.params,
            training=task.training,
            trainable=task.trainable,
            validate=self.validates,
        )

    def report(self, model: Model, task: Task, fitted: Fitted, memory: Memory) -> Report:
        """Stage one: what the adapters changed by. Stage two: the gate's adapter alone."""
        fitted = replace(fitted, metrics={**fitted.metrics, **counts_of(model, task)})
        if task.options["second"]:
            return self.own_report(model, task, fitted, memory)
        return report_deltas(self, model, task, fitted, memory)

    def aggregate(
        self, model: Model, state: State, clients: Sequence[Client], updates: Iterable[Update]
    ) -> State:
        """Stage one: mean of an adapter over those that trained it. Stage two: of the gate's."""
        heard, gate = Heard(), ExtraSum(state.extra, clients, self.weighting)
        second, most = self.is_second(state.round, state.rounds), most_blocks(model)
        average = average_products if self.rewrites and not second else average_trained
        after = average(self, model, state, clients, gate.adding(heard.listening(updates)))
        notes = {**state.notes, **self.after(state.notes, most, heard.mean(clients))}
        if not second and self.is_second(after.round, state.rounds):
            notes |= self.begin(most)
        if second:
            notes["served"] = sorted(heard.answered.union(notes["served"]))
        return replace(after, extra=gate.merged(), notes=notes)

    predictor = predict_whole

    def personal(self, model: Model, state: State, memory: Memory) -> Predictor:
        """Both experts under the client's gate; for unknown clients the global expert."""
        return self.mixture_of(model, state, memory)
