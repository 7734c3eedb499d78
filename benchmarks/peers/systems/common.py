"""What every system's script shares: arguments, the workload, the clock, the line it prints.

numpy and the standard library only, because each script runs in its system's own environment;
torch is imported where it is asked for.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

CHECKED = 1000  # examples that the final loss and accuracy are taken over
_HERTZ = os.sysconf("SC_CLK_TCK")


@dataclass
class Workload:
    """Data, sizes and starting weights, as `workloads.py` wrote them."""

    arrays: dict[str, Any]

    def __post_init__(self) -> None:
        self.name = str(self.arrays["name"])
        self.epochs, self.batch = int(self.arrays["epochs"]), int(self.arrays["batch"])
        self.lr, self.per_round = float(self.arrays["lr"]), int(self.arrays["per_round"])
        self.sizes: list[int] = self.arrays["sizes"].tolist()
        ends = np.cumsum(self.sizes)[:-1]
        self.x: list[Any] = np.split(self.arrays["x"], ends)
        self.y: list[Any] = np.split(self.arrays["y"], ends)
        self.init: dict[str, Any] = {
            key.removeprefix("init/"): value
            for key, value in self.arrays.items()
            if key.startswith("init/")
        }

    @property
    def clients(self) -> int:
        """How many clients there are."""
        return len(self.sizes)

    @property
    def steps(self) -> int:
        """Steps that each client must take in a round; all clients take equally many."""
        steps = {self.epochs * -(-size // self.batch) for size in self.sizes}
        assert len(steps) == 1
        return steps.pop()

    @cached_property
    def check_set(self) -> tuple[Any, Any]:
        """Examples for the check at the end."""
        return self.arrays["x"][:CHECKED], self.arrays["y"][:CHECKED]

    def cohort(self, number: int) -> list[int]:
        """The clients of a round, the same for every system that lets itself be told."""
        draw = np.random.default_rng([11, number])
        return draw.choice(self.clients, self.per_round, replace=False).tolist()

    @cached_property
    def padded(self) -> tuple[Any, Any]:
        """Inputs [clients, most, ...] and labels [clients, most]: clients as one array."""
        most = max(self.sizes)
        x = np.zeros((self.clients, most, *self.x[0].shape[1:]), np.float32)
        y = np.zeros((self.clients, most), np.int64)
        for client, size in enumerate(self.sizes):
            x[client, :size], y[client, :size] = self.x[client], self.y[client]
        return x, y

    def batches(self, cohort: list[int], draw: np.random.Generator) -> tuple[Any, Any]:
        """Shuffled batches of a whole cohort: rows and weights, both [clients, steps, batch].

        The rows point into a client's `padded` row; the weights of one batch sum to one and are
        zero where a batch is not full, so that a weighted sum is the mean over real examples.
        """
        most, batch = max(self.sizes), min(self.batch, max(self.sizes))
        assert most % batch == 0, "clients whose last batch is smaller than others need masks here"
        keys = draw.random((len(cohort), self.epochs, most), dtype=np.float32)
        real = np.arange(most) < np.array([self.sizes[client] for client in cohort])[:, None]
        keys += 2.0 * ~real[:, None, :]  # padding sorts behind the examples
        rows = keys.argsort(-1).reshape(len(cohort), self.steps, batch)
        weights = np.take_along_axis(real[:, None, :], rows.reshape(len(cohort), -1)[:, None], -1)
        weights = weights.reshape(rows.shape).astype(np.float32)
        return rows, weights / weights.sum(-1, keepdims=True)

    def shares(self, cohort: list[int]) -> Any:
        """Each client's share of the cohort's examples, float32 [clients]."""
        sizes = np.array([self.sizes[client] for client in cohort], np.float32)
        return sizes / sizes.sum()

    def net(self, sizes: dict[str, int] | None = None) -> Any:
        """The workload's net as a torch module; `sizes` are for systems that cut models."""
        from torch import nn

        s = {**self.net_sizes, **(sizes or {})}
        if self.name == "mlp":
            return nn.Sequential(
                nn.Linear(64, s["hidden1"]), nn.ReLU(), nn.Linear(s["hidden1"], s["classes"])
            )
        if self.name == "big":
            return nn.Sequential(
                nn.Linear(784, s["hidden1"]),
                nn.ReLU(),
                nn.Linear(s["hidden1"], s["hidden2"]),
                nn.ReLU(),
                nn.Linear(s["hidden2"], s["classes"]),
            )
        return nn.Sequential(
            nn.Conv2d(1, s["channels1"], 5, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(s["channels1"], s["channels2"], 5, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(s["channels2"] * 7 * 7, s["classes"]),
        )

    @property
    def net_sizes(self) -> dict[str, int]:
        """Widths of the net."""
        widths = {
            "mlp": {"hidden1": 200},
            "big": {"hidden1": 2560, "hidden2": 2560},
            "cnn": {"channels1": 16, "channels2": 32},
        }
        return {**widths[self.name], "classes": 10}

    def started_net(self) -> Any:
        """The torch module with the weights that every system starts from."""
        import torch

        net = self.net()
        net.load_state_dict({key: torch.from_numpy(v.copy()) for key, v in self.init.items()})
        return net.train()

    def tensors(self) -> tuple[list[Any], list[Any]]:
        """Inputs and labels of every client as torch tensors."""
        import torch

        return [torch.from_numpy(x) for x in self.x], [torch.from_numpy(y) for y in self.y]


def load(file: Path) -> Workload:
    """Read what `workloads.py` wrote."""
    with np.load(file) as arrays:
        return Workload({key: arrays[key] for key in arrays.files})


class Batches:
    """One client's batches, drawn anew in each pass, for systems that accept any loader.

    Cheaper than a DataLoader, which fetches example by example.
    """

    def __init__(self, x: Any, y: Any, batch: int) -> None:
        self.x, self.y, self.batch = x, y, batch

    def __len__(self) -> int:
        return -(-len(self.y) // self.batch)

    def __iter__(self) -> Any:
        import torch

        for rows in torch.randperm(len(self.y)).split(self.batch):
            yield self.x[rows], self.y[rows]


class StepCount:
    """Counts the steps of all torch optimisers in this process until it is stopped."""

    def __init__(self) -> None:
        from torch.optim.optimizer import register_optimizer_step_post_hook

        self.steps = 0
        self._handle = register_optimizer_step_post_hook(self._count)

    def _count(self, *_: object) -> None:
        self.steps += 1

    def stop(self) -> None:
        """Take the hook away, so that it costs the timed rounds nothing."""
        self._handle.remove()


class Bench:
    """One measurement of one system, from its arguments to its line of JSON."""

    def __init__(self, system: str, version: str, tree: bool = False) -> None:
        """Read the arguments.

        Args:
            system: the name in the table.
            version: what is measured.
            tree: count this process's descendants too, for systems that start workers.
        """
        parser = argparse.ArgumentParser(description=f"Measure {system} on one workload.")
        parser.add_argument("workload", type=Path)
        parser.add_argument("--rounds", type=int, default=10)
        parser.add_argument("--warmup", type=int, default=2)
        parser.add_argument("--threads", type=int, default=1)
        options = parser.parse_args()
        self.system, self.version, self.tree = system, version, tree
        self.rounds, self.warmup, self.threads = options.rounds, options.warmup, options.threads
        self.workload = load(options.workload)
        self._root = os.getpid() if tree else None
        self._marks: list[tuple[float, float]] = []

    @property
    def total(self) -> int:
        """Rounds to play: the warm-up is not timed."""
        return self.warmup + self.rounds

    def tick(self) -> None:
        """Call once before the first round and once after every round."""
        self._marks.append((time.perf_counter(), cpu_seconds(self._root)))

    def marked(self, marks: list[tuple[float, float]]) -> None:
        """Take (wall, processor seconds) at the rounds' ends that another process noted."""
        self._marks = marks

    def play(self, one_round: Any) -> None:
        """Call `one_round(number)` for every round."""
        self.tick()
        for number in range(self.total):
            one_round(number)
            self.tick()

    def finish(
        self,
        logits: Any = None,
        steps: float | None = None,
        note: str = "",
        own_cohorts: bool = False,
        peak: int | None = None,
    ) -> None:
        """Print the line.

        Args:
            logits: of the final global model for `workload.check_set`, an array; None: no check.
            steps: steps a client was seen to take in a round; None: not counted.
            note: what a reader of the table must know.
            own_cohorts: the system drew the cohorts itself: its model is of other clients.
            peak: highest resident bytes, where another process saw them.
        """
        rounds = [(b[0] - a[0], b[1] - a[1]) for a, b in zip(self._marks, self._marks[1:])]  # noqa: B905
        timed = rounds[self.warmup :]
        assert len(timed) == self.rounds, f"{len(timed)} rounds were timed, not {self.rounds}"
        loss, accuracy = _judge(logits, self.workload.check_set[1])
        line = {
            "system": self.system,
            "version": self.version,
            "workload": self.workload.name,
            "threads": self.threads,
            "rounds": self.rounds,
            "ms_per_round": 1e3 * statistics.median(wall for wall, _ in timed),
            # Of single rounds the system's clock is too coarse for other processes: their mean.
            "cpu_ms_per_round": 1e3
            * (
                statistics.fmean(cpu for _, cpu in timed)
                if self.tree
                else statistics.median(cpu for _, cpu in timed)
            ),
            "first_round_ms": 1e3 * rounds[0][0],
            "peak_rss_mb": (peak or peak_bytes(self._root)) / 2**20,
            "loss": loss,
            "accuracy": accuracy,
            "steps": steps,
            "expected_steps": self.workload.steps,
            "note": note,
            "own_cohorts": own_cohorts,
        }
        print(json.dumps(line), flush=True)


def _judge(logits: Any, labels: Any) -> tuple[float | None, float | None]:
    if logits is None:
        return None, None
    logits = np.asarray(logits, np.float64)
    logits = logits - logits.max(-1, keepdims=True)
    chosen = logits[np.arange(len(labels)), labels]
    loss = float((np.log(np.exp(logits).sum(-1)) - chosen).mean())
    return loss, float((logits.argmax(-1) == labels).mean())


def torch_logits(net: Any, workload: Workload) -> Any:
    """Logits of a torch module for the check."""
    import torch

    with torch.no_grad():
        return net.eval()(torch.from_numpy(workload.check_set[0])).numpy()


def _family(root: int) -> list[int]:
    """A process and its descendants."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            children.setdefault(int(fields[1]), []).append(int(entry.name))
    found = [root]
    for process in found:  # grows on the way
        found += children.get(process, [])
    return found


def cpu_seconds(root: int | None = None) -> float:
    """Processor time of this process, or of the process `root` and its descendants."""
    if root is None:
        return time.process_time()
    seconds = 0.0
    for process in _family(root):
        try:
            fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        seconds += sum(map(int, fields[11:15])) / _HERTZ  # its own and its waited-for children's
    return seconds


def peak_bytes(root: int | None = None) -> int:
    """Highest resident size; of a family the sum of each process's highest."""
    peak = 0
    for process in [os.getpid()] if root is None else _family(root):
        try:
            status = Path(f"/proc/{process}/status").read_text()
        except OSError:
            continue
        peak += next(
            (int(line.split()[1]) * 1024 for line in status.splitlines() if "VmHWM" in line), 0
        )
    return peak
