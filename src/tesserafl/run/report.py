"""A run folder as one page: `report.html`, readable without the run, without a network."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tesserafl.run.adaptation import adaptation_html
from tesserafl.run.files import read_json, write_atomic, write_json
from tesserafl.run.growth import growth_html
from tesserafl.run.labels import data_label, partition_label, ratio_label
from tesserafl.run.page import figure_html, page_html, table_html, write_png
from tesserafl.run.plots import (
    Line,
    Panel,
    Quantity,
    graph_figure,
    human,
    panels_figure,
    partition_figure,
)
from tesserafl.run.record import Record, read_record
from tesserafl.run.timeline import timeline_html

if TYPE_CHECKING:
    from tesserafl.run.setup import Setup


def write_report(folder: Path, setup: Setup | None = None) -> Path:
    """Write `report.html` into a run folder; the run may still be going on.

    The partition comes from `partition.json`; with a setup that is written if it is not there.

    Raises:
        CheckpointError: the folder is not a run, or cannot be written.
    """
    record = read_record(folder)
    if setup is not None and not (folder / "partition.json").exists():
        write_partition(folder, setup)
    parts = [_heading(record), _headline(record), _curves(record), _peers(record)]
    parts += [adaptation_html(record), growth_html(record), timeline_html(record)]
    if (folder / "partition.json").exists():
        held = read_json(folder / "partition.json")
        drawn = partition_figure(held["counts"], held["class_names"])
        parts.append(f"<h2>Who holds what</h2>{figure_html(drawn, 'partition')}")
    parts += [_client_classes(record), _failures(record), _configuration(record)]
    path = folder / "report.html"
    write_atomic(path, page_html(record.config["method"]["name"], "\n".join(parts)).encode())
    return path


def write_partition(folder: Path, setup: Setup) -> None:
    """Count each client's training examples per class; write partition.json and partition.png.

    Nothing, where the examples lie on devices.
    """
    if setup.data.elsewhere:
        return
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
        ("bytes received by participants", known["bytes_down"], "bytes"),
        ("bytes sent by participants", known["bytes_up"], "bytes"),
        ("FLOPs of the clients", known["flops"], "flops"),
        ("time of the rounds", known["seconds"], "seconds"),
    ]
    if "joules" in record.costs:
        tiles += [
            ("virtual time", known["virtual_seconds"], "virtual_seconds"),
            ("energy of the devices", known["joules"], "joules"),
        ]
    if own := known.get("accuracy_clients"):
        tiles.insert(2, ("accuracy, mean over the clients' tests", sum(own) / len(own), "percent"))
    for key, what in {"personal": "own models", "finetuned": "fine-tuned models"}.items():
        if own := known.get(f"accuracy_{key}"):
            mean = sum(own) / len(own)
            tiles.insert(3, (f"accuracy of {what}, mean over the clients' tests", mean, "percent"))
    cells = (f"<div><dt>{k}</dt><dd>{human(v, q)}</dd></div>" for k, v, q in tiles)
    return f"<dl>{''.join(cells)}</dl>"


def _curves(record: Record) -> str:
    if not record.rounds:
        return "<p>No round has ended yet.</p>"
    parts = ["<h2>Accuracy and what it costs</h2>"]
    if record.evaluations:
        panels = []
        for cost in record.costs:
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


def _peers(record: Record) -> str:
    """What there is to see where peers have no server: the graph, agreement, what one sends."""
    if not record.rounds or "params_stored" not in record.rounds[-1]:
        return ""
    rounds = [event["round"] for event in record.rounds]
    kinds: dict[str, tuple[str, Quantity]] = {
        "round_coverage": ("Share of the model that is trained in a round", "percent"),
        "consensus": ("Consensus distance: how far copies are from their mean", "plain"),
    }
    panels = [
        Panel(
            title=title,
            across="rounds",
            up=up,
            lines=[Line(label="run", x=rounds, y=[event[key] for event in record.rounds])],
        )
        for key, (title, up) in kinds.items()
        if key in record.rounds[-1]
    ]
    parts = ["<h2>Peers</h2>", figure_html(panels_figure(panels), "peers")]
    full, stored = record.start["params_full"], max(e["params_stored"] for e in record.rounds)
    own = (record.finish or {}).get("accuracy_peers")
    spread = (
        f" Their own copies reach {human(sum(own) / len(own), 'percent')} on average, "
        f"{human(min(own), 'percent')} at least."
        if own
        else ""
    )
    network = record.config["network"]
    parts.append(
        f"<p>Graph {escape(network['graph'])}, loss {network['loss']:g}, delay "
        f"{network['delay']:g}, failing links {network['failure']:g}. A peer stores at most "
        f"{stored:,} of {full:,} parameters between rounds ({human(stored / full, 'percent')})."
        f"{spread}</p>"
    )
    if record.start.get("links"):
        drawn = graph_figure(len(record.start["clients"]), record.start["links"])
        parts.append(figure_html(drawn, "graph"))
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
