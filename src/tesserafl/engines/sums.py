"""What a node of a tree adds up of those below it, and hands on.

Of methods that average entry by entry an exact sum: sub-sums of sub-sums have the bits of the whole
sum. Of others the updates themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from tesserafl.core.checks import check_entries
from tesserafl.core.errors import ConfigError
from tesserafl.core.exactsum import ExactSum, Weights
from tesserafl.core.messages import Client, Update
from tesserafl.core.method import Method, State, next_round, weights_of
from tesserafl.core.model import Model
from tesserafl.core.params import Params, subtract
from tesserafl.core.submodel import SubModel, View, merge
from tesserafl.core.subsum import SubSum, checked_weights


class Sums(Protocol):
    """What was reported to a node in one of its averages."""

    @property
    def num_bytes(self) -> int:
        """Of what it hands on."""
        ...

    def add(self, update: Update) -> None:
        """A client's update; its tensors hold until this returns."""
        ...

    def add_change(self, before: State, after: State, covered: Covered, clients: Clients) -> None:
        """What an edge with these clients made of its model in several averages."""
        ...

    def merge(self, other: Sums) -> None:
        """What an edge hands on; of the same kind."""
        ...

    def reported(self) -> Covered:
        """Who reported what, without what they reported."""
        ...

    def finish(self, state: State) -> State:
        """The model after the average."""
        ...


Clients = Sequence[Client]
Covered = dict[tuple[object, ...], tuple[View, int]]
"""Key of a view -> it, and the weight of those who trained it."""


def sums_of(
    model: Model, method: Method, cohort: Mapping[int, Client], params: Params
) -> Callable[[], Sums]:
    """Makes empty sums for a round in which these clients take part.

    Args:
        model: the global model.
        method: whose updates are added.
        cohort: client -> what is known of it.
        params: of the model, read for shapes.
    """
    if not method.entrywise:
        return lambda: Passed(model=model, method=method, clients=dict(cohort))
    weights = weights_of(list(cohort.values()), method.weighting)  # type: ignore[attr-defined]
    return lambda: Added(weights=weights, params=params)


def relay_of(method: Method) -> Callable[[Model, State, State, Client], Update]:
    """What makes one update of an edge's averages, for a method that looks at updates.

    Raises:
        ConfigError: the method has none.
    """
    if not hasattr(method, "relayed"):
        raise ConfigError(
            f"{type(method).__name__} looks at each update by itself, so its edges can only hand "
            f"updates on: let them average once in a round of the cloud"
        )
    relayed: Callable[[Model, State, State, Client], Update] = method.relayed
    return relayed


@dataclass(kw_only=True)
class Added:
    """An exact sum; its bounds are those of the whole cohort, so that any two can be merged."""

    weights: Mapping[int, int]
    params: Params
    _total: ExactSum = field(init=False)

    def __post_init__(self) -> None:
        self._total = ExactSum(max_weight=max(1, sum(self.weights.values())))

    @property
    def num_bytes(self) -> int:
        """Of the integers."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self._total.sums.values())

    def add(self, update: Update) -> None:
        """Fold it."""
        weight = self.weights[update.client]
        self._total.fold(update.submodel, update.delta, weight, self.params)

    def add_change(self, before: State, after: State, covered: Covered, clients: Clients) -> None:
        """Fold the change of every entry with the weight of those who trained it."""
        change = subtract(after.params, before.params)
        for view, weight in covered.values():
            place = SubModel({}, {view.name: view})
            delta = {view.name: view.read(change[view.name])}
            self._total.fold(place, delta, weight, self.params, rest=True)

    def check_change(self, after: Params, covered: Covered, clients: Clients) -> None:
        """Raise UpdateError unless a change of these clients, from elsewhere, may be added.

        Args:
            after: the edge's model.
            covered: what its clients trained.
            clients: those that were heard.
        """
        check_entries(subtract(after, self.params), self._total.max_entry)
        checked_weights(covered.values(), self.params, sum(self.weights[c.id] for c in clients))

    def take(self, sums: Params, reported: Weights, clients: Clients) -> None:
        """Add integers from elsewhere, of these clients; UpdateError if they cannot be theirs."""
        other = SubSum(
            max_weight=self._total.max_weight,
            max_entry=self._total.max_entry,
            weight=sum(self.weights[client.id] for client in clients),
            sums=sums,
            reported=reported,
        )
        other.check(self.params, self._total.scale)
        self._total.merge(other)

    @property
    def sums(self) -> Params:
        """The integers."""
        return self._total.sums

    def merge(self, other: Sums) -> None:
        """Add the integers."""
        assert isinstance(other, Added)
        self._total.merge(other._total)

    def reported(self) -> Covered:
        """Every view that somebody reported."""
        return {view.key: (view, weight) for view, weight in self._total.reported}

    def finish(self, state: State) -> State:
        """The mean, added."""
        return next_round(state, merge(state.params, self._total))


@dataclass(kw_only=True)
class Passed:
    """The updates, for a method that looks at them one by one."""

    model: Model
    method: Method
    clients: dict[int, Client]
    """All that take part in the round; edges that averaged stand for one of theirs."""
    updates: list[Update] = field(default_factory=list)
    _bytes: int = 0

    @property
    def num_bytes(self) -> int:
        """Of all updates, as they came."""
        return self._bytes

    def add(self, update: Update) -> None:
        """Keep a copy."""
        delta = {name: tensor.clone() for name, tensor in update.delta.items()}
        extra = {name: tensor.clone() for name, tensor in update.extra.items()}
        self.updates.append(replace(update, delta=delta, extra=extra))
        self._bytes += update.num_bytes

    def add_change(self, before: State, after: State, covered: Covered, clients: Clients) -> None:
        """The edge as one client, whose update the method's `relayed` makes.

        Raises:
            ConfigError: the method has none.
        """
        edge, change = self.relayed(before, after, clients)
        self.clients[edge.id] = edge
        self.updates.append(change)
        self._bytes += change.num_bytes

    def relayed(self, before: State, after: State, clients: Clients) -> tuple[Client, Update]:
        """The edge as one client, and its update; ConfigError if the method makes none."""
        examples = sum(client.num_examples for client in clients)
        alike = self.method.weighting == "uniform"  # type: ignore[attr-defined]
        mixing = len(clients) if alike else 1
        edge = replace(clients[0], num_examples=examples, mixing=mixing)
        return edge, relay_of(self.method)(self.model, before, after, edge)

    def merge(self, other: Sums) -> None:
        """Take them over."""
        assert isinstance(other, Passed)
        self.updates += other.updates
        self._bytes += other._bytes
        self.clients |= {u.client: other.clients[u.client] for u in other.updates}

    def reported(self) -> Covered:
        """Nothing: an edge's update is of its whole model."""
        return {}

    def finish(self, state: State) -> State:
        """As the method aggregates.

        It is told of all clients, as on a star: the grid of exact sums goes by them.
        """
        clients = list(self.clients.values())
        return self.method.aggregate(self.model, state, clients, self.updates)
