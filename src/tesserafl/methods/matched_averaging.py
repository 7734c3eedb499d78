"""Matched averaging: the server orders every client's units like its own before it averages.

Not a paper's algorithm but the plain core of two: units are matched by assignment, as in FedMA
(Wang et al., "Federated Learning with Matched Averaging", ICLR 2020,
https://arxiv.org/abs/2002.06440) and in the hard case of OTFusion (Singh and Jaggi, "Model Fusion
via Optimal Transport", NeurIPS 2020, https://arxiv.org/abs/1910.05653), here by weight matching
over all layers (Ainsworth et al., "Git Re-Basin", ICLR 2023, https://arxiv.org/abs/2209.04836).

Departures: FedMA's probabilistic model, which may add units, its retraining layer by layer and
OTFusion's soft transport are left out; a round is FedAvg's, with the matching in front of the mean.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from tesserafl.core.checks import check_delta
from tesserafl.core.fit import Fit, Training
from tesserafl.core.messages import Client, Memory, Task, Update
from tesserafl.core.method import (
    Predictor,
    State,
    Topology,
    Weighting,
    average_trained,
    report_deltas,
)
from tesserafl.core.model import Model
from tesserafl.core.params import Params, subtract
from tesserafl.core.submodel import cut
from tesserafl.methods._align import aligned
from tesserafl.methods._starts import Start, own_start
from tesserafl.methods._width import check_ratios, prefix

_START = "start"


@dataclass(frozen=True, kw_only=True)
class MatchedAveraging:
    """FedAvg of models whose units are permuted to match the global model's."""

    ratio: tuple[float, ...] = (1.0,)
    """width of the model that is trained: the smallest of these, 1 = the global model's width"""
    weighting: Weighting = "examples"
    """weight of a client in the mean: its number of examples, or one each"""
    matching: Literal["weights", "none"] = "weights"
    """how units are matched before the mean: by the inner product of their weights, or not at all,
    which is FedAvg"""
    start: Start = "shared"
    """where clients begin in round 0: at the global model, or each at an initialisation of its
    own"""

    topology: ClassVar[Topology] = "star"
    entrywise: ClassVar[bool] = False

    def init(self, model: Model, seed: int, rounds: int) -> State:
        """The model at the clients' width, freshly initialised at that width."""
        return State(params=self._trained(model).init(seed), seed=seed, rounds=rounds)

    def configure(
        self, model: Model, state: State, clients: Sequence[Client], training: Training
    ) -> Iterator[Task]:
        """Everybody gets everything, and in round 0 perhaps a seed to start from instead."""
        everything = self._trained(model).whole()
        draws = self.start == "own" and state.round == 0
        for client in clients:
            yield Task(
                round=state.round,
                client=client,
                submodel=everything,
                params=state.params,
                training=training,
                options={_START: state.seed} if draws else {},
            )

    def local(self, model: Model, task: Task, memory: Memory) -> Fit:
        """Plain local training, from the start that the task names."""
        params = task.params
        if _START in task.options:
            params = own_start(model, task.submodel, int(task.options[_START]), task.client.id)
        return Fit(params=params, training=task.training)

    report = report_deltas

    def aggregate(
        self, model: Model, state: State, clients: Sequence[Client], updates: Iterable[Update]
    ) -> State:
        """Mean of the clients' models, each with its units in the global model's order."""
        trained = self._trained(model)

        def matched() -> Iterator[Update]:
            for update in updates:
                yield self._matched(trained, state.params, update)
                del update  # its memory serves the next client

        return average_trained(self, trained, state, clients, matched())

    def predictor(self, model: Model, state: State) -> Predictor:
        """The averaged model."""
        return Predictor(model=self._trained(model), params=state.params)

    def _matched(self, model: Model, params: Params, update: Update) -> Update:
        """The change to the client's model with its units permuted; as it came where none moves."""
        if self.matching == "none":
            return update
        check_delta(update.submodel, update.delta, params)
        reference = cut(params, update.submodel)
        given = {name: reference[name] + change for name, change in update.delta.items()}
        moved = aligned(model, reference, given)
        permuted = {name: value for name, value in moved.items() if value is not given[name]}
        return replace(update, delta={**update.delta, **subtract(permuted, reference)})

    def _trained(self, model: Model) -> Model:
        check_ratios(self.ratio)
        smallest = min(self.ratio)
        return model if smallest == 1.0 else model.resized(prefix(model, smallest))
