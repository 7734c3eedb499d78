"""A run folder as one page: `report.html`, readable without the run, without a network."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tesserafl.run.events import read_events
from tesserafl.run.files import read_json, write_atomic, write_json
from tesserafl.run.plots import (
    Line,
    Panel,
    Quantity,
    human,
    panels_figure,
    partition_figure,
    svg_of,
    write_png,
)

if TYPE_CHECKING:
    from tesserafl.run.setup import Setup

Cost = Literal["rounds", "bytes", "flops"]
COSTS: tuple[Cost, ...] = ("rounds", "bytes", "flops")
"""What accuracy is held against: rounds, bytes down and up, the clients' FLOPs; cumulative."""

_STYLE = """
:root{color-scheme:light dark;--ink:#1d2125;--soft:#5c6670;--line:#d9dde1;--paper:#fff}
@media screen and (prefers-color-scheme:dark){
:root{--ink:#e4e7ea;--soft:#a3acb5;--line:#3a4148;--paper:#15181b;--first:#3b9ade}}
body{margin:0 auto;max-width:68rem;padding:1.5rem;background:var(--paper);color:var(--ink);
font:15px/1.5 system-ui,sans-serif}
h1{font-size:1.5rem;margin:0}h2{font-size:1.1rem;margin:2rem 0 .5rem}
p,small,figcaption,dt{color:var(--soft)}p{margin:.3rem 0}
dl{display:grid;grid-template-columns:repeat(auto-fit,minmax(11rem,1fr));gap:1rem;margin:1.5rem 0}
dl div{border-top:2px solid var(--line);padding-top:.4rem}dt{font-size:.8rem;line-height:1.3}
dd{margin:0;font-size:1.3rem;font-variant-numeric:tabular-nums}
figure{margin:1rem 0;overflow-x:auto}figcaption{font-size:.85rem}
svg{display:block;width:100%;height:auto;min-width:36rem;max-width:var(--width,none)}
svg *{stroke-linejoin:round;stroke-linecap:butt}
div.wide{overflow-x:auto}table{border-collapse:collapse;font-variant-numeric:tabular-nums}
th,td{padding:.25rem .9rem .25rem 0;text-align:right;border-bottom:1px solid var(--line)}
th{font-weight:600;font-size:.85rem;vertical-align:bottom;line-height:1.3}
table.many{font-size:.87rem}table.many th,table.many td{padding-right:.7rem}
.words{text-align:left}td{white-space:nowrap}td.words{white-space:normal;min-width:8rem}
pre{overflow-x:auto;font-size:.85rem}code{font-size:.9em}
@media print{body{padding:0;max-width:none;font-size:11px}svg{min-width:0}
div.wide{overflow:visible}td{white-space:normal}table.many{font-size:8px}
figure,tr,dl div{break-inside:avoid}h2{break-after:avoid}}
"""


@dataclass(frozen=True, kw_only=True)
class Record:
    """What a run folder tells, finished or not."""

    folder: Path
    config: Mapping[str, Any]
    start: Mapping[str, Any]
    rounds: Sequence[Mapping[str, Any]]
    evaluations: Sequence[Mapping[str, Any]]
    finish: Mapping[str, Any] | None

    @property
    def outcome(self) -> dict[str, Any]:
        """The summary of a finished run; what is known so far of another, None where nothing is."""
        last: Mapping[str, Any] = self.rounds[-1] if self.rounds else {}
        tested: Mapping[str, Any] = self.evaluations[-1] if self.evaluations else {}
        entries = [row["entries"] for event in self.rounds for row in event["clients"]]
        return {
            "accuracy": tested.get("accuracy"),
            "accuracy_untrained_zeroed": None,
            "loss": tested.get("loss"),
            "params_full": self.start.get("params_full"),
            "params_largest_client": max(entries, default=None),
            "rounds": last.get("round", 0),
            **{k: last.get(k) for k in ("coverage", "bytes_down", "bytes_up", "flops", "seconds")},
            **(self.finish or {}),
        }

    def curve(self, cost: Cost) -> tuple[list[float], list[float]]:
        """(cumulative cost, accuracy) of every evaluation."""
        spent = {
            "rounds": [event["round"] for event in self.evaluations],
            "bytes": [event["bytes_down"] + event["bytes_up"] for event in self.evaluations],
            "flops": [event["flops"] for event in self.evaluations],
        }[cost]
        return spent, [event["accuracy"] for event in self.evaluations]


def read_record(folder: Path) -> Record:
    """Read config.json and events.jsonl; CheckpointError if the folder is not a run."""
    config = read_json(folder / "config.json")
    kinds: dict[str, list[dict[str, Any]]] = {}
    for event in read_events(folder / "events.jsonl"):
        kinds.setdefault(event["kind"], []).append(event)
    return Record(
        folder=folder,
        config=config,
        start=kinds.get("start", [{}])[-1],
        rounds=kinds.get("round", []),
        evaluations=kinds.get("evaluate", []),
        finish=kinds["finish"][-1] if "finish" in kinds else None,
    )


def write_report(folder: Path, setup: Setup | None = None) -> Path:
    """Write `report.html` into a run folder; the run may still be going on.

    The partition comes from `partition.json`; with a setup that is written if it is not there.

    Raises:
        CheckpointError: the folder is not a run, or cannot be written.
    """
    record = read_record(folder)
    if setup is not None and not (folder / "partition.json").exists():
        write_partition(folder, setup)
    parts = [_heading(record), _headline(record), _curves(record)]
    if (folder / "partition.json").exists():
        held = read_json(folder / "partition.json")
        drawn = partition_figure(held["counts"], held["class_names"])
        parts.append(f"<h2>Who holds what</h2>{figure_html(drawn, 'partition')}")
    parts += [_client_classes(record), _failures(record), _configuration(record)]
    path = folder / "report.html"
    write_atomic(path, page_html(record.config["method"]["name"], "\n".join(parts)).encode())
    return path


def write_partition(folder: Path, setup: Setup) -> None:
    """Count each client's training examples per class; write partition.json and partition.png."""
    spec = setup.data.spec
    train = [client.train for client in setup.data.clients]
    if spec.task == "causal-lm":
        counts = [[len(examples)] for examples in train]
    else:
        labels = [examples.labels[examples.labels >= 0] for examples in train]
        counts = [own.bincount(minlength=spec.num_classes).tolist() for own in labels]
    names = list(spec.class_names)
    write_json(folder / "partition.json", {"counts": counts, "class_names": names})
    write_png(partition_figure(counts, names), folder / "partition.png")


def page_html(title: str, body: str) -> str:
    """A whole page around `body`: nothing in it is fetched from anywhere."""
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)} - TesseraFL</title><style>{_STYLE}</style></head>\n"
        f"<body>\n{body}\n</body></html>\n"
    )


def figure_html(figure: Any, name: str, caption: str = "") -> str:
    """A figure in a page, no larger than it was drawn; `name` makes its ids unique."""
    width = f"{figure.get_size_inches()[0] * 6:.4g}rem"
    below = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    opening = f'<figure role="img" aria-label="{name}" style="--width:{width}">'
    return f"{opening}{svg_of(figure, name)}{below}</figure>"


def table_html(headers: Sequence[str], rows: Sequence[Sequence[str]], num_words: int = 0) -> str:
    """A table of plain text; the first `num_words` columns hold words, the others numbers."""

    def line(tag: str, cells: Sequence[str]) -> str:
        kind = [' class="words"' if i < num_words else "" for i in range(len(cells))]
        both = zip(kind, cells, strict=True)
        return "<tr>" + "".join(f"<{tag}{k}>{escape(cell)}</{tag}>" for k, cell in both) + "</tr>"

    lines = "\n".join(line("td", row) for row in rows)
    many = ' class="many"' if len(headers) > 9 else ""
    return f'<div class="wide"><table{many}>{line("th", headers)}\n{lines}</table></div>'


def ratio_label(method: Mapping[str, Any]) -> str:
    """Width ratios as fractions: `1, 1/2, 1/4`; empty for a method without."""
    return ", ".join(str(Fraction(r).limit_denominator(100)) for r in method.get("ratio", ()))


def data_label(data: Mapping[str, Any]) -> str:
    """The data set in a word or two."""
    named = " ".join(part for part in (data["name"], data["subset"]) if part)
    return Path(data["path"]).name if data["path"] else named or str(data["source"])


def partition_label(data: Mapping[str, Any]) -> str:
    """How the data is spread, with the one number that matters."""
    kind = str(data["partition"])
    field = {"dirichlet": "alpha", "shards": "classes_per_client", "column": "partition_column"}
    return f"{kind}({data[field[kind]]})" if kind in field else kind


def _heading(record: Record) -> str:
    config, done = record.config, record.outcome["rounds"]
    ratio = ratio_label(config["method"])
    title = config["method"]["name"] + (f", ratio {ratio}" if ratio else "")
    clients = len(record.start.get("clients", ())) or config["data"]["num_clients"]
    rounds = human(config["rounds"], "rounds")
    if record.finish is None:
        rounds = f"{done} of {rounds} (not finished)"
    facts = (
        f"{data_label(config['data'])}, {partition_label(config['data'])}",
        f"model {config['model']['name']}",
        f"{clients} clients, {config['clients_per_round']} a round",
        rounds,
        f"seed {config['seed']}",
    )
    return f"<h1>{escape(title)}</h1><p>{escape(' | '.join(facts))}</p>"


def _headline(record: Record) -> str:
    known = record.outcome
    full, largest = known["params_full"], known["params_largest_client"]
    tiles: list[tuple[str, float | None, Quantity]] = [
        ("accuracy", known["accuracy"], "percent"),
        ("accuracy, untrained entries zeroed", known["accuracy_untrained_zeroed"], "percent"),
        ("test loss", known["loss"], "plain"),
        ("coverage: share ever trained", known["coverage"], "percent"),
        ("largest client's share of the model", largest / full if largest else None, "percent"),
        ("bytes down to the clients", known["bytes_down"], "bytes"),
        ("bytes up from the clients", known["bytes_up"], "bytes"),
        ("FLOPs of the clients", known["flops"], "flops"),
        ("time of the rounds", known["seconds"], "seconds"),
    ]
    if own := known.get("accuracy_clients"):
        tiles.insert(2, ("accuracy, mean over the clients' tests", sum(own) / len(own), "percent"))
    cells = (f"<div><dt>{k}</dt><dd>{human(v, q)}</dd></div>" for k, v, q in tiles)
    return f"<dl>{''.join(cells)}</dl>"


def _curves(record: Record) -> str:
    if not record.rounds:
        return "<p>No round has ended yet.</p>"
    parts = ["<h2>Accuracy and what it costs</h2>"]
    if record.evaluations:
        panels = []
        for cost in COSTS:
            x, y = record.curve(cost)
            lines = [Line(label="accuracy", x=x, y=y)]
            title = "Test accuracy" if cost == "rounds" else ""
            panels.append(Panel(title=title, across=cost, up="percent", lines=lines))
        parts.append(figure_html(panels_figure(panels), "accuracy"))
    else:
        parts.append("<p>The model has not been evaluated yet.</p>")
    losses = [(event["round"], event["loss"]) for event in record.rounds]
    losses = [(round, loss) for round, loss in losses if loss is not None]
    loss = Line(label="run", x=[r for r, _ in losses], y=[v for _, v in losses])
    shares = [(event["round"], event["coverage"]) for event in record.rounds]
    share = Line(label="run", x=[r for r, _ in shares], y=[v for _, v in shares])
    panels = [
        Panel(
            title="Training loss, mean over the answers", across="rounds", up="plain", lines=[loss]
        ),
        Panel(
            title="Coverage: share of the model ever trained",
            across="rounds",
            up="percent",
            lines=[share],
        ),
    ]
    parts.append(figure_html(panels_figure(panels), "training"))
    return "\n".join(parts)


def _client_classes(record: Record) -> str:
    groups: dict[int, list[Mapping[str, Any]]] = {}
    for event in record.rounds:
        for row in event["clients"]:
            groups.setdefault(row["entries"], []).append(row)
    if not groups:
        return ""
    seen = {row["client"] for rows in groups.values() for row in rows}
    lines = []
    for entries, rows in sorted(groups.items(), reverse=True):
        mean = {
            k: sum(row[k] for row in rows) / len(rows)
            for k in ("bytes_down", "bytes_up", "flops", "seconds")
        }
        lines.append(
            [
                str(len({row["client"] for row in rows})),
                f"{entries:,}",
                human(entries / record.start["params_full"], "percent"),
                human(mean["bytes_down"], "bytes"),
                human(mean["bytes_up"], "bytes"),
                human(mean["flops"], "flops"),
                human(mean["seconds"], "seconds"),
            ]
        )
    headers = ["clients", "parameters", "share of model", "bytes down", "bytes up", "FLOPs", "time"]
    silent = len(record.start.get("clients", seen)) - len(seen)
    note = f" Clients that have not answered in any round: {silent}." if silent > 0 else ""
    return (
        f"<h2>Classes of clients</h2>{table_html(headers, lines)}"
        f"<p>By parameters held; bytes, FLOPs and time are means per client and round.{note}</p>"
    )


def _failures(record: Record) -> str:
    reasons: dict[str, list[Mapping[str, Any]]] = {}
    for event in record.rounds:
        for failure in event["failures"]:
            reasons.setdefault(failure["reason"], []).append(failure)
    if not reasons:
        return ""
    rows = [
        [reason, found[0]["text"], str(len(found)), str(len({f["client"] for f in found}))]
        for reason, found in sorted(reasons.items())
    ]
    asked = sum(event["asked"] for event in record.rounds)
    headers = ["reason", "the first one says", f"times, of {asked:,} asked", "clients"]
    return f"<h2>Answers that did not come</h2>{table_html(headers, rows, 2)}"


def _configuration(record: Record) -> str:
    text = escape(json.dumps(record.config, indent=1))
    again = escape(f"tessera run {shlex.quote(str(record.folder / 'config.json'))}")
    return (
        f"<h2>Again</h2><pre><code>{again}</code></pre>\n"
        f"<details><summary>The resolved configuration</summary><pre>{text}</pre></details>"
    )
