"""HetLoRA: unequal ranks by truncation, weights by the size of the change, ranks that shrink.

Cho et al., "Heterogeneous LoRA for Federated Fine-tuning of On-Device Foundation Models", EMNLP
2024. https://arxiv.org/abs/2401.06432

A client's factors are padded with zeros to the full rank and averaged with weights in proportion to
||B_k A_k||. Local training keeps the last ranks small; a client whose last ranks shrank gives them
up.

Departures from the paper: its text could not be had; rules follow re-implementations. A rank that
is given up is reported by a smaller update, and the server remembers it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from tesserafl.core.errors import ConfigError
from tesserafl.core.fit import Fit, Fitted, Training
from tesserafl.core.lowrank import Collected, check_adapted, product_norm
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
from tesserafl.core.submodel import Units
from tesserafl.methods._ranks import TailPenalty, tail_norm, without_tail
from tesserafl.methods._wanted import wanting
from tesserafl.methods._width import kept_units, ratio_of, width_tasks


@dataclass(frozen=True, kw_only=True)
class HetLoRA:
    """Zero-padded factors, weighted by the norm of their product; self-pruning ranks."""

    ratio: tuple[float, ...] = (1.0, 0.5)
    """share of the rank that each client class begins with, dealt to the clients in turn"""
    weighting: Weighting = "examples"
    """weight of a client in the mean of what is no factor: its examples, or one each"""
    decay: float = 0.99
    """gamma: share of its ranks that a client keeps when it gives some up; 1 = never"""
    penalty: float = 0.005
    """lambda: weight of the last ranks' norms in the local loss"""

    topology: ClassVar[Topology] = "star"
    entrywise: ClassVar[bool] = False

    def init(self, model: Model, seed: int, rounds: int) -> State:
        """The adapters as they are drawn: their product is zero."""
        check_adapted(model, type(self).__name__)
        if not 0.0 < self.decay <= 1.0 or self.penalty < 0.0:
            raise ConfigError(
                f"method.decay must be in (0, 1] and method.penalty 0 or more; got {self.decay} "
                f"and {self.penalty}"
            )
        return init_whole(self, model, seed, rounds)

    def configure(
        self, model: Model, state: State, clients: Sequence[Client], training: Training
    ) -> Iterator[Task]:
        """The first ranks, as many as the client still has."""
        left: Mapping[str, int] = state.notes.get("ranks", {})

        def keep(slot: int, client: Client) -> Mapping[str, Units]:
            ratio = ratio_of(self.ratio, client)
            most = {axis: kept_units(model, axis, ratio) for axis in model.cuttable}
            rank = left.get(str(client.id))
            return {a: range(n if rank is None else min(n, rank)) for a, n in most.items()}

        tasks = width_tasks(model, state, clients, training, keep)
        return wanting(tasks, Wanted(fewer=self.decay < 1.0))

    def local(self, model: Model, task: Task, memory: Memory) -> Fit:
        """Cross-entropy, and the norms of the last ranks."""
        fit = Fit(params=task.params, training=task.training)
        if self.decay == 1.0 or self.penalty == 0.0:
            return fit
        pairs = tuple((pair.down, pair.up) for pair in model.low_rank)
        return replace(fit, objective=TailPenalty(self.penalty, self.decay, pairs))

    def report(self, model: Model, task: Task, fitted: Fitted, memory: Memory) -> Report:
        """The change; without the last ranks, if they have shrunk."""
        update, memory = report_deltas(self, model, task, fitted, memory)
        if self.decay == 1.0:
            return update, memory
        if tail_norm(model, fitted.params, self.decay) < tail_norm(model, task.params, self.decay):
            update = without_tail(model, update, self.decay)
        return update, memory

    def aggregate(
        self, model: Model, state: State, clients: Sequence[Client], updates: Iterable[Update]
    ) -> State:
        """Padded factors, weighted by the norm of the client's product."""
        kept = Collected(model, weights_of(clients, self.weighting))
        after = average_trained(self, model, state, clients, kept.apart(state.params, updates))
        if not kept.values:
            return after
        params, shares = dict(after.params), kept.shares
        sizes = [
            sum(
                float(product_norm(v[p.up].double(), v[p.down].double()).square())
                for p in model.low_rank
            )
            ** 0.5
            for v, _ in shares
        ]
        total = sum(sizes)
        for pair in model.low_rank:
            for name, dim in ((pair.down, 0), (pair.up, 1)):
                mean = torch.zeros_like(state.params[name], dtype=torch.float64)
                for (values, share), size in zip(shares, sizes, strict=True):
                    weight = size / total if total else share
                    mean.narrow(dim, 0, values[name].shape[dim]).add_(values[name], alpha=weight)
                params[name] = mean.to(state.params[name].dtype)
            # Ranks that nobody held: with A zero as well as B they could never learn again.
            most = max(len(values[pair.down]) for values, _ in shares)
            params[pair.down][most:] = state.params[pair.down][most:]
        first = model.low_rank[0].down
        ranks = {str(client): len(values[first]) for client, values in kept.values.items()}
        notes = {**after.notes, "ranks": {**state.notes.get("ranks", {}), **ranks}}
        return replace(after, params=params, notes=notes)

    predictor = predict_whole
