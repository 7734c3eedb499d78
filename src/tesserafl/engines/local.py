"""The embedded engine: clients run in this process, or in worker processes with equal bits."""

from __future__ import annotations

import contextlib
import json
import selectors
import subprocess
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import IO

from tesserafl.core.errors import TesseraError
from tesserafl.core.messages import Memory, Task
from tesserafl.core.wire import task_parts, update_of
from tesserafl.engines.client import ClientWorker
from tesserafl.engines.frames import read_frame, write_frame
from tesserafl.engines.seam import Done, Failed, Outcome
from tesserafl.engines.slab import Slab


@dataclass(kw_only=True)
class InProcess:
    """One client after another, in this process; a task is worked on when it is polled."""

    worker: ClientWorker
    memories: dict[int, Memory] = field(default_factory=dict)
    _waiting: deque[Sequence[Task]] = field(default_factory=deque)

    @property
    def capacity(self) -> int:
        """One: the next sub-models are cut when the last updates have been folded."""
        return 1

    @property
    def group(self) -> int:
        """As many as the worker trains together."""
        return self.worker.group

    def restore(self, memories: Mapping[int, Memory]) -> None:
        """Give the clients back what a checkpoint held."""
        self.memories = dict(memories)

    def submit(self, tasks: Sequence[Task]) -> None:
        """Queue a group."""
        self._waiting.append(tasks)

    def poll(self) -> list[Outcome]:
        """Work on the oldest group."""
        tasks, begun = self._waiting.popleft(), time.perf_counter()
        asked = [(task, self.memories.get(task.client.id, {})) for task in tasks]
        answers = self.worker.work_together(asked)
        seconds = (time.perf_counter() - begun) / len(tasks)
        outcomes: list[Outcome] = []
        for task, answer in zip(tasks, answers, strict=True):
            if isinstance(answer, TesseraError):
                outcomes.append(Failed(client=task.client.id, reason="error", text=str(answer)))
                continue
            update, memory = answer
            keep(self.memories, task.client.id, memory)
            outcomes.append(Done(client=task.client.id, update=update, seconds=seconds))
        return outcomes

    def close(self) -> None:
        """Nothing to release."""


@dataclass(kw_only=True)
class _Process:
    process: subprocess.Popen[bytes]
    down: Slab
    """Tasks lie there."""
    up: Slab
    """Updates lie there."""
    tasks: Sequence[Task] = ()
    """What it works on; empty: idle."""

    @property
    def stdin(self) -> IO[bytes]:
        assert self.process.stdin is not None
        return self.process.stdin

    @property
    def stdout(self) -> IO[bytes]:
        assert self.process.stdout is not None
        return self.process.stdout


FAULT = 70
"""Exit code of a worker whose code failed: the fault is ours, not the client's (EX_SOFTWARE)."""


def keep(memories: dict[int, Memory], client: int, memory: Memory) -> None:
    """Replace what a client keeps by a copy, since it may be a part of more; empty is none."""
    memories.pop(client, None)
    if memory:
        memories[client] = {name: tensor.clone() for name, tensor in memory.items()}


class WorkerPool:
    """Worker processes that each work on one group of tasks at a time.

    Tasks and updates lie in memory that both processes see; frames on the worker's standard input
    and output say where. An update's tensors are views: they hold until the worker is asked again.
    A worker that dies is started again and its group done again; a group that kills two is an
    error.
    """

    def __init__(self, command: Sequence[str], hello: bytes, size: int, group: int = 1) -> None:
        self._command, self._hello, self.group = list(command), hello, group
        self._waiting: deque[Sequence[Task]] = deque()
        self._again: set[int] = set()
        self.memories: dict[int, Memory] = {}
        self._selector = selectors.DefaultSelector()
        self._processes = [self._start(index) for index in range(size)]
        for worker in self._processes:  # all load at the same time; rounds begin when all are ready
            if read_frame(worker.stdout) is None:
                self.close()
                raise TesseraError(
                    "a worker process ended before it was ready; see its message above, or run "
                    "with engine.workers 1"
                )

    @property
    def capacity(self) -> int:
        """One group a worker."""
        return len(self._processes)

    def restore(self, memories: Mapping[int, Memory]) -> None:
        """Give the clients back what a checkpoint held."""
        self.memories = dict(memories)

    def submit(self, tasks: Sequence[Task]) -> None:
        """Hand a group to a free worker, or queue it."""
        self._waiting.append(tasks)
        self._dispatch()

    def poll(self) -> list[Outcome]:
        """Outcomes of all workers that have one by now; waits for the first."""
        outcomes: list[Outcome] = []
        while not outcomes:
            self._dispatch()
            for key, _ in self._selector.select():
                outcomes += self._collect(key.data)
        return outcomes

    def close(self) -> None:
        """End the workers."""
        for worker in self._processes:
            self._end(worker)
        self._processes = []
        self._selector.close()

    def _start(self, index: int) -> _Process:
        down, up = Slab(), Slab()
        shared = (down.descriptor, up.descriptor)
        process = subprocess.Popen(
            [*self._command, str(index), *map(str, shared)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=shared,
        )
        worker = _Process(process=process, down=down, up=up)
        write_frame(worker.stdin, self._hello)
        self._selector.register(worker.stdout, selectors.EVENT_READ, worker)
        return worker

    def _end(self, worker: _Process) -> None:
        with contextlib.suppress(KeyError, ValueError):  # ended before
            self._selector.unregister(worker.stdout)
        worker.process.kill()
        worker.process.wait()
        with contextlib.suppress(BrokenPipeError):  # what was written to a dead worker is lost
            worker.stdin.close()
        worker.stdout.close()
        worker.down.close()
        worker.up.close()

    def _dispatch(self) -> None:
        for worker in self._processes:
            if not worker.tasks and self._waiting:
                worker.tasks = self._waiting.popleft()
                worker.down.start_over()
                places = [
                    worker.down.put(*task_parts(task, self.memories.get(task.client.id, {})))
                    for task in worker.tasks
                ]
                # A dead worker's end of file is the next thing that `_collect` reads.
                with contextlib.suppress(BrokenPipeError):
                    write_frame(worker.stdin, json.dumps(places).encode())

    def _collect(self, worker: _Process) -> list[Outcome]:
        frame = read_frame(worker.stdout)
        if frame is None:
            self._replace(worker)
            return []
        tasks, worker.tasks = worker.tasks, ()
        if frame.failed:
            clients = ", ".join(str(task.client.id) for task in tasks)
            raise RuntimeError(f"client {clients}, round {tasks[0].round}: {frame.body.decode()}")
        seconds = frame.seconds / len(tasks)
        answers = json.loads(frame.body)
        return [
            self._outcome(worker, task, answer, seconds)
            for task, answer in zip(tasks, answers, strict=True)
        ]

    def _outcome(
        self, worker: _Process, task: Task, answer: str | list[int], seconds: float
    ) -> Outcome:
        self._again.discard(task.client.id)
        if isinstance(answer, str):
            return Failed(client=task.client.id, reason="error", text=answer)
        update, memory = update_of(*worker.up.get(*answer), task)
        keep(self.memories, task.client.id, memory)
        return Done(client=task.client.id, update=update, seconds=seconds)

    def _replace(self, worker: _Process) -> None:
        """Start a dead worker anew and do its group again: a lost worker must not change a bit."""
        tasks, code = worker.tasks, worker.process.wait()
        self._end(worker)
        if tasks:
            clients = [task.client.id for task in tasks]
            if not self._again.isdisjoint(clients):
                raise TesseraError(
                    f"client {', '.join(map(str, clients))}: the worker process ended with code "
                    f"{code}, twice; is there enough memory for {self.capacity} workers? lower "
                    f"engine.workers"
                )
            self._again.update(clients)
            self._waiting.appendleft(tasks)
        index = self._processes.index(worker)
        fresh = self._processes[index] = self._start(index)
        if read_frame(fresh.stdout) is None:
            raise TesseraError("a worker process ended and its successor too; see their messages")
