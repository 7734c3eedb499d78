"""What a peer on a device holds in memory: one that keeps a copy of the model, and a lean one.

    python benchmarks/peer_memory.py [--peers 4 8] [--hidden 5000] [--rounds 3] [--out FILE]

MSfusion with windows of 1/4 on a perceptron of two hidden layers. All peers first play the rounds
in one process, where what peer 0 is sent is kept. Peer 0 then does its part again in a process of
its own: resident memory over that of the idle process, the highest of each step and what stays.

    start   it makes what it begins with        turn    it trains, and writes its letters
    fold    it reads those of others            between nothing: what stays after the rounds
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from tesserafl.core import seeds
from tesserafl.core.fit import Training
from tesserafl.core.params import num_entries
from tesserafl.data.examples import ClientData, Examples, FederatedData, Spec
from tesserafl.engines.network import Exchange, NetworkSettings
from tesserafl.engines.process import threads
from tesserafl.engines.settings import EngineSettings
from tesserafl.engines.turns import Fold, Place
from tesserafl.methods import MSfusion
from tesserafl.models import MLP
from tesserafl.run.children import give_back_memory
from tesserafl.run.experiment import Experiment
from tesserafl.run.holding import Holding
from tesserafl.run.mailbag import Turns, parcels_of
from tesserafl.run.peer_device import PeerDevice, peer_device
from tesserafl.run.setup import Setup, client_worker, clients_of
from tesserafl.run.spool import Spool

MIB = 1 << 20
EXAMPLES, INPUTS, CLASSES = 32, 64, 10
MOST_BYTES = 32 << 20
EXCHANGES: tuple[Exchange, ...] = ("all_gather", "lean")


def main() -> None:
    """Measure, print a table, and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--peers", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--hidden", type=int, default=5000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--measure", type=Path, default=None, help=argparse.SUPPRESS)
    parser.add_argument("--exchange", choices=EXCHANGES, default=None, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure is not None:
        (peers,) = options.peers
        setup = setup_of(peers, options.hidden, options.rounds, options.exchange)
        with threads(1), tempfile.TemporaryDirectory() as folder:
            # What is loaded at first use, for large models too, is not the model.
            play(setup_of(2, 1200, 2, options.exchange), Path(folder))
            print(json.dumps(measured(setup, options.measure)))
        return
    rows = []
    for peers in options.peers:
        for exchange in EXCHANGES:
            setup = setup_of(peers, options.hidden, options.rounds, exchange)
            with tempfile.TemporaryDirectory() as folder, threads(1):
                play(setup, Path(folder))
                give_back_memory()
                arguments = ["--peers", str(peers), "--hidden", str(options.hidden)]
                arguments += ["--rounds", str(options.rounds), "--exchange", exchange]
                rows.append(_apart([*arguments, "--measure", folder]))
            print(json.dumps(rows[-1]), flush=True)
    if options.out:
        options.out.write_text(json.dumps(rows, indent=1) + "\n")


def play(setup: Setup, folder: Path) -> None:
    """All peers' rounds; what peer 0 is sent is kept in `folder`/sent."""
    devices = [device_of(setup, peer, folder / f"peer-{peer}") for peer in range(_peers(setup))]
    for round in range(setup.experiment.rounds):
        turns = Turns(found={d.client: d.turn(round, MOST_BYTES) for d in devices}, failed=[])
        for device in devices:
            letters = turns.letters_to(device.client)
            order = Fold(
                run="a" * 32,
                client=device.client,
                roster=roster_of(setup),
                round=round,
                answered=turns.answered,
                letters=letters,
            )
            writers = {
                note.sha256: devices[passed.origin].spool
                for passed in letters
                for note in parcels_of([passed])
            }
            for name, spool in writers.items():
                device.spool.store({name: spool.answered(name) or b""})
            if not device.client:
                sent = folder / f"sent/{round}"
                sent.mkdir(parents=True)
                (sent / "order.json").write_text(order.model_dump_json())
                for name in writers:
                    (sent / name).write_bytes(device.spool.fetch(name))
            device.fold(order)


def measured(setup: Setup, folder: Path) -> dict[str, Any]:
    """Peer 0's part of the rounds, in this process; MiB over the idle process."""
    give_back_memory()
    idle, steps = _resident(), dict[str, float]()
    device = _highest(steps, "start", lambda: device_of(setup, 0, folder / "again"))
    seconds = 0.0
    for number in range(setup.experiment.rounds):
        begun = time.perf_counter()
        _highest(steps, "turn", lambda number=number: device.turn(number, MOST_BYTES))
        order = Fold.model_validate_json((folder / f"sent/{number}/order.json").read_text())
        for note in parcels_of(order.letters):
            data = (folder / f"sent/{number}" / note.sha256).read_bytes()
            device.spool.store({note.sha256: data})
            del data
        _highest(steps, "fold", lambda order=order: device.fold(order))
        seconds = time.perf_counter() - begun
    give_back_memory()
    steps["between"] = _resident()
    model = setup.model.num_entries
    return {
        "peers": _peers(setup),
        "exchange": setup.experiment.network.exchange,
        "model_mib": 4 * model / MIB,
        "kept_share": num_entries(device.peer.stored) / model,
        **{f"{step}_mib": round(highest - idle, 1) for step, highest in steps.items()},
        "last_round_seconds": round(seconds, 2),
    }


def setup_of(peers: int, hidden: int, rounds: int, exchange: Exchange) -> Setup:
    """Peers with a few examples each."""
    experiment = Experiment(
        model=MLP(hidden=(hidden, hidden)),
        method=MSfusion(ratio=(0.25,), contrast=0.0, stride=hidden // 20),
        network=NetworkSettings(topology="peers", exchange=exchange),
        training=Training(lr=0.01, batch_size=16),
        engine=EngineSettings(batching="sequential", threads=1),
        rounds=rounds,
        clients_per_round=peers,
    )
    draw = seeds.generator(0, "benchmark")
    inputs = torch.randn(EXAMPLES, INPUTS, generator=draw)
    own = Examples(inputs=inputs, labels=torch.arange(EXAMPLES) % CLASSES)
    nothing = Examples(inputs=inputs[:0], labels=own.labels[:0])
    data = FederatedData(
        spec=Spec(
            kind="vector", task="vector-classification", shape=(INPUTS,), num_classes=CLASSES
        ),
        clients=(ClientData(train=own, validation=nothing, test=nothing),) * peers,
        test=nothing,
    )
    return Setup(
        experiment=experiment,
        data=data,
        model=experiment.model.build_model(data.spec),
        clients=clients_of(experiment, data),
    )


def device_of(setup: Setup, client: int, folder: Path) -> PeerDevice:
    """A device that is a peer, with a new disk."""
    own = setup.data.clients[client]
    worker = replace(client_worker(setup), examples=lambda _: own.train)
    holding = Holding(experiment=setup.experiment, data=own, setup=setup, worker=worker)
    return peer_device(holding, client, roster_of(setup), Spool(folder=folder), True)


def roster_of(setup: Setup) -> list[Place]:
    """All peers."""
    return [Place(num_examples=client.num_examples, memory_bytes=None) for client in setup.clients]


def _peers(setup: Setup) -> int:
    return len(setup.clients)


def _highest(steps: dict[str, float], step: str, do: Callable[[], Any]) -> Any:
    """Do a step, and note the highest memory of it, or of one like it before."""
    give_back_memory()
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
    result = do()
    (line,) = [
        line for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line
    ]
    steps[step] = max(steps.get(step, 0.0), int(line.split()[1]) / 1024)
    return result


def _resident() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / MIB


def _apart(arguments: list[str]) -> Any:
    done = subprocess.run(
        [sys.executable, __file__, *arguments], check=True, stdout=subprocess.PIPE
    )
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
