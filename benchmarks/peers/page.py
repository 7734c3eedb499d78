"""The results as a table for the terminal and as one HTML file that needs no network."""

from __future__ import annotations

import base64
import html
import io
from typing import Any

COLUMNS = ("system", "ms", "CPU ms", "x ours", "MB", "check", "version")
STYLE = """body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto;
padding: 0 1rem; color: #222 } table { border-collapse: collapse; margin: 1rem 0 }
th, td { padding: .2rem .7rem; text-align: left; border-bottom: 1px solid #ddd }
td:nth-child(n+2):nth-child(-n+5), th:nth-child(n+2):nth-child(-n+5) { text-align: right }
tr.ours { font-weight: bold } img { max-width: 100% }"""


def _groups(results: dict[str, Any]) -> dict[tuple[str, int], list[dict[str, Any]]]:
    groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for row in results["rows"]:
        groups.setdefault((row["workload"], row["threads"]), []).append(row)
    return {key: sorted(rows, key=lambda r: r["ms_per_round"]) for key, rows in groups.items()}


def _cells(row: dict[str, Any]) -> list[str]:
    ratio = row["ratio_to_ours"]
    return [
        row["system"],
        _short(row["ms_per_round"]),
        _short(row["cpu_ms_per_round"]),
        "-" if ratio is None else f"{ratio:.2f}",
        f"{row['peak_rss_mb']:,.0f}",
        row["check"],
        row["version"],
    ]


def _short(ms: float) -> str:
    return f"{ms:,.0f}" if ms >= 100 else f"{ms:.1f}" if ms >= 10 else f"{ms:.2f}"


def text(results: dict[str, Any]) -> str:
    """Tables for the terminal."""
    parts = []
    for (workload, threads), rows in _groups(results).items():
        table = [list(COLUMNS), *(_cells(row) for row in rows)]
        widths = [max(len(line[i]) for line in table) for i in range(len(COLUMNS))]
        parts.append(f"\n{workload}, {threads} thread{'s' if threads > 1 else ''}")
        for line in table:
            cells = [
                cell.rjust(width) if 1 <= i <= 4 else cell.ljust(width)
                for i, (cell, width) in enumerate(zip(line, widths, strict=True))
            ]
            parts.append("  ".join(cells).rstrip())
    for item in results["not_measured"]:
        where = f"{item['workload']}, {item['threads']}"
        parts.append(f"{where}: {item['system']} not measured: {item['reason']}")
    return "\n".join(parts)


def page(results: dict[str, Any]) -> str:
    """A self-contained page: a plot, the tables, what was not measured."""
    machine = results["machine"]
    body = [
        "<h1>One FedAvg round, side by side</h1>",
        f"<p>{html.escape(results['when'])}; {machine['cores']} cores of "
        f"{html.escape(machine['processor'])}. Medians over {results['repeats']} processes of "
        f"{results['rounds']} rounds each, after the warm-up; the systems took turns. "
        "10 of 100 clients a round. <b>x ours</b>: time over TesseraFL's in the same repeat. "
        "<b>MB</b>: highest resident memory, of all processes together.</p>",
    ]
    for (workload, threads), rows in _groups(results).items():
        title = f"{workload}, {threads} thread{'s' if threads > 1 else ''}"
        body.append(f"<h2>{title}</h2>{_plot(rows)}<table><tr>")
        body += [f"<th>{name}</th>" for name in COLUMNS]
        body.append("</tr>")
        for row in rows:
            ours = ' class="ours"' if row["system"] == "tessera" else ""
            cells = "".join(f"<td>{html.escape(cell)}</td>" for cell in _cells(row))
            body.append(f"<tr{ours}>{cells}</tr>")
        body.append("</table>")
        notes = [f"{row['system']}: {row['note']}" for row in rows if row["note"]]
        items = "".join(f"<li>{html.escape(note)}</li>" for note in notes)
        body.append(f"<ul>{items}</ul>")
    if results["not_measured"]:
        body.append("<h2>Not measured</h2><ul>")
        body += [
            f"<li>{html.escape(item['system'])} ({item['workload']}, {item['threads']}): "
            f"{html.escape(item['reason'])}"
            for item in results["not_measured"]
        ]
        body.append("</ul>")
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>Peers</title>'
        f"<style>{STYLE}</style>{''.join(body)}</html>\n"
    )


def _plot(rows: list[dict[str, Any]]) -> str:
    """Bars on a logarithmic axis, as an image inside the page."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    names = [row["system"] for row in rows]
    figure, axes = pyplot.subplots(figsize=(8, 0.32 * len(rows) + 0.9))
    colours = ["#c1440e" if name == "tessera" else "#5b7c99" for name in names]
    times = [row["ms_per_round"] for row in rows]
    axes.barh(names, times, color=colours)
    axes.set_xscale("log")
    axes.set_xlim(min(times) / 2, max(times) * 2)
    axes.invert_yaxis()
    axes.set_xlabel("ms a round, wall clock (logarithmic)")
    for position, value in enumerate(times):
        axes.text(value * 1.05, position, _short(value), va="center", fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    with io.BytesIO() as file:
        figure.savefig(file, format="svg", bbox_inches="tight")
        pyplot.close(figure)
        image = base64.b64encode(file.getvalue()).decode()
    return f'<img alt="milliseconds a round" src="data:image/svg+xml;base64,{image}">'
