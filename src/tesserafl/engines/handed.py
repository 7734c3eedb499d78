"""What an edge hands on to the cloud, as a message; on arrival nothing of it is believed.

summed    a sub-sum, in integers     the edge averaged once
passed    the updates themselves     likewise, for methods that look at each of them
changed   the edge's model           it averaged several times
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from tesserafl.core.answers import LEAST_DIVISOR, MAX_METRIC, check_update
from tesserafl.core.buffers import shown
from tesserafl.core.checks import MAX_ENTRY, check_entries
from tesserafl.core.errors import MessageError, UpdateError
from tesserafl.core.messages import Client, Task
from tesserafl.core.method import Method, State
from tesserafl.core.model import Model
from tesserafl.core.params import Params, num_bytes, subtract
from tesserafl.core.places import PartHeader, part_from_json, part_to_json
from tesserafl.core.submodel import SubModel, View
from tesserafl.core.wire import Parts, update_of
from tesserafl.core.wire import update_parts as parts_of_update
from tesserafl.engines.sums import Added, Covered, Passed, Sums


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class _Places(_Strict):
    part: PartHeader
    """Its views are called 0, 1, 2, ..."""
    weights: list[Annotated[int, Field(gt=0, lt=1 << 62)]]


class _Summed(_Strict):
    kind: Literal["summed"]
    reported: _Places


class _Passed(_Strict):
    kind: Literal["passed"]
    updates: list[dict[str, Any]]


class _Changed(_Strict):
    kind: Literal["changed"]
    covered: _Places
    notes: dict[str, Annotated[float, Field(allow_inf_nan=False)]]
    """Numbers among the state's notes that the averages changed."""


_HANDED: TypeAdapter[_Summed | _Passed | _Changed] = TypeAdapter(
    Annotated[_Summed | _Passed | _Changed, Field(discriminator="kind")]
)


def handed_sums(sums: Sums) -> Parts:
    """What an edge hands on that averaged once."""
    if isinstance(sums, Added):
        reported = _places(sums.reported().values())
        return {"kind": "summed", "reported": reported}, {"sums": sums.sums}
    assert isinstance(sums, Passed)
    headers, groups = [], dict[str, Params]()
    for number, update in enumerate(sums.updates):
        header, tensors = parts_of_update(update, {})
        headers.append(header)
        groups |= {_group(number, kind): tensors[kind] for kind in ("delta", "extra")}
    return {"kind": "passed", "updates": headers}, groups


def handed_change(before: State, after: State, covered: Covered) -> Parts:
    """What an edge hands on that averaged several times."""
    notes = {
        name: float(value)
        for name, value in after.notes.items()
        if isinstance(value, int | float) and before.notes.get(name) != value
    }
    header = {"kind": "changed", "covered": _places(covered.values()), "notes": notes}
    assert after.extra is before.extra, "averages of an edge change parameters and notes alone"
    return header, {"params": after.params}


@dataclass(frozen=True, kw_only=True)
class Below:
    """What the cloud knows of an edge's part of a round: beside it an answer is looked at."""

    model: Model
    method: Method
    state: State
    """Before the round."""
    clients: Mapping[int, Client]
    """The edge's own that take part."""
    rounds: int
    """Averages of the edge."""
    tasks: Callable[[], Iterable[Task]]
    """What the edge's clients are asked, where it averages once."""

    @property
    def most_bytes(self) -> int:
        """Of an honest answer; the rest is for the heads of parcels."""

        def least(tensors: Iterable[tuple[int, ...]]) -> int:
            return sum(16 * math.prod(shape) + (1 << 10) for shape in tensors)

        model = least(tuple(tensor.shape) for tensor in self.state.params.values())
        if self.rounds > 1 or self.method.entrywise:
            return (1 << 16) + model
        extra = [least(task.wanted.extra.values()) for task in self.tasks()]
        return (1 << 16) + len(self.clients) * model + sum(extra)

    def fold(self, total: Sums, parts: Parts, heard: Iterable[int]) -> int:
        """Add what the edge hands on to the cloud's sum; returns its bytes.

        Args:
            total: the cloud's.
            parts: what came.
            heard: those of the clients that answered the edge.

        Raises:
            MessageError: it answers something else.
            UpdateError: it cannot be what these clients did. Nothing is added then.
        """
        header, groups = parts
        try:
            handed = _HANDED.validate_python(header)
        except (ValidationError, RecursionError) as error:
            raise MessageError(f"what an edge hands on is wrong: {shown(str(error))}") from error
        clients = [self.clients[client] for client in sorted(set(heard))]
        if isinstance(handed, _Changed) and self.rounds > 1:
            return self._add_change(total, handed, groups, clients)
        if isinstance(handed, _Summed) and self.rounds == 1 and isinstance(total, Added):
            reported = _covered(handed.reported, self._most_places)
            sums = _only(groups, "sums")["sums"]
            total.take(sums, list(reported.values()), clients)
            return num_bytes(sums)
        if isinstance(handed, _Passed) and self.rounds == 1 and isinstance(total, Passed):
            return self._pass_on(total, handed, groups, {client.id for client in clients})
        raise MessageError(
            f"an edge that was to average {self.rounds} times hands on something {handed.kind}"
        )

    @property
    def _most_places(self) -> int:
        """Distinct views that the clients can have reported."""
        return self.rounds * len(self.clients) * len(self.state.params)

    def _add_change(
        self, total: Sums, handed: _Changed, groups: Mapping[str, Params], clients: list[Client]
    ) -> int:
        params = _only(groups, "params")["params"]
        _check_like(params, self.state.params)
        check_entries(subtract(params, self.state.params), MAX_ENTRY)
        # In the state's order: a gradient norm depends on it.
        params = {name: params[name] for name in self.state.params}
        after = replace(self.state, params=params, notes={**self.state.notes, **handed.notes})
        covered = _covered(handed.covered, self._most_places)
        if isinstance(total, Added):
            total.check_change(params, covered, clients)
        elif isinstance(total, Passed) and clients:
            _check_relayed(total, self.state, after, clients)
        if clients:
            total.add_change(self.state, after, covered, clients)
        return num_bytes(params)

    def _pass_on(
        self, total: Passed, handed: _Passed, groups: Mapping[str, Params], heard: set[int]
    ) -> int:
        kinds = [_group(n, kind) for n in range(len(handed.updates)) for kind in ("delta", "extra")]
        found = _only(groups, *kinds)
        if len(handed.updates) != len(heard):
            raise MessageError(
                f"an edge hands on {len(handed.updates)} updates of {len(heard)} devices"
            )
        given = [header.get("client") for header in handed.updates]
        numbers = {client: n for n, client in enumerate(given) if isinstance(client, int)}
        updates = []
        for task in self.tasks():
            if task.client.id not in heard:
                continue
            if (number := numbers.pop(task.client.id, None)) is None:
                raise MessageError(f"an edge hands on no update of client {task.client.id}")
            own = {kind: found[_group(number, kind)] for kind in ("delta", "extra")}
            update, _ = update_of(handed.updates[number], {**own, "memory": {}}, task)
            check_update(task, update, self.state.params, self.model)
            updates.append(update)
        if numbers:
            raise MessageError(
                f"an edge hands on an update of client {min(numbers)}, whose task is not known"
            )
        for update in updates:
            total.add(update)
        return sum(update.num_bytes for update in updates)


def _group(number: int, kind: str) -> str:
    return f"{number}/{kind}"


def _places(places: Iterable[tuple[View, int]]) -> dict[str, Any]:
    found = list(places)
    views = {str(number): view for number, (view, _) in enumerate(found)}
    return {"part": part_to_json(SubModel({}, views)), "weights": [weight for _, weight in found]}


def _covered(places: _Places, most: int) -> Covered:
    if len(places.part.views) > most or len(places.part.views) != len(places.weights):
        raise MessageError(
            f"an edge names {len(places.part.views)} places and {len(places.weights)} weights; its "
            f"devices have {most} places at most"
        )
    views = part_from_json(places.part).views
    pairs = zip(views.values(), places.weights, strict=True)
    return {view.key: (view, weight) for view, weight in pairs}


def _only(groups: Mapping[str, Params], *names: str) -> Mapping[str, Params]:
    if groups.keys() != set(names):
        raise MessageError(
            f"an edge sends the tensors {shown(sorted(groups))}; expected are {shown(list(names))}"
        )
    return groups


def _check_relayed(total: Passed, before: State, after: State, clients: list[Client]) -> None:
    """Raise UpdateError unless the edge's change can count as one client's."""
    try:
        _, change = total.relayed(before, after, clients)
    except (KeyError, TypeError, ArithmeticError) as error:
        raise UpdateError(f"an edge does not say what its model is worth: {error!r}") from error
    for name, value in change.metrics.items():
        if not LEAST_DIVISOR <= value <= MAX_METRIC:
            raise UpdateError(
                f"an edge's {name!r} is {value:g}; allowed is {LEAST_DIVISOR:g} to {MAX_METRIC:g}"
            )


def _check_like(found: Params, expected: Params) -> None:
    """Raise UpdateError unless these are parameters of the same names, shapes and types."""
    if found.keys() != expected.keys():
        raise UpdateError("an edge's model has other parameters than the cloud's")
    for name, tensor in found.items():
        if tensor.shape != expected[name].shape or tensor.dtype != expected[name].dtype:
            raise UpdateError(
                f"an edge's {name!r} is {tensor.dtype} {shown(list(tensor.shape))}; the cloud's is "
                f"{expected[name].dtype} {list(expected[name].shape)}"
            )
