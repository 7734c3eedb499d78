"""Peers that each keep a part of the model: nobody holds the whole, before, during or after.

    keeps[n, e]   peer n stores entry e: what it trains next, and what nobody trains next and fell
                  to it. Every entry has a keeper. Public: it follows from the schedule alone.

After a round every holder of an entry sends its change to those that will keep it, and one who has
the value sends that to those that have not. What a keeper computes from it is what a copy of the
whole would hold, to the bit; so a run is the same as with `all_gather`, stored and sent otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tesserafl.core.errors import CheckpointError
from tesserafl.core.exactsum import ExactSum
from tesserafl.core.fit import Training
from tesserafl.core.layout import entries, strides_of
from tesserafl.core.messages import Client, Task, Update
from tesserafl.core.method import Method, State, Weighting, weights_of
from tesserafl.core.model import Model
from tesserafl.core.params import Params, num_entries
from tesserafl.core.submodel import SubModel, View, merge
from tesserafl.engines.federation import Folded, Held, Traffic
from tesserafl.engines.network import Network

_Ints = npt.NDArray[np.int64]
_Bools = npt.NDArray[np.bool_]


class _Averaging(Method, Protocol):
    """What the method must be for this: entry by entry, with a weight."""

    @property
    def weighting(self) -> Weighting: ...


@dataclass(kw_only=True)
class Lean:
    """One store per peer: the entries that it keeps, in the model's order."""

    model: Model
    method: _Averaging
    network: Network
    cohorts: Callable[[int], Sequence[Client]]
    """Who takes part in a round: known to everybody beforehand."""
    state: State
    """The state without values: its parameters lie on `meta`."""
    keeps: _Bools
    """[peers, entries of the model]."""
    stores: list[Tensor]
    """Peer -> float [entries that it keeps]."""
    _places: dict[str, tuple[int, tuple[int, ...]]] = field(init=False)
    """Parameter -> its first entry, and its shape."""

    def __post_init__(self) -> None:
        self._places, first = {}, 0
        for name, tensor in self.state.params.items():
            self._places[name] = (first, tuple(tensor.shape))
            first += tensor.numel()

    @property
    def round(self) -> int:
        """Rounds that are done."""
        return self.state.round

    @property
    def rounds(self) -> int:
        """Rounds that are planned."""
        return self.state.rounds

    @property
    def shapes(self) -> Params:
        """Parameters without values."""
        return self.state.params

    def tasks(self, cohort: Sequence[Client], training: Training) -> Iterator[Task]:
        """Each peer's part, out of its own store."""
        for task in self.method.configure(self.model, self.state, cohort, training):
            peer = task.client.id
            kept = np.flatnonzero(self.keeps[peer])
            found = np.searchsorted(kept, self._entries(task.submodel.views))
            values = self.stores[peer][torch.from_numpy(found)]
            params, first = {}, 0
            for name, view in task.submodel.views.items():
                count = int(np.prod(view.shape))
                params[name] = values[first : first + count].reshape(view.shape)
                first += count
            yield replace(task, params=params)

    def fold(self, cohort: Sequence[Client], updates: Iterable[Update]) -> Folded:
        """Hand over what the next round needs."""
        changes: dict[int, tuple[_Ints, Tensor]] = {}
        for update in updates:
            views = {name: update.submodel.views[name] for name in update.delta}
            delta = torch.cat([update.delta[name].reshape(-1) for name in views])
            changes[update.client] = (self._entries(views), delta)
        trained = np.zeros_like(self.keeps)
        for peer, (where, _) in changes.items():
            trained[peer, where] = True
        ways = [self._ways(origin) for origin in range(self.network.peers)]
        self.state = self.method.aggregate(self.model, self.state, cohort, iter(()))
        keeps = self._next_keeps(trained)
        weights = weights_of(cohort, self.method.weighting)
        bound = max(1, sum(weights.values()))
        traffic = np.zeros((2, self.network.peers), dtype=np.int64)
        stores, kept = [], [np.flatnonzero(row) for row in self.keeps]
        for peer in range(self.network.peers):
            wanted = np.flatnonzero(keeps[peer])
            values = self._values(peer, wanted, kept, ways, traffic)
            total = ExactSum(max_weight=bound)
            for origin, (where, delta) in sorted(changes.items()):
                both, here, there = np.intersect1d(
                    wanted, where, assume_unique=True, return_indices=True
                )
                if not len(both):
                    continue
                part = SubModel({}, {"part": View("part", (torch.from_numpy(here),))})
                change = {"part": delta[torch.from_numpy(there)]}
                total.fold(part, change, weights[origin], {"part": values})
                _count(traffic, ways[origin], origin, peer, change["part"])
            stores.append(merge({"part": values}, total)["part"])
        self.keeps, self.stores = keeps, stores
        return Folded(
            traffic={
                peer: Traffic(int(traffic[0, peer]), int(traffic[1, peer]))
                for peer in range(self.network.peers)
            },
            stored=int(keeps.sum(axis=1).max()),
        )

    def assembled(self) -> State:
        """The whole model, from one keeper of each entry: nobody's but the evaluator's."""
        flat = torch.empty(self.keeps.shape[1], dtype=self.stores[0].dtype)
        for peer in reversed(range(self.network.peers)):
            flat[torch.from_numpy(self.keeps[peer])] = self.stores[peer]
        params = {}
        for name, (first, shape) in self._places.items():
            params[name] = flat[first : first + int(np.prod(shape))].reshape(shape).clone()
        return replace(self.state, params=params)

    def copies(self) -> Mapping[int, State]:
        """None: nobody has one."""
        return {}

    def held(self) -> Held:
        """The stores, and who keeps what."""
        stores = {str(peer): store for peer, store in enumerate(self.stores)}
        keeps = {"keeps": torch.from_numpy(self.keeps)}
        values = {"links": self.network.digest}
        return [replace(self.state, params={})], values, {"stores": stores, "public": keeps}

    def restore(self, held: Held) -> None:
        """Take them."""
        ((state,), values, groups) = held
        self.state = replace(state, params=self.state.params)
        keeps = groups["public"]["keeps"].numpy()
        if keeps.shape != self.keeps.shape:
            raise CheckpointError(
                f"the checkpoint is of {keeps.shape[0]} peers, config.json says "
                f"{self.network.peers}; put config.json back, or run it into a new folder"
            )
        self.network.refuse_others(values["links"])
        self.keeps = keeps
        self.stores = list(groups["stores"].values())

    def _values(
        self,
        peer: int,
        wanted: _Ints,
        kept: Sequence[_Ints],
        ways: Sequence[Mapping[int, int]],
        traffic: _Ints,
    ) -> Tensor:
        """Values before the round of the entries that the peer will keep; fetched where needed."""
        values = torch.empty(len(wanted), dtype=self.stores[peer].dtype)
        source = np.argmax(self.keeps[:, wanted], axis=0)
        source[self.keeps[peer, wanted]] = peer
        for origin in np.unique(source).tolist():
            mine = np.flatnonzero(source == origin)
            found = np.searchsorted(kept[origin], wanted[mine])
            part = self.stores[origin][torch.from_numpy(found)]
            values[torch.from_numpy(mine)] = part
            _count(traffic, ways[origin], origin, peer, part)
        return values

    def _next_keeps(self, trained: _Bools) -> _Bools:
        """Who keeps what after the round: who trains it next, else one of those that have it."""
        keeps = np.zeros_like(self.keeps)
        if self.round < self.state.rounds:
            cohort = self.cohorts(self.round)
            # What a client trains does not depend on how it trains.
            for task in self.method.configure(self.model, self.state, cohort, Training()):
                keeps[task.client.id, self._entries(task.submodel.views)] = True
        lonely = np.flatnonzero(~keeps.any(axis=0))
        had = np.where(trained[:, lonely].any(axis=0), trained[:, lonely], self.keeps[:, lonely])
        # Dealt evenly among those that have it: one who always took it would fill up.
        turn = lonely % had.sum(axis=0)
        keeps[np.argmax(np.cumsum(had, axis=0) > turn, axis=0), lonely] = True
        return keeps

    def _entries(self, views: Mapping[str, View]) -> _Ints:
        """Numbers of the viewed entries in the whole model, view after view."""
        parts = []
        for view in views.values():
            first, shape = self._places[view.name]
            numbers = np.array([first])
            for index, stride in zip(view.index, strides_of(shape), strict=True):
                numbers = (numbers[:, None] + entries(index) * stride).reshape(-1)
            parts.append(numbers)
        return np.concatenate(parts)

    def _ways(self, origin: int) -> dict[int, int]:
        """Receiver -> who hands it the origin's messages."""
        hops = self.network.journeys(self.round, origin, relayed=True)
        return {receiver: hop.sender for receiver, hop in hops.items()}


def _count(
    traffic: _Ints, way: Mapping[int, int], origin: int, receiver: int, part: Tensor
) -> None:
    """Add a part's bytes on every link of its way."""
    size = part.numel() * part.element_size()
    while receiver != origin:
        traffic[0, way[receiver]] += size
        traffic[1, receiver] += size
        receiver = way[receiver]


def lean(
    model: Model,
    method: _Averaging,
    network: Network,
    cohorts: Callable[[int], Sequence[Client]],
    state: State,
) -> Lean:
    """Peers that begin with their part of an initial state.

    What nobody trains first is dealt in equal shares.
    """
    count = num_entries(state.params)
    bare = replace(state, params={n: t.to("meta") for n, t in state.params.items()})
    shares = np.arange(count) * network.peers // count
    federation = Lean(
        model=model,
        method=method,
        network=network,
        cohorts=cohorts,
        state=bare,
        keeps=shares == np.arange(network.peers)[:, None],
        stores=[],
    )
    federation.keeps = federation._next_keeps(np.zeros_like(federation.keeps))
    flat = torch.cat([tensor.reshape(-1) for tensor in state.params.values()])
    federation.stores = [flat[torch.from_numpy(keeps)].clone() for keeps in federation.keeps]
    return federation
