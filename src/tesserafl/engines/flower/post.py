"""The post of Flower: messages of its grid, and what became of them."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import TypeVar

from flwr.app import Message, MessageType
from flwr.serverapp import Grid

from tesserafl.core.errors import MessageError
from tesserafl.engines.attendance import Disowned, Undelivered
from tesserafl.engines.flower.records import from_record, to_record
from tesserafl.engines.orders import Envelope
from tesserafl.engines.seam import Reason

_log = logging.getLogger(__name__)
_Found = TypeVar("_Found")

_REASONS: dict[int, Reason] = {1: "crashed", 2: "crashed", 3: "expired", 4: "expired"}
_REASONS |= {5: "offline", 8: "crashed"}
"""Flower's error codes; all others are errors. A client app that raises (1, 2) found no resident:
what a resident cannot do it says in its answer."""
_REFUSED = (401, 403)
"""HTTP's codes for a token that is not good: Flower has given this process up as lost."""
_AT_ONCE = 8
"""Messages that are asked for together: Flower brings all of their replies into memory."""
_TRIES = 8
"""Of one call of the grid; the pauses between them double from half a second, so a minute."""


@dataclass(kw_only=True)
class FlowerPost:
    """Sends envelopes through a grid. A grid that does not answer is asked again for a minute."""

    grid: Grid
    pause: Callable[[float], None] = time.sleep
    _until: dict[str, float] = field(default_factory=dict)

    def nodes(self) -> dict[int, str]:
        """The nodes that are connected now, and the names that they were registered with."""
        found = self._patiently(lambda: list(self.grid.get_nodes()))
        return {int(node.node_id): str(getattr(node, "name", "") or "") for node in found}

    def push(self, node: int, envelope: Envelope, seconds: float) -> str:
        """Send an envelope; its reply may come for so many seconds."""
        message = Message(to_record(envelope), node, MessageType.TRAIN, ttl=seconds)
        (name,) = self._patiently(lambda: list(self.grid.push_messages([message])))
        if not name:
            raise Undelivered("offline", f"Flower takes no message for node {node}: it has gone")
        return str(name)

    def pull(self, names: Collection[str]) -> list[tuple[str, Envelope | Undelivered]]:
        """The replies to these messages that have come by now."""
        asked, found = list(names), list[tuple[str, Envelope | Undelivered]]()
        for first in range(0, len(asked), _AT_ONCE):
            found += self._pull(asked[first : first + _AT_ONCE])
        return found

    def _pull(self, names: list[str]) -> list[tuple[str, Envelope | Undelivered]]:
        replies = self._patiently(lambda: list(self.grid.pull_messages(names)))
        found: list[tuple[str, Envelope | Undelivered]] = []
        for reply in replies:
            name = reply.metadata.reply_to_message_id
            if reply.has_error():
                reason = _REASONS.get(reply.error.code, "error")
                found.append((name, Undelivered(reason, str(reply.error.reason))))
                continue
            try:
                found.append((name, from_record(reply.content)))
            except MessageError as error:
                found.append((name, Undelivered("error", str(error))))
        return found

    def _patiently(self, call: Callable[[], _Found]) -> _Found:
        """What a call gives; a database that is locked or a link that restarts takes a moment.

        Raises:
            Disowned: this process is not the run's any more.
        """
        for attempt in range(_TRIES):
            try:
                return call()
            except Exception as error:  # of whatever kind Flower's transport raises
                answer = getattr(error, "response", None)
                if getattr(answer, "status_code", None) in _REFUSED:
                    raise Disowned(f"Flower refuses this process: {error}") from error
                if attempt == _TRIES - 1:
                    raise
                _log.warning("Flower did not answer (%s); asking again", error)
                self.pause(0.5 * 2**attempt)
        raise AssertionError("unreachable")
