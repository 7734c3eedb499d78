"""FedAdapter: adapters that grow in depth and width while three groups of clients try what is best.

Cai et al., "FedAdapter: Efficient Federated Learning for Modern NLP" (AdaFL), MobiCom 2023.
https://arxiv.org/abs/2205.10162

In every window of rounds a group of clients keeps the configuration, one trains wider adapters and
one those of deeper blocks. The best group's configuration and parameters are inherited by all.

Departures from the paper: LoRA instead of bottleneck adapters; windows are counted in rounds, not
in seconds; accuracies are measured on the clients' validation examples, where they have some.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from tesserafl.core.errors import ConfigError
from tesserafl.core.exactsum import ExactSum
from tesserafl.core.fit import Fit, Fitted, Training
from tesserafl.core.messages import Client, Memory, Task, Update
from tesserafl.core.method import (
    Report,
    State,
    Topology,
    Weighting,
    next_round,
    predict_whole,
    report_deltas,
    weights_of,
)
from tesserafl.core.model import Model
from tesserafl.core.submodel import cut, merge
from tesserafl.methods._activation import counts_of, trained_of
from tesserafl.methods._adapters import init_adapters
from tesserafl.methods._trials import (
    Tally,
    Trials,
    group_of,
    groups_of,
    held_by,
    params_of,
    tensor_of,
)
from tesserafl.methods._width import ratio_of


@dataclass(frozen=True, kw_only=True)
class FedAdapter(Trials):
    """Adapters whose depth and width grow by trial and error."""

    ratio: tuple[float, ...] = (1.0,)
    """share of the width that each client class trains, dealt to the clients in turn"""
    weighting: Weighting = "examples"
    """weight of a client in its group's mean: its number of examples, or one each"""

    topology: ClassVar[Topology] = "star"
    entrywise: ClassVar[bool] = False
    rewrites: ClassVar[bool] = True

    def init(self, model: Model, seed: int, rounds: int) -> State:
        """Adapters that change nothing, and the groups of the first window."""
        self.check_trials()
        state = init_adapters(self, model, seed, rounds)
        if any(bool(state.params[pair.up].any()) for pair in model.low_rank):
            raise ConfigError("fedadapter grows adapters from nothing; leave --model.adapter away")
        if not self.start_depth and not model.adapted(0):
            raise ConfigError("method.start_depth 0 trains nothing: all is in blocks; set it to 1")
        state = replace(state, notes={"log": []})
        return self.begun(model, state, self.start_depth, self.start_width)

    def configure(
        self, model: Model, state: State, clients: Sequence[Client], training: Training
    ) -> Iterator[Task]:
        """The adapters of the client's group, as the group has them."""
        judged = self.is_judged(state)
        for client in clients:
            group = group_of(state, client.id, state.round)
            part = held_by(model, group, ratio_of(self.ratio, client))
            names = {view.name for view in part.views.values()}
            own = {name: tensor_of(state, group, name) for name in names}
            depth = group.depth if client.depth is None else min(group.depth, client.depth)
            yield Task(
                round=state.round,
                client=client,
                submodel=part,
                params=cut(own, part),
                training=training,
                trainable=self.trained_in(model, depth).intersection(part.views),
                options={"group": group.name, "width": group.width, "judged": judged},
            )

    def local(self, model: Model, task: Task, memory: Memory) -> Fit:
        """Plain training; at the end of a window what was received is measured first."""
        return Fit(
            params=task.params,
            training=task.training,
            trainable=task.trainable,
            validate=task.options["judged"],
        )

    def report(self, model: Model, task: Task, fitted: Fitted, memory: Memory) -> Report:
        """What the adapters changed by, and the configuration."""
        more = {**counts_of(model, task), "group_width": float(task.options["width"])}
        fitted = replace(fitted, metrics={**fitted.metrics, **more})
        return report_deltas(self, model, task, fitted, memory)

    def aggregate(
        self, model: Model, state: State, clients: Sequence[Client], updates: Iterable[Update]
    ) -> State:
        """Every group's own mean; at the end of a window the winner's for all."""
        weights, tally = weights_of(clients, self.weighting), Tally()
        before = {group: params_of(state, group) for group in groups_of(state)}
        totals = {group: ExactSum(max_weight=max(1, sum(weights.values()))) for group in before}
        for update in updates:
            if update.round >= state.notes["begun"]:  # else it is late, of a trial that is over
                group = group_of(state, update.client, update.round)
                weight = weights[update.client]
                totals[group].fold(update.submodel, update.delta, weight, before[group])
                tally.note(group, update)
            del update  # its memory serves the next client
        if not tally.found:
            return next_round(state, state.params)
        params = {group: merge(before[group], totals[group]) for group in before}
        return self.after(model, state, params, tally)

    predictor = predict_whole

    def trained_in(self, model: Model, blocks: int) -> frozenset[str]:
        """What is trained with so many blocks: what a client's memory and time are held against."""
        return trained_of(model, blocks, 0, "output")
