"""The state before the first round."""

from __future__ import annotations

from dataclasses import replace

import torch

from tesserafl.core.method import PUBLIC_INPUTS, PUBLIC_LABELS, State
from tesserafl.core.model import Model
from tesserafl.data.examples import FederatedData
from tesserafl.run.experiment import Experiment


def first_state(
    experiment: Experiment, model: Model, data: FederatedData, rounds: int | None = None
) -> State:
    """What the method begins with; one that `reads_public` finds the public examples in it.

    Args:
        experiment: the method, the seed and the rounds.
        model: the global model.
        data: the public examples.
        rounds: other than the experiment's.
    """
    planned = experiment.rounds if rounds is None else rounds
    state: State = experiment.method.init(model, experiment.seed, planned)
    if data.public is None or not getattr(experiment.method, "reads_public", False):
        return state
    inputs, labels = data.public.batch(torch.arange(len(data.public)))
    held = {PUBLIC_INPUTS: inputs, PUBLIC_LABELS: labels}
    return replace(state, extra={**state.extra, **held})
