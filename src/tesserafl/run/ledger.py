"""What a run's rounds add up to, and the events that tell of them."""

from __future__ import annotations

from dataclasses import dataclass, field

from tesserafl.core.coverage import Coverage
from tesserafl.run.events import Event
from tesserafl.run.rounds import Notes


@dataclass(kw_only=True)
class Ledger:
    """The totals of a run so far."""

    totals: dict[str, float] = field(
        default_factory=lambda: {
            "bytes_down": 0,
            "bytes_up": 0,
            "flops": 0.0,
            "seconds": 0.0,
            "params_largest_client": 0,
            "params_trained": 0,
        }
    )

    def add(self, notes: Notes) -> None:
        """Add a round."""
        for key, amount in notes.amounts.items():
            self.totals[key] = self.totals.get(key, 0.0) + amount
        for key, row_key in {
            "params_largest_client": "entries",
            "params_trained": "trained_entries",
        }.items():
            self.totals[key] = max([self.totals[key], *(row[row_key] for row in notes.clients)])

    def event(self, round: int, notes: Notes, coverage: Coverage) -> Event:
        """The event of a round that was added."""
        return {
            "kind": "round",
            "round": round,
            "asked": len(notes.clients) + len(notes.failures),
            "answered": len(notes.clients),
            "loss": notes.loss,
            "coverage": coverage.share,
            **notes.exchange,
            **({} if notes.structure is None else {"structure": notes.structure}),
            **self.totals,
            "clients": sorted(notes.clients, key=lambda row: int(row["client"])),
            "failures": sorted(notes.failures, key=lambda row: int(row["client"])),
        }
