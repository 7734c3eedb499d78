"""What an edge keeps on its disk of devices that are late: what they were asked, to ask it again.

A device answers what it was asked before from its own disk, so nothing is trained twice.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tesserafl.core.errors import MessageError
from tesserafl.core.wire import pack, task_of, task_parts, unpack
from tesserafl.run.enough import Sent
from tesserafl.run.files import write_atomic


@dataclass(frozen=True, kw_only=True)
class Overtime:
    """A folder with one file for each device that is late."""

    folder: Path

    def write(self, late: Mapping[int, Sent]) -> None:
        """Keep what these clients were asked, and nothing of others."""
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        wanted = {self._path(client, sent): sent for client, sent in late.items()}
        for path in set(self.folder.iterdir()) - wanted.keys():
            path.unlink()
        for path, sent in wanted.items():
            if not path.exists():
                header, groups = task_parts(sent.task, {})
                write_atomic(path, pack({"remembers": sent.remembers, "task": header}, groups))

    def read(self) -> dict[int, Sent]:
        """What was kept, to be sent again; what is damaged is lost."""
        found: dict[int, Sent] = {}
        for path in sorted(self.folder.glob("*.safetensors")):
            try:
                header, groups = unpack(path.read_bytes())
                task, _ = task_of(header["task"], groups)
                found[task.client.id] = Sent(
                    task=task, remembers=header["remembers"], under_way=False
                )
            except (MessageError, KeyError):
                path.unlink()
        return found

    def _path(self, client: int, sent: Sent) -> Path:
        return self.folder / f"{client}-{sent.task.round}.safetensors"
