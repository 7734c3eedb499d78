"""The command line. `tessera --help` answers at once: heavy imports happen inside the commands."""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import tyro

from tesserafl import __version__

COMMANDS = {
    "run": "NAME|FILE  run a named experiment, a TOML file or a run folder's config.json",
    "resume": "RUN     continue a run or a study that was interrupted",
    "serve": "NAME|FILE  run an experiment on devices that join",
    "join": "FOLDER|ADDRESS  be a device of a run that is served",
    "edge": "FOLDER|ADDRESS  be an edge of a run that is served, with devices of its own",
    "plan": "NAME|FILE  what a run would cost each client, and how coverage grows; trains nothing",
    "bench": "NAME|FILE  how fast its rounds are here, for every way to train the clients",
    "learn": "NAME|FILE  learn when the nodes of a tree synchronise (tomtit, hwamei)",
    "list": "WHAT       methods, models, data or experiments",
    "compare": "RUN... tables and plots of several runs at equal rounds, bytes and FLOPs",
    "report": "RUN     write the report of a run folder anew",
    "assemble": "PART... the model of peers that each kept a part",
    "certs": "FOLDER  keys and certificates of a server and its devices",
    "token": "FOLDER  a line of text with which a device joins a server",
    "proxy": "FOLDER  the proxy in front of a server: devices reach what they need, no more",
    "doctor": "        check this machine and installation",
}

EPILOG = """`tessera run NAME --help` lists every setting of that experiment.
TESSERA_TRACEBACK=1 shows where an error comes from."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of `tessera`; exits with 1 after an error of the user's, 2 after a wrong call."""
    args = list(sys.argv[1:] if arguments is None else arguments)
    if not args or args[0] in ("-h", "--help", "help"):
        print(_help())
        return
    if args[0] in ("-V", "--version"):
        print(f"tessera {__version__}")
        return
    from tesserafl.core.errors import TesseraError, did_you_mean

    if args[0] not in COMMANDS:
        _fail(f"unknown command {args[0]!r}; {did_you_mean(args[0], COMMANDS)}", 2)
    # cuBLAS repeats its bits only with a workspace of its own, set before torch loads.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    try:
        _COMMANDS[args[0]](args[1:])
    except TesseraError as error:
        if os.environ.get("TESSERA_TRACEBACK"):
            traceback.print_exc()
        _fail(str(error), 1)
    except KeyboardInterrupt:
        _fail("interrupted; tessera resume, with the run folder, goes on from its checkpoint", 130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # the reader has gone, as in `| head`
    except OSError as error:
        if os.environ.get("TESSERA_TRACEBACK"):
            traceback.print_exc()
        _fail(f"{error.filename or 'a file'}: {error.strerror or error}", 1)


def _help() -> str:
    lines = [f"tessera {__version__}: federated training of models larger than any participant", ""]
    lines += [f"  tessera {name:8} {text}" for name, text in COMMANDS.items()]
    return "\n".join([*lines, "", EPILOG])


def _fail(message: str, code: int) -> None:
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(code)


def _run(args: list[str]) -> None:
    from tesserafl.arguments import RunOptions, configured
    from tesserafl.run.runner import start
    from tesserafl.run.shown import show
    from tesserafl.run.study import repeated, start_study

    name, named, options, experiment, asked = configured("run", args, RunOptions())
    folder = options.out or _fresh(Path("runs") / name)
    rows = dict(named.rows(experiment, asked)) if named.rows else {name: experiment}
    rows = repeated(rows, options.repeats)
    with _progress() as progress:
        if named.rows or options.repeats > 1:
            summary = start_study(rows, folder, progress.announce, progress.listen)
        else:
            summary = start(experiment, folder, progress.listen)
    show(summary, folder, options.json)


def _resume(args: list[str]) -> None:
    from tesserafl.arguments import ResumeOptions
    from tesserafl.run.deployed import is_deployed
    from tesserafl.run.runner import resume
    from tesserafl.run.serve import resume_serving
    from tesserafl.run.shown import show
    from tesserafl.run.study import is_study, resume_study

    options = tyro.cli(ResumeOptions, args=args, prog="tessera resume")
    folder, as_json = options.run, options.json
    with _progress() as progress:
        if is_study(folder):
            summary = resume_study(folder, progress.announce, progress.listen)
        elif is_deployed(folder):
            summary = resume_serving(folder, progress.listen)
        else:
            summary = resume(folder, progress.listen)
    show(summary, folder, as_json)


def _serve(args: list[str]) -> None:
    from tesserafl.run.shown import show
    from tesserafl.serving import served

    with _progress() as progress:
        summary, folder, as_json = served(args, _fresh, progress.listen)
    show(summary, folder, as_json)


def _join(args: list[str]) -> None:
    from tesserafl.serving import joined

    joined(args)


def _assemble(args: list[str]) -> None:
    from tesserafl.serving import assembled

    assembled(args)


def _edge(args: list[str]) -> None:
    from tesserafl.serving import hosted

    hosted(args)


def _plan(args: list[str]) -> None:
    from rich.console import Console

    from tesserafl.arguments import PlanOptions, configured
    from tesserafl.run.on_devices import as_tree
    from tesserafl.run.plan import described, make_plan
    from tesserafl.run.setup import prepare

    _, _, options, experiment, _ = configured("plan", args, PlanOptions())
    plan = make_plan(prepare(as_tree(experiment) if options.edges else experiment))
    if options.json:
        print(json.dumps(asdict(plan)))
    else:
        console = Console(highlight=False)
        for part in described(plan):
            console.print(part)


def _bench(args: list[str]) -> None:
    from rich.console import Console

    from tesserafl.arguments import BenchOptions, configured
    from tesserafl.run.bench import bench, described

    _, _, options, experiment, _ = configured("bench", args, BenchOptions())
    result = bench(experiment, options.timed)
    if options.json:
        print(json.dumps(asdict(result)))
        return
    console = Console(highlight=False)
    for part in described(result):
        console.print(part)


def _learn(args: list[str]) -> None:
    from tesserafl.arguments import LearnOptions, configured
    from tesserafl.run.learn import learn, line_of

    name, _, options, experiment, _ = configured("learn", args, LearnOptions())
    folder = options.out or _fresh(Path("runs") / f"{name}-policy")
    result = learn(
        experiment, folder, options.learning, lambda event: print(line_of(event), flush=True)
    )
    if options.json:
        print(json.dumps(result))


def _list(args: list[str]) -> None:
    from rich.console import Console

    from tesserafl.core.errors import did_you_mean
    from tesserafl.data import PARTITIONS, SOURCES
    from tesserafl.experiments import EXPERIMENTS
    from tesserafl.methods import METHODS
    from tesserafl.models import MODELS

    def described(kinds: Any) -> dict[str, str]:
        modules = {name: sys.modules[kind.__module__].__doc__ or "" for name, kind in kinds.items()}
        return {name: text.strip().splitlines()[0] for name, text in modules.items()}

    sections = {
        "methods": lambda: described(METHODS),
        "models": lambda: described(MODELS),
        "data": lambda: {**SOURCES, **{f"partition {k}": v for k, v in PARTITIONS.items()}},
        "experiments": lambda: {name: named.summary for name, named in EXPERIMENTS.items()},
    }
    if not args or args[0] not in sections:
        given = args[0] if args else ""
        _fail(f"tessera list {given}: {did_you_mean(given, sections)}", 2)
    console = Console(soft_wrap=True, highlight=False)
    entries = sections[args[0]]()
    width = max(map(len, entries))
    for name, text in entries.items():
        console.print(f"[bold]{name:{width}}[/bold]  {text}")


def _compare(args: list[str]) -> None:
    from rich.console import Console

    from tesserafl.arguments import CompareOptions
    from tesserafl.run.compare import compare

    options = tyro.cli(CompareOptions, args=args, prog="tessera compare")
    comparison = compare(options.runs)
    if options.out is not None:
        comparison.write_page(options.out)
    if options.json:
        print(json.dumps(comparison.as_json()))
    else:
        Console().print(comparison.as_table())


def _report(args: list[str]) -> None:
    from tesserafl.arguments import ReportOptions
    from tesserafl.run.report import write_report

    print(write_report(tyro.cli(ReportOptions, args=args, prog="tessera report").run))


def _doctor(args: list[str]) -> None:
    from tesserafl.run.doctor import examine

    healthy = True
    for finding in examine():
        healthy = healthy and finding.good
        print(f"{'ok  ' if finding.good else 'BAD '} {finding.what}: {finding.found}")
    if not healthy:
        raise SystemExit(1)


def _deployment(name: str) -> Callable[[list[str]], None]:
    def command(args: list[str]) -> None:
        from tesserafl.deployment import COMMANDS

        COMMANDS[name](args)

    return command


_COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "run": _run,
    "resume": _resume,
    "serve": _serve,
    "join": _join,
    "assemble": _assemble,
    "edge": _edge,
    "plan": _plan,
    "bench": _bench,
    "learn": _learn,
    "list": _list,
    "compare": _compare,
    "report": _report,
    **{name: _deployment(name) for name in ("certs", "token", "proxy")},
    "doctor": _doctor,
}


def _fresh(folder: Path) -> Path:
    candidate, number = folder, 1
    while candidate.exists():
        number += 1
        candidate = folder.with_name(f"{folder.name}-{number}")
    return candidate


def _progress() -> Any:
    from tesserafl.run.progress import Progress

    return Progress()


if __name__ == "__main__":
    main()
