"""One round of layer matching: updates are matched, summed, and set aside where they are unlike.

Every update is dealt with by itself, from what was known before the round; what is set aside is
looked at in the order of the clients. So no order of arrival changes anything.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from tesserafl.core.exactsum import ExactSum
from tesserafl.core.messages import Client, Update
from tesserafl.core.method import State, Weighting, weights_of
from tesserafl.core.model import Model
from tesserafl.core.params import Params
from tesserafl.core.submodel import SubModel, View, merge
from tesserafl.methods._depth import block_names
from tesserafl.methods._distances import Distances
from tesserafl.methods._match import (
    Place,
    aligned_order,
    flat,
    spread_of,
)
from tesserafl.methods._ordered import in_order_of, turned
from tesserafl.methods._stack import Stack
from tesserafl.methods._unlike import Grown, Measure, Unlike, alike, mean_block

_CERTAIN = -1e6
"""A distance that is matched whatever else there is."""
_LATELY = 0.7
"""How much of what was measured lasts to the next round."""


@dataclass(kw_only=True)
class Ledger:
    """What a round's updates add up to."""

    model: Model
    state: State
    stacks: Mapping[str, Stack]
    clients: Sequence[Client]
    weighting: Weighting
    measure: Measure
    distances: Distances
    """For all measures but `updates`."""
    delta: Mapping[str, float]
    """Axis -> the distance beyond which a block is matched to none; infinity: it is not looked."""
    align: bool = False
    """Whether units are permuted to match the server's before anything is compared or summed."""
    split: tuple[str, int] | None = None
    """Of measure `updates`: the block whose updates are set aside, to be told apart."""
    paths: dict[int, dict[str, tuple[int, ...]]] = field(default_factory=dict)
    """Client -> axis -> the slots that its blocks were matched to, else those that it got."""
    aside: list[Unlike] = field(default_factory=list)
    apart: dict[str, dict[int, list[float]]] = field(default_factory=dict)
    """Axis -> client -> distances of its blocks from where they came from."""
    moved: dict[tuple[str, int], dict[int, float]] = field(default_factory=dict)
    """(axis, slot) -> client -> weight times the norm of its update."""

    def __post_init__(self) -> None:
        self.weights = weights_of(self.clients, self.weighting)
        self.total = ExactSum(max_weight=max(1, sum(self.weights.values())))

    def sums(self, updates: Iterable[Update]) -> None:
        """Take in all updates."""
        for update in updates:
            self._take(update)
            del update  # its memory serves the next client

    @property
    def heard(self) -> int:
        """Weight of those that answered."""
        return sum(self.weights[client] for client in self.paths)

    def held(self, axis: str) -> dict[int, int]:
        """Slot -> weight of the clients whose blocks were summed there, or set aside from it."""
        held: dict[int, int] = {}
        for client, paths in self.paths.items():
            for slot in set(paths[axis]):
                held[slot] = held.get(slot, 0) + self.weights[client]
        return held

    def grow(
        self, free: Mapping[str, int | None], support: float
    ) -> tuple[Grown | None, Params, list[Unlike]]:
        """What is put in, its parameters (names within the block), and what is not in it.

        The heaviest group of alike blocks that were set aside becomes a new block if at least two
        clients and `support` of all weight stand behind it, and not more than half of the weight
        that held their origin: what most clients do is no dissimilarity.

        Args:
            free: axis -> a slot that is not in use; None: there is none.
            support: 0 to 1.
        """
        groups = [
            group
            for (axis, _, _), unlike in sorted(self._groups().items())
            if free[axis] is not None
            for group in alike(self.measure, unlike, self._origin(unlike))
        ]

        def weight(group: Sequence[Unlike]) -> int:
            return sum(unlike.stake for unlike in group)

        for group in sorted(groups, key=weight, reverse=True):
            first = group[0]
            whole = self.held(first.axis).get(first.origin, 0)
            if len(group) < 2 or weight(group) < support * self.heard or 2 * weight(group) > whole:
                continue
            slot = free[first.axis]
            assert slot is not None
            grown = Grown(
                axis=first.axis,
                slot=slot,
                origin=first.origin,
                after=first.after,
                members={unlike.client: self._with(unlike, slot) for unlike in group},
                part=weight(group) / whole,
            )
            return (
                grown,
                mean_block(group, self._origin(group)),
                [u for u in self.aside if u not in group],
            )
        return None, {}, list(self.aside)

    def _with(self, unlike: Unlike, slot: int) -> tuple[int, ...]:
        """What the client holds once the block that was set aside lies in this slot."""
        path = list(self.paths[unlike.client][unlike.axis])
        path[unlike.place] = slot
        return tuple(path)

    def fold_back(self, unlike: Iterable[Unlike]) -> None:
        """Sum what was set aside where it came from: no update is thrown away."""
        for each in unlike:
            part = SubModel({}, each.views)
            self.total.fold(part, each.delta, each.stake, self.state.params, rest=True)

    def merged(self) -> Params:
        """The parameters after the round."""
        return merge(self.state.params, self.total)

    def noted(self, axis: str, after: Params) -> Stack:
        """The axis's stack, which knows of this round."""
        stack = self.stacks[axis].hearing(self.held(axis), self.heard)
        found = [d for client in sorted(self.apart.get(axis, {})) for d in self.apart[axis][client]]
        if found:
            stack = replace(stack, spread=spread_of(found))
        if self.measure != "updates":
            return stack
        # A block that was told apart in vain leaves the next turn to another.
        unrest = {
            slot: _LATELY * value if (axis, slot) == self.split else value
            for slot, value in stack.unrest.items()
        }
        for (where, slot), norms in self.moved.items():
            if where == axis and (axis, slot) != self.split and len(norms) > 1:
                apart = 1.0 - self._moved_together(axis, slot, after, norms)
                old = unrest.get(slot, apart)
                unrest[slot] = _LATELY * old + (1.0 - _LATELY) * apart
        return replace(stack, unrest=unrest)

    def _moved_together(
        self, axis: str, slot: int, after: Params, norms: Mapping[int, float]
    ) -> float:
        """|sum of updates| / sum of |updates|: 1 where all agree (M2 is one minus this)."""
        names, before = self._names(axis, slot), self.state.params
        change = flat({rest: after[n].double() - before[n] for rest, n in names.items()})
        weight = sum(self.weights[client] for client in norms)
        whole = math.fsum(norms.values())
        return min(1.0, float(change.norm()) * weight / whole) if whole else 1.0

    def _take(self, update: Update) -> None:
        if self.align:
            update = in_order_of(self.model, self.state.params, update)
        weight, client = self.weights[update.client], update.client
        views, delta = dict(update.submodel.views), dict(update.delta)
        self.paths[client] = {}
        for axis, stack in self.stacks.items():
            blocks = self._blocks(axis, update)
            slots = [slot for slot, _ in blocks]
            places = self._places(axis, update, slots)
            path = []
            for j, ((slot, names), place) in enumerate(zip(blocks, places, strict=True)):
                order = stack.order
                to = slot if place.matched is None else order[place.matched]
                aside = place.matched is None or (axis, slot) == self.split
                path.append(to)
                if self.measure == "updates":
                    norm = float(flat({n: delta[n] for n in names.values()}).norm())
                    self.moved.setdefault((axis, slot), {})[client] = weight * norm
                if aside:
                    after = order[place.after] if place.after >= 0 else -1
                    self.aside.append(
                        Unlike(
                            client=client,
                            stake=weight,
                            axis=axis,
                            origin=slot,
                            place=j,
                            after=slot if self.measure == "updates" else after,
                            delta={rest: delta.pop(n).clone() for rest, n in names.items()},
                            views={rest: views[n] for rest, n in names.items()},
                        )
                    )
                elif to != slot:
                    self._move(axis, to, names, views, delta)
            self.paths[client][axis] = tuple(path)
        kept = SubModel(update.submodel.sizes, {name: views[name] for name in delta})
        self.total.fold(kept, delta, weight, self.state.params)

    def _move(
        self, axis: str, to: int, names: Mapping[str, str], views: dict[str, View], delta: Params
    ) -> None:
        """Tell a block's change of another slot than it came from; changes `views` and `delta`."""
        params, there = self.state.params, self._names(axis, to)
        values, reference = {}, {}
        for rest, name in names.items():
            values[rest] = views[name].read(params[views[name].name]) + delta[name]
            views[name] = View(there[rest], views[name].index)
            reference[rest] = views[name].read(params[there[rest]])
        if self.align:
            values = turned(self.model, axis, reference, values)
        for rest, name in names.items():
            delta[name] = values[rest] - reference[rest]

    def _places(self, axis: str, update: Update, slots: Sequence[int]) -> list[Place]:
        order = self.stacks[axis].order
        own = [order.index(slot) for slot in slots]
        if self.measure == "updates":
            return [Place(place, place) for place in own]
        table = self.distances(axis, update, slots)
        apart = [table[i][j] for j, i in enumerate(own)]
        self.apart.setdefault(axis, {})[update.client] = apart
        movable = set(self.model.movable(axis))
        for i, slot in enumerate(order):  # what is built otherwise stays where it is
            for j, source in enumerate(slots):
                if slot not in movable or source not in movable:
                    table[i][j] = _CERTAIN if slot == source else math.inf
        return _behind_origins(aligned_order(table, self.delta[axis])[0], own, len(order))

    def _blocks(self, axis: str, update: Update) -> list[tuple[int, dict[str, str]]]:
        """Per block of the client: its slot, and rest -> the client's name."""
        depth, blocks = self.model.depths[axis], dict[int, tuple[int, dict[str, str]]]()
        for name in update.delta:
            if here := depth.locate(name):
                there = depth.locate(update.submodel.views[name].name)
                assert there is not None
                rest = here[0] + here[2]
                blocks.setdefault(here[1], (there[1], {}))[1][rest] = name
        return [blocks[number] for number in sorted(blocks)]

    def _names(self, axis: str, slot: int) -> dict[str, str]:
        return block_names(self.model, axis)[slot]

    def _origin(self, group: Sequence[Unlike]) -> Params:
        """The block that these came from, by names within the block."""
        names = self._names(group[0].axis, group[0].origin)
        return {rest: self.state.params[name] for rest, name in names.items()}

    def _groups(self) -> dict[tuple[str, int, int], list[Unlike]]:
        groups: dict[tuple[str, int, int], list[Unlike]] = {}
        for unlike in sorted(self.aside, key=lambda u: (u.client, u.axis, u.origin)):
            groups.setdefault((unlike.axis, unlike.after, unlike.origin), []).append(unlike)
        return groups


def _behind_origins(places: Sequence[Place], own: Sequence[int], rows: int) -> list[Place]:
    """What is matched to none goes behind its origin, or as near to it as its neighbours allow."""
    found = []
    for j, place in enumerate(places):
        if place.matched is None:
            left = [p.matched for p in places[:j] if p.matched is not None]
            right = [p.matched for p in places[j:] if p.matched is not None]
            least, most = max(left, default=-1), min(right, default=rows) - 1
            place = Place(None, min(max(own[j], least), most))
        found.append(place)
    return found
