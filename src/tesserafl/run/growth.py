"""What a report shows of a model that grows: its blocks over the rounds, and whose they were."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tesserafl.run.page import figure_html, table_html
from tesserafl.run.plots import INK, PALETTE, Line, Panel, dress, empty_figure, human, panels_figure
from tesserafl.run.record import Record

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_KINDS = {"insert": "put in", "merge": "became one with its neighbour", "prune": "taken out"}


def growth_html(record: Record) -> str:
    """Depth over rounds, which clients' layers became which of the server's, and the log."""
    events = [event for event in record.rounds if "structure" in event]
    if not events:
        return ""
    last = events[-1]["structure"]
    parts = ["<h2>The model's blocks</h2>", figure_html(_depths(events), "depth")]
    for axis in last["axes"]:
        parts.append(figure_html(held_figure(events, axis), f"held-{axis}"))
        if any(event["structure"]["paths"] for event in events):
            parts.append(figure_html(layers_figure(events, axis), f"layers-{axis}"))
    parts.append(_log(last["log"]))
    if last["served"] is not None:
        served = ", ".join(f"{axis}: {slots}" for axis, slots in last["served"].items())
        parts.append(
            f"<p>Served is not the deep model but these blocks of it, which do better on the "
            f"public examples: {served}.</p>"
        )
    return "\n".join(parts)


def _depths(events: Sequence[Mapping[str, Any]]) -> Figure:
    rounds = [event["round"] for event in events]
    axes = events[-1]["structure"]["axes"]
    lines = []
    for axis in axes:
        depth = [len(event["structure"]["axes"][axis]["order"]) for event in events]
        label = "server" if len(axes) == 1 else f"server, {axis}"
        lines.append(Line(label=label, x=rounds, y=[float(number) for number in depth]))
    most = [
        max(
            (len(path) for own in event["structure"]["paths"].values() for path in own.values()),
            default=0,
        )
        for event in events
    ]
    lines.append(Line(label="deepest client", x=rounds, y=[float(number) for number in most]))
    panel = Panel(title="Depth: blocks in use", across="rounds", up="plain", lines=lines)
    return panels_figure([panel], width=6.5)


def blocks_seen(events: Sequence[Mapping[str, Any]], axis: str) -> list[int]:
    """Every slot that was ever in use, those of the last round in its order."""
    order: list[int] = list(events[-1]["structure"]["axes"][axis]["order"])
    for event in reversed(events):
        former = event["structure"]["axes"][axis]["order"]
        for place, slot in enumerate(former):
            if slot not in order:
                before = [order.index(s) for s in former[:place] if s in order]
                order.insert(max(before, default=-1) + 1, slot)
    return order


def held_figure(events: Sequence[Mapping[str, Any]], axis: str) -> Figure:
    """Share of a round's clients that trained each block; blocks of one origin have one colour."""
    from matplotlib.colors import to_rgb

    slots, rounds = blocks_seen(events, axis), [event["round"] for event in events]
    colours = _colours(events, axis)
    cells = []
    for slot in slots:
        row = []
        for event in events:
            paths = [own[axis] for own in event["structure"]["paths"].values()]
            share = sum(slot in path for path in paths) / max(1, len(paths))
            in_use = slot in event["structure"]["axes"][axis]["order"]
            row.append((*to_rgb(colours[slot]), 0.08 * in_use + 0.92 * share))
        cells.append(row)
    figure = empty_figure(min(10.5, max(5.0, 2.0 + 0.12 * len(rounds))), 1.4 + 0.28 * len(slots))
    axes = figure.add_subplot()
    ends = (rounds[0] - 0.5, rounds[-1] + 0.5, len(slots) - 0.5, -0.5)
    axes.imshow(cells, aspect="auto", interpolation="nearest", extent=ends)
    for entry in events[-1]["structure"]["log"]:
        if entry[1] in _KINDS and entry[2] == axis and entry[3] in slots:
            mark = "v" if entry[1] == "insert" else "x"
            axes.plot([entry[0]], [slots.index(entry[3])], mark, color=INK, markersize=5)
    axes.set_yticks(range(len(slots)), [f"block {slot}" for slot in slots])
    dress(axes, f"Share of clients per block ({axis}), input on top", "round")
    axes.grid(visible=False)
    return figure


def layers_figure(events: Sequence[Mapping[str, Any]], axis: str) -> Figure:
    """Which of the server's blocks each client's layers became, when it last took part."""
    latest: dict[int, Sequence[int]] = {}
    for event in events:
        for client, own in event["structure"]["paths"].items():
            latest[int(client)] = own[axis]
    slots, clients = blocks_seen(events, axis), sorted(latest)
    colours = _colours(events, axis)
    figure = empty_figure(min(10.5, max(4.5, 2.0 + 0.55 * len(slots))), 1.4 + 0.2 * len(clients))
    axes = figure.add_subplot()
    for row, client in enumerate(clients):
        places = [slots.index(slot) for slot in latest[client]]
        axes.plot(places, [row] * len(places), color=INK, linewidth=0.6, alpha=0.5, zorder=1)
        tones = [colours[slot] for slot in latest[client]]
        axes.scatter(places, [row] * len(places), s=70, c=tones, zorder=2)
        for layer, place in enumerate(places):
            axes.text(place, row, str(layer + 1), ha="center", va="center", fontsize=6, zorder=3)
    axes.set_xticks(range(len(slots)), [str(slot) for slot in slots])
    axes.set_yticks(range(len(clients)), [str(client) for client in clients])
    axes.set_ylim(len(clients) - 0.5, -0.5)
    axes.set_ylabel("client", fontsize=8.5, color=INK)
    dress(axes, f"What clients' layers 1, 2, ... became ({axis})", "block")
    axes.grid(visible=False)
    return figure


def _colours(events: Sequence[Mapping[str, Any]], axis: str) -> dict[int, str]:
    found: dict[int, str] = {}
    for event in events:
        for family in event["structure"]["axes"][axis]["families"]:
            for slot in family:
                found[slot] = PALETTE[family[0] % len(PALETTE)]
    return found


def _log(log: Sequence[Sequence[Any]]) -> str:
    rows = []
    for round, kind, axis, slot, beside, members in log:
        if kind in _KINDS:
            after = "in front of all" if beside < 0 else f"behind block {beside}"
            where = after if kind == "insert" else f"with block {beside}" if kind == "merge" else ""
            who = ", ".join(map(str, members))
            rows.append([str(round), f"block {slot} of {axis} {_KINDS[kind]}", where, who])
        else:
            found = ", ".join(human(value, "percent") for value in members)
            rows.append([str(round), f"the pilot keeps policy {kind}", found, ""])
    if not rows:
        return "<p>No block was put in.</p>"
    return table_html(["round", "what", "where", "clients"], rows)
