"""What a server asks of a device, and what a device answers: JSON heads, with parcels beside them.

    Hello   here is the experiment       -> Profile, Refusal
    Offer   this is what a task needs    -> Missing
    Store   keep these parcels           -> Missing (of nothing)
    Work    do the task of this letter   -> Answer, Missing, Stranger, Refusal
    Fetch   send parcels of your answer  -> Parcels, Missing
    Judge   measure what you keep        -> Judged, Stranger, Refusal
    Bye     the run is over              -> Missing (of nothing)

Edges are asked for whole rounds (edge_orders.py).
Every order can be given again: a device that has done a task answers it from what it kept.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import IO, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from tesserafl.core.errors import MessageError
from tesserafl.engines.edge_orders import EdgeProfile, Sweep
from tesserafl.engines.frames import read_frame, write_frame

_Natural = Annotated[int, Field(ge=0, lt=1 << 48)]
_Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
_RunId = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
"""Also the name of a folder on the device, so nothing else may be in it."""

_MOST_HEAD_BYTES = 64 << 20
"""Of one head's JSON: a letter names every tensor of a model, and where it lies."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Hello(_Strict):
    """The experiment, to a device that the server does not know yet."""

    kind: Literal["hello"] = "hello"
    run: _RunId
    experiment: dict[str, Any]
    spec: dict[str, Any]
    """What a model must know of the data; see `data.examples.Spec`."""
    parts: bool = True
    """Whether devices take parts of the experiment's data; else they have their own."""


class Offer(_Strict):
    """What a task will need."""

    kind: Literal["offer"] = "offer"
    run: _RunId
    parcels: list[_Digest]


class Store(_Strict):
    """Parcels to keep come with it."""

    kind: Literal["store"] = "store"
    run: _RunId


class Work(_Strict):
    """A task; parcels may come with it, or have come before."""

    kind: Literal["work"] = "work"
    run: _RunId
    client: _Natural
    remembers: _Natural | None
    """The round that the client answered last, as far as the server has heard: with what it kept
    then it begins. None: with nothing."""
    letter: dict[str, Any]
    """Of the task; see `parcels.Letter`."""
    most_bytes: _Natural
    """Of tensors in a parcel of the answer."""
    keeps: _Natural | None = None
    """A further round whose memory must stay: a task of several in a round of an edge's cloud is
    asked for again with those before it."""


class Fetch(_Strict):
    """Asks for parcels of an answer."""

    kind: Literal["fetch"] = "fetch"
    run: _RunId
    parcels: list[_Digest]


class Judge(_Strict):
    """Asks what the client's own model reaches on its own test examples; the global model's
    parcels come with it or have come before."""

    kind: Literal["judge"] = "judge"
    run: _RunId
    client: _Natural
    remembers: _Natural | None
    letter: dict[str, Any]
    """Of the global state."""


class Bye(_Strict):
    """The run is over: the device keeps nothing of it."""

    kind: Literal["bye"] = "bye"
    run: _RunId


class Profile(_Strict):
    """Who a device is."""

    kind: Literal["profile"] = "profile"
    name: Annotated[str, Field(max_length=200)]
    client: _Natural | None
    """The client whose part of the experiment's data it holds; None: it has data of its own."""
    num_examples: Annotated[int, Field(ge=1, lt=1 << 40)]
    memory_mib: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None


class Missing(_Strict):
    """Parcels that the device has not got."""

    kind: Literal["missing"] = "missing"
    parcels: list[_Digest]


class Stranger(_Strict):
    """The device does not know the run: it wants a Hello."""

    kind: Literal["stranger"] = "stranger"


class Refusal(_Strict):
    """The device cannot do it."""

    kind: Literal["refusal"] = "refusal"
    text: Annotated[str, Field(max_length=10_000)]


class Answer(_Strict):
    """An update; parcels come with it, or must be fetched."""

    kind: Literal["answer"] = "answer"
    letter: dict[str, Any]
    seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    """The device's own computing time."""


class Parcels(_Strict):
    """Parcels come with it."""

    kind: Literal["parcels"] = "parcels"


class Judged(_Strict):
    """What the client's own model reaches."""

    kind: Literal["judged"] = "judged"
    accuracy: Annotated[float, Field(ge=0, le=1)]
    share: Annotated[float, Field(ge=0, le=1)] | None
    """How much its own expert counts, of mixtures."""


Order = Annotated[
    Hello | Offer | Store | Work | Fetch | Judge | Bye | Sweep, Field(discriminator="kind")
]
Reply = Annotated[
    Profile | EdgeProfile | Missing | Stranger | Refusal | Answer | Parcels | Judged,
    Field(discriminator="kind"),
]
_ORDERS: TypeAdapter[Order] = TypeAdapter(Order)
_REPLIES: TypeAdapter[Reply] = TypeAdapter(Reply)


@dataclass(frozen=True, kw_only=True)
class Envelope:
    """What travels at once."""

    head: bytes
    """JSON of an order or a reply."""
    parcels: Mapping[str, bytes] = field(default_factory=dict)
    """By their digests."""

    @property
    def num_bytes(self) -> int:
        """Of what it carries."""
        return len(self.head) + sum(map(len, self.parcels.values()))


def sealed(head: BaseModel, parcels: Mapping[str, bytes] | None = None) -> Envelope:
    """An order or a reply, with parcels."""
    return Envelope(head=head.model_dump_json().encode(), parcels=parcels or {})


def order_of(envelope: Envelope) -> Order:
    """The order in an envelope; raises MessageError."""
    order: Order = _opened(_ORDERS, envelope)
    return order


def reply_of(envelope: Envelope) -> Reply:
    """The reply in an envelope; raises MessageError."""
    reply: Reply = _opened(_REPLIES, envelope)
    return reply


def _opened(kind: TypeAdapter[Any], envelope: Envelope) -> Any:
    if len(envelope.head) > _MOST_HEAD_BYTES:
        raise MessageError(
            f"a message's head has {len(envelope.head)} bytes; allowed are {_MOST_HEAD_BYTES}"
        )
    try:
        return kind.validate_json(envelope.head)
    except (ValidationError, RecursionError) as error:
        raise MessageError(f"a message's head is wrong: {error}") from error


def write_envelope(pipe: IO[bytes], envelope: Envelope) -> None:
    """Write an envelope to a stream of bytes: a frame that names the parcels, then all of them."""
    names = json.dumps(list(envelope.parcels)).encode()
    write_frame(pipe, names)
    write_frame(pipe, envelope.head)
    for data in envelope.parcels.values():
        write_frame(pipe, data)


def read_envelope(pipe: IO[bytes]) -> Envelope | None:
    """The next envelope of a stream; None at its end, also in the middle of one.

    Raises:
        MessageError: the bytes are no envelope.
    """
    if (first := read_frame(pipe)) is None or (head := read_frame(pipe)) is None:
        return None
    try:
        names = TypeAdapter(list[_Digest]).validate_json(first.body)
    except ValidationError as error:
        raise MessageError(f"the parcels of an envelope are wrongly named: {error}") from error
    parcels = {}
    for name in names:
        if (frame := read_frame(pipe)) is None:
            return None
        parcels[name] = frame.body
    return Envelope(head=head.body, parcels=parcels)
