"""What a report shows of adapted blocks, of experts under a gate, and of a frozen model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tesserafl.run.page import figure_html
from tesserafl.run.plots import INK, PALETTE, Line, Panel, dress, empty_figure, human, panels_figure
from tesserafl.run.record import Record

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_BLUE = (0.16, 0.53, 0.78)
"""Strong enough on white and on black."""


def adaptation_html(record: Record) -> str:
    """Who trained how many blocks in which round, and what the gates say; empty for other runs."""
    parts = [_budget(record), _blocks(record), _experts(record)]
    found = [part for part in parts if part]
    return "\n".join(["<h2>Adapters on a frozen model</h2>", *found]) if found else ""


def _budget(record: Record) -> str:
    frozen = record.start.get("params_frozen")
    if not frozen:
        return ""
    rows = [row for event in record.rounds for row in event["clients"]]
    most = max((row["trained_entries"] for row in rows), default=0)
    return (
        f"<p>The frozen model has {frozen:,} numbers. A client trained at most {most:,} in a round:"
        f" {human(most / frozen, 'percent') if most / frozen >= 0.01 else f'{most / frozen:.3%}'}."
        f"</p>"
    )


def _blocks(record: Record) -> str:
    table = {
        (row["client"], event["round"]): row["active_blocks"]
        for event in record.rounds
        for row in event["clients"]
        if "active_blocks" in row
    }
    if not table:
        return ""
    parts = [figure_html(blocks_figure(table), "blocks")]
    heard = []
    for event in record.rounds:
        rows = [row for row in event["clients"] if "validation_accuracy" in row]
        if weight := sum(row["examples"] for row in rows):
            mean = sum(row["validation_accuracy"] * row["examples"] for row in rows) / weight
            heard.append((event["round"], mean))
    if heard:
        line = Line(label="run", x=[r for r, _ in heard], y=[v for _, v in heard])
        title = "Validation accuracy of the clients, before training"
        panel = Panel(title=title, across="rounds", up="percent", lines=[line])
        parts.append(figure_html(panels_figure([panel], width=6.5), "validation"))
    return "\n".join(parts)


def _experts(record: Record) -> str:
    done = record.finish or {}
    shares = done.get("own_share")
    if not shares:
        return ""
    mean = sum(shares) / len(shares)
    return (
        f"{figure_html(gates_figure(shares, done['accuracy_personal']), 'gates')}"
        f"<p>On the clients' own tests their own expert counts {human(mean, 'percent')} on "
        f"average, from {human(min(shares), 'percent')} to {human(max(shares), 'percent')}.</p>"
    )


def blocks_figure(table: dict[tuple[int, int], float]) -> Figure:
    """Blocks that each client trained in each round.

    Args:
        table: (client, round) -> number of blocks; clients that did not take part are not in it.
    """
    clients = sorted({client for client, _ in table})
    rounds = sorted({round for _, round in table})
    largest = max(table.values())
    figure = empty_figure(min(10.5, max(5.0, 2.0 + 0.16 * len(rounds))), 1.3 + 0.16 * len(clients))
    axes = figure.add_subplot()
    cells = [
        [(*_BLUE, 0.15 + 0.85 * table[c, r] / largest if (c, r) in table else 0.0) for r in rounds]
        for c in clients
    ]
    ends = (rounds[0] - 0.5, rounds[-1] + 0.5, len(clients) - 0.5, -0.5)
    axes.imshow(cells, aspect="auto", interpolation="nearest", extent=ends)
    if len(rounds) * len(clients) <= 600:
        for row, client in enumerate(clients):
            for round in rounds:
                if (client, round) in table:
                    text = f"{table[client, round]:.0f}"
                    axes.text(round, row, text, ha="center", va="center", fontsize=6, color=INK)
    axes.set_yticks(range(len(clients)), [str(c) for c in clients])
    axes.set_ylabel("client", fontsize=8.5, color=INK)
    dress(axes, f"Blocks whose adapters a client trained (at most {largest:.0f})", "round")
    axes.grid(visible=False)
    return figure


def gates_figure(shares: list[float], accuracies: list[float]) -> Figure:
    """How much each client's own expert counts, and what its mixture reaches."""
    figure = empty_figure(min(10.5, max(5.0, 2.0 + 0.3 * len(shares))), 2.8)
    axes = figure.add_subplot()
    places = range(len(shares))
    axes.bar(places, [100 * s for s in shares], color=PALETTE[0], label="share of the own expert")
    axes.plot(
        places,
        [100 * a for a in accuracies],
        "D",
        color=PALETTE[1],
        markersize=5,
        label="accuracy of the mixture",
    )
    dress(axes, "Experts and accuracy on each client's own test", "client with a test")
    axes.yaxis.set_major_formatter("{x:g} %")
    axes.set_ylim(0, 102)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=8, labelcolor=INK)
    return figure
