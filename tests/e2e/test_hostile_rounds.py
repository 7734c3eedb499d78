"""A round in which some clients are enemies is the round without them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache

import torch

from tesserafl.core.coverage import Coverage
from tesserafl.core.errors import TesseraError
from tesserafl.core.messages import Task, Update
from tesserafl.core.params import sha256
from tesserafl.core.submodel import SubModel, View
from tesserafl.core.wire import decode_update, encode_update
from tesserafl.engines.local import InProcess
from tesserafl.engines.seam import Done, Failed, Outcome
from tesserafl.run.costs import CostTable
from tesserafl.run.experiment import from_json
from tesserafl.run.federate import federate
from tesserafl.run.first import first_state
from tesserafl.run.rounds import Notes, play_round
from tesserafl.run.setup import Setup, client_worker, prepare


@dataclass
class Enemies(InProcess):
    """An engine between whose clients and the server there is a wire, and some clients lie."""

    lie: Callable[[Task, Update], Update] | None = None
    """None: they do not answer at all."""
    liars: Sequence[int] = ()
    again: bool = False
    """Whether every answer comes twice."""

    def poll(self) -> list[Outcome]:
        (task,), outcomes = self._waiting[0], []
        for outcome in InProcess.poll(self):
            assert isinstance(outcome, Done)
            update = outcome.update
            if task.client.id in self.liars:
                if self.lie is None:
                    outcomes.append(Failed(client=task.client.id, reason="offline", text="gone"))
                    continue
                update = self.lie(task, update)
            try:
                update, _ = decode_update(encode_update(update, {}), task)
            except TesseraError as error:
                outcomes.append(Failed(client=task.client.id, reason="error", text=str(error)))
                continue
            outcomes += [replace(outcome, update=update)] * (2 if self.again else 1)
        return outcomes


@cache
def setup_of() -> Setup:
    return prepare(
        from_json(
            {
                "data": {"num_clients": 6},
                "model": {"name": "mlp", "hidden": [16, 16]},
                "method": {"name": "fedbrb", "ratio": [0.5, 0.25]},
                "rounds": 2,
                "clients_per_round": 4,
                "engine": {"batching": "sequential"},
            }
        )
    )


@cache
def costs() -> CostTable:
    return setup_of().costs()


def cohort() -> list[int]:
    return [client.id for client in setup_of().cohort(0)]


def played(**how: object) -> tuple[str, Notes]:
    setup = setup_of()
    federation = federate(setup, first_state(setup.experiment, setup.model, setup.data))
    engine = Enemies(worker=client_worker(setup), **how)  # type: ignore[arg-type]
    notes = play_round(setup, engine, federation, Coverage(setup.model.shapes), costs())
    return sha256(federation.assembled().params), notes


def _moved(task: Task, update: Update) -> Update:
    """One part of the model further than what was sent."""
    views = {}
    for name, view in update.submodel.views.items():
        index = tuple(
            slice(i.start + 1, i.stop + 1) if isinstance(i, slice) else i for i in view.index
        )
        views[name] = View(view.name, index)
    return replace(update, submodel=SubModel(update.submodel.sizes, views))


LIES: dict[str, Callable[[Task, Update], Update]] = {
    "not finite": lambda task, u: replace(u, delta={n: t * torch.nan for n, t in u.delta.items()}),
    "too large": lambda task, u: replace(u, delta={n: t + 300 for n, t in u.delta.items()}),
    "double": lambda task, u: replace(u, delta={n: t.double() for n, t in u.delta.items()}),
    "another's name": lambda task, u: replace(u, client=cohort()[0]),
    "an earlier round": lambda task, u: replace(u, round=u.round + 1),
    "another part": _moved,
    "a row of ours": lambda task, u: replace(u, metrics={**u.metrics, "client": 99.0}),
    "no loss": lambda task, u: replace(u, metrics={**u.metrics, "loss": float("nan")}),
    "a tensor more": lambda task, u: replace(u, extra={"x": torch.ones(3)}),
    "examples": lambda task, u: replace(u, num_examples=10**9),
}


def test_a_round_with_enemies_is_the_round_without_them() -> None:
    bits, alone = played(liars=cohort()[1:3])
    honest, _ = played()
    assert bits != honest
    for what, lie in LIES.items():
        found, notes = played(liars=cohort()[1:3], lie=lie)
        assert found == bits, what
        assert sorted(note["client"] for note in notes.failures) == sorted(cohort()[1:3]), what
        assert [row["client"] for row in notes.clients] == [r["client"] for r in alone.clients]
        assert notes.loss == alone.loss, what


def test_an_answer_that_comes_twice_counts_once() -> None:
    assert played(again=True)[0] == played()[0]


def test_an_answer_without_a_loss_is_no_end_of_a_round() -> None:
    _, notes = played(liars=cohort()[1:3], lie=lambda task, update: replace(update, metrics={}))
    assert len(notes.clients) == 4 and notes.loss is not None and not notes.failures
