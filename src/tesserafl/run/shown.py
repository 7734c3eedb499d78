"""What a command prints of a run, or of a study, that is over."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console

from tesserafl.run.compare import compare


def _frozen(summary: dict[str, Any]) -> str:
    if "trainable_share" not in summary:
        return ""
    return (
        f" and trained at most {summary['params_trained']:,}, {summary['trainable_share']:.3%} of "
        f"the frozen model's {summary['params_frozen']:,}"
    )


def show(summary: dict[str, Any], folder: Path, as_json: bool) -> None:
    """Print a summary: as a sentence and where the report is, or as one JSON object."""
    console = Console()
    if as_json:
        print(json.dumps(summary))
        return
    if "rows" in summary:
        console.print(compare([folder]).as_table())
        console.print(f"Comparison: {folder / 'comparison.html'}", soft_wrap=True, markup=False)
        return
    share = summary["params_largest_client"] / summary["params_full"]
    accuracy, rounds = summary["accuracy"], f"{summary['rounds']} rounds"
    reached = f"{rounds}; nobody holds the whole model, so it was not tested"
    if accuracy is not None:
        reached = f"accuracy {accuracy:.4f} after {rounds}"
    console.print(
        f"{summary['method']}: {reached}; the largest client held "
        f"{summary['params_largest_client']:,} of {summary['params_full']:,} parameters "
        f"({share:.1%}){_frozen(summary)}",
        soft_wrap=True,
        highlight=False,
        markup=False,
    )
    for key, what in {"personal": "their own models", "finetuned": "fine-tuned models"}.items():
        if own := summary.get(f"accuracy_{key}"):
            mean = sum(own) / len(own)
            text = f"On the tests of {len(own)} clients {what} reach {mean:.4f} on average"
            console.print(text, soft_wrap=True, highlight=False, markup=False)
    console.print(
        f"Report: {folder / 'report.html'}", soft_wrap=True, highlight=False, markup=False
    )
