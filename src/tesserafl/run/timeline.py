"""What a report shows of devices in virtual time: who did what when, and when nodes met."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tesserafl.run.page import figure_html, table_html
from tesserafl.run.plots import (
    INK,
    PALETTE,
    Line,
    Panel,
    dress,
    empty_figure,
    human,
    panels_figure,
    unit_of,
)
from tesserafl.run.record import Record

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLOURS = {
    "download": PALETTE[4],
    "compute": PALETTE[0],
    "upload": PALETTE[1],
    "wait": "#d9d9d9",
}
_DEVICES = 40
"""Devices that are drawn, at most; evenly chosen."""
_PIECES = 1500
"""Stretches of time that are drawn, at most: those of the last rounds."""


def timeline_html(record: Record) -> str:
    """Devices over time, what they spent it on, and the periods of a tree's nodes."""
    events = [event for event in record.rounds if "virtual_seconds" in event]
    if not events:
        return ""
    drawn = _drawn(events)
    parts = [
        "<h2>Devices and time</h2>",
        figure_html(timeline_figure(events, drawn), "timeline"),
        figure_html(shares_figure(events, drawn), "time"),
    ]
    if any("periods" in event for event in events):
        parts.append(figure_html(periods_figure(events), "periods"))
    parts.append(_totals(events))
    return "\n".join(parts)


def works(event: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """What devices did that the round heard of, answers and failures."""
    yield from (row for row in (*event["clients"], *event["failures"]) if "pieces" in row)


def _drawn(events: Sequence[Mapping[str, Any]]) -> list[int]:
    clients = sorted({int(row["client"]) for event in events for row in works(event)})
    step = max(1, -(-len(clients) // _DEVICES))
    return clients[::step]


def timeline_figure(events: Sequence[Mapping[str, Any]], clients: Sequence[int]) -> Figure:
    """Compute, communicate, idle: a row for each device, over the last rounds."""
    places = {client: row for row, client in enumerate(clients)}
    pieces: list[tuple[int, str, float, float]] = []
    for event in reversed(events):
        own = [
            (places[int(row["client"])], str(kind), float(start), float(end))
            for row in works(event)
            if int(row["client"]) in places
            for kind, start, end in row["pieces"]
        ]
        if pieces and len(pieces) + len(own) > _PIECES:
            break
        pieces += own
    last = max((end for *_, end in pieces), default=0.0)
    divisor, unit = unit_of(last, "virtual_seconds")
    figure = empty_figure(10.5, 1.3 + 0.17 * len(clients))
    axes = figure.add_subplot()
    for kind, colour in _COLOURS.items():
        for row in range(len(clients)):
            spans = [
                (start / divisor, (end - start) / divisor)
                for place, what, start, end in pieces
                if (place, what) == (row, kind)
            ]
            if spans:
                axes.broken_barh(spans, (row - 0.4, 0.8), color=colour, linewidth=0)
    _rows(axes, clients)
    dress(axes, "What devices did in the last rounds", f"virtual time ({unit})")
    axes.grid(visible=False)
    _legend(figure)
    return figure


def shares_figure(events: Sequence[Mapping[str, Any]], clients: Sequence[int]) -> Figure:
    """How much of the whole run each device spent on what."""
    spent: dict[int, dict[str, float]] = {
        client: dict.fromkeys(_COLOURS, 0.0) for client in clients
    }
    for event in events:
        for row in works(event):
            if (own := spent.get(int(row["client"]))) is not None:
                for kind, start, end in row["pieces"]:
                    own[kind] += end - start
    longest = max((sum(own.values()) for own in spent.values()), default=0.0)
    divisor, unit = unit_of(longest, "virtual_seconds")
    figure = empty_figure(10.5, 1.3 + 0.17 * len(clients))
    axes = figure.add_subplot()
    left = [0.0] * len(clients)
    for kind, colour in _COLOURS.items():
        width = [spent[client][kind] / divisor for client in clients]
        axes.barh(range(len(clients)), width, left=left, color=colour, height=0.8)
        left = [a + b for a, b in zip(left, width, strict=True)]
    _rows(axes, clients)
    dress(axes, "What devices spent their time on", f"virtual time ({unit})")
    axes.grid(visible=False)
    _legend(figure)
    return figure


def periods_figure(events: Sequence[Mapping[str, Any]]) -> Figure:
    """Averages of each edge in a round of the cloud, and mean steps of its devices."""
    known = [event for event in events if "periods" in event]
    edges = list(dict.fromkeys(edge for event in known for edge in event["periods"]))
    rounds = [float(event["round"]) for event in known]
    averages, steps = [], []
    for edge in edges:
        own = [event["periods"].get(edge, {"rounds": 0, "steps": {}}) for event in known]
        averages.append(Line(label=edge, x=rounds, y=[float(each["rounds"]) for each in own]))
        means = [sum(e["steps"].values()) / len(e["steps"]) if e["steps"] else 0.0 for e in own]
        steps.append(Line(label=edge, x=rounds, y=means))
    panels = [
        Panel(title="Averages of an edge a round", across="rounds", up="plain", lines=averages),
        Panel(title="Local steps, mean of its devices", across="rounds", up="plain", lines=steps),
    ]
    return panels_figure(panels)


def _rows(axes: Any, clients: Sequence[int]) -> None:
    axes.set_yticks(range(len(clients)), [str(client) for client in clients])
    axes.set_ylim(len(clients) - 0.5, -0.5)
    axes.set_ylabel("device", fontsize=8.5, color=INK)


def _legend(figure: Figure) -> None:
    from matplotlib.patches import Patch

    patches = [Patch(color=colour, label=kind) for kind, colour in _COLOURS.items()]
    figure.legend(
        handles=patches,
        loc="outside lower center",
        ncols=len(patches),
        frameon=False,
        fontsize=8,
        labelcolor=INK,
    )


def _totals(events: Sequence[Mapping[str, Any]]) -> str:
    seconds = dict.fromkeys(_COLOURS, 0.0)
    failed = late = 0
    for event in events:
        for row in works(event):
            for kind, start, end in row["pieces"]:
                seconds[kind] += end - start
            failed += "reason" in row
            late += row.get("staleness", 0) > 0
    whole = sum(seconds.values())
    shares = [human(value / whole if whole else None, "percent") for value in seconds.values()]
    last = events[-1]
    rows = [
        [
            human(last["virtual_seconds"], "virtual_seconds"),
            human(last["joules"], "joules"),
            *shares,
            str(failed),
            str(late),
        ]
    ]
    headers = ["virtual time", "energy", *(f"time: {kind}" for kind in _COLOURS)]
    return table_html([*headers, "works that failed", "works that came late"], rows)
