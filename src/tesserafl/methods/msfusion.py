"""MSfusion: peers without a server train shifting, overlapping windows of one large model.

Xie and Li, "MSfusion: A Dynamic Model Splitting Approach for Resource-Constrained Machines to
Collaboratively Train Larger Models", 2024. https://arxiv.org/abs/2407.03622

Of the paper: double shifting, adaptive overlap, contrast, fusion on common parameters. Its formulas
could not be had: the schedules and the loss are a reconstruction. See docs/methods/msfusion.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from tesserafl.core.fit import Fit, Fitted, Training, WidthScaling
from tesserafl.core.messages import Client, Memory, Task, Update
from tesserafl.core.method import (
    Report,
    State,
    Topology,
    Weighting,
    average_trained,
    init_whole,
    predict_whole,
    report_deltas,
    train_scaled,
    weights_of,
)
from tesserafl.core.model import Model
from tesserafl.core.submodel import Units
from tesserafl.methods import _fusion
from tesserafl.methods._contrast import check_contrast
from tesserafl.methods._shift import Overlap, Phase, check_shift, overlap_at, shifted, union_of
from tesserafl.methods._width import ranks_of, ratio_of, width_tasks


@dataclass(frozen=True, kw_only=True)
class MSfusion:
    """Double shifting windows, overlap that changes over the rounds, a contrastive loss."""

    ratio: tuple[float, ...] = (0.25,)
    """mu: width ratios of the participants, dealt in turn"""
    weighting: Weighting = "examples"
    """weight of a participant in the fusion: its number of examples, or one each"""
    overlap_schedule: Overlap = "decaying"
    """how the overlap of neighbours' windows changes: decaying from overlap to overlap_end,
    constant, growing, or adaptive: up where the fused values disagree more than usual, else down"""
    overlap: float = 0.5
    """c: share of a window that the next participant has too, in the first round"""
    overlap_end: float | None = None
    """c towards the last round; None: 0.2, or less if full coverage of a round takes less"""
    stride: int = 1
    """units that all windows move from round to round"""
    layer_phase: Phase = "same"
    """same: one offset for all layers; staggered: layers apart, so that more pairs of channels
    meet"""
    contrast: float = 0.1
    """lambda: weight of the contrastive loss; 0 leaves it out"""
    temperature: float = 0.5
    """tau of the contrastive loss"""
    negatives: _fusion.Negatives = "own"
    """what the contrastive loss keeps away from: the own last sub-model, those of peers as they
    were before fusion, or both"""
    peer_negatives: int = 2
    """how many peers' sub-models, of the following ranks"""
    momentum: _fusion.Momentum = "reset"
    """momentum when windows move: begin anew, or keep it where the window stays"""
    width_scaling: WidthScaling = "output"
    """how a cut layer makes up for the inputs it lacks: none, output (HeteroFL's scaler) or
    parameters (as output, at the learning pace of a small network)"""

    topology: ClassVar[Topology] = "peers"

    def init(self, model: Model, seed: int, rounds: int) -> State:
        """The global model, which no participant needs to train as a whole."""
        check_shift(self.overlap, self.overlap_end, self.stride)
        check_contrast(self.contrast, self.temperature, self.peer_negatives)
        return init_whole(self, model, seed, rounds)

    @property
    def entrywise(self) -> bool:
        """Unless the disagreement of all, or the parts of others, are looked at."""
        alone = not _fusion.wants_peers(self.contrast, self.negatives)
        return alone and self.overlap_schedule != "adaptive"

    def configure(
        self, model: Model, state: State, clients: Sequence[Client], training: Training
    ) -> Iterator[Task]:
        """Every participant's windows, by its rank among those that take part."""
        _fusion.check_able(model, training, self.contrast, self.momentum)
        ranks, ratios = ranks_of(clients), self._ratios(clients)
        overlap, raw = self.overlap_of(state, clients), _fusion.RawParts(state.extra)

        def keep(slot: int, client: Client) -> Mapping[str, Units]:
            where = (ratios, ranks[client.id], overlap, state.round, self.stride)
            return shifted(model, *where, self.layer_phase)

        for task in width_tasks(model, state, clients, training, keep):
            yield replace(task, extra=raw.after(task, ranks, self.peer_negatives))

    def local(self, model: Model, task: Task, memory: Memory) -> Fit:
        """Cross-entropy and, from the second round on, the contrastive loss."""
        fit = train_scaled(self, model, task, memory)
        if self.momentum == "carry":
            fit = _fusion.with_momentum(fit, model, task, memory)
        if self.contrast > 0:
            fit = _fusion.contrasted(fit, model, task, memory, self.contrast, self.temperature)
        return fit

    def report(self, model: Model, task: Task, fitted: Fitted, memory: Memory) -> Report:
        """The change; what the next round needs stays in the memory."""
        update, _ = report_deltas(self, model, task, fitted, memory)
        return update, _fusion.remembered(model, task, fitted, self.contrast > 0, self.negatives)

    def aggregate(
        self, model: Model, state: State, clients: Sequence[Client], updates: Iterable[Update]
    ) -> State:
        """Every entry becomes the mean over those that trained it."""
        weights, raw = weights_of(clients, self.weighting), _fusion.RawParts({})
        measure = _fusion.Disagreement(model, weights)
        if _fusion.wants_peers(self.contrast, self.negatives):
            updates = raw.collecting(model, state.params, updates)
        if self.overlap_schedule == "adaptive":
            updates = measure.watching(state.params, updates)
        after = average_trained(self, model, state, clients, updates)
        notes = measure.notes(state, after, self.overlap_of(state, clients))
        return replace(after, notes=notes, extra=raw.tensors)

    predictor = predict_whole

    def overlap_of(self, state: State, clients: Sequence[Client]) -> float:
        """c of the state's round."""
        if self.overlap_schedule == "adaptive":
            return float(state.notes.get("overlap", self.overlap))
        ends, progress = (self.overlap, self.overlap_end), state.round / max(1, state.rounds)
        return overlap_at(self.overlap_schedule, *ends, self._ratios(clients), progress)

    @property
    def num_references(self) -> int:
        """Frozen sub-models that a participant holds while it trains, at most."""
        return _fusion.num_references(self.contrast, self.negatives, self.peer_negatives)

    def union_of(self, state: State, clients: Sequence[Client]) -> float:
        """Share of an axis's units that somebody trains in the state's round, by the formula."""
        return union_of(self._ratios(clients), self.overlap_of(state, clients))

    def _ratios(self, clients: Sequence[Client]) -> list[float]:
        """By rank."""
        return [ratio_of(self.ratio, c) for c in sorted(clients, key=lambda client: client.id)]
