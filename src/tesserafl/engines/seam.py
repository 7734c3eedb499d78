"""The seam between runs and engines: submit tasks, poll outcomes.

Synchronous rounds are a special case of it: submit a cohort, poll until all answered or failed.
Tasks are handed over in groups of one sub-model shape, since an engine that simulates clients may
train a group in one program. Groups never depend on the engine's capacity, so neither do the bits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from tesserafl.core.messages import Memory, Task, Update

Reason = Literal["offline", "crashed", "error", "expired"]


@dataclass(frozen=True, kw_only=True)
class Done:
    """A client answered. Whether its update may be summed, `core.answers.check_update` says."""

    client: int
    """Who was asked, whatever the update says."""
    update: Update
    seconds: float
    """The client's own computing time; a group that is trained together shares its time evenly."""


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
        """Groups that may be under way at once; more wait with the caller, uncut."""
        ...

    @property
    def group(self) -> int:
        """Tasks of a group, at most; 1 for an engine whose clients are devices."""
        ...

    @property
    def memories(self) -> Mapping[int, Memory]:
        """What clients keep between rounds, for a checkpoint; empty if devices keep their own."""
        ...

    def restore(self, memories: Mapping[int, Memory]) -> None:
        """Give the clients back what a checkpoint held."""
        ...

    def submit(self, tasks: Sequence[Task]) -> None:
        """Hand a group of tasks of one sub-model shape to their clients."""
        ...

    def poll(self) -> list[Outcome]:
        """At least one outcome of what was submitted, in any order; blocks until there is one."""
        ...

    def close(self) -> None:
        """Release workers; idempotent."""
        ...
