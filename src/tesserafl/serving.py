"""The commands of runs on devices, without what they print."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import tyro

from tesserafl.arguments import (
    AssembleOptions,
    EdgeOptions,
    JoinOptions,
    ServeOptions,
    configured,
)
from tesserafl.run.deployed import begin
from tesserafl.run.edge_host import host
from tesserafl.run.holding import Local
from tesserafl.run.join import join, line_to
from tesserafl.run.parts import assemble
from tesserafl.run.runner import Listener
from tesserafl.run.serve import serve


def served(
    args: list[str], fresh: Callable[[Path], Path], listener: Listener
) -> tuple[dict[str, Any], Path, bool]:
    """`tessera serve`: the run's summary, its folder, and whether JSON is wanted."""
    name, _, options, experiment, asked = configured("serve", args, ServeOptions())
    devices = options.deployment.devices
    # A named experiment's numbers are those of a simulation.
    if "data.num_clients" not in asked:
        experiment = replace(experiment, data=replace(experiment.data, num_clients=devices))
    if "clients_per_round" not in asked:
        experiment = replace(experiment, clients_per_round=experiment.data.num_clients)
    folder = options.out or fresh(Path("runs") / name)
    begin(experiment, options.deployment, folder)
    return serve(folder, options.link, listener), folder, options.json


def joined(args: list[str]) -> None:
    """`tessera join`: a device, until it is stopped."""
    options = tyro.cli(JoinOptions, args=args, prog="tessera join")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    line = line_to(options.place, options.name)
    name = line.name_of(options.name)
    folder = options.folder or line.folder_of(name)
    join(line, name, folder, options.local, memory_mib=options.memory_mib, once=options.once)


def assembled(args: list[str]) -> None:
    """`tessera assemble`: the model of peers that each kept a part."""
    options = tyro.cli(AssembleOptions, args=args, prog="tessera assemble")
    found = assemble(options.parts, options.out)
    if options.json:
        print(json.dumps(found))
        return
    print(f"{options.out}: {found['entries']:,} parameters after {found['rounds']} rounds")


def hosted(args: list[str]) -> None:
    """`tessera edge`: an edge, until it is stopped."""
    options = tyro.cli(EdgeOptions, args=args, prog="tessera edge")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    line = line_to(options.place, options.name)
    name = line.name_of(options.name)
    folder = options.folder or line.folder_of(name)
    local = Local(model=options.model)
    host(line, name, folder, options.link, options.hosting, local, once=options.once)
