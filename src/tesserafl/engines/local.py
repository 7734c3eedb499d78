"""The embedded engine: clients run in this process, one group after another."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from tesserafl.core.errors import TesseraError
from tesserafl.core.messages import Memory, Task
from tesserafl.engines.client import ClientWorker
from tesserafl.engines.seam import Done, Failed, Outcome


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


def keep(memories: dict[int, Memory], client: int, memory: Memory) -> None:
    """Replace what a client keeps by a copy, since it may be a part of more; empty is none."""
    memories.pop(client, None)
    if memory:
        memories[client] = {name: tensor.clone() for name, tensor in memory.items()}
