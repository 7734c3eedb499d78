"""Runs side by side: at their end, and where all of them had spent the same."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

import numpy as np

from tesserafl.run.files import write_atomic
from tesserafl.run.labels import labels_of, name_of
from tesserafl.run.page import figure_html, page_html, table_html
from tesserafl.run.plots import Line, Panel, Quantity, human, panels_figure, unit_of
from tesserafl.run.record import COSTS, Cost, Record, read_record, run_folders

if TYPE_CHECKING:
    from rich.table import Table

_COLUMNS: dict[str, tuple[str, Quantity]] = {
    "accuracy": ("accuracy at the end", "percent"),
    "accuracy_untrained_zeroed": ("accuracy zeroed", "percent"),
    **{f"accuracy_at_{cost}": (f"accuracy at {{{cost}}}", "percent") for cost in COSTS},
    "largest_client": ("held", "percent"),
    "coverage": ("covered", "percent"),
    "bytes": ("sent", "bytes"),
    "flops": ("work", "flops"),
    "seconds": ("time", "seconds"),
    "virtual_seconds": ("virtual time", "virtual_seconds"),
    "joules": ("energy", "joules"),
}
_CAPTION = "Bands: +- one standard deviation. Dotted: the equal cost of the table's columns."


@dataclass(frozen=True, kw_only=True)
class Spread:
    """A number over the runs of a row that have it."""

    mean: float
    std: float | None
    """sample standard deviation; None for one run"""
    n: int


@dataclass(frozen=True, kw_only=True)
class Row:
    """Runs that are equal but for the seed."""

    label: Mapping[str, str]
    """what tells this row from the others: method, ratio, data, partition, ..."""
    runs: tuple[str, ...]
    """their folders"""
    values: Mapping[str, Spread | None]
    """None where no run has the number"""
    curves: Mapping[Cost, Line]
    """mean accuracy against each cost, where all runs of the row have it"""

    @property
    def name(self) -> str:
        """The label in one line."""
        return name_of(self.label)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One row per setting, and the costs at which they are compared."""

    rows: tuple[Row, ...]
    common: Mapping[str, str]
    """labels that all rows share"""
    equal_cost: Mapping[Cost, float]
    """the largest cost that every evaluated run reached; empty if none was evaluated"""

    def as_table(self) -> Table:
        """For a terminal."""
        from rich.table import Table
        from rich.text import Text

        headers, rows = self._cells()
        words = len(self.rows[0].label)
        broken = [[cell.replace(" +- ", "\n+- ") for cell in cells[words:]] for cells in rows]
        table = Table(box=None, padding=(0, 1, 0, 0), title="accuracy and shares in %")
        table.caption = self._note()
        table.add_column("", min_width=12, overflow="fold")
        for header, column in zip(headers[words:], zip(*broken, strict=True), strict=True):
            short = header.removeprefix("accuracy ").removesuffix(", %")
            # Numbers are never cut; a long word of a header may be.
            parts = "\n".join(column).split("\n") + [word[:6] for word in short.split()]
            table.add_column(short, justify="right", width=max(map(len, parts)), overflow="fold")
        for row, texts in zip(self.rows, broken, strict=True):
            table.add_row(*map(Text, [row.name, *texts]))
        return table

    def as_markdown(self) -> str:
        """A table for a README or a paper's notes."""
        headers, rows = self._cells()
        words = len(self.rows[0].label)
        rule = ["---"] * words + ["---:"] * (len(headers) - words)
        lines = [[cell.replace("|", "\\|") for cell in row] for row in [headers, rule, *rows]]
        table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        return f"{table}\n\n{self._note()}\n"

    def as_json(self) -> dict[str, Any]:
        """Plain values; accuracies and shares from 0 to 1."""
        rows = [
            {
                "label": dict(row.label),
                "runs": list(row.runs),
                "n": len(row.runs),
                **{key: value and asdict(value) for key, value in row.values.items()},
            }
            for row in self.rows
        ]
        return {"common": dict(self.common), "equal_cost": dict(self.equal_cost), "rows": rows}

    def write_page(self, path: Path) -> Path:
        """A page of its own with the table and accuracy against rounds, bytes and FLOPs."""
        headers, rows = self._cells()
        words = len(self.rows[0].label)
        named = [[row.name, *cells[words:]] for row, cells in zip(self.rows, rows, strict=True)]
        panels = [
            Panel(
                title="Test accuracy" if cost == "rounds" else "",
                across=cost,
                up="percent",
                lines=[row.curves[cost] for row in self.rows],
                mark=self.equal_cost.get(cost),
            )
            for cost in self.equal_cost
        ]
        title = f"Comparison of {sum(len(row.runs) for row in self.rows)} runs"
        folders = "\n".join(escape(run) for row in self.rows for run in row.runs)
        drawn = figure_html(panels_figure(panels), "accuracy", _CAPTION) if panels else ""
        parts = [
            f"<h1>{title}</h1><p>{escape(self._note())}</p>",
            drawn or "<p>No run has been evaluated yet.</p>",
            table_html(["", *headers[words:]], named, 1),
            f"<details><summary>The runs</summary><pre>{folders}</pre></details>",
        ]
        body = "\n".join(parts).replace("+-", "&plusmn;")
        write_atomic(path, page_html(title, body).encode())
        return path

    def _cells(self) -> tuple[list[str], list[list[str]]]:
        costs = {str(cost): human(value, cost) for cost, value in self.equal_cost.items()}
        headers = [*self.rows[0].label, "n"]
        cells = [[*row.label.values(), str(len(row.runs))] for row in self.rows]
        for key, (header, quantity) in _COLUMNS.items():
            column = [row.values.get(key) for row in self.rows]
            largest = max((value.mean for value in column if value), default=None)
            if largest is None:
                continue
            divisor, unit = (0.01, "%") if quantity == "percent" else unit_of(largest, quantity)
            headers.append(f"{header.format_map(costs)}, {unit}")
            for line, value, row in zip(cells, column, self.rows, strict=True):
                line.append(_text(value, divisor, len(row.runs), deviates=quantity == "percent"))
        return headers, cells

    def _note(self) -> str:
        alike = "; ".join(f"{key} {value}" for key, value in self.common.items())
        return (
            "Mean +- sample standard deviation over n seeds. At equal cost: interpolated between "
            "evaluations. Zeroed: entries that nobody trained are 0. Held: the largest client's "
            "share of the widest model. Covered: share ever trained. Sent: down and up."
        ) + (f" All rows: {alike}." if alike else "")


def compare(folders: Sequence[Path]) -> Comparison:
    """Compare runs, or all runs of folders that hold some; seeds of one setting become one row.

    Raises:
        CheckpointError: a folder is not a run and holds none.
    """
    groups: dict[tuple[str, int], list[Record]] = {}
    times: dict[tuple[str, int], int] = {}
    for record in map(read_record, run_folders(folders)):
        seed = record.config["seed"]
        setting = json.dumps({**record.config, "seed": None}, sort_keys=True)
        # A seed that comes a second time is no second sample: it starts a row of its own.
        copy = times[setting, seed] = times.get((setting, seed), 0) + 1
        groups.setdefault((setting, copy), []).append(record)
    reached: dict[Cost, float] = {}
    shared = [c for c in COSTS if all(c in r.costs for group in groups.values() for r in group)]
    for cost in shared:
        ends = [r.curve(cost)[0][-1] for group in groups.values() for r in group if r.evaluations]
        if ends:
            reached[cost] = min(ends)
    labels, common = labels_of(list(groups.values()))
    full = [record.outcome["params_full"] for group in groups.values() for record in group]
    widest = max(filter(None, full), default=None)
    rows = tuple(
        _row(label, group, reached, widest)
        for label, group in zip(labels, groups.values(), strict=True)
    )
    return Comparison(rows=rows, common=common, equal_cost=reached)


def _row(
    label: dict[str, str], group: list[Record], reached: Mapping[Cost, float], widest: int | None
) -> Row:
    ends = [record.outcome for record in group]
    values = {key: _spread(end[key] for end in ends) for key in list(_COLUMNS)[:2]}
    for cost, budget in reached.items():
        values[f"accuracy_at_{cost}"] = _spread(_at(record, cost, budget) for record in group)
    held = [end["params_largest_client"] for end in ends]
    values["largest_client"] = _spread(h / widest if h and widest else None for h in held)
    begun = [end for end in ends if end["rounds"]]
    values["bytes"] = _spread(end["bytes_down"] + end["bytes_up"] for end in begun)
    for key in ("coverage", "flops", "seconds", "virtual_seconds", "joules"):
        values[key] = _spread(end.get(key) for end in begun)
    curves = {cost: _mean_curve(name_of(label), group, cost) for cost in reached}
    runs = (str(record.folder) for record in group)
    return Row(label=label, runs=tuple(runs), values=values, curves=curves)


def _spread(values: Iterable[float | None]) -> Spread | None:
    known = [value for value in values if value is not None]
    if not known:
        return None
    return Spread(mean=fmean(known), std=stdev(known) if len(known) > 1 else None, n=len(known))


def _at(record: Record, cost: Cost, budget: float) -> float | None:
    spent, accuracy = record.curve(cost)
    if not spent or budget < spent[0]:
        return None
    return float(np.interp(budget, spent, accuracy))


def _mean_curve(label: str, group: Sequence[Record], cost: Cost) -> Line:
    curves = [record.curve(cost) for record in group if record.evaluations]
    if not curves:
        return Line(label=label, x=[], y=[])
    low, high = max(x[0] for x, _ in curves), min(x[-1] for x, _ in curves)
    grid = sorted({value for x, _ in curves for value in x if low <= value <= high})
    every = np.array([np.interp(grid, x, y) for x, y in curves])  # [runs, points]
    spread = every.std(axis=0, ddof=1).tolist() if len(curves) > 1 else None
    return Line(label=label, x=grid, y=every.mean(axis=0).tolist(), spread=spread)


def _text(value: Spread | None, divisor: float, num_runs: int, *, deviates: bool) -> str:
    if value is None:
        return "-"
    mean = value.mean / divisor
    text = f"{mean:.1f}" if deviates or mean >= 10 else f"{mean:.2f}"
    if value.std and deviates:
        text += f" +- {value.std / divisor:.1f}"
    return text if value.n == num_runs else f"{text} (n={value.n})"
