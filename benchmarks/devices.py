"""Seconds of a round, bytes on the wire and memory on real devices' processes, over Flower.

    python benchmarks/devices.py [--mib 1 50 500] [--devices 2] [--rounds 3] [--bar] [--out FILE]

A server and its devices are processes of this machine (`tessera serve`, `tessera join`), without
TLS. A perceptron of so many MiB, FedAvg, every device takes one step a round: what is measured is
the transport. `--bar` measures beside it a plain Flower app with Flower's own FedAvg strategy,
whose devices send back arrays of the same sizes, on processes of the same kind.

`round` is the median over rounds but the first. `wire` is all bytes of tasks and updates as they
are handed to Flower, over the bytes of the parameters that are meant. `device` and `server` are the
largest resident sets of all of a device's, or the server's, processes together, sampled ten times a
second, less what they had when all had joined and nothing was asked of them yet; over the bytes of
one payload.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tesserafl.run.children import end, free_port, program, running
from tesserafl.run.flower_env import SUPERLINK_FLAGS, environment

MIB = 1 << 20
HERE = Path(__file__).parent


def main() -> None:
    """Measure, print and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--mib", nargs="+", type=int, default=[1, 50])
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--bar", action="store_true", help="also Flower's own FedAvg")
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    table = []
    for mib in options.mib:
        ways = [ours, plain] if options.bar else [ours]
        for way in ways:
            with tempfile.TemporaryDirectory() as folder:
                row = way(Path(folder), mib, options.devices, options.rounds)
            table.append({"way": way.__name__, "mib": mib, **row})
            print(json.dumps(table[-1]), flush=True)
    if options.out:
        options.out.write_text(json.dumps(table, indent=1) + "\n")


def ours(folder: Path, mib: int, devices: int, rounds: int) -> dict[str, Any]:
    """`tessera serve` and `tessera join`."""
    port, width = free_port(), math.isqrt(mib * MIB // 4)
    tessera = str(Path(sys.executable).parent / "tessera")
    serve = [tessera, "serve", "quickstart", "--out", str(folder / "run"), "--port", str(port)]
    serve += ["--devices", str(devices), "--data.num-clients", str(devices)]
    serve += ["--data.partition", "iid", "--clients-per-round", str(devices)]
    serve += ["--rounds", str(rounds), "--checkpoint-every", str(rounds)]
    serve += ["--evaluate-every", str(rounds), "--method", "fedavg", "--method.ratio", "1.0"]
    serve += ["--model.hidden", str(width), str(width), "--model.norm", "none"]
    serve += ["--training.steps", "1"]
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(running(serve, os.environ, folder / "serve.log"))
        joined = [
            stack.enter_context(
                running(
                    [
                        *(tessera, "join", f"127.0.0.1:{port}", "--client", str(n)),
                        *("--name", f"d{n}", "--folder", str(folder / f"d{n}"), "--once"),
                    ],
                    os.environ,
                    folder / f"d{n}.log",
                )
            )
            for n in range(devices)
        ]
        # Written when all have joined.
        with watching([server.pid, joined[0].pid], (folder / "run/devices.json").exists) as peaks:
            if server.wait() != 0:
                raise SystemExit((folder / "serve.log").read_text())
    lines = (folder / "run/events.jsonl").read_text().splitlines()
    seconds = [event["seconds"] for event in map(json.loads, lines) if event["kind"] == "round"]
    summary = json.loads((folder / "run/summary.json").read_text())
    wire = json.loads((folder / "run/wire.json").read_text())
    payload = summary["params_full"] * 4
    assert abs(payload / (mib * MIB) - 1) < 0.25, "another model than was meant"
    return {
        "round": _later([b - a for a, b in zip([0.0, *seconds], seconds, strict=False)]),
        "wire": (wire["down"] + wire["up"]) / (summary["bytes_down"] + summary["bytes_up"]),
        "server": peaks[0] / payload,
        "device": peaks[1] / payload,
    }


def plain(folder: Path, mib: int, devices: int, rounds: int) -> dict[str, Any]:
    """A plain Flower app: the strategy FedAvg, and clients that return what they were sent."""
    home, port = folder / "flower", free_port()
    home.mkdir()
    shutil.copytree(HERE / "flower_fedavg", folder / "app")
    text = f'[superlink]\ndefault = "bar"\n[superlink.bar]\naddress = "127.0.0.1:{port}"\n'
    (home / "config.toml").write_text(text + "insecure = true\n")
    env = environment(home)
    link = [program("flower-superlink"), *SUPERLINK_FLAGS, "--insecure", "--host", "127.0.0.1"]
    with contextlib.ExitStack() as stack:
        log = folder / "link.log"
        server = stack.enter_context(running([*link, "--port", str(port)], env, log))
        time.sleep(10)
        nodes = [
            stack.enter_context(
                running(
                    [
                        *(program("flower-supernode"), "--insecure"),
                        *("--superlink", f"127.0.0.1:{port}"),
                        *("--host", "127.0.0.1", "--port", str(free_port())),
                    ],
                    environment(folder / f"node{n}"),
                    folder / f"node{n}.log",
                )
            )
            for n in range(devices)
        ]
        ready = time.monotonic() + 20.0
        with watching([server.pid, nodes[0].pid], lambda: time.monotonic() > ready) as peaks:
            config = f"mib={mib} devices={devices} rounds={rounds} out='{folder / 'rounds.json'}'"
            while time.monotonic() <= ready:  # else what is measured has begun before it is idle
                time.sleep(0.5)
            command = [program("flwr"), "run", str(folder / "app"), "bar", "--run-config", config]
            subprocess.run(command, env=env, check=True, stdout=subprocess.DEVNULL)
            while not (folder / "rounds.json").exists():
                time.sleep(0.2)
                if server.poll() is not None:
                    raise SystemExit(log.read_text())
        for node in nodes:
            end(node)
    seconds = json.loads((folder / "rounds.json").read_text())
    payload = mib * MIB
    return {
        "round": _later(seconds),
        "wire": None,
        "server": peaks[0] / payload,
        "device": peaks[1] / payload,
    }


def _later(seconds: Sequence[float]) -> float:
    return statistics.median(seconds[1:] or seconds)


@contextlib.contextmanager
def watching(roots: Sequence[int], begins: Callable[[], bool]) -> Iterator[list[float]]:
    """The largest resident bytes of each root with its descendants after something begins, less
    the last ones before."""
    peaks, idle = [0.0] * len(roots), [0.0] * len(roots)
    over = threading.Event()

    def watch() -> None:
        begun = False
        while not over.wait(0.1):
            begun = begun or begins()
            tree = _children()
            for n, root in enumerate(roots):
                size = sum(_resident(pid) for pid in _descendants(root, tree))
                if begun:
                    peaks[n] = max(peaks[n], size)
                else:
                    idle[n] = size

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peaks
    finally:
        over.set()
        thread.join()
        for n, before in enumerate(idle):
            peaks[n] -= before


def _children() -> dict[int, list[int]]:
    tree: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = stat.read_text().rpartition(")")[2].split()
            tree.setdefault(int(fields[1]), []).append(int(stat.parent.name))
    return tree


def _descendants(root: int, tree: dict[int, list[int]]) -> list[int]:
    found, waiting = [], [root]
    while waiting:
        pid = waiting.pop()
        found.append(pid)
        waiting += tree.get(pid, [])
    return found


def _resident(pid: int) -> float:
    with contextlib.suppress(OSError):
        found = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
        return float(found[1]) * 1024 if found else 0.0
    return 0.0


if __name__ == "__main__":
    main()
