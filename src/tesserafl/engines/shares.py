"""A model among peers of whom nobody holds the whole: who keeps what, and what they hand over.

    keeps[n, e]   peer n stores entry e: what it trains next, and what nobody trains next and fell
                  to it. Every entry has a keeper. Public: it follows from the schedule alone.

After a round every holder of an entry sends its change to those that will keep it, and one who has
the value sends that to those that have not. What a keeper computes from it is what a copy of the
whole would hold, to the bit. A peer needs its own store for it and what others hand it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tesserafl.core.errors import UpdateError
from tesserafl.core.exactsum import ExactSum
from tesserafl.core.fit import Training
from tesserafl.core.layout import entries, strides_of
from tesserafl.core.messages import Client, Task, Update
from tesserafl.core.method import Method, State, Weighting, weights_of
from tesserafl.core.model import Model
from tesserafl.core.params import num_entries
from tesserafl.core.submodel import SubModel, View, merge

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]


class Averaging(Method, Protocol):
    """What the method must be for this: entry by entry, with a weight."""

    @property
    def weighting(self) -> Weighting:
        """What a client's word weighs."""
        ...


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

    where: Ints
    """Entries of the model, in the order of the update."""
    delta: Tensor
    """Float, as many."""


NOTHING = Change(np.zeros(0, dtype=np.int64), torch.zeros(0))
"""Of a peer that did not train."""


@dataclass(frozen=True, kw_only=True)
class Shares:
    """Who keeps what in a round."""

    model: Model
    method: Averaging
    cohorts: Callable[[int], Sequence[Client]]
    """Who takes part in a round: known to everybody beforehand."""
    state: State
    """The state without values: its parameters lie on `meta`."""
    keeps: Bools
    """[peers, entries of the model]."""

    @property
    def peers(self) -> int:
        """How many there are."""
        return len(self.keeps)

    def kept(self, peer: int) -> Ints:
        """The entries that a peer keeps, ascending: those of its store."""
        return np.flatnonzero(self.keeps[peer])

    def tasks(self, cohort: Sequence[Client], training: Training) -> Iterator[Task]:
        """What each of the cohort trains, without values."""
        return self.method.configure(self.model, self.state, cohort, training)

    def filled(self, task: Task, store: Tensor) -> Task:
        """A peer's task, out of its own store."""
        found = np.searchsorted(self.kept(task.client.id), self._entries(task.submodel.views))
        values = store[torch.from_numpy(found)]
        params, first = {}, 0
        for name, view in task.submodel.views.items():
            count = int(np.prod(view.shape))
            params[name] = values[first : first + count].reshape(view.shape)
            first += count
        return replace(task, params=params)

    def following(self) -> Shares:
        """The shares of the next round."""
        cohort = self.cohorts(self.state.round)
        state = self.method.aggregate(self.model, self.state, cohort, iter(()))
        after = replace(self, state=state)
        return replace(after, keeps=after._given_out())

    def change_of(self, update: Update) -> Change:
        """What an update changes, and where."""
        views = {name: update.submodel.views[name] for name in update.delta}
        delta = torch.cat([update.delta[name].reshape(-1) for name in views])
        return Change(self._entries(views), delta)

    def places_of(self, part: SubModel) -> Ints:
        """The entries of a sub-model, in the order of its views."""
        return self._entries(part.views)

    def hand(
        self, after: Shares, origin: int, receiver: int, store: Tensor, change: Change
    ) -> Handed:
        """What a peer hands another, out of its own store and what it trained."""
        found = np.searchsorted(self.kept(origin), self._lent(after, origin, receiver))
        _, _, there = _both(after.kept(receiver), change.where)
        trained = change.delta[torch.from_numpy(there)].to(store.dtype)
        return Handed(store[torch.from_numpy(found)], trained)

    def fuse(
        self,
        after: Shares,
        peer: int,
        store: Tensor,
        trained: Mapping[int, Ints],
        handed: Callable[[int], Handed],
    ) -> Tensor:
        """A peer's store after the round.

        Args:
            after: the shares of the next round.
            peer: whose it is.
            store: its store before the round.
            trained: who answered -> the entries that it trained.
            handed: what another peer hands it; for itself, its own change.

        Raises:
            UpdateError: a peer hands over more or fewer entries than are due.
        """
        wanted = after.kept(peer)
        values = torch.empty(len(wanted), dtype=store.dtype)
        source = self._sources(wanted, peer)
        weights = weights_of(self.cohorts(self.state.round), self.method.weighting)
        total = ExactSum(max_weight=max(1, sum(weights.values())))
        for origin in sorted({*np.unique(source).tolist(), *trained}):
            part = handed(origin)
            mine = np.flatnonzero(source == origin)
            if origin == peer:
                found = np.searchsorted(self.kept(peer), wanted[mine])
                values[torch.from_numpy(mine)] = store[torch.from_numpy(found)]
            else:
                _check_length("values", origin, part.values, len(mine))
                values[torch.from_numpy(mine)] = part.values
            if origin not in trained:
                continue
            both, here, _ = _both(wanted, trained[origin])
            _check_length("changes", origin, part.change, len(both))
            if len(both):
                place = SubModel({}, {"part": View("part", (torch.from_numpy(here),))})
                total.fold(place, {"part": part.change}, weights[origin], {"part": values})
        return merge({"part": values}, total)["part"]

    def _lent(self, after: Shares, origin: int, receiver: int) -> Ints:
        """Entries whose value a peer hands another."""
        if origin == receiver:
            return np.zeros(0, dtype=np.int64)
        wanted = after.kept(receiver)
        lent: Ints = wanted[self._sources(wanted, receiver) == origin]
        return lent

    def _sources(self, wanted: Ints, peer: int) -> Ints:
        """Who gives a peer each of these entries: itself, or the first that keeps it."""
        source: Ints = np.argmax(self.keeps[:, wanted], axis=0)
        source[self.keeps[peer, wanted]] = peer
        return source

    def _given_out(self) -> Bools:
        """Who keeps what in this state's round, as given out from the keepers of before."""
        keeps = np.zeros_like(self.keeps)
        if self.state.round < self.state.rounds:
            cohort = self.cohorts(self.state.round)
            # What a client trains does not depend on how it trains.
            for task in self.tasks(cohort, Training()):
                keeps[task.client.id, self._entries(task.submodel.views)] = True
        lonely = np.flatnonzero(~keeps.any(axis=0))
        had = self.keeps[:, lonely]
        # Dealt evenly among those that have it: one who always took it would fill up.
        turn = lonely % had.sum(axis=0)
        keeps[np.argmax(np.cumsum(had, axis=0) > turn, axis=0), lonely] = True
        return keeps

    @cached_property
    def _places(self) -> dict[str, tuple[int, tuple[int, ...]]]:
        """Parameter -> its first entry, and its shape."""
        places, first = {}, 0
        for name, tensor in self.state.params.items():
            places[name] = (first, tuple(tensor.shape))
            first += tensor.numel()
        return places

    def _entries(self, views: Mapping[str, View]) -> Ints:
        """Numbers of the viewed entries in the whole model, view after view."""
        parts = [np.zeros(0, dtype=np.int64)]
        for view in views.values():
            first, shape = self._places[view.name]
            numbers = np.array([first])
            for index, stride in zip(view.index, strides_of(shape), strict=True):
                numbers = (numbers[:, None] + entries(index) * stride).reshape(-1)
            parts.append(numbers)
        return np.concatenate(parts)


def first_shares(
    model: Model,
    method: Averaging,
    peers: int,
    cohorts: Callable[[int], Sequence[Client]],
    state: State,
) -> Shares:
    """Who keeps what first; what nobody trains is dealt in equal shares. `state` needs no values"""
    count = num_entries(state.params)
    shares = Shares(
        model=model,
        method=method,
        cohorts=cohorts,
        state=replace(state, params={n: t.to("meta") for n, t in state.params.items()}),
        keeps=np.arange(count) * peers // count == np.arange(peers)[:, None],
    )
    return replace(shares, keeps=shares._given_out())


def _both(wanted: Ints, where: Ints) -> tuple[Ints, Ints, Ints]:
    """Entries that are in both, ascending, and their places in either."""
    both, here, there = np.intersect1d(wanted, where, assume_unique=True, return_indices=True)
    return both, here, there


def _check_length(what: str, origin: int, part: Tensor, due: int) -> None:
    if part.shape != (due,):
        raise UpdateError(
            f"peer {origin} hands over {what} of shape {list(part.shape)}; due are {due} entries"
        )
