"""A page that needs nothing but itself: style, tables and figures inside."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from tesserafl.run.files import write_atomic
from tesserafl.run.plots import INK, PALETTE

if TYPE_CHECKING:
    from matplotlib.figure import Figure

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


def page_html(title: str, body: str) -> str:
    """A whole page around `body`: nothing in it is fetched from anywhere."""
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)} - TesseraFL</title><style>{_STYLE}</style></head>\n"
        f"<body>\n{body}\n</body></html>\n"
    )


def figure_html(figure: Figure, name: str, caption: str = "") -> str:
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


def svg_of(figure: Figure, prefix: str) -> str:
    """The figure as an `<svg>` element for a page: text in the page's colour, ids of its own."""
    file = io.StringIO()
    figure.savefig(file, format="svg", facecolor="none", dpi=200)
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'^<svg [^>]*?(viewBox="[^"]*")[^>]*>', r"<svg \1>", svg)
    numbers: dict[str, int] = {}

    def renamed(match: re.Match[str]) -> str:
        number = numbers.setdefault(match[2], len(numbers))
        return f"{match[1]}{prefix}-{number}{match[3]}"

    svg = re.sub(r'( id="|href="#|url\(#)([^")]+)(["\)])', renamed, svg)
    svg = svg.replace(INK, "currentColor")
    return svg.replace(PALETTE[0], f"var(--first, {PALETTE[0]})").strip()


def write_png(figure: Figure, path: Path) -> None:
    """The figure on white, 120 dots per inch."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=120, facecolor="white")
    write_atomic(path, file.getvalue())
