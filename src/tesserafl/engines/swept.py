"""What an edge says of its devices in a round of the cloud: JSON beside what it hands on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field, ValidationError

from tesserafl.core.answers import MAX_METRIC, MAX_METRICS, NOTED
from tesserafl.core.buffers import shown
from tesserafl.core.errors import MessageError
from tesserafl.core.messages import Client
from tesserafl.core.params import Params
from tesserafl.core.places import PartHeader, part_from_json
from tesserafl.core.submodel import SubModel
from tesserafl.engines.heads import Natural, Pair, Strict
from tesserafl.engines.seam import Reason

_Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]
_Coordinates = Annotated[list[Annotated[float, Field(allow_inf_nan=False)]], Field(max_length=4096)]


class Row(Strict):
    """One device's answer in one of the edge's averages."""

    client: Natural
    round: Natural
    """Of its task."""
    examples: Natural
    steps: Natural
    trained_entries: Natural
    entries: Natural
    flops: _Amount
    seconds: _Amount
    """Of its computing."""
    link_seconds: _Amount
    """From its task to its answer, without its computing."""
    bytes_up: Natural
    bytes_down: Natural
    change: _Amount
    """L2 norm of what it changed."""
    sketch: _Coordinates
    part: Natural
    """What it trained, as a number among `Swept.parts`."""
    metrics: dict[str, Annotated[float, Field(ge=-MAX_METRIC, le=MAX_METRIC)]]

    @property
    def noted(self) -> dict[str, Any]:
        """As a run notes it."""
        known = self.model_dump(exclude={"metrics", "change", "sketch", "part", "round"})
        return {**self.metrics, **known}


class Loss(Strict):
    """One device that did not answer."""

    client: Natural
    reason: Reason
    text: Annotated[str, Field(max_length=10_000)]


class Swept(Strict):
    """The header of an edge's answer."""

    handed: dict[str, Any]
    """See `handed.Below.fold`."""
    rows: list[Row]
    failures: list[Loss]
    parts: list[PartHeader]
    sketch: _Coordinates
    """Of its model."""
    late: list[Natural]
    """Clients that are at work yet."""
    heard: list[Pair]
    """Clients, and the rounds of the tasks that they answered last, counted or not: with what they
    kept then they begin."""

    def trained(self, shapes: Params) -> list[SubModel]:
        """What the rows' devices trained; MessageError if it is not of this model."""
        parts = [part_from_json(part) for part in self.parts]
        for part in parts:
            for view in part.views.values():
                if view.name not in shapes or not view.fits(shapes[view.name].shape):
                    raise MessageError(
                        f"an edge's device trained {shown(repr(view.name))}, which the model has "
                        f"not got there"
                    )
        return [parts[row.part] for row in self.rows]


def swept_of(header: Mapping[str, Any], clients: Mapping[int, Client], rounds: int) -> Swept:
    """What an edge with these clients says of a round in which it was to average so often.

    Raises:
        MessageError: it is not of these clients, or more than they can have done.
    """
    try:
        swept = Swept.model_validate(header)
    except (ValidationError, RecursionError) as error:
        raise MessageError(f"an edge's answer is wrong: {shown(str(error))}") from error
    most = rounds * len(clients)
    if len(swept.rows) + len(swept.failures) > most or len(swept.parts) > len(swept.rows):
        raise MessageError(f"an edge's devices were asked {most} times, and it tells of more")
    told = {row.client for row in swept.rows} | {loss.client for loss in swept.failures}
    told |= {*swept.late, *(client for client, _ in swept.heard)}
    if not told <= clients.keys():
        raise MessageError(
            f"an edge tells of client {min(told - clients.keys())}, which is not below it"
        )
    for row in swept.rows:
        bad = [n for n in row.metrics if not n.isidentifier() or n in NOTED or len(n) > MAX_METRICS]
        if bad or len(row.metrics) > MAX_METRICS or row.part >= len(swept.parts):
            raise MessageError(f"an edge's row of client {row.client} is wrong in what it measured")
        if row.examples > clients[row.client].num_examples:
            raise MessageError(
                f"an edge says that client {row.client} saw {row.examples} examples; it has "
                f"{clients[row.client].num_examples}"
            )
    return swept
