"""A model among peers of whom nobody holds the whole: who keeps what.

A peer keeps what it trains next, and what nobody trains next and fell to it; every entry has a
keeper. That is public, as it follows from the schedule alone: everybody works it out, a strip of
the model at a time, from the schedule and one number an entry, deflated. What peers hand over from
a round to the next is in passages.py.
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from tesserafl.core.errors import CheckpointError
from tesserafl.core.fit import Training
from tesserafl.core.messages import Client, Task
from tesserafl.core.method import Method, State, Weighting, weights_of
from tesserafl.core.model import Model
from tesserafl.core.params import Params, num_entries
from tesserafl.engines.passages import Passage, Taken
from tesserafl.engines.strips import Places, Strip, places_of, strips_of

_TABLE = 1 << 19
"""Entries of a table of peers by entries of a strip."""


class Averaging(Method, Protocol):
    """What the method must be for this: entry by entry, with a weight."""

    @property
    def weighting(self) -> Weighting:
        """What a client's word weighs."""
        ...


@dataclass(frozen=True, kw_only=True)
class Shares:
    """Who keeps what in a round."""

    model: Model
    method: Averaging
    peers: int
    """How many there are."""
    cohorts: Callable[[int], Sequence[Client]]
    """Who takes part in a round: known to everybody beforehand."""
    state: State
    """The state without values: its parameters lie on `meta`."""
    keepers: tuple[bytes, ...]
    """Of each strip: who keeps each of the entries that nobody trains, deflated; see `_deflated`"""

    @cached_property
    def strips(self) -> tuple[Strip, ...]:
        """The model in strips."""
        shapes = {name: tuple(tensor.shape) for name, tensor in self.state.params.items()}
        return strips_of(shapes, max(1, _TABLE // self.peers))

    def keeps(self, number: int) -> Tensor:
        """Who keeps which entries of a strip: bool [peers, size]."""
        found = self._trained(self.strips[number])
        lonely, keepers = ~_anybody(found), self._keepers(number)
        for peer, mine in enumerate(found):
            mine |= lonely & (keepers == peer)
        return found

    def masks(self, peer: int) -> Iterator[Tensor]:
        """Which entries of each strip a peer keeps: bool [size]."""
        for number in range(len(self.strips)):
            yield self.keeps(number)[peer]

    def num_kept(self, peer: int) -> int:
        """How many entries a peer keeps."""
        return sum(int(mask.sum()) for mask in self.masks(peer))

    def tasks(self, cohort: Sequence[Client], training: Training) -> Iterator[Task]:
        """What each of the cohort trains, without values."""
        return self.method.configure(self.model, self.state, cohort, training)

    def filled(self, task: Task, store: Tensor) -> Task:
        """A peer's task, out of its own store."""
        views = task.submodel.views
        places, kept = places_of(views), Taken(flat=store)
        params = {name: store.new_empty(view.shape) for name, view in views.items()}
        for strip, mask in zip(self.strips, self.masks(task.client.id), strict=True):
            values = store.new_zeros(strip.size)
            values[mask] = kept.take(int(mask.sum()))
            strip.gather(places, values, params)
        return replace(task, params=params)

    @cached_property
    def following(self) -> Shares:
        """The shares of the next round."""
        cohort = self.cohorts(self.state.round)
        state = self.method.aggregate(self.model, self.state, cohort, iter(()))
        after, keepers = replace(self, state=state), list(self.keepers)
        for number, strip in enumerate(self.strips):
            trained = self._trained(strip)
            # What nobody trained before either stays where it is.
            lonely = _anybody(trained) & ~_anybody(after._trained(strip))
            if len(places := lonely.nonzero().flatten()):
                found = self._keepers(number)
                found[places] = _dealt(trained[:, places], strip.first + places, self._kind)
                keepers[number] = _deflated(found)
        return replace(after, keepers=tuple(keepers))

    def passages(self) -> Iterator[Passage]:
        """The strips on their way to the next round."""
        weights = weights_of(self.cohorts(self.state.round), self.method.weighting)
        for number, strip in enumerate(self.strips):
            had, will = self.keeps(number), self.following.keeps(number)
            yield Passage(strip=strip, had=had, will=will, weights=weights)

    def written(self) -> Params:
        """Who keeps what nobody trains, for a checkpoint."""
        data = bytearray(b"".join(self.keepers))
        sizes = torch.tensor([len(part) for part in self.keepers])
        return {"keepers": torch.frombuffer(data, dtype=torch.uint8), "sizes": sizes}

    def read(self, state: State, written: Params) -> Shares:
        """These shares in another round, as they were written.

        Raises:
            CheckpointError: they are of another model or of other peers.
        """
        sizes = written["sizes"].tolist()
        data = written["keepers"].numpy().tobytes()
        ends = [sum(sizes[:number]) for number in range(len(sizes) + 1)]
        keepers = tuple(data[low:high] for low, high in itertools.pairwise(ends))
        after = replace(self, state=replace(state, params=self.state.params), keepers=keepers)
        if len(sizes) != len(self.strips) or any(
            len(after._keepers(number)) != strip.size for number, strip in enumerate(self.strips)
        ):
            raise CheckpointError(
                f"the checkpoint says who keeps what of another model than this one, or among "
                f"others than these {self.peers} peers; put config.json back, or run it into a "
                f"new folder"
            )
        return after

    @cached_property
    def _trains(self) -> dict[int, Places]:
        """Peer -> what it trains in the state's round."""
        if self.state.round >= self.state.rounds:
            return {}
        # What a client trains does not depend on how it trains.
        tasks = self.tasks(self.cohorts(self.state.round), Training())
        return {task.client.id: places_of(task.submodel.views) for task in tasks}

    def _trained(self, strip: Strip) -> Tensor:
        """Who trains which entries of a strip in the state's round: bool [peers, size]."""
        found = torch.zeros(self.peers, strip.size, dtype=torch.bool)
        for peer, places in self._trains.items():
            found[peer] = strip.mask(places)
        return found

    @property
    def _kind(self) -> torch.dtype:
        """Of a peer's number."""
        return torch.uint8 if self.peers <= 1 << 8 else torch.int32

    def _keepers(self, number: int) -> Tensor:
        """Who keeps which entry of a strip, of those that nobody trains: [size]."""
        return torch.frombuffer(bytearray(zlib.decompress(self.keepers[number])), dtype=self._kind)


def first_shares(
    model: Model,
    method: Averaging,
    peers: int,
    cohorts: Callable[[int], Sequence[Client]],
    state: State,
) -> Shares:
    """Who keeps what first; what nobody trains is dealt in equal shares. `state` needs no values"""
    count = num_entries(state.params)
    shares = Shares(
        model=model,
        method=method,
        peers=peers,
        cohorts=cohorts,
        state=replace(state, params={n: t.to("meta") for n, t in state.params.items()}),
        keepers=(),
    )
    numbers = (torch.arange(strip.first, strip.first + strip.size) for strip in shares.strips)
    keepers = [_deflated((each * peers // count).to(shares._kind)) for each in numbers]
    return replace(shares, keepers=tuple(keepers))


def _anybody(masks: Tensor) -> Tensor:
    """Where one of [peers, size] is true: bool [size]."""
    found = masks[0].clone()
    for mask in masks[1:]:
        found |= mask
    return found


def _dealt(had: Tensor, numbers: Tensor, kind: torch.dtype) -> Tensor:
    """Who of those that had an entry keeps it alone; `had` is [peers, entries].

    Evenly, by the entries' numbers: one who always took them would fill up.
    """
    left, keepers = numbers % had.sum(dim=0), torch.zeros(len(numbers), dtype=kind)
    for peer, mine in enumerate(had):
        keepers[mine & (left == 0)] = peer
        left -= mine.int()
    return keepers


def _deflated(keepers: Tensor) -> bytes:
    """Windows and turns repeat, so that little is left of a number an entry."""
    return zlib.compress(keepers.numpy().tobytes(), 1)
