"""Progressive training: the model grows block by block, what lies below the new ones is frozen.

Wu, Li, Xu, "Breaking the Memory Wall for Heterogeneous Federated Learning via Progressive
Training" (ProFL), KDD 2025, model growing: https://arxiv.org/abs/2404.13349; in the same way
SmartFreeze (Wu et al., IWQoS 2024): https://arxiv.org/abs/2408.09101
Copies as new blocks: Gong et al., "Efficient Training of BERT by Progressively Stacking", 2019.

Departures from the papers: one head serves every phase (they give each phase an output module that
stands in for the missing blocks, and ProFL trains those in a shrinking stage before); the calendar
ends a phase (they look at how far the parameters still move); all clients take part.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from tesserafl.core.errors import ConfigError
from tesserafl.core.fit import Fit, Training
from tesserafl.core.messages import Client, Memory, Task, Update
from tesserafl.core.method import (
    Predictor,
    State,
    Topology,
    Weighting,
    average_trained,
    init_whole,
    report_deltas,
)
from tesserafl.core.model import Model
from tesserafl.core.params import Params
from tesserafl.core.submodel import cut
from tesserafl.methods._depth import check_depths, depth_axes, depth_of
from tesserafl.methods._width import width_tasks


@dataclass(frozen=True, kw_only=True)
class Progressive:
    """A model that grows phase by phase; its newest blocks and its head are trained."""

    depth: tuple[int, ...] = (2,)
    """most blocks that each client class trains, dealt to the clients in turn; all those below are
    held and run, frozen"""
    step: int = 0
    """blocks that a phase adds; 0: as many as the weakest class trains"""
    start: Literal["fresh", "copy"] = "fresh"
    """how new blocks begin: as they were drawn, or as copies of those below (stacking)"""
    weighting: Weighting = "uniform"
    """weight of a client in the mean: one each, or its examples"""

    topology: ClassVar[Topology] = "star"
    entrywise: ClassVar[bool] = False

    @property
    def ratio(self) -> tuple[float, ...]:
        """Widths are whole."""
        return (1.0,) * len(self.depth)

    def init(self, model: Model, seed: int, rounds: int) -> State:
        """The global model, of which the first phase trains the first blocks."""
        phases = self._phases(model)
        if rounds < phases:
            raise ConfigError(
                f"the model grows in {phases} phases, of a round or more each; got {rounds} "
                f"rounds: ask for more, or for a larger method.step"
            )
        state = init_whole(self, model, seed, rounds)
        return replace(state, params=self._stacked(model, state.params, self._step()))

    def configure(
        self, model: Model, state: State, clients: Sequence[Client], training: Training
    ) -> Iterator[Task]:
        """The model grown so far; of the phase's new blocks a client trains those on top."""
        axis, (old, grown) = _axis(model), self._reached(model, state, state.round)
        for task in width_tasks(model, state, clients, training, lambda *_: {axis: range(grown)}):
            first = max(old, grown - depth_of(self.depth, task.client))
            depth, names = model.depths[axis], task.params.keys()
            frozen = {n for n in names if (place := depth.locate(n)) and place[1] < first}
            frozen |= set(depth.below if first else ())
            yield replace(task, trainable=frozenset(names - frozen))

    def local(self, model: Model, task: Task, memory: Memory) -> Fit:
        """Plain training of what is not frozen."""
        return Fit(params=task.params, training=task.training, trainable=task.trainable)

    report = report_deltas

    def aggregate(
        self, model: Model, state: State, clients: Sequence[Client], updates: Iterable[Update]
    ) -> State:
        """Mean over those that trained an entry; blocks to come stay copies of what is below."""
        after = average_trained(self, model, state, clients, updates)
        if all(after.params[name] is tensor for name, tensor in state.params.items()):
            return after  # nobody answered
        grown = self._reached(model, state, state.round)[1]
        return replace(after, params=self._stacked(model, after.params, grown))

    def predictor(self, model: Model, state: State) -> Predictor:
        """The model as it was grown in the newest round."""
        axis, grown = _axis(model), self._reached(model, state, max(0, state.round - 1))[1]
        if grown == model.units(axis):
            return Predictor(model=model, params=state.params)
        part = model.slice({axis: range(grown)})
        return Predictor(model=model.resized(part), params=cut(state.params, part), part=part)

    def _step(self) -> int:
        check_depths(self.depth)
        if self.step < 0:
            raise ConfigError(f"method.step must be 0 or more; got {self.step}")
        return self.step or min(self.depth)

    def _phases(self, model: Model) -> int:
        return -(-model.units(_axis(model)) // self._step())

    def _reached(self, model: Model, state: State, round: int) -> tuple[int, int]:
        """Blocks before and after the growth of this round's phase; phases are equally long."""
        phase = min(round, state.rounds - 1) * self._phases(model) // state.rounds
        step = self._step()
        return phase * step, min((phase + 1) * step, model.units(_axis(model)))

    def _stacked(self, model: Model, params: Params, grown: int) -> Params:
        """The parameters, where blocks from `grown` on are copies of those a step below."""
        if self.start == "fresh":
            return params
        axis, stacked, step = _axis(model), dict(params), self._step()
        for name in params:
            place = model.depths[axis].locate(name)
            if place and place[1] >= grown:
                below = (place[1] - grown) % step + grown - step
                if {below, place[1]} <= set(model.movable(axis)):
                    stacked[name] = params[f"{place[0]}{below}.{place[2]}"]
        return stacked


def _axis(model: Model) -> str:
    """The one axis of blocks along which the model grows.

    Raises:
        ConfigError: there are several.
    """
    axes = depth_axes(model)
    if len(axes) > 1:
        raise ConfigError(
            f"the model grows from input to output, so its blocks must form one row; it has "
            f"{', '.join(axes)}: choose --model residual or huggingface"
        )
    return axes[0]
