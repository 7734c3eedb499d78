"""The client app: it starts anew for every message, so it only hands it to the resident.

Neither torch nor the model is loaded here: the resident (`tessera join`) has them.
"""

from __future__ import annotations

import socket
from typing import IO, cast

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from tesserafl.core.errors import ConfigError, MessageError
from tesserafl.engines.flower.records import from_record, to_record
from tesserafl.engines.orders import Envelope, read_envelope, write_envelope

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """Answer a message with what the resident says to it."""
    path = context.node_config.get("resident")
    if not isinstance(path, str):
        raise ConfigError(
            "this SuperNode does not know where its resident listens; start it with: tessera join"
        )
    answer = forward(path, from_record(message.content))
    return Message(to_record(answer), reply_to=message)


def forward(path: str, envelope: Envelope) -> Envelope:
    """The answer of the resident whose socket lies at `path`; waits for it.

    Raises:
        OSError: nobody listens there.
        MessageError: the resident ended before it answered.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.connect(path)
        with connection.makefile("rwb") as both:
            pipe = cast(IO[bytes], both)
            write_envelope(pipe, envelope)
            answer = read_envelope(pipe)
    if answer is None:
        raise MessageError("the resident ended before it answered")
    return answer
