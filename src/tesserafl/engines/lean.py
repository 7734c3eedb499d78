"""Peers that each keep a part of the model: nobody holds the whole, before, during or after.

Who keeps what, and what is handed over, is worked out in shares.py. A run is the same as with
`all_gather`, to the bit, stored and sent otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from tesserafl.core.errors import CheckpointError
from tesserafl.core.fit import Training
from tesserafl.core.messages import Client, Task, Update
from tesserafl.core.method import State
from tesserafl.core.model import Model
from tesserafl.core.params import Params
from tesserafl.engines.federation import Folded, Held, Traffic
from tesserafl.engines.network import Network
from tesserafl.engines.shares import (
    NOTHING,
    Averaging,
    Bools,
    Change,
    Handed,
    Ints,
    Shares,
    first_shares,
)


@dataclass(kw_only=True)
class Lean:
    """One store per peer: the entries that it keeps, in the model's order."""

    network: Network
    shares: Shares
    stores: list[Tensor]
    """Peer -> float [entries that it keeps]."""

    @property
    def round(self) -> int:
        """Rounds that are done."""
        return self.shares.state.round

    @property
    def rounds(self) -> int:
        """Rounds that are planned."""
        return self.shares.state.rounds

    @property
    def shapes(self) -> Params:
        """Parameters without values."""
        return self.shares.state.params

    def tasks(self, cohort: Sequence[Client], training: Training) -> Iterator[Task]:
        """Each peer's part, out of its own store."""
        for task in self.shares.tasks(cohort, training):
            yield self.shares.filled(task, self.stores[task.client.id])

    def fold(self, cohort: Sequence[Client], updates: Iterable[Update]) -> Folded:
        """Hand over what the next round needs."""
        changes = {update.client: self.shares.change_of(update) for update in updates}
        trained = {peer: change.where for peer, change in changes.items()}
        ways = [self._ways(origin) for origin in range(self.network.peers)]
        traffic = np.zeros((2, self.network.peers), dtype=np.int64)
        after, stores = self.shares.following(), []

        def handing(receiver: int) -> Callable[[int], Handed]:
            def hand(origin: int) -> Handed:
                change: Change = changes.get(origin, NOTHING)
                part = self.shares.hand(after, origin, receiver, self.stores[origin], change)
                _count(traffic, ways[origin], origin, receiver, part.num_bytes)
                return part

            return hand

        for peer, store in enumerate(self.stores):
            stores.append(self.shares.fuse(after, peer, store, trained, handing(peer)))
        self.shares, self.stores = after, stores
        return Folded(
            traffic={
                peer: Traffic(int(traffic[0, peer]), int(traffic[1, peer]))
                for peer in range(self.network.peers)
            },
            stored=int(after.keeps.sum(axis=1).max()),
        )

    def assembled(self) -> State:
        """The whole model, from one keeper of each entry: nobody's but the evaluator's."""
        return assembled(self.shares, dict(enumerate(self.stores)))

    def copies(self) -> Mapping[int, State]:
        """None: nobody has one."""
        return {}

    def held(self) -> Held:
        """The stores, and who keeps what."""
        stores = {str(peer): store for peer, store in enumerate(self.stores)}
        keeps = {"keeps": torch.from_numpy(self.shares.keeps)}
        values = {"links": self.network.digest}
        state = replace(self.shares.state, params={})
        return [state], values, {"stores": stores, "public": keeps}

    def restore(self, held: Held) -> None:
        """Take them."""
        ((state,), values, groups) = held
        keeps = groups["public"]["keeps"].numpy()
        if keeps.shape != self.shares.keeps.shape:
            raise CheckpointError(
                f"the checkpoint is of {keeps.shape[0]} peers, config.json says "
                f"{self.network.peers}; put config.json back, or run it into a new folder"
            )
        self.network.refuse_others(values["links"])
        state = replace(state, params=self.shapes)
        self.shares = replace(self.shares, state=state, keeps=keeps)
        self.stores = list(groups["stores"].values())

    def _ways(self, origin: int) -> dict[int, int]:
        """Receiver -> who hands it the origin's messages."""
        hops = self.network.journeys(self.round, origin, relayed=True)
        return {receiver: hop.sender for receiver, hop in hops.items()}


def assembled(shares: Shares, stores: Mapping[int, Tensor]) -> State:
    """The whole model, from the stores of its keepers.

    Raises:
        CheckpointError: an entry is in none of them.
    """
    flat = torch.empty(shares.keeps.shape[1], dtype=next(iter(stores.values())).dtype)
    there: Bools = shares.keeps[sorted(stores)]
    if lacking := int((~there.any(axis=0)).sum()):
        raise CheckpointError(
            f"{lacking} of {flat.numel()} entries are kept by peers whose parts are not "
            f"here; here are those of peers {', '.join(map(str, sorted(stores)))} of {shares.peers}"
        )
    for peer in sorted(stores, reverse=True):
        flat[torch.from_numpy(shares.keeps[peer])] = stores[peer]
    params, first = {}, 0
    for name, tensor in shares.state.params.items():
        params[name] = flat[first : first + tensor.numel()].reshape(tensor.shape).clone()
        first += tensor.numel()
    return replace(shares.state, params=params)


def _count(
    traffic: Ints, way: Mapping[int, int], origin: int, receiver: int, num_bytes: int
) -> None:
    """Add a part's bytes on every link of its way."""
    while receiver != origin:
        traffic[0, way[receiver]] += num_bytes
        traffic[1, receiver] += num_bytes
        receiver = way[receiver]


def store_of(shares: Shares, peer: int, state: State) -> Tensor:
    """A peer's part of a whole state."""
    flat = torch.cat([tensor.reshape(-1) for tensor in state.params.values()])
    return flat[torch.from_numpy(shares.kept(peer))]


def lean(
    model: Model,
    method: Averaging,
    network: Network,
    cohorts: Callable[[int], Sequence[Client]],
    state: State,
) -> Lean:
    """Peers that begin with their part of an initial state."""
    shares = first_shares(model, method, network.peers, cohorts, state)
    stores = [store_of(shares, peer, state) for peer in range(network.peers)]
    return Lean(network=network, shares=shares, stores=stores)
