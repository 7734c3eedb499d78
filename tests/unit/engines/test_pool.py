"""A pool of workers, whoever they are: what is lost is done again, once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
import torch

from tesserafl.core.errors import TesseraError
from tesserafl.core.fit import Training
from tesserafl.core.messages import Client, Memory, Task, Update
from tesserafl.core.submodel import SubModel
from tesserafl.engines.pool import Answered, Broke, Ended, WorkerPool
from tesserafl.engines.seam import Done, Failed


def task(client: int) -> Task:
    return Task(
        round=3,
        client=Client(id=client, num_examples=1),
        submodel=SubModel({}, {}),
        params={},
        training=Training(),
    )


def update(client: int, round: int = 3) -> Update:
    return Update(
        round=round,
        client=client,
        submodel=SubModel({}, {}),
        delta={},
        num_examples=1,
        num_steps=1,
        metrics={},
    )


Script = list[Answered | Ended | Broke | None]


@dataclass(kw_only=True)
class Scripted:
    """Workers of which each piece of work ends as written; None: as it should."""

    script: Script
    size: int = 2
    sent: list[tuple[int, list[int]]] = field(default_factory=list)
    replaced: list[int] = field(default_factory=list)
    _asked: dict[int, Sequence[tuple[Task, Memory]]] = field(default_factory=dict)

    def send(self, number: int, asked: Sequence[tuple[Task, Memory]]) -> None:
        assert number not in self._asked, "it is busy"
        self._asked[number] = asked
        self.sent.append((number, [task.client.id for task, _ in asked]))

    def ready(self) -> Sequence[int]:
        return [next(iter(self._asked))]

    def receive(self, number: int, tasks: Sequence[Task]) -> Answered | Ended | Broke:
        asked = self._asked.pop(number)
        assert [task for task, _ in asked] == list(tasks), "those that it was sent"
        told = self.script.pop(0) if self.script else None
        if told is not None:
            return told
        answers = [(update(t.client.id), {"m": m.get("m", torch.zeros(1)) + 1}) for t, m in asked]
        return Answered(answers=answers, seconds=6.0)

    def replace(self, number: int) -> None:
        self.replaced.append(number)

    def close(self) -> None:
        pass


def ended() -> Ended:
    return Ended(how="the worker fell over")


def test_what_a_lost_worker_had_is_done_again_before_what_waits() -> None:
    workers = Scripted(script=[ended()], size=1)
    pool = WorkerPool(workers=workers, group=2)
    for group in ([1, 2], [3], [4]):
        pool.submit([task(client) for client in group])
    answered = [outcome.client for _ in range(3) for outcome in pool.poll()]
    assert answered == [1, 2, 3, 4]
    assert [clients for _, clients in workers.sent] == [[1, 2], [1, 2], [3], [4]]
    assert workers.replaced == [0]


def test_work_that_ends_two_workers_is_an_error() -> None:
    pool = WorkerPool(workers=Scripted(script=[ended(), ended()]))
    pool.submit([task(1), task(2)])
    with pytest.raises(TesseraError, match=r"client 1, 2: the worker fell over, twice.*2 workers"):
        pool.poll()


def test_a_worker_may_be_lost_again_in_other_work_or_after_a_success() -> None:
    workers = Scripted(script=[ended(), ended(), None, None, ended()])
    pool = WorkerPool(workers=workers)
    pool.submit([task(1)])
    pool.submit([task(2)])
    assert sorted(pool.poll()[0].client for _ in range(2)) == [1, 2]
    pool.submit([task(1)])
    assert pool.poll()[0].client == 1
    assert len(workers.replaced) == 3


def test_a_fault_of_ours_is_not_taken_for_a_client_that_failed() -> None:
    pool = WorkerPool(workers=Scripted(script=[Broke(text="a stack of lines")]))
    pool.submit([task(7)])
    with pytest.raises(RuntimeError, match="client 7, round 3: a stack of lines"):
        pool.poll()


def test_a_client_that_cannot_has_failed_keeps_its_memory_and_may_be_asked_again() -> None:
    answers = [(update(1), {"m": torch.ones(1)}), "not enough of it"]
    workers = Scripted(script=[Answered(answers=answers, seconds=3.0), ended()])
    pool = WorkerPool(workers=workers, memories={2: {"m": torch.full((1,), 5.0)}})
    pool.submit([task(1), task(2)])
    done, failed = pool.poll()
    assert isinstance(done, Done) and done.seconds == 1.5
    assert failed == Failed(client=2, reason="error", text="not enough of it")
    assert {client: float(memory["m"]) for client, memory in pool.memories.items()} == {1: 1, 2: 5}
    pool.submit([task(2)])
    assert pool.poll()[0].client == 2
    assert float(pool.memories[2]["m"]) == 6
    pool.restore({})
    assert pool.memories == {}
