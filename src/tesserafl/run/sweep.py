"""What an edge does in a round of the cloud, on devices of its own; by the rules of averages.py."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from tesserafl.core.messages import Client, Memory, Task
from tesserafl.core.method import State
from tesserafl.core.params import norm
from tesserafl.core.places import part_to_json
from tesserafl.core.schedule import Sketch
from tesserafl.core.submodel import SubModel
from tesserafl.core.wire import Parts
from tesserafl.engines.edge_orders import Sweep
from tesserafl.engines.federation import Star
from tesserafl.engines.handed import handed_change, handed_sums
from tesserafl.engines.seam import Engine, Outcome
from tesserafl.engines.sums import Sums, sums_of
from tesserafl.engines.swept import Loss, Row, Swept
from tesserafl.run.averages import Patience, Several, fits, numbered, round_of, turns
from tesserafl.run.costs import CostTable
from tesserafl.run.enough import Counted, Working
from tesserafl.run.rounds import Notes, answers, training_of
from tesserafl.run.setup import Setup

_FIXED = ("client", "examples", "steps", "trained_entries", "entries", "flops", "seconds")
"""Of a row, beside metrics; see `rounds.note_answer`."""


@dataclass(kw_only=True)
class Sweeping:
    """One round of the cloud, while an edge plays it."""

    setup: Setup
    """Of which the clients are not used: the order names them."""
    engine: Engine
    """The edge's devices."""
    costs: CostTable
    order: Sweep
    sketch: Sketch | None
    heard: Mapping[int, int]
    """Client -> the round of the task that it answered last; kept by who asks the devices."""
    begins: Callable[[], None] = lambda: None
    """Called before each average."""
    working: Working | None = None
    """Devices that are not waited for until all have answered; None: the edge waits for all."""
    seconds: float = math.inf
    """That an average has, where it does not wait for all."""
    _rows: list[Row] = field(default_factory=list)
    _failures: list[Loss] = field(default_factory=list)
    _parts: dict[object, SubModel] = field(default_factory=dict)
    """What devices trained, each part once, by its places."""

    def play(self, state: State) -> Parts:
        """The averages; what the edge hands on, and what it says of its devices."""
        order, method = self.order, self.setup.experiment.method
        self._forget()
        cohort = {member.id: Client(**member.model_dump()) for member in order.cohort}
        together = [cohort[client] for client in order.together]
        empty = sums_of(self.setup.model, method, cohort, state.params)
        if order.rounds == 1:
            total = empty()
            self._average(state, together, 1, total)
            (header, groups), model = handed_sums(total), state
            if self.sketch is not None:
                model = total.finish(state)
        else:
            several = Several(model=state)
            for number in turns(order.rounds):
                total = empty()
                self._average(several.model, together, number, total)
                several.average(total)
            model = several.model
            header, groups = handed_change(state, model, several.covered)
        swept = Swept(
            handed=header,
            rows=self._rows,
            failures=self._failures,
            parts=[],
            sketch=[] if self.sketch is None else list(self.sketch.model(model.params)),
            late=[] if self.working is None else sorted(self.working.tasks),
            heard=[[c, self.heard[c]] for c in self._clients if c in self.heard],
        )
        parts = [part_to_json(part) for part in self._parts.values()]
        return {**swept.model_dump(), "parts": parts}, groups

    @property
    def _clients(self) -> list[int]:
        """Below the edge, whose answers may have come."""
        late = [] if self.order.waits is None else self.order.waits.late
        return [*self.order.own, *late]

    def _forget(self) -> None:
        """Go on with those late devices alone that the cloud knows of; name those that are lost."""
        if self.working is None or self.order.waits is None:
            return
        late = set(self.order.waits.late)
        for client in self.working.tasks.keys() - late:
            del self.working.tasks[client]
        for client in sorted(late - self.working.tasks.keys()):
            text = "its edge knows of its work no more"
            self._failures.append(Loss(client=client, reason="crashed", text=text))

    def _average(self, state: State, together: Sequence[Client], number: int, total: Sums) -> None:
        self.begins()
        experiment = self.setup.experiment
        star = Star(
            model=self.setup.model,
            method=experiment.method,
            state=state,
            compression=experiment.compression,
        )
        own, steps = set(self.order.own), {client: each for client, each in self.order.steps}
        busy = () if self.working is None else self.working.tasks.keys()
        together = [client for client in together if client.id not in busy]
        dealt = star.tasks(together, training_of(self.setup, star))
        tasks = (task for task in numbered(dealt, state, steps, number) if task.client.id in own)
        notes = Notes()
        if self.working is None:
            counted = self._all(tasks, state, notes)
        else:
            asked = sum(client.id in own for client in together)
            counted = self._enough(self.working, asked, tasks, state, number, notes)
        for each in counted:
            total.add(each.update)
            self._note(notes, each)
            del each  # its memory serves the next client
        self._failures += [Loss(**failure) for failure in notes.failures]

    def _all(self, tasks: Iterator[Task], state: State, notes: Notes) -> Iterator[Counted]:
        """The answers of all that answer."""
        down, engine = dict[int, int](), _Watched(engine=self.engine)

        def measured() -> Iterator[Task]:
            for task in tasks:
                down[task.client.id] = task.num_bytes
                yield task

        for update in answers(self.setup, engine, measured(), state.params, self.costs, notes):
            took = engine.took[update.client]
            yield Counted(update=update, round=update.round, down=down[update.client], seconds=took)

    def _enough(
        self,
        working: Working,
        asked: int,
        tasks: Iterator[Task],
        state: State,
        number: int,
        notes: Notes,
    ) -> Iterator[Counted]:
        """The answers until a quorum of those asked, or a deadline; those of late devices too."""
        waits = self.order.waits
        assert waits is not None, "who does not wait for all was told how"
        patience = Patience(quorum=waits.quorum, wanted=waits.wanted, asked=waits.asked)
        working.fits = lambda task: fits(self.setup.experiment.method, state, task.round, number)
        return working.until_enough(
            tasks,
            asked,
            patience.needed(asked),
            self.seconds,
            round_of(state, number),
            state.params,
            notes,
        )

    def _note(self, notes: Notes, counted: Counted) -> None:
        update, took, down = counted.update, counted.seconds, counted.down
        noted, part = notes.clients[-1], notes.trained[-1]
        places = tuple((name, view.key) for name, view in part.views.items())
        self._parts.setdefault(places, part)
        fixed = {name: noted[name] for name in _FIXED}
        row = Row(
            **fixed,
            metrics={name: value for name, value in noted.items() if name not in fixed},
            round=update.round,
            link_seconds=max(0.0, took - noted["seconds"]),
            bytes_up=update.num_bytes,
            bytes_down=down,
            change=norm(update.delta),
            sketch=[]
            if self.sketch is None
            else list(self.sketch.change(update.delta, update.submodel)),
            part=list(self._parts).index(places),
        )
        self._rows.append(row)


@dataclass(kw_only=True)
class _Watched:
    """An engine, and how long its clients' tasks took from here and back."""

    engine: Engine
    took: dict[int, float] = field(default_factory=dict)
    _begun: dict[int, float] = field(default_factory=dict)

    @property
    def capacity(self) -> int:
        return self.engine.capacity

    @property
    def group(self) -> int:
        return self.engine.group

    @property
    def memories(self) -> Mapping[int, Memory]:
        return self.engine.memories

    def restore(self, memories: Mapping[int, Memory]) -> None:
        self.engine.restore(memories)

    def submit(self, tasks: Sequence[Task]) -> None:
        self._begun |= {task.client.id: time.monotonic() for task in tasks}
        self.engine.submit(tasks)

    def poll(self) -> list[Outcome]:
        outcomes = self.engine.poll()
        now = time.monotonic()
        self.took |= {each.client: now - self._begun[each.client] for each in outcomes}
        return outcomes

    def close(self) -> None:
        self.engine.close()
