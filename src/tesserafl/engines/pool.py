"""An engine of several workers: groups wait for a free one, and a lost one costs no bit.

Where the workers live, and how tasks reach them, is theirs to know: processes of this machine
(`engines/processes.py`), or actors of a cluster (`engines/cluster.py`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from tesserafl.core.errors import TesseraError
from tesserafl.core.messages import Memory, Task
from tesserafl.engines.client import Answer
from tesserafl.engines.local import keep
from tesserafl.engines.seam import Done, Failed, Outcome


@dataclass(frozen=True, kw_only=True)
class Answered:
    """A worker did its group."""

    answers: Sequence[Answer | str]
    """In the order of the tasks; a text for a client that could not do its task."""
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Ended:
    """A worker is there no more."""

    how: str
    """As the end of a sentence: "the worker process ended with code 9"."""


@dataclass(frozen=True, kw_only=True)
class Broke:
    """A worker's code failed: the fault is ours, not the client's."""

    text: str


class Workers(Protocol):
    """Workers that are loaded and ready, by number."""

    @property
    def size(self) -> int:
        """How many there are."""
        ...

    def send(self, number: int, asked: Sequence[tuple[Task, Memory]]) -> None:
        """Have an idle worker do a group; whether it was alive is for `receive` to say."""
        ...

    def ready(self) -> Sequence[int]:
        """Those that answered or ended; waits for the first."""
        ...

    def receive(self, number: int, tasks: Sequence[Task]) -> Answered | Ended | Broke:
        """What became of a worker that is ready; `tasks` are those that it was sent."""
        ...

    def replace(self, number: int) -> None:
        """Start a worker that ended anew, and wait until it is loaded; TesseraError if it fails."""
        ...

    def close(self) -> None:
        """End them all; idempotent."""
        ...


@dataclass(kw_only=True)
class WorkerPool:
    """Workers that each do one group of tasks at a time.

    A worker that ends is replaced and its group done again; a group that ends two is an error. An
    update's tensors hold until its worker is asked again.
    """

    workers: Workers
    group: int = 1
    """Tasks of a group, at most."""
    memories: dict[int, Memory] = field(default_factory=dict)
    _waiting: deque[Sequence[Task]] = field(default_factory=deque)
    _busy: dict[int, Sequence[Task]] = field(default_factory=dict)
    """Worker -> what it does."""
    _again: set[int] = field(default_factory=set)
    """Clients whose work ended a worker."""

    @property
    def capacity(self) -> int:
        """One group a worker."""
        return self.workers.size

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
            for number in self.workers.ready():
                outcomes += self._collect(number)
        return outcomes

    def close(self) -> None:
        """End the workers."""
        self.workers.close()

    def _dispatch(self) -> None:
        for number in range(self.workers.size):
            if self._waiting and number not in self._busy:
                tasks = self._busy[number] = self._waiting.popleft()
                asked = [(task, self.memories.get(task.client.id, {})) for task in tasks]
                self.workers.send(number, asked)

    def _collect(self, number: int) -> list[Outcome]:
        tasks = self._busy.pop(number, ())
        found = self.workers.receive(number, tasks)
        if isinstance(found, Ended):
            self._do_again(tasks, found)
            self.workers.replace(number)
            return []
        if isinstance(found, Broke):
            clients = ", ".join(str(task.client.id) for task in tasks)
            raise RuntimeError(f"client {clients}, round {tasks[0].round}: {found.text}")
        seconds = found.seconds / len(tasks)
        return [
            self._outcome(task, answer, seconds)
            for task, answer in zip(tasks, found.answers, strict=True)
        ]

    def _outcome(self, task: Task, answer: Answer | str, seconds: float) -> Outcome:
        self._again.discard(task.client.id)
        if isinstance(answer, str):
            return Failed(client=task.client.id, reason="error", text=answer)
        update, memory = answer
        keep(self.memories, task.client.id, memory)
        return Done(client=task.client.id, update=update, seconds=seconds)

    def _do_again(self, tasks: Sequence[Task], ended: Ended) -> None:
        """A lost worker must not change a bit, but work that ends every worker must not go on."""
        if not tasks:
            return
        clients = [task.client.id for task in tasks]
        if not self._again.isdisjoint(clients):
            raise TesseraError(
                f"client {', '.join(map(str, clients))}: {ended.how}, twice; is there enough "
                f"memory for {self.capacity} workers? lower engine.workers"
            )
        self._again.update(clients)
        self._waiting.appendleft(tasks)
