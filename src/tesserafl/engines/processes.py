"""Worker processes of this machine: `python -m tesserafl.run.worker`, as a pool's workers."""

from __future__ import annotations

import contextlib
import json
import selectors
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from typing import IO

from tesserafl.core.errors import TesseraError
from tesserafl.core.messages import Memory, Task
from tesserafl.core.wire import task_parts, update_of
from tesserafl.engines.frames import read_frame, write_frame
from tesserafl.engines.pool import Answered, Broke, Ended
from tesserafl.engines.slab import Slab

FAULT = 70
"""Exit code of a worker whose code failed: the fault is ours, not the client's (EX_SOFTWARE)."""


@dataclass(kw_only=True)
class Running:
    """One worker process."""

    process: subprocess.Popen[bytes]
    down: Slab
    """Tasks lie there."""
    up: Slab
    """Updates lie there."""

    @property
    def stdin(self) -> IO[bytes]:
        """Frames go in."""
        assert self.process.stdin is not None
        return self.process.stdin

    @property
    def stdout(self) -> IO[bytes]:
        """Frames come out."""
        assert self.process.stdout is not None
        return self.process.stdout


class Processes:
    """Worker processes that this one started.

    Tasks and updates lie in memory that both see; frames on a worker's standard input and output
    say where. An update's tensors are views: they hold until the worker is asked again.

    Args:
        command: starts one; its number and the descriptors of the shared memory follow.
        hello: its first frame, the experiment.
        size: how many.
    """

    def __init__(self, command: Sequence[str], hello: bytes, size: int) -> None:
        self._command, self._hello = list(command), hello
        self._selector = selectors.DefaultSelector()
        self.running = [self._start(number) for number in range(size)]
        for worker in self.running:  # all load at the same time; rounds begin when all are ready
            if read_frame(worker.stdout) is None:
                self.close()
                raise TesseraError(
                    "a worker process ended before it was ready; see its message above, or run "
                    "with engine.workers 1"
                )

    @property
    def size(self) -> int:
        """How many there are."""
        return len(self.running)

    def send(self, number: int, asked: Sequence[tuple[Task, Memory]]) -> None:
        """Lay the tasks into shared memory and say where."""
        worker = self.running[number]
        worker.down.start_over()
        places = [worker.down.put(*task_parts(task, memory)) for task, memory in asked]
        # A dead worker's end of file is the next thing that `receive` reads.
        with contextlib.suppress(BrokenPipeError):
            write_frame(worker.stdin, json.dumps(places).encode())

    def ready(self) -> Sequence[int]:
        """Those that wrote, or whose output ended, idle ones too; waits for the first."""
        return [self.running.index(key.data) for key, _ in self._selector.select()]

    def receive(self, number: int, tasks: Sequence[Task]) -> Answered | Ended | Broke:
        """What became of a worker that is ready."""
        worker = self.running[number]
        frame = read_frame(worker.stdout)
        if frame is None:
            return Ended(how=f"the worker process ended with code {worker.process.wait()}")
        if frame.failed:
            return Broke(text=frame.body.decode())
        answers = [
            answer if isinstance(answer, str) else update_of(*worker.up.get(*answer), task)
            for task, answer in zip(tasks, json.loads(frame.body), strict=True)
        ]
        return Answered(answers=answers, seconds=frame.seconds)

    def replace(self, number: int) -> None:
        """Start a worker that ended anew, and wait until it is loaded."""
        self._end(self.running[number])
        fresh = self.running[number] = self._start(number)
        if read_frame(fresh.stdout) is None:
            raise TesseraError("a worker process ended and its successor too; see their messages")

    def close(self) -> None:
        """End them all."""
        for worker in self.running:
            self._end(worker)
        self.running = []
        self._selector.close()

    def _start(self, number: int) -> Running:
        down, up = Slab(), Slab()
        shared = (down.descriptor, up.descriptor)
        process = subprocess.Popen(
            [*self._command, str(number), *map(str, shared)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=shared,
        )
        worker = Running(process=process, down=down, up=up)
        write_frame(worker.stdin, self._hello)
        self._selector.register(worker.stdout, selectors.EVENT_READ, worker)
        return worker

    def _end(self, worker: Running) -> None:
        with contextlib.suppress(KeyError, ValueError):  # ended before
            self._selector.unregister(worker.stdout)
        worker.process.kill()
        worker.process.wait()
        with contextlib.suppress(BrokenPipeError):  # what was written to a dead worker is lost
            worker.stdin.close()
        worker.stdout.close()
        worker.down.close()
        worker.up.close()
