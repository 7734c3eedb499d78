"""`tessera serve` and `tessera join` as processes on this machine, for tests."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flower_processes import BIN, free_port

from tesserafl.run.experiment import Experiment, to_json


@dataclass(kw_only=True)
class Site:
    """A folder in which a server and its devices run."""

    folder: Path
    port: int = field(default_factory=free_port)
    enrol_port: int = field(default_factory=free_port)
    running: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    """Name -> its process, the newest of that name."""

    @property
    def run(self) -> Path:
        """The server's run folder."""
        return self.folder / "run"

    def keys(self, devices: Sequence[str]) -> Path:
        """A new folder of keys."""
        keys = self.folder / "keys"
        arguments = ["certs", str(keys), "--server", "127.0.0.1", "--port", str(self.port)]
        arguments += ["--enrol-port", str(self.enrol_port)]
        self.tell(*arguments, *(["--devices", ",".join(devices)] if devices else []))
        return keys

    def tell(self, *arguments: str) -> str:
        """Run a command to its end; what it printed."""
        command = [str(BIN / "tessera"), *arguments]
        done = subprocess.run(command, cwd=self.folder, capture_output=True, text=True, env=_env())
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def begin(self, name: str, *arguments: str) -> subprocess.Popen[bytes]:
        """Start a command; what it prints goes to NAME.log."""
        with (self.folder / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                [str(BIN / "tessera"), *arguments],
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=_env(),
            )
        self.running[name] = process
        return process

    def serve(self, experiment: Experiment, *arguments: str) -> subprocess.Popen[bytes]:
        """Start the server of an experiment."""
        path = self.folder / "experiment.json"
        path.write_text(json.dumps(to_json(experiment)))
        return self.begin("server", "serve", str(path), "--out", str(self.run), *arguments)

    def kill(self, name: str) -> None:
        """With -9, and wait until it is gone."""
        self.running[name].send_signal(signal.SIGKILL)
        self.running[name].wait()

    def wait_for(self, port: int) -> None:
        """Until somebody listens there."""
        for _ in self.while_it_runs():
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                return
        raise AssertionError(self.said())

    def finish(self) -> dict[str, Any]:
        """Wait for the server's end; the run's summary."""
        code = self.running["server"].wait()
        assert code == 0, f"{code}\n{self.said()}"
        return self.summary()

    def summary(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.run / "summary.json").read_text())
        return found

    def events(self, kind: str) -> list[Mapping[str, Any]]:
        """The run's events of a kind, as far as they are written."""
        path = self.run / "events.jsonl"
        lines = path.read_text().split("\n")[:-1] if path.exists() else []
        return [event for event in map(json.loads, lines) if event["kind"] == kind]

    def said(self) -> str:
        """The ends of all logs."""
        paths = [*self.folder.glob("*.log"), *self.folder.glob("**/super*.log")]
        return "\n".join(f"{path}: {path.read_text(errors='replace')[-3000:]}" for path in paths)

    def while_it_runs(self) -> Iterator[None]:
        """Once every tenth of a second until the server has ended."""
        while self.running["server"].poll() is None:
            yield
            time.sleep(0.1)


@contextlib.contextmanager
def site(folder: Path) -> Iterator[Site]:
    """A site whose processes end with the block."""
    found = Site(folder=folder)
    try:
        yield found
    finally:
        for process in found.running.values():
            process.terminate()
        for process in found.running.values():
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _env() -> dict[str, str]:
    # One thread each: there are a dozen processes. Only what was imported from here is tested.
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
