"""Measure the same FedAvg rounds in TesseraFL, in bare PyTorch and JAX, and in other simulators.

    python benchmarks/peers/run.py --workloads mlp cnn big --systems all --threads 1 2 \\
        --rounds 10 --repeats 3 --out benchmarks/peers/results

Every measurement is a process of its own, in its system's own environment. The systems take turns,
repeat after repeat, so that their ratios are of the same minutes; reported are medians over the
repeats. See docs/howto/benchmarks.md.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import workloads
from environments import NotInstalled, interpreter

HERE = Path(__file__).parent
OURS = "tessera"
BOUND = "loop"  # what a correct FedAvg must agree with


@dataclass(frozen=True, kw_only=True)
class System:
    """How a system is run."""

    script: str
    """in `systems/`, without .py"""
    arguments: tuple[str, ...] = ()
    """of the script, beside those that all have"""
    environment: str | None = None
    """of `requirements/`; None: the Python that runs this"""
    workloads: tuple[str, ...] = ("mlp", "cnn", "big")
    """what it can do"""
    slow: tuple[str, ...] = ()
    """workloads whose rounds take long: a third of the rounds is timed"""


SYSTEMS = {
    OURS: System(script="tessera"),
    "tessera_sequential": System(script="tessera", arguments=("--batching", "sequential")),
    "tessera_vmapped": System(script="tessera", arguments=("--batching", "vmapped")),
    "tessera_compiled": System(
        script="tessera", arguments=("--batching", "compiled"), workloads=("mlp",)
    ),
    "floor": System(script="floor"),
    BOUND: System(script="loop"),
    "vmap": System(script="vmap"),
    "bmm": System(script="bmm", workloads=("mlp",)),
    "vmap_compiled": System(script="vmap_compiled", workloads=("mlp",)),
    "jax_round": System(script="jax_round", environment="jax", slow=("cnn",)),
    "pfl_research": System(script="pfl_research", environment="pfl"),
    "fedjax": System(script="fedjax_fedavg", environment="fedjax"),
    "fedlab": System(script="fedlab_fedavg", environment="fedlab"),
    "flgo": System(script="flgo_fedavg", environment="flgo"),
    "fluke": System(script="fluke_fedavg", environment="fluke"),
    "nvflare": System(
        script="nvflare_simulator", environment="nvflare", slow=("mlp", "cnn", "big")
    ),
    "flower": System(script="flower_simulation", environment="flower", slow=("mlp", "cnn", "big")),
}

Row = dict[str, Any]
Key = tuple[str, int, str]  # workload, threads, system


def main() -> None:
    """Measure, print, and write results.json and results.html."""
    options = _options()
    options.out.mkdir(parents=True, exist_ok=True)
    files = {name: workloads.write(name, options.out / "data") for name in options.workloads}
    chosen = list(SYSTEMS) if options.systems == ["all"] else options.systems
    pythons: dict[str, Path | str] = {}  # or why there is none
    missing: dict[Key, str] = {}
    measured: dict[Key, list[Row]] = {}
    for system in chosen:
        try:
            pythons[system] = interpreter(SYSTEMS[system].environment, options.envs)
        except NotInstalled as error:
            pythons[system] = f"not installed: {error}"
            print(f"{system}: {pythons[system]}", file=sys.stderr)
    keys = [
        (workload, threads, system)
        for workload in options.workloads
        for threads in options.threads
        for system in chosen
    ]
    for workload, threads, system in keys:
        if workload not in SYSTEMS[system].workloads:
            missing[workload, threads, system] = "is not made for this workload"
        elif isinstance(reason := pythons[system], str):
            missing[workload, threads, system] = reason
    for repeat in range(options.repeats):
        for key in keys:
            if key in missing:
                continue
            workload, threads, system = key
            python = Path(pythons[system])
            row = _measure(SYSTEMS[system], python, files[workload], threads, options)
            if isinstance(row, str):
                missing[key] = row
                measured.pop(key, None)
            else:
                measured.setdefault(key, []).append(row)
            state = row if isinstance(row, str) else f"{row['ms_per_round']:.4g} ms"
            print(
                f"repeat {repeat + 1}/{options.repeats} {workload} {threads} {system}: {state}",
                file=sys.stderr,
                flush=True,
            )
    results = {
        "when": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": {
            "cores": os.cpu_count(),
            "processor": _processor(),
            "python": platform.python_version(),
        },
        "rounds": options.rounds,
        "repeats": options.repeats,
        "rows": summarise(measured),
        "not_measured": [
            {"workload": key[0], "threads": key[1], "system": key[2], "reason": reason}
            for key, reason in missing.items()
        ],
    }
    (options.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    from page import page, text

    (options.out / "results.html").write_text(page(results), encoding="utf-8")
    print(text(results))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--workloads", nargs="+", default=["mlp"], choices=list(workloads.SHAPES))
    parser.add_argument("--systems", nargs="+", default=["all"], choices=["all", *SYSTEMS])
    parser.add_argument("--threads", nargs="+", type=int, default=[1])
    parser.add_argument("--rounds", type=int, default=10, help="timed rounds of one process")
    parser.add_argument("--warmup", type=int, default=2, help="rounds before them; at least 1")
    parser.add_argument("--repeats", type=int, default=3, help="processes of each system")
    parser.add_argument("--limit", type=float, default=600, help="seconds that a process may take")
    parser.add_argument("--envs", type=Path, default=HERE / ".envs")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    options = parser.parse_args()
    if min(options.rounds, options.warmup, options.repeats, *options.threads) < 1:
        parser.error("rounds, warmup, repeats and threads are at least 1")
    return options


def _measure(
    system: System, python: Path, file: Path, threads: int, options: argparse.Namespace
) -> Row | str:
    """One process's line, or why there is none."""
    rounds = max(1, options.rounds // 3) if file.stem in system.slow else options.rounds
    command = [str(python), str(HERE / "systems" / f"{system.script}.py"), str(file.absolute())]
    command += ["--rounds", str(rounds), "--warmup", str(options.warmup)]
    command += ["--threads", str(threads), *system.arguments]
    limits = ("OMP", "MKL", "OPENBLAS", "NUMEXPR", "VECLIB_MAXIMUM")
    environment = {**os.environ, **{f"{name}_NUM_THREADS": str(threads) for name in limits}}
    # A process group of its own, so that a system's workers can be ended with it.
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
        cwd=options.out,
    )
    try:
        out, errors = process.communicate(timeout=options.limit)
    except subprocess.TimeoutExpired:
        return f"took more than {options.limit:.0f} s"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    lines = [line for line in out.splitlines() if line.startswith('{"system"')]
    if not lines:
        said = errors.strip().splitlines() or ["it printed nothing"]
        return f"failed: {said[-1][:200]}"
    row: Row = json.loads(lines[-1])
    return row


def summarise(measured: dict[Key, list[Row]]) -> list[Row]:
    """Medians over repeats, ratios to ours within each repeat, and what the checks say."""
    rows = []
    for key, repeats in measured.items():
        workload, threads, _ = key
        row = dict(repeats[0])
        for name in ("ms_per_round", "cpu_ms_per_round", "first_round_ms", "peak_rss_mb"):
            row[name] = statistics.median(repeat[name] for repeat in repeats)
        row["repeats"] = [repeat["ms_per_round"] for repeat in repeats]
        ours = measured.get((workload, threads, OURS), [])
        pairs = zip(row["repeats"], ours, strict=False)
        ratios = [wall / other["ms_per_round"] for wall, other in pairs]
        row["ratio_to_ours"] = statistics.median(ratios) if ratios else None
        bound = measured.get((workload, threads, BOUND), [])
        row["check"] = _check(row, bound[0] if bound else None)
        rows.append(row)
    return rows


def _check(row: Row, bound: Row | None) -> str:
    """What the trained model and the counted steps say."""
    if row["steps"] is not None and abs(row["steps"] - row["expected_steps"]) > 1e-6:
        return f"trains {row['steps']:g} steps, not {row['expected_steps']}"
    if row["loss"] is None:
        return "no model"
    if bound is None or bound["rounds"] != row["rounds"] or row["own_cohorts"]:
        return f"loss {row['loss']:.4f}"
    off = abs(row["loss"] - bound["loss"]) / bound["loss"]
    if off < 1e-4:
        return "same model"
    return f"loss {100 * off:.2g} % off" if off < 0.05 else f"loss {100 * off:.0f} % OFF"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":")[1].strip() for line in lines if "model name" in line), "unknown")


if __name__ == "__main__":
    main()
