"""What answers hold, for methods whose clients report something else than what they trained."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

from tesserafl.core.messages import Task, Wanted

NOTHING = Wanted(deltas=frozenset())
"""Counts and metrics alone."""


def wanting(tasks: Iterable[Task], wanted: Wanted | Callable[[Task], Wanted]) -> Iterator[Task]:
    """The tasks, whose answers hold this, or what it says of each."""
    for task in tasks:
        yield replace(task, wanted=wanted if isinstance(wanted, Wanted) else wanted(task))


def changes_of(names: Iterable[str]) -> Callable[[Task], Wanted]:
    """The changes of these parameters, as far as a task holds them."""
    held = frozenset(names)
    return lambda task: Wanted(deltas=held.intersection(task.submodel.views))


def changes_but(names: Iterable[str | None]) -> Callable[[Task], Wanted]:
    """The changes of all parameters that a task holds but these."""
    kept = frozenset(names)
    return lambda task: Wanted(deltas=frozenset(task.submodel.views) - kept)


def values(task: Task) -> Wanted:
    """The trained values of all parameters, in place of their changes."""
    shapes = {name: view.shape for name, view in task.submodel.views.items()}
    return Wanted(deltas=frozenset(), extra=shapes)
