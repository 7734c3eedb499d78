"""What a device keeps on its disk of one run: parcels, answers and what its client remembers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from safetensors import SafetensorError, safe_open
from torch import Tensor

from tesserafl.core.errors import CheckpointError, MessageError
from tesserafl.core.messages import Memory
from tesserafl.core.wire import pack, unpack
from tesserafl.engines.parcels import Outgoing, ParcelNote, in_messages
from tesserafl.run.files import read_json, write_atomic, write_json


@dataclass(frozen=True, kw_only=True)
class Spool:
    """A folder of one run and one client; every file is whole or not there."""

    folder: Path

    def __post_init__(self) -> None:
        for name in ("parcels", "answer", "memory"):
            (self.folder / name).mkdir(parents=True, exist_ok=True, mode=0o700)

    # Parcels of the task at hand.

    def missing(self, parcels: Iterable[str]) -> list[str]:
        """Those of these parcels that are not here."""
        return [name for name in parcels if not self._parcel(name).exists()]

    def drop_damaged(self, parcels: Iterable[str]) -> None:
        """Let those of these parcels go that are not what their names say: they are sent again."""
        for name in parcels:
            path = self._parcel(name)
            if path.exists() and hashlib.sha256(path.read_bytes()).hexdigest() != name:
                path.unlink()

    def store(self, parcels: Mapping[str, bytes]) -> None:
        """Keep parcels; raises MessageError if one is not what its name says."""
        for name, data in parcels.items():
            if hashlib.sha256(data).hexdigest() != name:
                raise MessageError(f"a parcel of {len(data)} bytes is not {name}; send it again")
            if not self._parcel(name).exists():
                _put(self._parcel(name), data)

    def fetch(self, name: str) -> bytes:
        """A parcel that is here."""
        return self._parcel(name).read_bytes()

    def piece(self, name: str, key: str) -> Tensor:
        """A tensor in a parcel that is here, not to be written to; its bytes are the file's, read
        when they are looked at. Raises MessageError if it cannot be."""
        try:
            with safe_open(self._parcel(name), framework="pt") as parcel:
                return cast(Tensor, parcel.get_tensor(key))
        except (SafetensorError, OSError, ValueError) as error:
            raise MessageError(f"parcel {name} was damaged while it was in use: {error}") from error

    def keep_only(self, parcels: Collection[str]) -> None:
        """Let the parcels of earlier tasks go."""
        for path in (self.folder / "parcels").iterdir():
            if path.name not in parcels:
                path.unlink()

    # The last answer, until the next: who asks again need not be trained for again.

    def write_answer(self, task: str, outgoing: Outgoing, seconds: float) -> None:
        """Keep the answer to the task of this digest, in the place of the one before."""
        letter = outgoing.letter.model_dump()
        self.write_letters(task, [outgoing], {"seconds": seconds, "letter": letter})

    def write_letters(
        self, task: str, outgoing: Iterable[Outgoing], values: Mapping[str, Any]
    ) -> None:
        """The same, of an answer in several letters: their parcels, and plain values."""
        folder, parcels = self.folder / "answer", {}
        for path in folder.iterdir():
            path.unlink()
        for each in outgoing:
            for number, note in enumerate(each.letter.parcels):
                _put(folder / note.sha256, each.parcel(number))
                parcels[note.sha256] = note.bytes
        # Last: without it there is no answer.
        write_json(folder / "letter.json", {**values, "task": task, "parcels": parcels})

    def answer(self, task: str | None = None) -> dict[str, Any] | None:
        """The values of the answer that is kept; None: it is of another task, or none that is
        whole."""
        path = self.folder / "answer" / "letter.json"
        if not path.exists():
            return None
        try:
            value: dict[str, Any] = read_json(path)
            whole = all(self._answered(*note) for note in value["parcels"].items())
        except (CheckpointError, KeyError, TypeError, AttributeError):
            return None  # damaged: it can be trained for again
        return value if whole and task in (None, value["task"]) else None

    def answered(self, name: str) -> bytes | None:
        """A parcel of the answer."""
        path = self.folder / "answer" / name
        return path.read_bytes() if path.exists() else None

    def answered_in(
        self, notes: Sequence[ParcelNote], most_bytes: int, number: int = 0
    ) -> dict[str, bytes]:
        """These parcels of the answer, those that go with its message of this number."""
        groups = in_messages(notes, most_bytes)
        names = [notes[n].sha256 for n in groups[number]] if number < len(groups) else []
        return {name: self.answered(name) or b"" for name in names}

    def _answered(self, name: str, num_bytes: int) -> bool:
        path = self.folder / "answer" / name
        return path.exists() and path.stat().st_size == num_bytes

    # What the client remembers, after each round that it answered.

    def remember(
        self,
        begun: int | None,
        round: int,
        memory: Memory,
        every: int = 1,
        keeps: int | None = None,
    ) -> None:
        """Keep a round's memory, and those that the server may ask for yet.

        That is the one that this round began with, since the server may not have heard of it; and
        what the server knew at its last checkpoint, of which there is one `every` so many rounds.
        `keeps` is one that an edge may ask for.
        """
        write_atomic(self._memory(round), pack({"round": round}, {"memory": memory}))
        saved = round // every * every  # the first round after the last checkpoint
        kept = {begun, round, keeps}
        if begun is not None and begun >= saved:
            # Only one is left of before: the round that was begun with it removed the others.
            kept.add(max((each for each in self._rounds() if each < saved), default=None))
        for each in self._rounds() - kept:
            self._memory(each).unlink()

    def _rounds(self) -> set[int]:
        paths = (self.folder / "memory").glob("*.safetensors")
        return {int(path.stem) for path in paths if path.stem.isdigit()}

    def recall(self, round: int | None) -> Memory | None:
        """What the client kept after a round (None: nothing yet); None: it is not here."""
        if round is None:
            return {}
        path = self._memory(round)
        try:
            return unpack(path.read_bytes())[1]["memory"] if path.exists() else None
        except (MessageError, KeyError):  # damaged on the disk: as lost as if it were not there
            return None

    def _parcel(self, name: str) -> Path:
        return self.folder / "parcels" / name

    def _memory(self, round: int) -> Path:
        return self.folder / "memory" / f"{round}.safetensors"


def _put(path: Path, data: bytes) -> None:
    """Whole or not there, should this process be killed.

    Should the machine lose its power it may be damaged: its digest tells, and it is sent again. So
    nobody waits for the disk.
    """
    temporary = path.with_suffix(".tmp")
    temporary.write_bytes(data)
    temporary.replace(path)


def digest_of(values: Mapping[str, Any]) -> str:
    """SHA-256 of JSON values."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
