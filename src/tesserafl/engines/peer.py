"""One peer alone with what it keeps of the model: the device's side of a run without a server.

    CopyPeer   a copy of the whole, as one of replicas.py
    LeanPeer   a part, as one of lean.py (lean_peer.py)

What it makes of others' letters is what the simulation of all peers makes of them, to the bit. It
trusts nobody: a letter that cannot be true is left out, and as all peers look at the same letters
with the same eyes, all leave it out.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

from tesserafl.core.answers import check_claims, check_update
from tesserafl.core.checks import check_places
from tesserafl.core.errors import TesseraError, UpdateError
from tesserafl.core.fit import Training
from tesserafl.core.messages import Client, Task, Update, Wanted
from tesserafl.core.params import Params
from tesserafl.core.wire import Parts, update_of, update_parts
from tesserafl.engines.federation import Held
from tesserafl.engines.replicas import Replicas, seen_from

_log = logging.getLogger(__name__)

Letters = Mapping[int, Callable[[], Parts]]
"""Who wrote a letter -> reads it; raises TesseraError."""


class Asked(NamedTuple):
    """Who takes part in a round, and how they train."""

    cohort: Sequence[Client]
    training: Training


class Heard(NamedTuple):
    """What ends a round."""

    own: Update | None
    """What the peer itself trained, if that counts."""
    answered: Collection[int]
    """All whose training counts."""
    letters: Letters
    """What others wrote to it."""


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

    def task(self, asked: Asked) -> Task | None:
        """What it trains in this round; None: nothing."""
        ...

    def letters(self, update: Update | None, asked: Asked) -> list[tuple[list[int], Parts]]:
        """What it writes to whom, after it has trained (None: it has not)."""
        ...

    def fold(self, heard: Heard, asked: Asked) -> None:
        """End the round; raises TesseraError if it cannot, and nothing has changed then."""
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

    def task(self, asked: Asked) -> Task | None:
        """Cut from its own copy."""
        tasks = self.copy.tasks(*asked)
        return next((task for task in tasks if task.client.id == self.client), None)

    def letters(self, update: Update | None, asked: Asked) -> list[tuple[list[int], Parts]]:
        """To all others its change; to neighbours, if peers gossip, where it stands."""
        if not self.copy.gossip:
            others = [peer for peer in range(self.copy.network.peers) if peer != self.client]
            return [] if update is None else [(others, update_parts(update, {}))]
        self.task(asked)  # notes what it holds
        message = self.copy.standing(self.client) if update is None else self.copy.message(update)
        return [(self.copy.network.neighbours(self.client), update_parts(message, {}))]

    def fold(self, heard: Heard, asked: Asked) -> None:
        """Into its copy."""
        own, answered, letters = heard
        tasks = self._tasks(asked)
        if not self.copy.gossip:
            told = {origin: letters[origin] for origin in letters if origin in answered}
            updates = self._believed(told, answered, tasks)
            if own is not None:
                updates = itertools.chain([own], updates)
            self.copy.fold(asked.cohort, updates)
            return
        self.task(asked)
        mine = self.copy.standing(self.client) if own is None else self.copy.message(own)
        found = {
            update.client: replace(update, delta=dict(update.delta))
            for update in self._believed(letters, answered, tasks)
        }
        inbox = [({self.client: mine} | found)[origin] for origin in sorted({*found, self.client})]
        self.copy.states = [self.copy.mixed(self.client, asked.cohort, inbox)]
        self.copy.copy_of = [0] * self.copy.network.peers

    def held(self) -> Held:
        """Its copy."""
        return self.copy.held()

    def restore(self, held: Held) -> None:
        """Take it."""
        self.copy.restore(held)

    def _tasks(self, asked: Asked) -> dict[int, Task]:
        """What everybody was to train, without values."""
        state = self.copy.states[0]
        bare = replace(state, params={n: t.to("meta") for n, t in state.params.items()})
        tasks = self.copy.method.configure(self.copy.model, bare, *asked)
        return {task.client.id: task for task in tasks}

    def _believed(
        self, letters: Letters, answered: Collection[int], tasks: Mapping[int, Task]
    ) -> Iterator[Update]:
        """What others wrote, as far as it can be true."""
        for origin, read in letters.items():
            try:
                task = task_of(origin, tasks)
                if origin not in answered:
                    task = standing_task(task)
                update, _ = update_of(*read(), task)
                if origin not in answered and (update.num_steps or update.metrics):
                    raise UpdateError(f"peer {origin} did not train, and says that it has")
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


def standing_task(task: Task) -> Task:
    """What is asked of a peer that trained nothing: where it stands, in all of its part.

    Its own task may want some of the part alone, rows of it or tensors beside it, which come of
    training.
    """
    training = replace(task.training, mask_absent_classes=False)
    client = replace(task.client, num_examples=0)
    return replace(task, client=client, training=training, trainable=None, wanted=Wanted())


def task_of(origin: int, tasks: Mapping[int, Task]) -> Task:
    """What a peer was to train; UpdateError if nothing."""
    if origin not in tasks:
        raise UpdateError(f"peer {origin} was not asked in this round")
    return tasks[origin]


def _left_out(origin: int, error: TesseraError) -> None:
    _log.warning("a letter of peer %d is left out: %s", origin, error)
