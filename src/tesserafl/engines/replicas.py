"""Peers that each hold a copy of the model, and play the server for themselves.

    all_gather    every update reaches every peer; each folds them all into its copy
    gossip        a peer folds its own and its neighbours' updates

Where every message arrives, copies stay equal to the bit, whatever the order of arrival, because
sums are exact; then updates are deltas and one copy stands for all. Elsewhere copies part: peers
send the values that they trained, and the receiver takes their difference from its own copy.
Peers whose copies had the same history share one here.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from tesserafl.core.errors import CheckpointError
from tesserafl.core.fit import Training
from tesserafl.core.messages import Client, Task, Update
from tesserafl.core.method import Method, State
from tesserafl.core.model import Model
from tesserafl.core.params import Params, num_entries, subtract
from tesserafl.core.submodel import SubModel, cut
from tesserafl.core.wire import update_of, update_parts
from tesserafl.engines.federation import Folded, Held, TrafficCounter, noting_bytes
from tesserafl.engines.network import Hop, Network


class _Late(NamedTuple):
    """A message on its way."""

    due: int
    """The round at whose end it arrives."""
    receivers: tuple[int, ...]
    message: Update


@dataclass(kw_only=True)
class Replicas:
    """One state per peer; `states` are the different ones, `copy_of` says which is whose."""

    model: Model
    method: Method
    network: Network
    gossip: bool
    begin: Params
    """What all copies began with: an entry that equals it has not reached a peer yet."""
    states: list[State]
    copy_of: list[int]
    _newest: dict[tuple[int, int], int] = field(default_factory=dict)
    """(receiver, sender) -> the round of the newest message that arrived."""
    _late: list[_Late] = field(default_factory=list)
    _given: dict[int, SubModel] = field(default_factory=dict)
    """What each peer trains in this round."""

    @property
    def round(self) -> int:
        """Rounds that are done."""
        return self.states[0].round

    @property
    def rounds(self) -> int:
        """Rounds that are planned."""
        return self.states[0].rounds

    @property
    def shapes(self) -> Params:
        """Peer 0's parameters."""
        return self.states[self.copy_of[0]].params

    @property
    def exact(self) -> bool:
        """Whether all copies stay equal."""
        return not self.gossip and self.network.reliable and self.network.connected

    def tasks(self, cohort: Sequence[Client], training: Training) -> Iterator[Task]:
        """What the method gives each peer, out of the peer's own copy."""
        self._given = {}
        for task in self._tasks(cohort, training):
            self._given[task.client.id] = task.submodel
            yield task

    def _tasks(self, cohort: Sequence[Client], training: Training) -> Iterator[Task]:
        if len(self.states) == 1:
            yield from self.method.configure(self.model, self.states[0], cohort, training)
            return
        # Who trains what is worked out without values: of a copy only one peer's part is cut.
        plans: dict[int, Iterator[Task]] = {}
        for number, state in enumerate(self.states):
            bare = replace(state, params={n: t.to("meta") for n, t in state.params.items()})
            plans[number] = self.method.configure(self.model, bare, cohort, training)
        for rows in zip(*plans.values(), strict=True):
            number = self.copy_of[rows[0].client.id]
            task = rows[number]
            yield replace(task, params=cut(self.states[number].params, task.submodel))

    def fold(self, cohort: Sequence[Client], updates: Iterable[Update]) -> Folded:
        """Every peer folds what reaches it."""
        if self.exact and len(self.states) == 1:
            sizes: dict[int, int] = {}
            state, passing = self.states[0], noting_bytes(updates, sizes)
            self.states = [self.method.aggregate(self.model, state, cohort, passing)]
            traffic = TrafficCounter(len(self.copy_of))
            for origin, size in sorted(sizes.items()):
                traffic.count(origin, size, self._journeys(origin))
            return Folded(traffic=traffic.sums, consensus=0.0, stored=self._stored)
        messages = {update.client: self.message(update) for update in updates}
        if self.gossip:  # who did not finish still tells where it stands
            for peer in self._given.keys() - messages.keys():
                messages[peer] = self.standing(peer)
        traffic = TrafficCounter(len(self.copy_of))
        inboxes = self._inboxes(messages, {client.id for client in cohort}, traffic)
        self._aggregate(cohort, inboxes)
        return Folded(traffic=traffic.sums, consensus=self._consensus(), stored=self._stored)

    def assembled(self) -> State:
        """The mean of the copies; of an entry that has not reached all, of those that it has."""
        if len(self.states) == 1:
            return self.states[0]
        return replace(self.states[self.copy_of[0]], params=self._mean())

    def copies(self) -> Mapping[int, State]:
        """Every peer's own."""
        if len(self.states) == 1:
            return {}
        return {peer: self.states[number] for peer, number in enumerate(self.copy_of)}

    def held(self) -> Held:
        """The different states, whose they are, and what is under way."""
        late: list[dict[str, object]] = []
        groups: dict[str, Params] = {}
        for number, (due, receivers, message) in enumerate(self._late):
            header, tensors = update_parts(message, {})
            late.append({"due": due, "receivers": list(receivers), "update": header})
            groups |= {f"late-{number}-{group}": params for group, params in tensors.items()}
        newest = [[*pair, round] for pair, round in sorted(self._newest.items())]
        values = {"copy_of": self.copy_of, "late": late, "newest": newest}
        return self.states, {**values, "links": self.network.digest}, groups

    def restore(self, held: Held) -> None:
        """Take all of it."""
        states, values, groups = held
        if len(values["copy_of"]) != len(self.copy_of):
            raise CheckpointError(
                f"the checkpoint is of {len(values['copy_of'])} peers, config.json says "
                f"{len(self.copy_of)}; put config.json back, or run it into a new folder"
            )
        self.network.refuse_others(values["links"])
        self.states, self.copy_of = list(states), list(values["copy_of"])
        self._newest = {(one, other): round for one, other, round in values["newest"]}
        self._late = []
        for number, row in enumerate(values["late"]):
            begin = f"late-{number}-"
            tensors = {n.removeprefix(begin): t for n, t in groups.items() if n.startswith(begin)}
            message, _ = update_of(row["update"], tensors)
            self._late.append(_Late(row["due"], tuple(row["receivers"]), message))

    @property
    def _stored(self) -> int:
        return num_entries(self.shapes)

    def _journeys(self, origin: int) -> dict[int, Hop]:
        return self.network.journeys(self.round, origin, relayed=not self.gossip)

    def message(self, update: Update) -> Update:
        """The update with the trained values in place of the change, in memory of its own."""
        begun = cut(self.states[self.copy_of[update.client]].params, update.submodel)
        values = {name: begun[name] + delta for name, delta in update.delta.items()}
        extra = {name: tensor.clone() for name, tensor in update.extra.items()}
        return replace(update, delta=values, extra=extra)

    def standing(self, peer: int) -> Update:
        """The message of a peer that trained nothing."""
        submodel = self._given[peer]
        return Update(
            round=self.round,
            client=peer,
            submodel=submodel,
            delta=cut(self.states[self.copy_of[peer]].params, submodel),
            num_examples=0,
            num_steps=0,
            metrics={},
        )

    def _inboxes(
        self, messages: Mapping[int, Update], cohort: set[int], traffic: TrafficCounter
    ) -> list[list[Update]]:
        """What each peer has at the end of the round, by sender; of one sender the newest."""
        inboxes: list[dict[int, Update]] = [{} for _ in self.copy_of]
        due = [late for late in self._late if late.due <= self.round]
        self._late = [late for late in self._late if late.due > self.round]
        for _, receivers, message in due:  # in the order in which they were sent
            for receiver in receivers:
                pair = (receiver, message.client)
                if message.client in cohort and message.round > self._newest.get(pair, -1):
                    inboxes[receiver][message.client] = message
        for origin, message in sorted(messages.items()):
            inboxes[origin][origin] = message
            hops = self._journeys(origin)
            traffic.count(origin, message.num_bytes, hops)
            waiting: dict[int, list[int]] = {}
            for receiver, hop in hops.items():
                if hop.arrived and hop.late:
                    waiting.setdefault(self.round + hop.late, []).append(receiver)
                elif hop.arrived:
                    inboxes[receiver][origin] = message
            for due_round, late in sorted(waiting.items()):
                self._late.append(_Late(due_round, tuple(late), message))
        if self.network.settings.delay:  # elsewhere nothing is ever overtaken
            for receiver, inbox in enumerate(inboxes):
                for origin, message in inbox.items():
                    self._newest[receiver, origin] = message.round
        return [[inbox[origin] for origin in sorted(inbox)] for inbox in inboxes]

    def _aggregate(self, cohort: Sequence[Client], inboxes: Sequence[list[Update]]) -> None:
        states: list[State] = []
        known: dict[Hashable, int] = {}
        copy_of = []
        for peer, inbox in enumerate(inboxes):
            weights = self._weights(peer, inbox)
            heard = tuple((m.client, m.round, weights[m.client]) for m in inbox)
            key = (self.copy_of[peer], heard)
            if key not in known:
                known[key] = len(states)
                states.append(self.mixed(peer, cohort, inbox))
            copy_of.append(known[key])
        self.states, self.copy_of = states, copy_of

    def mixed(self, peer: int, cohort: Sequence[Client], inbox: Sequence[Update]) -> State:
        """A peer's state after a round in which it heard these messages, its own among them."""
        state, weights = self.states[self.copy_of[peer]], self._weights(peer, inbox)
        clients = [replace(c, mixing=weights.get(c.id, 1)) for c in cohort]
        own = (seen_from(message, state.params) for message in inbox)
        return self.method.aggregate(self.model, state, clients, own)

    def _weights(self, peer: int, inbox: Sequence[Update]) -> dict[int, int]:
        """Sender -> weight of its message for the peer."""
        if not self.gossip:
            return {message.client: 1 for message in inbox}
        mixing = self.network.mixing(self.round, peer)
        for message in inbox:
            if message.client not in mixing:  # a late one over a link that is down by now
                then = self.network.mixing(message.round, peer)
                share = then.get(message.client, 0) / sum(then.values())
                mixing[message.client] = max(1, round(share * sum(mixing.values())))
        return mixing

    def _mean(self) -> Params:
        return {name: self._spread(name)[0] for name in self.shapes}

    def _consensus(self) -> float:
        if len(self.states) == 1:
            return 0.0
        squares, size = 0.0, 0.0
        for name in self.shapes:
            mean, square = self._spread(name)
            squares += square
            size += float(mean.double().square().sum())
        return (squares / size) ** 0.5 if size else 0.0

    def _spread(self, name: str) -> tuple[Tensor, float]:
        """A parameter's mean over the copies that it has reached, and the sum over its entries of
        the mean square distance from that."""
        first = self.begin[name].double()
        mean, count, squares = (torch.zeros_like(first) for _ in range(3))
        for number in self.copy_of:  # of the difference: entries that have not moved add nothing
            moved = self.states[number].params[name].double() - first
            mean += moved
            count += moved != 0
        mean /= count.clamp_(min=1.0)
        for number in self.copy_of:
            moved = self.states[number].params[name].double() - first
            squares += (moved - mean).square_() * (moved != 0)
        return (first + mean).to(self.begin[name].dtype), float((squares / count).sum())


def seen_from(message: Update, params: Params) -> Update:
    """The message as a change of the receiver's own copy."""
    return replace(message, delta=subtract(message.delta, cut(params, message.submodel)))


def replicas(
    model: Model, method: Method, network: Network, gossip: bool, state: State
) -> Replicas:
    """Peers that begin with equal copies."""
    copy_of: list[int] = [0] * network.peers
    return Replicas(
        model=model,
        method=method,
        network=network,
        gossip=gossip,
        begin=state.params,
        states=[state],
        copy_of=copy_of,
    )
