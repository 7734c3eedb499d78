"""Letters among peers, on the disk of the server that carries them.

mail/000003/parcels/   what peers wrote in a round, as it came: nobody opens it here
mail/000003/turns.json who wrote what to whom, and who did not; the commit of the round's letters
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from tesserafl.core.errors import CheckpointError
from tesserafl.engines.parcels import ParcelNote, letter_of
from tesserafl.engines.seam import Failed
from tesserafl.engines.turns import Passed, Turned
from tesserafl.run.files import read_json, write_atomic


@dataclass(frozen=True, kw_only=True)
class Turns:
    """What came of a round's turns."""

    found: Mapping[int, Turned]
    """Peer -> what it wrote."""
    failed: Sequence[Failed]

    @property
    def answered(self) -> list[int]:
        """Whose training counts."""
        return sorted(peer for peer, turned in self.found.items() if turned.row is not None)

    def letters_to(self, receiver: int) -> list[Passed]:
        """What others wrote to a peer."""
        return [
            Passed(origin=origin, letter=each.letter)
            for origin, turned in sorted(self.found.items())
            for each in turned.letters
            if receiver in each.receivers and origin != receiver
        ]


_TURNS = TypeAdapter(Turns)


@dataclass(frozen=True, kw_only=True)
class Mailbag:
    """The letters of the rounds that not all peers have ended."""

    folder: Path

    def kept(self, round: int, name: str) -> bool:
        """Whether a parcel of a round is here."""
        return self._parcel(round, name).exists()

    def keep(self, round: int, note: ParcelNote, data: bytes) -> None:
        """Keep a parcel that was checked."""
        path = self._parcel(round, note.sha256)
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_atomic(path, data)

    def read(self, round: int, name: str) -> bytes:
        """A parcel of a round."""
        return self._parcel(round, name).read_bytes()

    def close(self, round: int, turns: Turns) -> None:
        """All letters of a round are here."""
        self._round(round).mkdir(parents=True, exist_ok=True, mode=0o700)
        write_atomic(self._round(round) / "turns.json", _TURNS.dump_json(turns))

    def turns(self, round: int) -> Turns | None:
        """What came of a round; None: it was not closed, or all peers have ended it."""
        path = self._round(round) / "turns.json"
        if not path.exists():
            return None
        try:
            return _TURNS.validate_python(read_json(path), strict=False)
        except ValidationError as error:
            raise CheckpointError(f"{path} is damaged: {error}") from error

    def drop(self, before: int) -> None:
        """Let the rounds go that all peers have ended."""
        for path in self.folder.glob("*"):
            if path.name.isdigit() and int(path.name) < before:
                shutil.rmtree(path)

    def _round(self, round: int) -> Path:
        return self.folder / f"{round:06d}"

    def _parcel(self, round: int, name: str) -> Path:
        return self._round(round) / "parcels" / name


def parcels_of(letters: Sequence[Passed]) -> list[ParcelNote]:
    """The parcels of letters, each once."""
    notes = {n.sha256: n for passed in letters for n in letter_of(passed.letter).parcels}
    return list(notes.values())
