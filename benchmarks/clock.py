"""How fast virtual time passes, and what a server of very many devices holds in memory.

    python benchmarks/clock.py [--devices 1000 10000] [--events 20000] [--out clock.json]

    synchronous    FedAvg, 100 devices a round
    asynchronous   FedBuff, 100 devices at work, 10 answers a model
    crowded        the same with a tenth of all devices at work

An event is a device's work that ended. Nobody trains: an engine answers at once, with a model of
some dozen parameters, so that the time is the clock's and the server's. Devices are of four classes
under a load that switches, come and go, and are slowed down so that a work takes minutes. Each row
has a process of its own.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from tesserafl.core.coverage import Coverage
from tesserafl.core.fit import Training
from tesserafl.core.messages import Memory, Task, Update
from tesserafl.data.examples import ClientData, Examples, FederatedData, Spec
from tesserafl.engines.clock import ClockSettings
from tesserafl.engines.device import Placed
from tesserafl.engines.federation import Star
from tesserafl.engines.fleet import FleetSettings, generated
from tesserafl.engines.process import threads
from tesserafl.engines.seam import Done, Outcome
from tesserafl.engines.settings import EngineSettings
from tesserafl.methods import FedAvg, FedBuff, MethodSettings
from tesserafl.models import MLP
from tesserafl.run.experiment import Experiment
from tesserafl.run.setup import Setup, clients_of
from tesserafl.run.timed import Timed

MIB = 1 << 20
AT_WORK = 100
SLOWER = 1e9
FLEET = FleetSettings(
    profiles=("raspberry-pi-4", "raspberry-pi-5", "phone", "laptop"),
    load=(0.1, 0.4, 0.8),
    online=0.8,
)


def main() -> None:
    """Measure every mode at every size, print, and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--devices", type=int, nargs="+", default=[1000, 10_000])
    parser.add_argument("--events", type=int, default=20_000)
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--mode", choices=list(MODES), default=None)
    options = parser.parse_args()
    if options.mode is not None:
        print(json.dumps(measured(options.mode, options.devices[0], options.events)))
        return
    rows = []
    for mode in MODES:
        for devices in options.devices:
            rows.append(_apart(mode, devices, options.events))
            print(json.dumps(rows[-1]), flush=True)
    if options.out:
        options.out.write_text(json.dumps(rows, indent=1) + "\n")


def measured(mode: str, devices: int, events: int) -> dict[str, Any]:
    """Play until so many works have ended; events a second, resident memory before and at most."""
    with threads(1):
        timed = _server(mode, devices)
        coverage = Coverage(timed.setup.model.shapes)
        timed.play(coverage)  # what is counted and probed once
        before, begun, ended, models = _resident(), time.perf_counter(), 0, 0
        while ended < events:
            notes = timed.play(coverage)
            ended += len(notes.clients) + len(notes.failures)
            models += 1
        seconds = time.perf_counter() - begun
    return {
        "mode": mode,
        "devices": devices,
        "events": ended,
        "models": models,
        "seconds": seconds,
        "events_per_second": ended / seconds,
        "virtual_hours": timed.now / 3600,
        "before_mib": before,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024.0,
    }


@dataclass(kw_only=True)
class Constant:
    """Clients that answer at once and all the same."""

    update: Update
    memories: dict[int, Memory] = field(default_factory=dict)
    _waiting: deque[Sequence[Task]] = field(default_factory=deque)
    capacity = 1
    group = 1

    def restore(self, memories: Mapping[int, Memory]) -> None:
        """Nobody remembers anything."""

    def submit(self, tasks: Sequence[Task]) -> None:
        """Queue a group."""
        self._waiting.append(tasks)

    def poll(self) -> list[Outcome]:
        """The oldest group's answers."""
        return [
            Done(
                client=task.client.id,
                update=self.answer(task.client.id, task.round),
                seconds=0.0,
            )
            for task in self._waiting.popleft()
        ]

    def answer(self, client: int, round: int) -> Update:
        """The one change, as this client's."""
        one = self.update
        return Update(
            round=round,
            client=client,
            submodel=one.submodel,
            delta=one.delta,
            num_examples=one.num_examples,
            num_steps=one.num_steps,
            metrics=one.metrics,
        )

    def close(self) -> None:
        """Nothing to release."""


def _server(mode: str, devices: int) -> Timed:
    clock, method = MODES[mode]
    if mode == "crowded":
        clock = ClockSettings(mode="asynchronous", buffer=10, concurrency=devices // 10)
    setup = _setup(devices, clock, method)
    state, fleet = method.init(setup.model, 0, 1 << 30), generated(FLEET, devices, seed=0)
    task = next(method.configure(setup.model, state, setup.clients[:1], Training()))
    update = Update(
        round=0,
        client=0,
        submodel=task.submodel,
        delta={name: torch.full_like(tensor, 1e-6) for name, tensor in task.params.items()},
        num_examples=task.client.num_examples,
        num_steps=1,
        metrics={"loss": 1.0},
    )
    return Timed(
        setup=setup,
        engine=Constant(update=update),
        federation=Star(model=setup.model, method=method, state=state),
        fleet=replace(fleet, devices=tuple(map(_slowed, fleet.devices))),
        costs=setup.costs(),
    )


def _slowed(placed: Placed) -> Placed:
    return replace(placed, device=replace(placed.device, gflops=placed.device.gflops / SLOWER))


def _setup(devices: int, clock: ClockSettings, method: MethodSettings) -> Setup:
    """Clients that all hold the same few examples, so that they take no memory."""
    spec = Spec(kind="vector", task="vector-classification", shape=(8,), num_classes=2)
    inputs, labels = torch.zeros(20, 8), torch.arange(20) % 2
    train, nothing = (
        Examples(inputs=inputs, labels=labels),
        Examples(inputs=inputs[:0], labels=labels[:0]),
    )
    own = ClientData(train=train, validation=nothing, test=nothing)
    experiment = Experiment(
        model=MLP(hidden=(4,)),
        method=method,
        training=Training(batch_size=16),
        engine=EngineSettings(batching="sequential"),
        fleet=FLEET,
        clock=clock,
        rounds=1 << 30,
        clients_per_round=AT_WORK,
    )
    data = FederatedData(spec=spec, clients=(own,) * devices, test=nothing)
    return Setup(
        experiment=experiment,
        data=data,
        model=experiment.model.build_model(spec),
        clients=clients_of(experiment, data),
    )


def _resident() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / MIB


def _apart(mode: str, devices: int, events: int) -> Any:
    command = [sys.executable, __file__, "--mode", mode]
    command += ["--devices", str(devices), "--events", str(events)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE)
    return json.loads(done.stdout.splitlines()[-1])


FREE = ClockSettings(mode="asynchronous", buffer=10, concurrency=AT_WORK)
MODES: dict[str, tuple[ClockSettings, MethodSettings]] = {
    "synchronous": (ClockSettings(), FedAvg()),
    "asynchronous": (FREE, FedBuff()),
    "crowded": (FREE, FedBuff()),
}

if __name__ == "__main__":
    main()
