"""A peer that keeps a part of the model, as one of lean.py: the device's side of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tesserafl.core.answers import check_claims, reported_by
from tesserafl.core.checks import MAX_ENTRY, check_entries
from tesserafl.core.errors import UpdateError
from tesserafl.core.messages import Task, Update
from tesserafl.core.params import Params
from tesserafl.core.wire import Parts, update_of, update_parts
from tesserafl.engines.federation import Held
from tesserafl.engines.passages import NOTHING, Handed, Taken, change_of
from tesserafl.engines.peer import Asked, Heard, task_of
from tesserafl.engines.shares import Shares
from tesserafl.engines.strips import Places, places_of

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

    def task(self, asked: Asked) -> Task | None:
        """Out of its store."""
        for task in self.shares.tasks(*asked):
            if task.client.id == self.client:
                return self.shares.filled(task, self.store)
        return None

    def letters(self, update: Update | None, asked: Asked) -> list[tuple[list[int], Parts]]:
        """To each that will keep something of its: values that it lacks, and the change."""
        change, kept = NOTHING if update is None else change_of(update), Taken(flat=self.store)
        others = [peer for peer in range(self.shares.peers) if peer != self.client]
        parts: dict[int, list[Handed]] = {peer: [] for peer in others}
        for passage in self.shares.passages():
            store = kept.take(passage.held[self.client])
            within = change.within(passage.strip, store.dtype)
            for peer in others:
                part = passage.hand(self.client, peer, store, *within)
                if part.num_bytes:
                    parts[peer].append(part)
        head = None
        if update is not None:
            head = update_parts(replace(update, delta={}, extra={}), {})[0]
        found: list[tuple[list[int], Parts]] = []
        for peer in others:
            if handed := parts.pop(peer):
                values, changes = (torch.cat(each) for each in zip(*handed, strict=True))
                groups: dict[str, Params] = {_VALUES: {_PART: values}, _CHANGE: {_PART: changes}}
                found.append(([peer], ({"update": head}, groups)))
        return found

    def fold(self, heard: Heard, asked: Asked) -> None:
        """Into the store of the next round.

        Raises:
            TesseraError: a letter cannot be true: what it holds nobody else may have.
        """
        own, answered, letters = heard
        tasks = {task.client.id: task for task in self.shares.tasks(*asked)}
        change, kept = NOTHING if own is None else change_of(own), Taken(flat=self.store)
        places = {} if own is None else {self.client: change.places}
        handed: dict[int, _Letter] = {}
        for origin, read in letters.items():
            header, groups = read()
            if header.get("update") is not None and origin in answered:
                places[origin] = _trained(header["update"], task_of(origin, tasks))
            handed[origin] = _letter(origin, groups, self.store.dtype)
        after = self.shares.following
        store = Taken(flat=self.store.new_empty(after.num_kept(self.client)))
        for passage in self.shares.passages():
            before = kept.take(passage.held[self.client])
            within = change.within(passage.strip, before.dtype)
            mine = passage.hand(self.client, self.client, before, *within)
            hand = partial(_due, handed, self.client, mine)
            trained = {peer: passage.strip.mask(places[peer]) for peer in places}
            store.put(passage.fuse(self.client, before, trained, hand))
        for letter in handed.values():
            letter.check_over()
        self.shares, self.store = after, store.flat

    def held(self) -> Held:
        """Its part, and who keeps what."""
        state = replace(self.shares.state, params={})
        return [state], {}, {"store": self.stored, "public": self.shares.written()}

    def restore(self, held: Held) -> None:
        """Take it."""
        ((state,), _, groups) = held
        self.shares = self.shares.read(state, groups["public"])
        self.store = groups["store"][_PART]


@dataclass(frozen=True, kw_only=True)
class _Letter:
    """What another peer hands over, taken strip by strip."""

    origin: int
    values: Taken
    change: Taken

    def take(self, values: int, changes: int) -> Handed:
        """So much of it; UpdateError if it does not hold that."""
        for what, part, due in (("values", self.values, values), ("changes", self.change, changes)):
            if part.left < due:
                raise UpdateError(
                    f"peer {self.origin} hands over {len(part.flat)} {what}; more are due"
                )
        return Handed(self.values.take(values), self.change.take(changes))

    def check_over(self) -> None:
        """UpdateError if something is left."""
        for what, part in (("values", self.values), ("changes", self.change)):
            if part.left:
                raise UpdateError(
                    f"peer {self.origin} hands over {len(part.flat)} {what}; due are "
                    f"{len(part.flat) - part.left}"
                )


def _due(
    letters: Mapping[int, _Letter],
    client: int,
    mine: Handed,
    origin: int,
    values: int,
    changes: int,
) -> Handed:
    """What a peer hands `client` of a strip, of which it knows how much that is."""
    if origin == client:
        return mine
    if origin not in letters:
        raise UpdateError(f"peer {origin} handed nothing over, and something is due")
    return letters[origin].take(values, changes)


def _trained(header: dict[str, Any], task: Task) -> Places:
    """Where a peer says it trained, if its task was that; raises TesseraError."""
    update, _ = update_of(header, {"delta": {}, "extra": {}, "memory": {}})
    check_claims(task, update)
    reported = reported_by(task)
    views = update.submodel.views
    return places_of({name: view for name, view in views.items() if name in reported})


def _letter(origin: int, groups: Mapping[str, Params], dtype: torch.dtype) -> _Letter:
    parts = []
    for group, most in ((_VALUES, torch.finfo(dtype).max), (_CHANGE, MAX_ENTRY)):
        tensors = groups.get(group, {})
        if set(tensors) != {_PART} or tensors[_PART].dtype != dtype or tensors[_PART].dim() != 1:
            raise UpdateError(f"peer {origin}'s letter holds no {group} of type {dtype}")
        if tensors[_PART].numel():
            check_entries({group: tensors[_PART]}, most)
        parts.append(Taken(flat=tensors[_PART]))
    return _Letter(origin=origin, values=parts[0], change=parts[1])
