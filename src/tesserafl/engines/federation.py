"""The seam between rounds and topologies: who holds the model, and how updates become the next one.

star      a server holds it                          Star, here
peers     everybody holds a copy                     replicas.py
          everybody keeps a part, nobody the whole   lean.py
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from tesserafl.core.fit import Training
from tesserafl.core.messages import Client, Task, Update
from tesserafl.core.method import Method, State
from tesserafl.core.model import Model
from tesserafl.core.params import Params
from tesserafl.engines.compression import CompressionSettings, as_sent
from tesserafl.engines.network import Hop


class Traffic(NamedTuple):
    """Bytes of tensors that one participant sent and received in a round."""

    sent: int
    received: int


class TrafficCounter:
    """Bytes that each peer sent and received."""

    def __init__(self, peers: int) -> None:
        self._sent, self._received = [0] * peers, [0] * peers

    def count(self, origin: int, size: int, hops: Mapping[int, Hop]) -> None:
        """One message's way."""
        for receiver, hop in hops.items():
            self._sent[hop.sender] += size
            self._received[receiver] += size * hop.arrived

    @property
    def sums(self) -> dict[int, Traffic]:
        """Of every peer."""
        return {
            peer: Traffic(*both)
            for peer, both in enumerate(zip(self._sent, self._received, strict=True))
        }


@dataclass(frozen=True, kw_only=True)
class Folded:
    """What is noted of a round's exchange."""

    traffic: Mapping[int, Traffic]
    """Participant -> its bytes."""
    consensus: float | None = None
    """Root mean square distance of the peers' copies from their mean, relative to the mean's norm;
    None where nobody holds a copy of the whole."""
    stored: int | None = None
    """Entries of the model that a participant stores between rounds, at most; None: a server does.
    """


Held = tuple[Sequence[State], dict[str, Any], dict[str, Params]]
"""What a checkpoint keeps of a federation: states, plain JSON values, groups of tensors."""


class Federation(Protocol):
    """Holds the model between rounds."""

    @property
    def round(self) -> int:
        """Rounds that are done."""
        ...

    @property
    def rounds(self) -> int:
        """Rounds that are planned."""
        ...

    @property
    def shapes(self) -> Params:
        """The model's parameters, of which only names, shapes and types may be looked at."""
        ...

    def tasks(self, cohort: Sequence[Client], training: Training) -> Iterator[Task]:
        """What each of the cohort trains in the next round."""
        ...

    def fold(self, cohort: Sequence[Client], updates: Iterable[Update]) -> Folded:
        """End the round with the updates of those that answered, taken one at a time.

        The order of the updates changes no bit.
        """
        ...

    def assembled(self) -> State:
        """The model as a whole, as everybody together would put it together now."""
        ...

    def copies(self) -> Mapping[int, State]:
        """Peer -> its own copy, where copies differ; empty elsewhere."""
        ...

    def held(self) -> Held:
        """All that a checkpoint needs."""
        ...

    def restore(self, held: Held) -> None:
        """Go on from a checkpoint."""
        ...


@dataclass(kw_only=True)
class Star:
    """A server that holds the state, and clients that hold nothing of it between rounds."""

    model: Model
    method: Method
    state: State
    compression: CompressionSettings = field(default_factory=CompressionSettings)
    """How parameters go down."""
    _down: dict[int, int] = field(default_factory=dict)

    @property
    def round(self) -> int:
        """Rounds that are done."""
        return self.state.round

    @property
    def rounds(self) -> int:
        """Rounds that are planned."""
        return self.state.rounds

    @property
    def shapes(self) -> Params:
        """The server's parameters."""
        return self.state.params

    def tasks(self, cohort: Sequence[Client], training: Training) -> Iterator[Task]:
        """As the method says."""
        self._down = {}
        for configured in self.method.configure(self.model, self.state, cohort, training):
            task = as_sent(configured, self.compression)
            del configured  # its parameters, where others are sent
            self._down[task.client.id] = task.num_bytes
            yield task

    def fold(self, cohort: Sequence[Client], updates: Iterable[Update]) -> Folded:
        """Streamed through the method's `aggregate`."""
        up: dict[int, int] = {}
        self.state = self.method.aggregate(
            self.model, self.state, cohort, noting_bytes(updates, up)
        )
        return Folded(
            traffic={c: Traffic(up.get(c, 0), received) for c, received in self._down.items()}
        )

    def assembled(self) -> State:
        """The server's state."""
        return self.state

    def copies(self) -> Mapping[int, State]:
        """None: there is one model."""
        return {}

    def held(self) -> Held:
        """The state."""
        return [self.state], {}, {}

    def restore(self, held: Held) -> None:
        """Take the state."""
        ((self.state,), _, _) = held


def noting_bytes(updates: Iterable[Update], sizes: dict[int, int]) -> Iterator[Update]:
    """Pass updates on and note how large they are."""
    for update in updates:
        sizes[update.client] = update.num_bytes
        yield update
        del update  # its memory serves the next client
