"""The seam between runs and engines: submit tasks, poll outcomes.

Synchronous rounds are a special case of it: submit a cohort, poll until all answered or failed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

from tesserafl.core.messages import Memory, Task, Update

Reason = Literal["offline", "crashed", "error", "expired"]


@dataclass(frozen=True, kw_only=True)
class Done:
    """A client answered."""

    update: Update
    seconds: float
    """The client's own computing time."""


@dataclass(frozen=True, kw_only=True)
class Failed:
    """A client did not answer, and why."""

    client: int
    reason: Reason
    text: str


Outcome = Done | Failed


class Engine(Protocol):
    """Decides when and where the client hooks run."""

    @property
    def capacity(self) -> int:
        """Tasks that may be under way at once; more wait with the caller, uncut."""
        ...

    @property
    def memories(self) -> Mapping[int, Memory]:
        """What clients keep between rounds, for a checkpoint; empty if devices keep their own."""
        ...

    def restore(self, memories: Mapping[int, Memory]) -> None:
        """Give the clients back what a checkpoint held."""
        ...

    def submit(self, task: Task) -> None:
        """Hand a task to its client."""
        ...

    def poll(self) -> list[Outcome]:
        """At least one outcome of what was submitted, in any order; blocks until there is one."""
        ...

    def close(self) -> None:
        """Release workers; idempotent."""
        ...
