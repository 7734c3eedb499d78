"""Figures of runs: drawn once, shown in light and dark, inside a page or as a PNG.

Every figure is an object of its own, without pyplot and without global state.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

Quantity = Literal[
    "rounds", "bytes", "flops", "seconds", "virtual_seconds", "joules", "percent", "plain"
]
"""What an axis or a number counts; decides its unit."""

PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#8c8c8c")
"""Okabe and Ito's colours for all kinds of colour vision, without the ones that vanish on paper."""

INK = "#1d2125"
"""Text and axes; becomes the page's own text colour in an SVG."""
_MARKERS = "osD^vPX*"
_STYLES = ("-", "--", "-.", ":")
_ACROSS = {
    "bytes": "bytes down and up",
    "flops": "clients' work",
    "virtual_seconds": "virtual time",
    "joules": "energy of the devices",
}
_MAX_CLASSES = 20
_MAX_BUBBLES = 60
"""Clients up to which each is a column of circles; beyond that, cells."""
_UNITS: dict[str, tuple[int, int, tuple[str, ...]]] = {
    "bytes": (1024, 1, ("B", "KiB", "MiB", "GiB", "TiB", "PiB")),
    "flops": (1000, 1, ("FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP", "EFLOP")),
    "seconds": (60, 2, ("s", "min", "h")),
    "virtual_seconds": (60, 2, ("s", "min", "h")),
    "joules": (1000, 1, ("J", "kJ", "MJ", "GJ")),
}
"""Quantity -> size of a step, how many of the next unit there must be to use it, names."""


@dataclass(frozen=True, kw_only=True)
class Line:
    """One curve, with a band of +- `spread` if there is one."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    spread: Sequence[float] | None = None


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One pair of axes and its curves."""

    title: str
    across: Quantity
    up: Quantity
    lines: Sequence[Line]
    mark: float | None = None
    """a value across that gets a dotted line"""


def unit_of(largest: float, quantity: str) -> tuple[float, str]:
    """What to divide by, and the name of the unit, for values up to `largest`."""
    step, least, names = _UNITS.get(quantity, (1, 1, ("",)))
    place = 0
    while place + 1 < len(names) and largest >= least * float(step) ** (place + 1):
        place += 1
    return float(step) ** place, names[place]


def human(value: float | None, quantity: Quantity) -> str:
    """A number for people: `12.3 MiB`, `4.56 TFLOP`, `81.3 %`; a dash for None."""
    if value is None:
        return "-"
    if quantity == "percent":
        return f"{100 * value:.1f} %"
    divisor, unit = unit_of(value, quantity)
    scaled = value / divisor
    if quantity == "seconds" and 0 < value < 1:
        return f"{1000 * value:.0f} ms"
    if quantity == "plain":
        text = f"{scaled:.4g}"
    elif quantity == "rounds":
        text = f"{scaled:,.0f} round{'s' * (scaled != 1)}"
    elif unit == "B":
        text = f"{scaled:,.0f}"
    else:
        text = f"{scaled:.{max(0, 2 - (scaled >= 10) - (scaled >= 100))}f}"
    return f"{text} {unit}".rstrip()


def panels_figure(panels: Sequence[Panel], *, width: float = 10.5, height: float = 3.1) -> Figure:
    """Panels side by side (inches), one legend below them; a line looks the same in all panels."""
    labels = list(dict.fromkeys(line.label for panel in panels for line in panel.lines))
    columns = max(1, min(len(labels), int(width * 13 / (max(map(len, labels), default=0) + 7))))
    legend_rows = -(-len(labels) // columns) if len(labels) > 1 else 0
    figure = empty_figure(width, height + 0.22 * legend_rows)
    handles = {}
    first: Axes | None = None
    for number, panel in enumerate(panels):
        joined = first if panel.up == panels[0].up == "percent" else None
        axes = figure.add_subplot(1, len(panels), number + 1, sharey=joined)
        first = first or axes
        divisor, unit = unit_of(
            max((max(line.x, default=0) for line in panel.lines), default=0), panel.across
        )
        scale = 100.0 if panel.up == "percent" else 1.0
        for line in panel.lines:
            place = labels.index(line.label)
            color = PALETTE[place % len(PALETTE)]
            xs, ys = [x / divisor for x in line.x], [scale * y for y in line.y]
            handles[line.label] = axes.plot(
                xs,
                ys,
                color=color,
                linewidth=1.6,
                markersize=4,
                linestyle=_STYLES[place // len(PALETTE) % len(_STYLES)],
                marker=_MARKERS[place % len(_MARKERS)],
                markevery=max(1, -(-len(xs) // 12)),
            )[0]
            if line.spread is not None:
                around = [scale * spread for spread in line.spread]
                below = [y - s for y, s in zip(ys, around, strict=True)]
                above = [y + s for y, s in zip(ys, around, strict=True)]
                axes.fill_between(xs, below, above, color=color, alpha=0.18, linewidth=0)
        name = _ACROSS.get(panel.across, "rounds")
        dress(axes, panel.title, f"{name} ({unit})" if unit else name)
        axes.set_xlim(left=0)
        if panel.mark is not None:
            axes.axvline(panel.mark / divisor, color=INK, alpha=0.6, linewidth=1, linestyle=":")
        if panel.up == "percent":
            low, high = axes.get_ylim()
            axes.set_ylim(max(low, -2.0), min(high, 102.0))
            axes.yaxis.set_major_formatter("{x:g} %")
    if len(labels) > 1:
        legend = figure.legend(
            list(handles.values()),
            list(handles),
            loc="outside lower center",
            ncols=columns,
            frameon=False,
            fontsize=8,
            labelcolor=INK,
        )
        for text in legend.get_texts():
            text.set_parse_math(False)
    return figure


def partition_figure(counts: list[list[int]], class_names: list[str]) -> Figure:
    """Examples per client and class; sizes alone beyond 20 classes or where there are none.

    Args:
        counts: examples of each client (outer) and class (inner).
        class_names: one name per class; empty where the data has no classes.
    """
    sizes = [sum(row) for row in counts]
    if not 1 < len(counts[0]) <= _MAX_CLASSES:
        return _sizes_figure(sizes)
    clients, classes = len(counts), len(counts[0])
    width, height = min(10.5, max(6.5, 1.4 + 0.34 * clients)), 1.5 + 0.26 * classes
    figure = empty_figure(width, height + 0.8)
    above, below = figure.subplots(
        2, 1, sharex=True, gridspec_kw={"height_ratios": [0.7, 0.26 * classes]}
    )
    _size_bars(above, sizes)
    largest = max(max(row) for row in counts)
    if clients <= _MAX_BUBBLES:
        cell = 72 * min((width - 1.4) / clients, 0.26)  # points
        places = [(x, y) for x in range(clients) for y in range(classes) if counts[x][y]]
        below.scatter(
            [x for x, _ in places],
            [y for _, y in places],
            s=[max(1.5, (0.95 * cell) ** 2 * counts[x][y] / largest) for x, y in places],
            c=[PALETTE[y % len(PALETTE)] for _, y in places],
            linewidths=0,
        )
        note = f"client (a circle's area is its examples, at most {largest:,})"
    else:
        red, green, blue = 0.16, 0.53, 0.78  # strong enough on white and on black
        below.imshow(
            [
                [
                    (
                        red,
                        green,
                        blue,
                        counts[x][y] and min(1.0, 0.2 + 0.8 * counts[x][y] / largest),
                    )
                    for x in range(clients)
                ]
                for y in range(classes)
            ],
            aspect="auto",
            interpolation="nearest",
        )
        note = f"client (a cell's strength is its examples, at most {largest:,})"
    below.set_xlim(-0.7, clients - 0.3)
    below.set_ylim(classes - 0.4, -0.6)
    names = class_names or [str(number) for number in range(classes)]
    below.set_yticks(range(classes), [_short(name) for name in names], parse_math=False)
    dress(above, "Examples of each client, and of each class", "")
    dress(below, "", note)
    above.tick_params(labelbottom=False)
    below.grid(axis="y", visible=False)
    return figure


def graph_figure(peers: int, links: Sequence[Sequence[int]]) -> Figure:
    """The peers on a circle, and the links between them."""
    size = min(6.0, 2.2 + 0.12 * peers)
    figure = empty_figure(size, size)
    axes = figure.add_subplot()
    angles = [2 * math.pi * peer / peers for peer in range(peers)]
    xs, ys = [math.sin(angle) for angle in angles], [math.cos(angle) for angle in angles]
    for one, other in links:
        axes.plot(
            [xs[one], xs[other]],
            [ys[one], ys[other]],
            color=INK,
            alpha=max(0.08, min(0.6, 30 / len(links))),
            linewidth=0.8,
            zorder=1,
        )
    axes.scatter(xs, ys, s=max(12, 160 - 3 * peers), color=PALETTE[0], linewidths=0, zorder=2)
    if peers <= _MAX_BUBBLES:
        for peer, (x, y) in enumerate(zip(xs, ys, strict=True)):
            axes.text(
                1.14 * x, 1.14 * y, str(peer), color=INK, fontsize=8, ha="center", va="center"
            )
    axes.set_xlim(-1.3, 1.3)
    axes.set_ylim(-1.3, 1.3)
    axes.set_aspect("equal")
    axes.set_axis_off()
    return figure


def empty_figure(width: float, height: float) -> Figure:
    """A figure of this size (inches)."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _sizes_figure(sizes: list[int]) -> Figure:
    figure = empty_figure(6.5, 2.8)
    axes = figure.add_subplot()
    if len(sizes) <= _MAX_BUBBLES:
        _size_bars(axes, sizes)
        dress(axes, "Examples of each client", "client")
    else:
        axes.hist(sizes, bins=30, color=PALETTE[0])
        dress(axes, f"How many of the {len(sizes)} clients have so many examples", "examples")
    return figure


def _size_bars(axes: Axes, sizes: list[int]) -> None:
    axes.bar(range(len(sizes)), sizes, color=PALETTE[-1], width=0.8 if len(sizes) < 100 else 1.0)
    axes.yaxis.set_major_locator(_ticks(3))


def dress(axes: Axes, title: str, xlabel: str) -> None:
    """Our axes: a title, a label across, and little ink."""
    axes.set_title(title, loc="left", fontsize=9.5, color=INK)
    axes.set_xlabel(xlabel, fontsize=8.5, color=INK)
    axes.set_facecolor("none")
    axes.tick_params(labelsize=8, colors=INK, width=0.6, length=3)
    axes.grid(axis="y", color=INK, alpha=0.12, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set(color=INK, linewidth=0.6)
    axes.xaxis.set_major_locator(_ticks(6, integer="(" not in xlabel or "client" in xlabel))


def _ticks(number: int, *, integer: bool = True) -> MaxNLocator:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(number, integer=integer, min_n_ticks=1)


def _short(name: str) -> str:
    return name if len(name) <= 24 else f"{name[:23]}\u2026"
