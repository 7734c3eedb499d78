"""What a cloud asks of an edge beyond what it asks of a device, and who an edge says it is.

    Hello   here is the experiment             -> EdgeProfile, Refusal
    Sweep   play this round with your devices  -> Answer, Missing, Stranger, Refusal
    Survey  measure what your devices keep     -> Answer (a Surveyed), Missing, Stranger, Refusal

All other orders are those of devices (orders.py): parcels go to and fro in the same way.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from tesserafl.engines.heads import Natural, Pair, RunId, Share, Strict

if TYPE_CHECKING:  # a client app reads orders, and has no torch
    from tesserafl.core.messages import Client


class EdgeDevice(Strict):
    """A device below an edge."""

    name: Annotated[str, Field(max_length=200)]
    client: Natural | None
    """The client that it is; None: the cloud gives it a number."""
    num_examples: Annotated[int, Field(ge=1, lt=1 << 40)]
    memory_mib: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None


class EdgeProfile(Strict):
    """Who an edge is, and who is below it."""

    kind: Literal["edge"] = "edge"
    name: Annotated[str, Field(max_length=200)]
    devices: list[EdgeDevice]


class Member(Strict):
    """A client that takes part in the round, here or elsewhere; see `core.messages.Client`."""

    id: Natural
    num_examples: Natural
    memory_bytes: Natural | None
    depth: Natural | None
    mixing: Natural


class Waits(Strict):
    """How an edge waits for its devices; see `run.averages.Patience`."""

    quorum: Annotated[float, Field(gt=0, le=1)]
    wanted: Natural
    asked: Natural
    banks: bool
    """Whether an answer that comes after its average counts in a later one."""
    late: list[Natural]
    """Clients below the edge that are at work yet, as far as the cloud has heard: their answers may
    come. What others were asked before is forgotten."""


class Sweep(Strict):
    """A round of the cloud, for one edge."""

    kind: Literal["sweep"] = "sweep"
    run: RunId
    letter: dict[str, Any]
    """Of the cloud's state."""
    cohort: list[Member]
    """All whose answers may come, those that are asked first, in the round's order: the grid of
    exact sums goes by them."""
    together: list[Natural]
    """Those of them whom the method deals parts to at once."""
    own: list[Natural]
    """Those below the edge that are asked."""
    numbers: dict[str, Natural]
    """Device -> the client that it is, of all below the edge."""
    rounds: Annotated[int, Field(ge=1)]
    """Averages of the edge."""
    steps: list[Pair]
    """Clients and their steps, those that do not train as the experiment says."""
    heard: list[Pair]
    """Own clients, and the rounds of the tasks that they answered last: with what they kept then
    they begin."""
    seconds: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    """Until the cloud gives the edge up."""
    most_bytes: Natural
    """Of tensors in a parcel of the answer."""
    waits: Waits | None = None
    """None: the edge waits until all of its devices have answered or failed."""


class Survey(Strict):
    """Asks what the own models of an edge's clients reach, on test examples of theirs."""

    kind: Literal["survey"] = "survey"
    run: RunId
    letter: dict[str, Any]
    """Of the global state."""
    numbers: dict[str, Natural]
    """Device -> the client that it is, of all below the edge."""
    heard: list[Pair]
    """As a `Sweep`'s, of all below the edge."""
    seconds: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    """Until the cloud gives the edge up."""


class JudgedBelow(Strict):
    """What one client's own model reaches; see `orders.Judged`."""

    client: Natural
    accuracy: Share
    share: Share | None


class Surveyed(Strict):
    """The answer to a `Survey`; who is not there or has no test examples is left out."""

    judged: list[JudgedBelow]


def member_of(client: Client) -> Member:
    """A client as it is sent."""
    return Member(**asdict(client))
