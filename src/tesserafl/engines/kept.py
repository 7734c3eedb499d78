"""What a process keeps between rounds because frozen parameters would give the same again.

Nothing here decides a result: an entry that has gone is computed again, to the same bits. That is
why what is kept, and what is left out because it is too large, never depends on what else is there.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from tesserafl.core.params import Params, num_bytes, sha256
from tesserafl.models.split import Cut, Tower


@dataclass(kw_only=True)
class Kept:
    """Tensors under keys, up to a number of bytes; those not used for longest go first."""

    most_bytes: int
    """Of all entries together; 0: nothing is kept."""
    towers: dict[object, tuple[Tower, ...]] = field(default_factory=dict)
    """What was found of modules, by module and cuts."""
    most_asked: int = 1 << 16
    """Keys that are remembered as asked for once, without an entry."""
    num_bytes: int = field(default=0, init=False)
    """Of all entries."""
    _entries: OrderedDict[Hashable, Params] = field(default_factory=OrderedDict, init=False)
    _asked: OrderedDict[Hashable, None] = field(default_factory=OrderedDict, init=False)

    def get(self, key: Hashable) -> Params | None:
        """The entry; None: it is not there, or no longer."""
        if key in self._entries:
            self._entries.move_to_end(key)
        return self._entries.get(key)

    def again(self, key: Hashable) -> bool:
        """Whether this was asked of the key before.

        What is another in every round would fill the room, and nobody would ever ask for it.
        """
        before = key in self._asked
        self._asked[key] = None
        self._asked.move_to_end(key)
        if len(self._asked) > self.most_asked:
            self._asked.popitem(last=False)
        return before

    def put(self, key: Hashable, entry: Params) -> None:
        """Keep an entry, unless it alone is too large; older ones make room."""
        size = num_bytes(entry)
        if size > self.most_bytes:
            return
        self.num_bytes += size - num_bytes(self._entries.pop(key, {}))
        self._entries[key] = entry
        while self.num_bytes > self.most_bytes:
            _, gone = self._entries.popitem(last=False)
            self.num_bytes -= num_bytes(gone)


def nothing_kept() -> Kept:
    """Where nothing is kept."""
    return Kept(most_bytes=0)


@dataclass(frozen=True, kw_only=True)
class Shelf:
    """What one client finds of its own in `Kept`."""

    kept: Kept
    client: int | None
    """None: the server."""
    forward: Hashable
    """Equal for equal forward functions only: the sub-model's shape and the width scaling."""
    prefixes: tuple[str, ...] = ()
    """Of an adapted model's blocks; empty: no block is ever left out."""

    def key(self, what: str, *more: Hashable, of_client: bool = True) -> Hashable:
        """The key of an entry, of this client or of any."""
        return (self.client if of_client else None, self.forward, what, *more)

    def cut_key(self, cuts: Iterable[Cut]) -> Hashable:
        """The key of what was found of a module."""
        return (self.forward, tuple(cuts))


def digests_of(params: Params) -> dict[str, str]:
    """A digest of each tensor, so that those of any of them are at hand without another look."""
    return {name: sha256({name: tensor}) for name, tensor in params.items()}


def joined(digests: Mapping[str, str], names: Iterable[str]) -> str:
    """One digest of the tensors of these names."""
    lines = "".join(f"{name}|{digests[name]}|" for name in sorted(names))
    return hashlib.sha256(lines.encode()).hexdigest()


def rows_of(table: Tensor, rows: Tensor) -> Tensor:
    """The rows of a table that lies where it was computed."""
    return table[rows.to(table.device)]
