"""FLoRA: clients' adapters are stacked, which sums their products exactly, and merged.

Wang et al., "FLoRA: Federated Fine-Tuning Large Language Models with Heterogeneous Low-Rank
Adaptations", NeurIPS 2024. https://arxiv.org/abs/2409.05976

A = [A_1; ...; A_K], B = [p_1 B_1, ..., p_K B_K]: B A = sum of p_k B_k A_k, for any ranks. After
every round the product is merged into the weights and the adapters begin anew.

Departures from the paper: the server merges, where the paper's clients each merge the stack that
they receive; the weights that come of it are the same. So a task holds the merged weights (all of
them every round), not the stack: bytes down are those of a client that kept nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from tesserafl.core import seeds
from tesserafl.core.errors import ConfigError
from tesserafl.core.fit import Fit, Training
from tesserafl.core.lowrank import Collected, check_adapted, factors_of, merged, stacked
from tesserafl.core.messages import Client, Memory, Task, Update
from tesserafl.core.method import (
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
from tesserafl.core.modules import parameters_of
from tesserafl.methods._adapters import first_ranks
from tesserafl.methods._wanted import changes_but, wanting


@dataclass(frozen=True, kw_only=True)
class FLoRA:
    """Stacking and merging; exact for unequal ranks."""

    ratio: tuple[float, ...] = (1.0,)
    """share of the rank that each client class trains, dealt to the clients in turn"""
    weighting: Weighting = "examples"
    """weight of a client in the mean: its number of examples, or one each"""

    topology: ClassVar[Topology] = "star"
    entrywise: ClassVar[bool] = False
    rewrites: ClassVar[bool] = True

    def init(self, model: Model, seed: int, rounds: int) -> State:
        """The adapters as they are drawn, and the weights that they will be merged into."""
        check_adapted(model, type(self).__name__, merging=True)
        if any(pair.merged is None for pair in model.low_rank):
            raise ConfigError("method 'flora' merges adapters into the weights; add --model.merge")
        return init_whole(self, model, seed, rounds)

    def configure(
        self, model: Model, state: State, clients: Sequence[Client], training: Training
    ) -> Iterator[Task]:
        """The first ranks of every adapter; answers hold no change of the merged weights."""
        tasks = first_ranks(self, model, state, clients, training)
        return wanting(tasks, changes_but(pair.merged for pair in model.low_rank))

    def local(self, model: Model, task: Task, memory: Memory) -> Fit:
        """Everything but the merged weights."""
        frozen = {pair.merged for pair in model.low_rank}
        trainable = frozenset(name for name in task.params if name not in frozen)
        return Fit(params=task.params, training=task.training, trainable=trainable)

    report = report_deltas

    def aggregate(
        self, model: Model, state: State, clients: Sequence[Client], updates: Iterable[Update]
    ) -> State:
        """Merge the stack; draw the adapters anew; what is neither is averaged."""
        kept = Collected(model, weights_of(clients, self.weighting))
        after = average_trained(self, model, state, clients, kept.apart(state.params, updates))
        if not kept.values:
            return after
        params, shares = dict(after.params), kept.shares
        for pair in model.low_rank:
            assert pair.merged is not None
            params[pair.merged] = merged(pair, state.params[pair.merged], *stacked(pair, shares))
        with seeds.seeded(state.seed, "adapters", state.round):  # never a saved adapter again
            fresh = parameters_of(model.module())
        return replace(after, params=params | {name: fresh[name] for name in factors_of(model)})

    predictor = predict_whole
