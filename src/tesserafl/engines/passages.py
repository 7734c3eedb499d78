"""From one round to the next: what peers that keep parts of a model hand over, strip by strip.

    had[n, e], will[n, e]   peer n stores entry e before the round, and after it

Every holder of an entry sends its change to those that will keep it, and one who has the value
sends that to those that have not. What a keeper computes from it is what a copy of the whole would
hold, to the bit. A peer needs its own store for it and what others hand it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from tesserafl.core.exactsum import ExactSum
from tesserafl.core.messages import Update
from tesserafl.core.params import Params
from tesserafl.core.submodel import SubModel, View, merge
from tesserafl.engines.strips import Places, Strip, places_of


class Handed(NamedTuple):
    """What one peer hands another at the end of a round; both know which entries these are."""

    values: Tensor
    """From before the round, of what the other will keep and has not: float [entries]."""
    change: Tensor
    """Of what the other will keep and this one trained: float [entries]."""

    @property
    def num_bytes(self) -> int:
        """Of both."""
        return sum(part.numel() * part.element_size() for part in self)


class Change(NamedTuple):
    """What a peer trained."""

    places: Places
    delta: Params

    def within(self, strip: Strip, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Which entries of a strip, bool [size], and by how much they change, [size]."""
        return strip.mask(self.places), strip.spread(self.places, self.delta, dtype)


NOTHING = Change({}, {})
"""Of a peer that did not train."""


def change_of(update: Update) -> Change:
    """What an update changes."""
    views = {name: update.submodel.views[name] for name in update.delta}
    return Change(places_of(views), update.delta)


@dataclass(frozen=True, kw_only=True)
class Passage:
    """A strip of the model from one round to the next."""

    strip: Strip
    had: Tensor
    """bool [peers, size]"""
    will: Tensor
    """bool [peers, size]"""
    weights: Mapping[int, int]
    """Who trained -> the weight of its word."""

    @property
    def held(self) -> list[int]:
        """How many entries each peer had."""
        counts: list[int] = self.had.sum(dim=1).tolist()
        return counts

    @cached_property
    def _gives(self) -> Tensor:
        """bool [peers, size]: who has an entry gives its value, the first of them."""
        gives, given = torch.empty_like(self.had), torch.zeros_like(self.had[0])
        for peer, had in enumerate(self.had):
            gives[peer] = had & ~given
            given |= had
        return gives

    def lent(self, origin: int, receiver: int) -> Tensor:
        """Entries whose value a peer hands another: bool [size]."""
        return self.will[receiver] & ~self.had[receiver] & self._gives[origin]

    def hand(
        self, origin: int, receiver: int, store: Tensor, trained: Tensor, delta: Tensor
    ) -> Handed:
        """What a peer hands another.

        Args:
            origin: who hands it over.
            receiver: to whom.
            store: what the origin keeps of the strip.
            trained: which entries of the strip it trained, bool [size].
            delta: and by how much they change, [size].
        """
        lent = self.lent(origin, receiver)
        return Handed(store[lent[self.had[origin]]], delta[trained & self.will[receiver]])

    def fuse(
        self,
        peer: int,
        store: Tensor,
        trained: Mapping[int, Tensor],
        handed: Callable[[int, int, int], Handed],
    ) -> Tensor:
        """What a peer keeps of the strip after the round.

        Args:
            peer: whose it is.
            store: what it kept before.
            trained: who answered -> which entries of the strip it trained, bool [size].
            handed: what another hands it, so many values and changes; for itself its own change.
        """
        wanted, mine = self.will[peer], self.had[peer]
        values = store.new_empty(int(wanted.sum()))
        values[mine[wanted]] = store[wanted[mine]]
        total = ExactSum(max_weight=max(1, sum(self.weights.values())))
        for origin in range(len(self.had)):
            lent = self.lent(origin, peer)[wanted].nonzero().flatten()
            told = trained[origin][wanted].nonzero().flatten() if origin in trained else lent[:0]
            if not len(lent) and not len(told):
                continue
            part = handed(origin, len(lent), len(told))
            values[lent] = part.values
            if len(told):
                place = SubModel({}, {"part": View("part", (told,))})
                weight = self.weights[origin]
                total.fold(place, {"part": part.change}, weight, {"part": values})
        return merge({"part": values}, total)["part"]


@dataclass(kw_only=True)
class Taken:
    """A flat tensor from its beginning to its end, a part at a time: read or filled."""

    flat: Tensor
    _taken: int = 0

    @property
    def left(self) -> int:
        """Entries that were not taken."""
        return len(self.flat) - self._taken

    def take(self, count: int) -> Tensor:
        """The next entries."""
        self._taken += count
        return self.flat[self._taken - count : self._taken]

    def put(self, part: Tensor) -> None:
        """Set the next entries."""
        self.take(len(part))[:] = part
