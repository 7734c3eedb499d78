"""RAVAN: a sum of low-rank heads between frozen bases; square cores are trained and averaged.

Raje et al., "Ravan: Multi-Head Low-Rank Adaptation for Federated Fine-Tuning", NeurIPS 2025.
https://arxiv.org/abs/2506.05568

The change of a frozen weight is sum of s_h B_h H_h A_h. Bases B, A are the same for everybody, so
the mean of s_h H_h is the mean of the products, exactly. A weaker client trains some of the heads.

Departures from the paper: its text could not be had in full; see docs/methods/ravan.md. Bases are
drawn from the run's seed on either side and are never sent.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from tesserafl.core.checks import MAX_ENTRY, check_entries
from tesserafl.core.errors import ConfigError
from tesserafl.core.exactsum import ExactSum
from tesserafl.core.fit import Fit, Fitted, Training
from tesserafl.core.lowrank import check_adapted, factors_of
from tesserafl.core.messages import Client, Memory, Task, Update, Wanted
from tesserafl.core.method import (
    Report,
    State,
    Topology,
    Weighting,
    average_trained,
    init_whole,
    predict_whole,
    report_deltas,
    weights_of,
)
from tesserafl.core.model import Model
from tesserafl.core.params import Params
from tesserafl.core.submodel import SubModel, cut, merge
from tesserafl.methods import _cores
from tesserafl.methods._width import ratio_of


@dataclass(frozen=True, kw_only=True)
class Ravan:
    """FedAvg of the heads' cores."""

    ratio: tuple[float, ...] = (1.0,)
    """share of the heads that each client class trains, dealt to the clients in turn"""
    weighting: Weighting = "examples"
    """weight of a client in the mean: its number of examples, or one each"""
    heads: int = 4
    """h: heads of every adapted weight; each has model.rank / heads of the ranks"""
    choice: Literal["random", "largest"] = "random"
    """which heads a client trains that does not train all: drawn anew in every round, or those of
    the largest cores"""

    topology: ClassVar[Topology] = "star"
    entrywise: ClassVar[bool] = False

    def init(self, model: Model, seed: int, rounds: int) -> State:
        """H_h = 0 between the bases, which are drawn."""
        check_adapted(model, type(self).__name__)
        _cores.check_heads(model, self.heads)
        state = init_whole(self, model, seed, rounds)
        ups = [state.params[pair.up] for pair in model.low_rank]
        if any(up.any() for up in ups):
            raise ConfigError("method 'ravan' has bases of its own; leave --model.adapter away")
        cores = _cores.zeros(model, self.heads, ups[0].dtype)
        factors = _cores.factors_of_cores(model, cores, seed)
        return replace(state, params=state.params | factors, extra=cores)

    def configure(
        self, model: Model, state: State, clients: Sequence[Client], training: Training
    ) -> Iterator[Task]:
        """All cores, what is no factor, and which heads to train."""
        part, own = model.whole(), factors_of(model)
        rest = {name: view for name, view in part.views.items() if name not in own}
        for client in clients:
            heads = self._chosen(state, client)
            yield Task(
                round=state.round,
                client=client,
                submodel=part,
                params=cut(state.params, SubModel(part.sizes, rest)),
                training=training,
                extra=dict(state.extra),
                options={"seed": state.seed, "heads": heads},
                wanted=Wanted(
                    deltas=frozenset(rest), fewer=True, extra=_cores.shapes(state.extra, heads)
                ),
            )

    def local(self, model: Model, task: Task, memory: Memory) -> Fit:
        """H_h and s_h of the chosen heads, and what is no factor; s_h begins at 1."""
        own = factors_of(model)
        rest = {name: value for name, value in task.params.items() if name not in own}
        return _cores.fit_of(model, task, rest, task.options["seed"], task.options["heads"])

    def report(self, model: Model, task: Task, fitted: Fitted, memory: Memory) -> Report:
        """What s_h H_h changed by; the scales are not sent."""
        rest = {name: value for name, value in fitted.params.items() if name in task.params}
        update, memory = report_deltas(self, model, task, replace(fitted, params=rest), memory)
        heads = task.options["heads"]
        changes = _cores.changes_of(fitted.params, task.extra, heads)
        check_entries(changes, MAX_ENTRY)  # here, where it costs this client's work alone
        part = _cores.only(model, update.submodel, task.extra, heads)
        return replace(update, submodel=part, extra=changes), memory

    def aggregate(
        self, model: Model, state: State, clients: Sequence[Client], updates: Iterable[Update]
    ) -> State:
        """H_h <- mean of s_h H_h over those that trained the head; the others keep theirs."""
        weights, asked = weights_of(clients, self.weighting), {c.id: c for c in clients}
        total = ExactSum(max_weight=max(1, sum(weights.values())))

        def without_cores() -> Iterator[Update]:
            for update in updates:
                part = self._places(state, asked[update.client])
                total.fold(part, update.extra, weights[update.client], state.extra)
                yield update

        after = average_trained(self, model, state, clients, without_cores())
        if not total.sums:
            return after
        cores = merge(state.extra, total)
        factors = _cores.factors_of_cores(model, cores, state.seed)
        return replace(after, params=after.params | factors, extra=cores)

    predictor = predict_whole

    def factors(self, model: Model, state: State, update: Update) -> Params:
        """The factors, at the full rank, that a client's answer stands for."""
        total = ExactSum(max_weight=1)
        client = Client(id=update.client, num_examples=update.num_examples)
        total.fold(self._places(state, client), update.extra, 1, state.extra)
        return _cores.factors_of_cores(model, merge(state.extra, total), state.seed)

    def _places(self, state: State, client: Client) -> SubModel:
        return _cores.places(state.extra, self._chosen(state, client))

    def _chosen(self, state: State, client: Client) -> list[list[int]]:
        count = math.ceil(round(ratio_of(self.ratio, client) * self.heads, 9))
        keys = (state.round, client.id)
        return _cores.chosen(state.extra, count, self.choice, state.seed, *keys)
