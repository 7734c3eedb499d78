"""Who came to a run, and what became of it, for who watches the run: one JSON object a line."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

GUESTS = "guests.jsonl"
"""Beside the seats."""


@dataclass(kw_only=True)
class Guests:
    """A book that names nobody twice in a row with the same words."""

    path: Path
    _told: dict[str, str] = field(default_factory=dict)

    def tell(self, name: str, text: str) -> None:
        """Write what a guest was told, unless that was the last that it was told."""
        if self._told.get(name) != text:
            self._told[name] = text
            with self.path.open("a", encoding="utf-8") as book:
                book.write(json.dumps({"device": name, "text": text}) + "\n")
