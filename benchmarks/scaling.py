"""What a participant has to do as more of them take part: a figure from finished runs.

    tessera run paper_msfusion --data.path FOLDER --out runs/peers
    python benchmarks/scaling.py runs/peers/scale-* --out scaling.svg

Four panels over the number of participants, on logarithmic axes but for accuracy: accuracy of the
assembled model, parameters that a participant trains, its FLOPs in the run, bytes that it sends in
a round. Runs of one number are averaged. Prints the numbers as a table too.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import mean
from typing import Any

from matplotlib.figure import Figure

from tesserafl.run.plots import INK, PALETTE
from tesserafl.run.record import Record, read_record

Summary = Mapping[str, Any]
PANELS: dict[str, Callable[[Summary, int], float]] = {
    "accuracy (%)": lambda done, count: 100 * done["accuracy"],
    "parameters trained": lambda done, count: done["params_largest_client"],
    "GFLOP in the run": lambda done, count: done["flops"] / count / 1e9,
    "MB sent in a round": lambda done, count: done["bytes_up"] / count / done["rounds"] / 1e6,
}


def main() -> None:
    """Read the runs, print the table, write the figure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, default=Path("scaling.svg"))
    options = parser.parse_args()
    lines: dict[str, dict[int, list[Summary]]] = {}
    for folder in options.runs:
        if (folder / "summary.json").exists():
            record = read_record(folder)
            count = int(record.config["data"]["num_clients"])
            lines.setdefault(_label(record), {}).setdefault(count, []).append(record.outcome)
    figure = Figure(figsize=(10.5, 2.9), layout="constrained")
    for place, (title, value) in enumerate(PANELS.items()):
        axes = figure.add_subplot(1, len(PANELS), place + 1)
        for number, (label, counts) in enumerate(sorted(lines.items())):
            xs = sorted(counts)
            ys = [mean(value(done, x) for done in counts[x]) for x in xs]
            numbers = "  ".join(f"{x}: {y:.4g}" for x, y in zip(xs, ys, strict=True))
            print(f"{label:24} {title:20} {numbers}")
            axes.plot(xs, ys, color=PALETTE[number], marker="os^D"[number % 4], label=label)
        axes.set_xscale("log")
        if place:
            axes.set_yscale("log")
        axes.set_xticks(xs, [str(x) for x in xs])
        axes.minorticks_off()
        axes.set_title(title, loc="left", fontsize=9.5, color=INK)
        axes.set_xlabel("participants", fontsize=8.5, color=INK)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8, colors=INK)
    figure.axes[0].legend(frameon=False, fontsize=8)
    figure.savefig(options.out, facecolor="white", metadata={"Date": None})


def _label(record: Record) -> str:
    method = record.config["method"]
    phase = method.get("layer_phase", "same")
    return str(method["name"]) + ("" if phase == "same" else f", {phase}")


if __name__ == "__main__":
    main()
