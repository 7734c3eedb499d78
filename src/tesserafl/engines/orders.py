"""What a server asks of a device, and what a device answers: JSON heads, with parcels beside them.

    Hello   here is the experiment       -> Profile, Refusal
    Store   keep these parcels           -> Missing (of nothing)
    Work    do the task of this letter   -> Answer, Missing, Stranger, Refusal
    Fetch   send parcels of your answer  -> Parcels, Missing
    Rest    send what the answer has yet -> Parcels, Missing (of nothing)
    Judge   measure what you keep        -> Judged, Stranger, Refusal
    Bye     the run is over              -> Missing (of nothing)

Of a run among peers, whose letters the server carries (see run/carried.py):

    Turn    your part of a round         -> Turned, Standing
    Fold    what others sent you in it   -> Standing, Missing
    Examine what has your model come to  -> Examined

Edges are asked for whole rounds (edge_orders.py).
Every order can be given again: a device that has done a task answers it from what it kept.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import IO, Annotated, Any, Literal

from pydantic import BaseModel, Field, TypeAdapter, ValidationError

from tesserafl.core.errors import MessageError
from tesserafl.engines.edge_orders import EdgeProfile, Survey, Sweep
from tesserafl.engines.frames import read_frame, write_frame
from tesserafl.engines.heads import Digest, Natural, RunId, Share, Strict
from tesserafl.engines.turns import Examine, Examined, Fold, Standing, Turn, Turned

_MOST_HEAD_BYTES = 64 << 20
"""Of one head's JSON: a letter names every tensor of a model, and where it lies."""


class Hello(Strict):
    """The experiment, to a device that the server does not know yet."""

    kind: Literal["hello"] = "hello"
    run: RunId
    experiment: dict[str, Any]
    spec: dict[str, Any]
    """What a model must know of the data; see `data.examples.Spec`."""
    parts: bool = True
    """Whether devices take parts of the experiment's data; else they have their own."""


class Store(Strict):
    """Parcels to keep come with it."""

    kind: Literal["store"] = "store"
    run: RunId


class Work(Strict):
    """A task; parcels may come with it, or have come before."""

    kind: Literal["work"] = "work"
    run: RunId
    client: Natural
    remembers: Natural | None
    """The round that the client answered last, as far as the server has heard: with what it kept
    then it begins. None: with nothing."""
    letter: dict[str, Any]
    """Of the task; see `parcels.Letter`."""
    most_bytes: Natural
    """Of tensors in a parcel of the answer."""
    keeps: Natural | None = None
    """A further round whose memory must stay: a task of several in a round of an edge's cloud is
    asked for again with those before it."""


class Fetch(Strict):
    """Asks for parcels of an answer."""

    kind: Literal["fetch"] = "fetch"
    run: RunId
    parcels: list[Digest]


class Judge(Strict):
    """Asks what the client's own model reaches on its own test examples; the global model's
    parcels come with it or have come before."""

    kind: Literal["judge"] = "judge"
    run: RunId
    client: Natural
    remembers: Natural | None
    letter: dict[str, Any]
    """Of the global state."""


class Bye(Strict):
    """The run is over: the device keeps nothing of it."""

    kind: Literal["bye"] = "bye"
    run: RunId
    text: Annotated[str, Field(max_length=10_000)] = ""
    """Why the device has no seat in it; "": it is over for all."""


class Profile(Strict):
    """Who a device is."""

    kind: Literal["profile"] = "profile"
    name: Annotated[str, Field(max_length=200)]
    client: Natural | None
    """The client whose part of the experiment's data it holds; None: it has data of its own."""
    num_examples: Annotated[int, Field(ge=1, lt=1 << 40)]
    memory_mib: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None


class Rest(Strict):
    """Asks for more of the answer to this round's task, before anybody knows what it consists of:
    for the parcels that would go with the message of this number."""

    kind: Literal["rest"] = "rest"
    run: RunId
    round: Natural
    number: Annotated[int, Field(ge=1, lt=1 << 24)]
    most_bytes: Natural
    """Of tensors in one message; as in the task's order."""


class Missing(Strict):
    """Parcels that the device has not got."""

    kind: Literal["missing"] = "missing"
    parcels: list[Digest]


class Stranger(Strict):
    """The device does not know the run: it wants a Hello."""

    kind: Literal["stranger"] = "stranger"


class Refusal(Strict):
    """The device cannot do it."""

    kind: Literal["refusal"] = "refusal"
    text: Annotated[str, Field(max_length=10_000)]


class Answer(Strict):
    """An update; parcels come with it, or must be fetched."""

    kind: Literal["answer"] = "answer"
    letter: dict[str, Any]
    seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    """The device's own computing time."""


class Parcels(Strict):
    """Parcels come with it."""

    kind: Literal["parcels"] = "parcels"


class Judged(Strict):
    """What the client's own model reaches."""

    kind: Literal["judged"] = "judged"
    accuracy: Share
    share: Share | None
    """How much its own expert counts, of mixtures."""


Order = Annotated[
    Hello | Store | Work | Fetch | Rest | Judge | Bye | Sweep | Survey | Turn | Fold | Examine,
    Field(discriminator="kind"),
]
Reply = Annotated[
    Profile
    | EdgeProfile
    | Missing
    | Stranger
    | Refusal
    | Answer
    | Parcels
    | Judged
    | Turned
    | Standing
    | Examined,
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
    order: Order = _opened(_ORDERS, envelope, _MOST_HEAD_BYTES)
    return order


def reply_of(envelope: Envelope, most_bytes: int = _MOST_HEAD_BYTES) -> Reply:
    """The reply in an envelope, whose head has so many bytes at most; raises MessageError.

    Who reads what others wrote says how many: JSON takes many times its size when it is read.
    """
    reply: Reply = _opened(_REPLIES, envelope, min(most_bytes, _MOST_HEAD_BYTES))
    return reply


def _opened(kind: TypeAdapter[Any], envelope: Envelope, most_bytes: int) -> Any:
    if len(envelope.head) > most_bytes:
        raise MessageError(
            f"a message's head has {len(envelope.head)} bytes; allowed are {most_bytes}"
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
        names = TypeAdapter(list[Digest]).validate_json(first.body)
    except ValidationError as error:
        raise MessageError(f"the parcels of an envelope are wrongly named: {error}") from error
    parcels = {}
    for name in names:
        if (frame := read_frame(pipe)) is None:
            return None
        parcels[name] = frame.body
    return Envelope(head=head.body, parcels=parcels)
