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
from dataclasses import dataclass
from typing import ClassVar, Literal

from tesserafl.core.fit import Training
from tesserafl.core.messages import Client, Task, Update
from tesserafl.core.method import (
    Predictor,
    State,
    Topology,
    Weighting,
    average_trained,
    report_deltas,
)
from tesserafl.core.model import Model
from tesserafl.methods._ordered import in_order_of
from tesserafl.methods._starts import Start, start_options, train_from_start
from tesserafl.methods._width import smallest_part


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
    rewrites: ClassVar[bool] = True

    def init(self, model: Model, seed: int, rounds: int) -> State:
        """The model at the clients' width, freshly initialised at that width."""
        return State(params=smallest_part(model, self.ratio).init(seed), seed=seed, rounds=rounds)

    def configure(
        self, model: Model, state: State, clients: Sequence[Client], training: Training
    ) -> Iterator[Task]:
        """Everybody gets everything, and in round 0 perhaps a seed to start from instead."""
        everything = smallest_part(model, self.ratio).whole()
        for client in clients:
            yield Task(
                round=state.round,
                client=client,
                submodel=everything,
                params=state.params,
                training=training,
                options=start_options(self.start, state),
            )

    local = train_from_start
    report = report_deltas

    def aggregate(
        self, model: Model, state: State, clients: Sequence[Client], updates: Iterable[Update]
    ) -> State:
        """Mean of the clients' models, each with its units in the global model's order."""
        trained = smallest_part(model, self.ratio)

        def matched() -> Iterator[Update]:
            for update in updates:
                if self.matching == "none":
                    yield update
                else:
                    yield in_order_of(trained, state.params, update)
                del update  # its memory serves the next client

        return average_trained(self, trained, state, clients, matched())

    def predictor(self, model: Model, state: State) -> Predictor:
        """The averaged model."""
        return Predictor(model=smallest_part(model, self.ratio), params=state.params)
