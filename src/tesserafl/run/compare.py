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

from tesserafl.core.errors import CheckpointError
from tesserafl.run.files import write_atomic
from tesserafl.run.plots import Line, Panel, Quantity, figure_html, human, panels_figure
from tesserafl.run.report import (
    COSTS,
    Cost,
    Record,
    data_label,
    page_html,
    partition_label,
    ratio_label,
    read_record,
    table_html,
)

if TYPE_CHECKING:
    from rich.table import Table

_COLUMNS: dict[str, tuple[str, Quantity]] = {
    "accuracy": ("accuracy at the end", "percent"),
    "accuracy_untrained_zeroed": ("untrained zeroed", "percent"),
    **{f"accuracy_at_{cost}": (f"accuracy at {{{cost}}}", "percent") for cost in COSTS},
    "largest_client": ("largest client / widest model", "percent"),
    "coverage": ("coverage", "percent"),
    "bytes": ("bytes down and up", "bytes"),
    "flops": ("FLOPs", "flops"),
    "seconds": ("time", "seconds"),
}
_LABELLED = {"seed", "method.ratio", "data.source", "data.path", "data.name", "data.subset"} | {
    f"data.{name}" for name in ("partition", "alpha", "classes_per_client", "partition_column")
}
"""Settings that a label column already shows."""


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
        table = Table(caption=self._note())
        for number, header in enumerate(headers):
            words = number < len(self.rows[0].label)
            table.add_column(header, justify="left" if words else "right", overflow="fold")
        for row in rows:
            table.add_row(*map(Text, row))
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
        panels = [
            Panel(
                title="Test accuracy" if cost == "rounds" else "",
                across=cost,
                up="percent",
                lines=[row.curves[cost] for row in self.rows],
            )
            for cost in COSTS
        ]
        title = f"Comparison of {sum(len(row.runs) for row in self.rows)} runs"
        folders = "\n".join(escape(run) for row in self.rows for run in row.runs)
        drawn = figure_html(panels_figure(panels), "accuracy", "Bands: +- one standard deviation.")
        parts = [
            f"<h1>{title}</h1><p>{escape(self._note())}</p>",
            drawn if self.equal_cost else "<p>No run has been evaluated yet.</p>",
            table_html(headers, rows, len(self.rows[0].label)),
            f"<details><summary>The runs</summary><pre>{folders}</pre></details>",
        ]
        body = "\n".join(parts).replace("+-", "&plusmn;")
        write_atomic(path, page_html(title, body).encode())
        return path

    def _cells(self) -> tuple[list[str], list[list[str]]]:
        shown = [key for key in _COLUMNS if any(row.values.get(key) for row in self.rows)]
        costs = {cost: human(value, cost) for cost, value in self.equal_cost.items()}
        costs["rounds"] = f"{costs.get('rounds')} rounds"
        headers = [_COLUMNS[key][0].format_map(costs) for key in shown]
        rows = [
            [*row.label.values(), str(len(row.runs))]
            + [_text(row.values[key], _COLUMNS[key][1], len(row.runs)) for key in shown]
            for row in self.rows
        ]
        return [*self.rows[0].label, "n", *headers], rows

    def _note(self) -> str:
        alike = ", ".join(f"{key} {value}" for key, value in self.common.items())
        several = any(len(row.runs) > 1 for row in self.rows)
        spread = "Mean +- sample standard deviation over n seeds. " if several else ""
        return f"{spread}Accuracy at equal cost is interpolated between evaluations." + (
            f" All rows: {alike}." if alike else ""
        )


def compare(folders: Sequence[Path]) -> Comparison:
    """Compare runs, or all runs of folders that hold some; seeds of one setting become one row.

    Raises:
        CheckpointError: a folder is not a run and holds none.
    """
    groups: dict[tuple[str, int], list[Record]] = {}
    times: dict[tuple[str, int], int] = {}
    for record in map(read_record, _run_folders(folders)):
        seed = record.config["seed"]
        setting = json.dumps({**record.config, "seed": None}, sort_keys=True)
        # A seed that comes a second time is no second sample: it starts a row of its own.
        copy = times[setting, seed] = times.get((setting, seed), 0) + 1
        groups.setdefault((setting, copy), []).append(record)
    reached: dict[Cost, float] = {}
    for cost in COSTS:
        ends = [r.curve(cost)[0][-1] for group in groups.values() for r in group if r.evaluations]
        if ends:
            reached[cost] = min(ends)
    labels, common = _labels(list(groups.values()))
    everyone = [record.outcome for group in groups.values() for record in group]
    widest = max((o["params_full"] for o in everyone if o["params_full"]), default=None)
    rows = tuple(
        _row(label, group, reached, widest)
        for label, group in zip(labels, groups.values(), strict=True)
    )
    return Comparison(rows=rows, common=common, equal_cost=reached)


def _run_folders(folders: Sequence[Path]) -> list[Path]:
    found: dict[Path, Path] = {}
    for folder in folders:
        inside = [folder] if (folder / "config.json").exists() else sorted(folder.glob("*/"))
        runs = [run for run in inside if (run / "config.json").exists()]
        if not runs:
            raise CheckpointError(
                f"{folder} is not a run folder (config.json and events.jsonl) and holds none; "
                f"give the --out of a run, or the folder of a study"
            )
        found.update({run.resolve(): run for run in runs})
    if not found:
        raise CheckpointError("no run was given; name at least one run folder")
    return list(found.values())


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
    for key in ("coverage", "flops", "seconds"):
        values[key] = _spread(end[key] for end in begun)
    name = ", ".join(f"ratio {v}" if k == "ratio" else v for k, v in label.items() if v)
    curves = {cost: _mean_curve(name, group, cost) for cost in COSTS}
    runs = tuple(str(record.folder) for record in group)
    return Row(label=label, runs=runs, values=values, curves=curves)


def _labels(groups: list[list[Record]]) -> tuple[list[dict[str, str]], dict[str, str]]:
    """What tells the rows apart, and what they share."""
    configs = [group[0].config for group in groups]
    flat = [_flat(config) for config in configs]
    labels = []
    for group, config, own in zip(groups, configs, flat, strict=True):
        unfinished = sum(record.finish is None for record in group)
        labels.append(
            {
                "method": str(config["method"]["name"]),
                "ratio": ratio_label(config["method"]),
                "data": data_label(config["data"]),
                "partition": partition_label(config["data"]),
                "model": str(config["model"]["name"]),
                "settings": ", ".join(f"{k}={own[k]}" for k in own if _differs(k, own, flat)),
                "state": f"{unfinished} of {len(group)} unfinished" if unfinished else "",
            }
        )
    if len({tuple(label.values()) for label in labels}) < len(labels):
        for label, group in zip(labels, groups, strict=True):
            label["run"] = ", ".join(record.folder.name for record in group)
    same = {key: value for key, value in labels[0].items() if all(o[key] == value for o in labels)}
    if len(same) == len(labels[0]):
        del same["method"]
    for label in labels:
        for key in same:
            del label[key]
    return labels, {key: value for key, value in same.items() if value}


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value if isinstance(value, str) else json.dumps(value)
    return flat


def _differs(key: str, own: Mapping[str, str], everyone: Sequence[Mapping[str, str]]) -> bool:
    section = key.split(".")[0]
    # A method's settings are held against those of the same method only.
    name = f"{section}.name" if section in ("method", "model") else "seed"
    peers = [o for o in everyone if name == "seed" or o[name] == own[name]]
    return key not in _LABELLED and any(other.get(key) != own[key] for other in peers)


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


def _text(value: Spread | None, quantity: Quantity, num_runs: int) -> str:
    if value is None:
        return "-"
    text = human(value.mean, quantity)
    if value.std and quantity == "percent":
        text = f"{100 * value.mean:.1f} +- {100 * value.std:.1f} %"
    return text if value.n == num_runs else f"{text} (n={value.n})"
