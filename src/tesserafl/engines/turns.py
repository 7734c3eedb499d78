"""What is asked of a device that is a peer, and what it answers; see orders.py."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from tesserafl.engines.heads import Digest, Natural, RunId, Strict


class Place(Strict):
    """What everybody knows of one peer."""

    num_examples: Annotated[int, Field(ge=1, lt=1 << 40)]
    memory_bytes: Natural | None


class Turn(Strict):
    """Asks a peer for its part of a round: it trains, and sends letters to the others."""

    kind: Literal["turn"] = "turn"
    run: RunId
    client: Natural
    roster: list[Place]
    """All peers, by their numbers."""
    round: Natural
    most_bytes: Natural
    """Of tensors in a parcel of its letters."""


class Passed(Strict):
    """A letter from another peer."""

    origin: Natural
    letter: dict[str, Any]


class Fold(Strict):
    """Ends a peer's round with what others sent it; parcels come with it, or have come before."""

    kind: Literal["fold"] = "fold"
    run: RunId
    client: Natural
    roster: list[Place]
    round: Natural
    answered: list[Natural]
    """Who trained in the round, to be the same for everybody."""
    letters: list[Passed]


class Examine(Strict):
    """Asks what a peer's model reaches."""

    kind: Literal["examine"] = "examine"
    run: RunId
    client: Natural
    roster: list[Place]
    keep: bool
    """Whether the peer writes what it holds into its folder, to stay there."""


class Addressed(Strict):
    """A letter to other peers."""

    receivers: list[Natural]
    letter: dict[str, Any]


class Lapse(Strict):
    """Why a peer that was asked to train has not."""

    reason: Literal["offline", "error"]
    text: Annotated[str, Field(max_length=10_000)]


class Turned(Strict):
    """A peer's part of a round; parcels of its letters come with it, or must be fetched."""

    kind: Literal["turned"] = "turned"
    round: Natural
    row: dict[str, Annotated[float, Field(allow_inf_nan=False)]] | None
    """What is noted of its training; None: it did not train, or not well."""
    lapse: Lapse | None = None
    """Why not, if it was asked."""
    part: dict[str, Any] | None
    """Of the model, the sub-model that it trained."""
    letters: list[Addressed]


class Standing(Strict):
    """Where a peer stands."""

    kind: Literal["standing"] = "standing"
    round: Natural
    """Rounds that it has ended."""


class Examined(Strict):
    """What a peer holds, and reaches."""

    kind: Literal["examined"] = "examined"
    round: Natural
    entries: Natural
    """Numbers of the model that it stores."""
    sha256: Digest
    """Of them."""
    whole: bool
    """Whether it holds the whole model; else nothing is tested."""
    examples: Natural
    """Of the test."""
    accuracy: Annotated[float, Field(ge=0, le=1)]
    loss: Annotated[float, Field(ge=0, allow_inf_nan=False)]
