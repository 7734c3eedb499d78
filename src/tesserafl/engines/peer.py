"""One peer alone with what it keeps of the model: the device's side of a run without a server.

    CopyPeer   a copy of the whole, as one of replicas.py
    LeanPeer   a part, as one of lean.py (lean_peer.py)

What it makes of others' letters is what the simulation of all peers makes of them, to the bit. It
trusts nobody: a letter that cannot be true is left out, and as all peers look at the same letters
with the same eyes, all leave it out.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from tesserafl.core.answers import check_claims, check_update
from tesserafl.core.checks import check_places
from tesserafl.core.errors import TesseraError, UpdateError
from tesserafl.core.fit import Training
from tesserafl.core.messages import Client, Task, Update
from tesserafl.core.params import Params
from tesserafl.core.wire import Parts, update_of, update_parts
from tesserafl.engines.federation import Held
from tesserafl.engines.replicas import Replicas, seen_from

_log = logging.getLogger(__name__)

Letters = Mapping[int, Callable[[], Parts]]
"""Who wrote a letter -> reads it; raises TesseraError."""


class Peer(Protocol):
    """What a peer does in a round: take its task, write to the others, fold what they wrote."""

    @property
    def round(self) -> int:
        """Rounds that it has ended."""
        ...

    @property
    def stored(self) -> Params:
        """What it keeps of the model between rounds."""
        ...

    def task(self, cohort: Sequence[Client], training: Training) -> Task | None:
        """What it trains in this round; None: nothing."""
        ...

    def letters(
        self, update: Update | None, cohort: Sequence[Client], training: Training
    ) -> list[tuple[list[int], Parts]]:
        """What it writes to whom, after it has trained (None: it has not)."""
        ...

    def fold(
        self,
        own: Update | None,
        answered: Collection[int],
        letters: Letters,
        cohort: Sequence[Client],
        training: Training,
    ) -> None:
        """End the round.

        Args:
            own: what it trained, if that counts.
            answered: all whose training counts.
            letters: what others wrote to it.
            cohort: who was asked.
            training: how they trained.
        """
        ...

    def held(self) -> Held:
        """All that it must remember."""
        ...

    def restore(self, held: Held) -> None:
        """Go on from there."""
        ...


@dataclass(kw_only=True)
class CopyPeer:
    """A peer with a copy of the model."""

    client: int
    copy: Replicas
    """One state: its own."""

    @property
    def round(self) -> int:
        """Rounds that it has ended."""
        return self.copy.round

    @property
    def stored(self) -> Params:
        """The whole model."""
        return self.copy.shapes

    def task(self, cohort: Sequence[Client], training: Training) -> Task | None:
        """Cut from its own copy."""
        tasks = self.copy.tasks(cohort, training)
        return next((task for task in tasks if task.client.id == self.client), None)

    def letters(
        self, update: Update | None, cohort: Sequence[Client], training: Training
    ) -> list[tuple[list[int], Parts]]:
        """To all others its change; to neighbours, if peers gossip, where it stands."""
        if not self.copy.gossip:
            others = [peer for peer in range(self.copy.network.peers) if peer != self.client]
            return [] if update is None else [(others, update_parts(update, {}))]
        self.task(cohort, training)  # notes what it holds
        message = self.copy.standing(self.client) if update is None else self.copy.message(update)
        return [(self.copy.network.neighbours(self.client), update_parts(message, {}))]

    def fold(
        self,
        own: Update | None,
        answered: Collection[int],
        letters: Letters,
        cohort: Sequence[Client],
        training: Training,
    ) -> None:
        """Into its copy."""
        tasks = self._tasks(cohort, training)
        if not self.copy.gossip:
            heard = {origin: letters[origin] for origin in letters if origin in answered}
            self.copy.fold(cohort, self._updates(own, heard, tasks))
            return
        self.task(cohort, training)
        mine = self.copy.standing(self.client) if own is None else self.copy.message(own)
        found = {u.client: replace(u, delta=dict(u.delta)) for u in self._all(letters, tasks)}
        inbox = [({self.client: mine} | found)[origin] for origin in sorted({*found, self.client})]
        self.copy.states = [self.copy.mixed(self.client, cohort, inbox)]
        self.copy.copy_of = [0] * self.copy.network.peers

    def held(self) -> Held:
        """Its copy."""
        return self.copy.held()

    def restore(self, held: Held) -> None:
        """Take it."""
        self.copy.restore(held)

    def _tasks(self, cohort: Sequence[Client], training: Training) -> dict[int, Task]:
        """What everybody was to train, without values."""
        state = self.copy.states[0]
        bare = replace(state, params={n: t.to("meta") for n, t in state.params.items()})
        tasks = self.copy.method.configure(self.copy.model, bare, cohort, training)
        return {task.client.id: task for task in tasks}

    def _updates(
        self, own: Update | None, letters: Letters, tasks: Mapping[int, Task]
    ) -> Iterator[Update]:
        if own is not None:
            yield own
        yield from self._all(letters, tasks)

    def _all(self, letters: Letters, tasks: Mapping[int, Task]) -> Iterator[Update]:
        """Others' updates, those that can be true."""
        for origin, read in letters.items():
            try:
                task = task_of(origin, tasks)
                update, _ = update_of(*read(), task)
                moved = update
                if self.copy.gossip:  # values, of which the change is found where they lie
                    check_claims(task, update)
                    check_places(update.submodel, update.delta, self.copy.shapes)
                    moved = seen_from(update, self.copy.shapes)
                check_update(task, moved, self.copy.shapes, self.copy.model)
            except TesseraError as error:
                _left_out(origin, error)
                continue
            yield update


def task_of(origin: int, tasks: Mapping[int, Task]) -> Task:
    """What a peer was to train; UpdateError if nothing."""
    if origin not in tasks:
        raise UpdateError(f"peer {origin} was not asked in this round")
    return tasks[origin]


def _left_out(origin: int, error: TesseraError) -> None:
    _log.warning("a letter of peer %d is left out: %s", origin, error)
