"""FLM: the server matches clients' layers, averages similar ones, adds dissimilar ones as layers.

Zhang, Song, Honarkhah, Ding, Hong, "Building Large Models from Small Distributed Models: A Layer
Matching Approach", IEEE SAM 2024; its workshop ancestor: "Building Large Machine Learning Models
from Small Distributed Models", FL-NeurIPS 2022, https://openreview.net/forum?id=vpXExByg5e5

Departures from the paper: only its abstracts could be had; docs/methods/flm.md says step by step
what is sourced and what is ours.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from tesserafl.core.fit import Training
from tesserafl.core.messages import Client, Task, Update
from tesserafl.core.method import (
    Predictor,
    State,
    Topology,
    Weighting,
    report_deltas,
)
from tesserafl.core.model import Model
from tesserafl.methods._depth import check_depths, depth_of, first_blocks
from tesserafl.methods._growing import Growing
from tesserafl.methods._handback import handed_to, weighed
from tesserafl.methods._look import looked
from tesserafl.methods._pilot import piloted, settled
from tesserafl.methods._public import part_of, public_of
from tesserafl.methods._stack import free_slots, noted, orders_of, stacks_of
from tesserafl.methods._starts import Start, start_options, train_from_start
from tesserafl.methods._width import width_tasks


@dataclass(frozen=True, kw_only=True)
class FLM(Growing):
    """A deep model grows out of shallow ones."""

    weighting: Weighting = "examples"
    """p_k: weight of a client: its number of examples, or one each"""

    start: Start = "shared"
    """where clients begin in round 0: at the server's model, or each at an initialisation of its
    own (then with align)"""

    topology: ClassVar[Topology] = "star"
    entrywise: ClassVar[bool] = False
    rewrites: ClassVar[bool] = True
    reads_public: ClassVar[bool] = True

    @property
    def ratio(self) -> tuple[float, ...]:
        """Classes of clients differ in depth alone."""
        return (1.0,) * len(self.depth)

    def init(self, model: Model, seed: int, rounds: int) -> State:
        """A model as deep as the deepest client's; its further slots are empty."""
        self.check_growth(model)
        first = model.slice(first_blocks(model, max(self.depth)))
        params = {name: torch.zeros(shape) for name, shape in model.shapes.items()}
        params |= model.resized(first).init(seed)
        state = State(params=params, seed=seed, rounds=rounds, notes=self.first_notes(model))
        return self._weighed(model, state)

    def configure(
        self, model: Model, state: State, clients: Sequence[Client], training: Training
    ) -> Iterator[Task]:
        """Every client gets as many blocks as it can train, by the policy."""
        check_depths(self.depth)
        if self.needs_public:
            public_of(state, self.needs_public)
        stacks = stacks_of(state)

        def keep(slot: int, client: Client) -> dict[str, list[int]]:
            depth, policy = depth_of(self.depth, client), state.notes["policy"]
            return handed_to(policy, model, state, stacks, client, depth, self.cooldown)

        options = start_options(self.start, state)
        for task in width_tasks(model, state, clients, training, keep):
            yield replace(task, options=options)

    local = train_from_start
    report = report_deltas

    def aggregate(
        self, model: Model, state: State, clients: Sequence[Client], updates: Iterable[Update]
    ) -> State:
        """Match and combine; put a dissimilar block in; tidy up."""
        ledger = self.ledger(model, state, clients, self.weighting)
        ledger.sums(updates)
        if not ledger.paths:
            after = replace(state, round=state.round + 1)
            ends = after.round == after.rounds and state.notes["grown"] is not None
            return looked(self, model, piloted(self, model, after)) if ends else after
        free = free_slots(model, ledger.stacks)
        grown, block, rest = ledger.grow(free, self.support)
        ledger.fold_back(rest)
        params = ledger.merged()
        stacks = {axis: ledger.noted(axis, params) for axis in ledger.stacks}
        if state.notes["policy"] == "persistent" and self.measure != "updates":
            for client, paths in sorted(ledger.paths.items()):
                for axis, path in paths.items():
                    stacks[axis] = stacks[axis].with_path(client, path)
        matched: dict[str, Any] = {
            str(client): {axis: list(path) for axis, path in own.items()}
            for client, own in sorted(ledger.paths.items())
        }
        notes = {**state.notes, **noted(stacks), "paths": matched}
        after = replace(state, params=params, round=state.round + 1, notes=notes)
        if grown is not None:
            after = settled(self, model, self.put_in(after, model, stacks, grown, block))
        return self._weighed(model, looked(self, model, piloted(self, model, after)))

    def predictor(self, model: Model, state: State) -> Predictor:
        """All blocks, scaled; or a client's path, where that is better on public examples."""
        stacks = stacks_of(state)
        orders, scales = orders_of(stacks), self.scales(model, state, stacks)
        if state.notes["served"] is not None:
            orders = state.notes["served"]
            scales = {axis: {} for axis in orders}
        small, params = part_of(model, state.params, orders, scales)
        return Predictor(model=small, params=params, part=model.slice(orders))

    def described(self, model: Model, state: State) -> dict[str, Any]:
        """What a report shows of the round, as plain JSON values."""
        stacks = stacks_of(state)
        scales = self.scales(model, state, stacks)
        axes = {
            axis: {
                "order": list(stack.order),
                "scales": [scales[axis][slot] for slot in stack.order],
                "families": stack.families,
            }
            for axis, stack in stacks.items()
        }
        known = {name: state.notes[name] for name in ("paths", "log", "policy", "served")}
        return {"axes": axes, **known}

    def _weighed(self, model: Model, state: State) -> State:
        """The sizes of blocks, where they say who is drawn."""
        if state.notes["policy"] != "importance":
            return state
        stacks = weighed(model, state.params, stacks_of(state))
        return replace(state, notes={**state.notes, **noted(stacks)})
