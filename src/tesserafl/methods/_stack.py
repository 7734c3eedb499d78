"""The blocks of a growing model in their order, and which of them each client holds.

A block lies in a slot of the global model, which has as many as there may be; the order says which
slots are in use and what follows on what. So a block is put in without moving a parameter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from tesserafl.core.method import State
from tesserafl.core.model import Model

_MEMORY = 0.9
"""How much of the weights that held a block lasts to the next round."""


@dataclass(frozen=True, kw_only=True)
class Stack:
    """One depth axis of a growing model; plain values, so that a state can note it."""

    order: tuple[int, ...]
    """Slots in use, from input to output."""
    origin: Mapping[int, int] = field(default_factory=dict)
    """Slot -> the one that it was split from, and that one from, back to the first round."""
    born: Mapping[int, int] = field(default_factory=dict)
    """Slot -> the first round in which it could be held; founders are not in it."""
    paths: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    """Client -> its slots, of clients for which that was ever changed."""
    held: Mapping[int, float] = field(default_factory=dict)
    """Slot -> weight of the clients that held it, of late."""
    heard: float = 0.0
    """Weight of all clients, of late."""
    spread: tuple[float, float] | None = None
    """Median and deviation of the distances of clients' blocks from where they came from."""
    unrest: Mapping[int, float] = field(default_factory=dict)
    """Slot -> how much the clients' updates cancel, of late."""
    sizes: Mapping[int, float] = field(default_factory=dict)
    """Slot -> logarithm of the block's size, where blocks are drawn by it."""
    close: Mapping[int, int] = field(default_factory=dict)
    """Slot -> for how many looks in a row it was like the next one."""

    @property
    def founders(self) -> tuple[int, ...]:
        """Slots of the first round that are still in use."""
        return tuple(slot for slot in self.order if slot not in self.born)

    @property
    def families(self) -> list[list[int]]:
        """Slots that were split from one, in the order of the first of them."""
        found: dict[int, list[int]] = {}
        for slot in self.order:
            found.setdefault(self.origin.get(slot, slot), []).append(slot)
        return list(found.values())

    def path(self, client: int, depth: int) -> tuple[int, ...]:
        """The client's slots: its own, or `depth` of the founders at equal distances."""
        if client in self.paths:
            return self.paths[client]
        slots = self.founders if len(self.founders) >= depth else self.order
        depth = min(depth, len(slots))
        last = max(1, depth - 1)
        return tuple(slots[j * (len(slots) - 1) // last] for j in range(depth))

    def with_path(self, client: int, path: Sequence[int]) -> Stack:
        """The client's slots from now on; out of order they move to the next that are free.

        Nothing changes if one is not in use, or the client holds more blocks than there are.
        """
        count, size = len(path), len(self.order)
        if count > size or not set(path) <= set(self.order):
            return self
        places: list[int] = []
        for slot in path:
            places.append(max(self.order.index(slot), places[-1] + 1 if places else 0))
        places = [min(place, size - count + j) for j, place in enumerate(places)]
        kept = tuple(self.order[place] for place in places)
        return replace(self, paths={**self.paths, client: kept})

    def hearing(self, held: Mapping[int, int], heard: int) -> Stack:
        """After a round in which clients of these weights held these slots."""
        kept = {slot: _MEMORY * self.held.get(slot, 0.0) for slot in self.order}
        return replace(
            self,
            held={slot: weight + held.get(slot, 0) for slot, weight in kept.items()},
            heard=_MEMORY * self.heard + heard,
        )

    def shares(self, depth: float) -> dict[int, float]:
        """Slot -> how often it was held, 0 to 1; `depth` blocks at random before anybody held."""
        if not self.heard:
            return dict.fromkeys(self.order, min(1.0, depth / len(self.order)))
        return {slot: self.held.get(slot, 0.0) / self.heard for slot in self.order}

    def with_block(
        self,
        slot: int,
        origin: int,
        after: int,
        members: Mapping[int, Sequence[int]],
        part: float,
        round: int,
    ) -> Stack:
        """A block put in after the slot `after` (-1: in front of all).

        Args:
            slot: where it lies.
            origin: the block that it was split from.
            after: the one that it follows.
            members: clients that hold it, and all that they hold from now on.
            part: their part of the weight that held the origin.
            round: the first one in which it can be held.
        """
        place = self.order.index(after) + 1 if after >= 0 else 0
        held = self.held.get(origin, 0.0)
        grown = replace(
            self,
            order=(*self.order[:place], slot, *self.order[place:]),
            origin={**self.origin, slot: self.origin.get(origin, origin)},
            born={**self.born, slot: round},
            held={**self.held, slot: part * held, origin: (1.0 - part) * held},
        )
        for client, path in members.items():
            grown = grown.with_path(client, path)
        return grown

    def without(self, slot: int, into: int | None = None) -> Stack:
        """A block taken out; who held it holds `into`, or the nearest that it does not hold yet."""
        order = tuple(s for s in self.order if s != slot)
        held = {s: w for s, w in self.held.items() if s != slot}
        if into is not None:
            held[into] = min(self.heard, held.get(into, 0.0) + self.held.get(slot, 0.0))
        left = replace(
            self,
            order=order,
            held=held,
            paths={},
            born={s: r for s, r in self.born.items() if s != slot},
            origin={s: o for s, o in self.origin.items() if s != slot},
            unrest={s: u for s, u in self.unrest.items() if s != slot},
            close={},
        )
        paths = {}
        for client, path in self.paths.items():
            kept = [s for s in path if s != slot]
            if slot in path:
                free = [s for s in order if s not in kept]
                near = sorted(free, key=lambda s: (s != into, abs(self._at(s) - self._at(slot))))
                kept = sorted([*kept, *near[:1]], key=order.index)
            paths[client] = tuple(kept)
        return replace(left, paths=paths)

    def _at(self, slot: int) -> int:
        return self.order.index(slot)

    def to_notes(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {
            "order": list(self.order),
            "paths": {str(client): list(path) for client, path in self.paths.items()},
            "heard": self.heard,
            "spread": None if self.spread is None else list(self.spread),
        } | {
            name: {str(slot): value for slot, value in getattr(self, name).items()}
            for name in _BY_SLOT
        }

    @staticmethod
    def from_notes(notes: Mapping[str, Any]) -> Stack:
        """The inverse of `to_notes`."""
        by_slot = {name: {int(s): v for s, v in notes[name].items()} for name in _BY_SLOT}
        return Stack(
            order=tuple(notes["order"]),
            paths={int(client): tuple(path) for client, path in notes["paths"].items()},
            heard=notes["heard"],
            spread=None if notes["spread"] is None else tuple(notes["spread"]),
            **by_slot,
        )


_BY_SLOT = ("origin", "born", "held", "unrest", "sizes", "close")


Stacks = dict[str, Stack]


def stacks_of(state: State) -> Stacks:
    """The stacks that a state notes, by axis."""
    return {axis: Stack.from_notes(notes) for axis, notes in state.notes["stacks"].items()}


def noted(stacks: Mapping[str, Stack]) -> dict[str, Any]:
    """The stacks as a part of a state's notes."""
    return {"stacks": {axis: stack.to_notes() for axis, stack in stacks.items()}}


def orders_of(stacks: Mapping[str, Stack]) -> dict[str, list[int]]:
    """Axis -> slots in use, from input to output."""
    return {axis: list(stack.order) for axis, stack in stacks.items()}


def free_slots(model: Model, stacks: Mapping[str, Stack]) -> dict[str, int | None]:
    """Axis -> the first slot that is not in use; None: all are."""
    return {
        axis: next((s for s in model.movable(axis) if s not in stack.order), None)
        for axis, stack in stacks.items()
    }
