"""A peer that keeps a part of the model, as one of lean.py: the device's side of it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tesserafl.core.answers import check_claims
from tesserafl.core.checks import MAX_ENTRY, check_entries
from tesserafl.core.errors import UpdateError
from tesserafl.core.fit import Training
from tesserafl.core.messages import Client, Task, Update
from tesserafl.core.params import Params
from tesserafl.core.wire import Parts, update_of, update_parts
from tesserafl.engines.federation import Held
from tesserafl.engines.peer import Letters, task_of
from tesserafl.engines.shares import NOTHING, Handed, Ints, Shares

_VALUES, _CHANGE = "values", "change"
_PART = "part"


@dataclass(kw_only=True)
class LeanPeer:
    """A peer with a part of the model."""

    client: int
    shares: Shares
    store: Tensor
    """Float [entries that it keeps]."""

    @property
    def round(self) -> int:
        """Rounds that it has ended."""
        return self.shares.state.round

    @property
    def stored(self) -> Params:
        """The entries that it keeps, in the model's order."""
        return {_PART: self.store}

    def task(self, cohort: Sequence[Client], training: Training) -> Task | None:
        """Out of its store."""
        for task in self.shares.tasks(cohort, training):
            if task.client.id == self.client:
                return self.shares.filled(task, self.store)
        return None

    def letters(
        self, update: Update | None, cohort: Sequence[Client], training: Training
    ) -> list[tuple[list[int], Parts]]:
        """To each that will keep something of its: values that it lacks, and the change."""
        after, found = self.shares.following(), []
        change = NOTHING if update is None else self.shares.change_of(update)
        head = None
        if update is not None:
            head = update_parts(replace(update, delta={}, extra={}), {})[0]
        for receiver in range(self.shares.peers):
            if receiver == self.client:
                continue
            part = self.shares.hand(after, self.client, receiver, self.store, change)
            if part.num_bytes:
                groups: dict[str, Params] = {
                    _VALUES: {_PART: part.values},
                    _CHANGE: {_PART: part.change},
                }
                found.append(([receiver], ({"update": head}, groups)))
        return found

    def fold(
        self,
        own: Update | None,
        answered: Collection[int],
        letters: Letters,
        cohort: Sequence[Client],
        training: Training,
    ) -> None:
        """Into the store of the next round.

        Raises:
            TesseraError: a letter cannot be true: what it holds nobody else may have.
        """
        tasks = {task.client.id: task for task in self.shares.tasks(cohort, training)}
        change = NOTHING if own is None else self.shares.change_of(own)
        after = self.shares.following()
        mine = self.shares.hand(after, self.client, self.client, self.store, change)
        handed, trained = {self.client: mine}, dict[int, Ints]()
        if own is not None:
            trained[self.client] = change.where
        for origin, read in letters.items():
            header, groups = read()
            if header.get("update") is not None and origin in answered:
                task = task_of(origin, tasks)
                empty: dict[str, Params] = {"delta": {}, "extra": {}, "memory": {}}
                update, _ = update_of(header["update"], empty)
                check_claims(task, update)
                trained[origin] = self.shares.places_of(update.submodel)
            handed[origin] = _handed(origin, groups, self.store.dtype)

        def hand(origin: int) -> Handed:
            if origin not in handed:
                raise UpdateError(f"peer {origin} handed nothing over, and something is due")
            return handed[origin]

        store = self.shares.fuse(after, self.client, self.store, trained, hand)
        self.shares, self.store = after, store

    def held(self) -> Held:
        """Its part, and who keeps what."""
        state = replace(self.shares.state, params={})
        groups = {"store": self.stored, "public": {"keeps": torch.from_numpy(self.shares.keeps)}}
        return [state], {}, groups

    def restore(self, held: Held) -> None:
        """Take it."""
        ((state,), _, groups) = held
        state = replace(state, params=self.shares.state.params)
        keeps = groups["public"]["keeps"].numpy()
        self.shares = replace(self.shares, state=state, keeps=keeps)
        self.store = groups["store"][_PART]


def _handed(origin: int, groups: Mapping[str, Params], dtype: torch.dtype) -> Handed:
    parts = []
    for group, most in ((_VALUES, torch.finfo(dtype).max), (_CHANGE, MAX_ENTRY)):
        tensors = groups.get(group, {})
        if set(tensors) != {_PART} or tensors[_PART].dtype != dtype:
            raise UpdateError(f"peer {origin}'s letter holds no {group} of type {dtype}")
        if tensors[_PART].numel():
            check_entries({group: tensors[_PART]}, most)
        parts.append(tensors[_PART])
    return Handed(*parts)
