"""Peers that each keep a part of the model: nobody holds the whole, before, during or after.

Who keeps what is worked out in shares.py, and what is handed over in passages.py. A run is the same
as with `all_gather`, to the bit, stored and sent otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from tesserafl.core.errors import CheckpointError
from tesserafl.core.fit import Training
from tesserafl.core.layout import Ints
from tesserafl.core.messages import Client, Task, Update
from tesserafl.core.method import State
from tesserafl.core.model import Model
from tesserafl.core.params import Params, num_entries
from tesserafl.engines.federation import Folded, Held, Traffic
from tesserafl.engines.network import Network
from tesserafl.engines.passages import NOTHING, Handed, Passage, Taken, change_of
from tesserafl.engines.shares import Averaging, Shares, first_shares


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
        changes = {update.client: change_of(update) for update in updates}
        kept = [Taken(flat=store) for store in self.stores]
        passed = np.zeros((len(kept), len(kept)), dtype=np.int64)
        stores: list[list[Tensor]] = [[] for _ in kept]
        for passage in self.shares.passages():
            before = [part.take(count) for part, count in zip(kept, passage.held, strict=True)]
            within = [
                changes.get(peer, NOTHING).within(passage.strip, store.dtype)
                for peer, store in enumerate(before)
            ]
            trained = {peer: within[peer][0] for peer in changes}
            for peer, store in enumerate(before):
                handed = partial(_handed, passage, before, within, passed, peer)
                stores[peer].append(passage.fuse(peer, store, trained, handed))
        traffic = self._traffic(passed)
        self.shares, self.stores = self.shares.following, [torch.cat(parts) for parts in stores]
        return Folded(traffic=traffic, stored=max(map(len, self.stores)))

    def assembled(self) -> State:
        """The whole model, from one keeper of each entry: nobody's but the evaluator's."""
        flat = torch.empty(num_entries(self.shapes), dtype=self.stores[0].dtype)
        kept = [Taken(flat=store) for store in self.stores]
        for number, strip in enumerate(self.shares.strips):
            part = flat[strip.first : strip.first + strip.size]
            for peer, mask in enumerate(self.shares.keeps(number)):
                part[mask] = kept[peer].take(int(mask.sum()))
        params, whole = {}, Taken(flat=flat)
        for name, tensor in self.shapes.items():
            params[name] = whole.take(tensor.numel()).reshape(tensor.shape).clone()
        return replace(self.shares.state, params=params)

    def copies(self) -> Mapping[int, State]:
        """None: nobody has one."""
        return {}

    def held(self) -> Held:
        """The stores, and who keeps what."""
        stores = {str(peer): store for peer, store in enumerate(self.stores)}
        values = {"links": self.network.digest, "peers": self.shares.peers}
        state = replace(self.shares.state, params={})
        return [state], values, {"stores": stores, "public": self.shares.written()}

    def restore(self, held: Held) -> None:
        """Take them."""
        ((state,), values, groups) = held
        if values["peers"] != self.shares.peers:
            raise CheckpointError(
                f"the checkpoint is of {values['peers']} peers, config.json says "
                f"{self.shares.peers}; put config.json back, or run it into a new folder"
            )
        self.network.refuse_others(values["links"])
        self.shares = self.shares.read(state, groups["public"])
        self.stores = list(groups["stores"].values())

    def _traffic(self, passed: Ints) -> dict[int, Traffic]:
        """What each peer sent and received, with what it handed on; `passed` is bytes [from, to]"""
        sent, received = np.zeros((2, self.network.peers), dtype=np.int64)
        for origin in range(self.network.peers):
            hops = self.network.journeys(self.round, origin, relayed=True)
            for receiver in range(self.network.peers):
                at = receiver
                while at != origin and passed[origin, receiver]:
                    sent[hops[at].sender] += passed[origin, receiver]
                    received[at] += passed[origin, receiver]
                    at = hops[at].sender
        return {peer: Traffic(int(sent[peer]), int(received[peer])) for peer in range(len(sent))}


def _handed(
    passage: Passage,
    stores: Sequence[Tensor],
    within: Sequence[tuple[Tensor, Tensor]],
    passed: Ints,
    receiver: int,
    origin: int,
    *_: int,
) -> Handed:
    """What one peer hands another of a strip; adds its bytes to what has passed."""
    part = passage.hand(origin, receiver, stores[origin], *within[origin])
    passed[origin, receiver] += part.num_bytes
    return part


def store_of(shares: Shares, peer: int, state: State) -> Tensor:
    """A peer's part of a whole state."""
    (dtype,) = {tensor.dtype for tensor in state.params.values()}
    device = next(iter(state.params.values())).device
    # Counted first: beside the whole model there is no room for the part twice.
    store = Taken(flat=torch.empty(shares.num_kept(peer), dtype=dtype, device=device))
    for strip, mask in zip(shares.strips, shares.masks(peer), strict=True):
        store.put(strip.of(state.params)[mask.nonzero().flatten()])
    return store.flat


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
