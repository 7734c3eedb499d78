"""How many blocks' adapters are active: a schedule, and who trains which of them (SAL).

Sparsely activated LoRA (Wu et al., FedFMSL, IEEE TMC 2024): adapters in the blocks of a frozen
model are activated one after another while training goes on. What is active stays applied; what is
newly active has a product of zero, so that no answer changes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from tesserafl.core.errors import ConfigError
from tesserafl.core.messages import Client, Task, Update
from tesserafl.core.model import Model
from tesserafl.core.submodel import SubModel, Units
from tesserafl.methods._width import kept_units

Schedule = Literal["plateau", "linear", "manual", "all"]
Order = Literal["output", "input"]
_ROUNDING = 1e-9


@dataclass(frozen=True, kw_only=True)
class Activation:
    """The settings of a schedule, and what follows from them; a method that has one inherits it."""

    schedule: Schedule = "plateau"
    """what activates blocks: no change of the clients' validation accuracy (needs data.validation),
    the calendar (linear, manual), or nothing, since all are active"""
    start: int = 2
    """a_0: blocks whose adapters are active in the first round of a stage"""
    step: int = 2
    """Delta: blocks that a plateau activates"""
    patience: int = 3
    """q: rounds that make a plateau"""
    tolerance: float = 0.005
    """epsilon: the accuracies of a plateau differ by less"""
    ramp: int = 10
    """rounds in which schedule linear activates all blocks"""
    depths: tuple[int, ...] = ()
    """active blocks in each round of a stage, for schedule manual; the last number stays"""
    window: int = 0
    """train the newest so many active blocks, the others stay applied; 0: train all active ones"""
    order: Order = "output"
    """whether blocks are activated from the output or from the input"""
    caps: tuple[int, ...] = ()
    """most blocks that each client class trains, beside what memory and time allow"""

    @property
    def validates(self) -> bool:
        """Whether clients need validation examples."""
        return self.schedule == "plateau"

    def check_schedule(self) -> None:
        """Check the settings.

        Raises:
            ConfigError: a number is too small, or a manual schedule names no depth.
        """
        least = {"start": 1, "step": 1, "patience": 2, "ramp": 1}
        for name, low in least.items():
            if getattr(self, name) < low:
                raise ConfigError(
                    f"method.{name} must be at least {low}; got {getattr(self, name)}"
                )
        if self.window < 0 or min(self.caps, default=1) < 1:
            raise ConfigError(
                f"method.window must be 0 or more and method.caps at least 1; got {self.window} "
                f"and {list(self.caps)}"
            )
        if self.tolerance < 0:
            raise ConfigError(f"method.tolerance must be 0 or more; got {self.tolerance}")
        if self.schedule == "manual" and (not self.depths or min(self.depths) < 1):
            raise ConfigError(
                f"method.schedule 'manual' needs method.depths, numbers of blocks of at least 1, "
                f"for instance 2,2,4,4,6; got {list(self.depths)}"
            )

    def begin(self, most: int) -> dict[str, Any]:
        """What a state notes before the first round of a stage; a model has `most` blocks."""
        active = self._scheduled(0, most)
        active = min(self.start, most) if active is None else active
        return {"active": active, "reached": active, "recent": [], "since": 0}

    def after(self, notes: Mapping[str, Any], most: int, accuracy: float | None) -> dict[str, Any]:
        """What it notes after a round; `accuracy` is None where nobody measured one."""
        since, active, recent = notes["since"] + 1, notes["active"], list(notes["recent"])
        if accuracy is not None:
            recent = [*recent, accuracy][-self.patience :]
        planned = self._scheduled(since, most)
        if planned is not None:
            active = planned
        elif active < most and self._is_flat(recent):
            active, recent = min(most, active + self.step), []
        reached = max(notes["reached"], active)
        return {"active": active, "reached": reached, "recent": recent, "since": since}

    def trained_by(self, model: Model, notes: Mapping[str, Any], client: Client) -> frozenset[str]:
        """What the client trains: of the active blocks as many as it can."""
        active = notes["active"]
        if self.caps:
            active = min(active, self.caps[client.id % len(self.caps)])
        if client.depth is not None:
            active = min(active, client.depth)
        return self.trained_in(model, active)

    def trained_in(self, model: Model, active: int) -> frozenset[str]:
        """What is trained with so many active blocks."""
        return trained_of(model, active, self.window, self.order)

    def held_by(
        self, model: Model, notes: Mapping[str, Any], ratio: float, everything: bool
    ) -> SubModel:
        """What a client of this share of the ranks holds: what ever was active, or everything."""
        keep: dict[str, Units] = {a: range(kept_units(model, a, ratio)) for a in model.cuttable}
        if not everything and self.order == "output":
            for axis, depth in model.depths.items():
                if depth.last is not None:
                    keep[axis] = range(min(notes["reached"], depth.blocks))
        return model.slice(keep)

    def _is_flat(self, recent: Sequence[float]) -> bool:
        if len(recent) < self.patience:
            return False
        return max(recent) - min(recent) < self.tolerance - _ROUNDING

    def _scheduled(self, since: int, most: int) -> int | None:
        """Active blocks by the calendar alone; None: accuracies decide."""
        if self.schedule == "all":
            return most
        if self.schedule == "manual":
            return min(most, self.depths[min(since, len(self.depths) - 1)])
        if self.schedule == "linear":
            start = min(self.start, most)
            return min(most, start + since * (most - start) // self.ramp)
        return None


@dataclass
class Heard:
    """The accuracies that clients measured, noted while their updates pass by."""

    found: dict[int, float] = field(default_factory=dict)
    """Client -> accuracy on its validation examples."""
    answered: set[int] = field(default_factory=set)

    def listening(self, updates: Iterable[Update]) -> Iterator[Update]:
        """Pass updates on as they are."""
        for update in updates:
            if update.num_steps:  # peers hear of those too that did not train
                self.answered.add(update.client)
            if "validation_accuracy" in update.metrics:
                self.found[update.client] = update.metrics["validation_accuracy"]
            yield update

    def mean(self, clients: Sequence[Client]) -> float | None:
        """Over the clients' examples; None: nobody measured."""
        weights = {c.id: c.num_examples for c in clients if c.id in self.found}
        total = sum(weights.values())
        heard = sorted(weights)
        return sum(self.found[i] * weights[i] for i in heard) / total if total else None


def counts_of(model: Model, task: Task) -> dict[str, float]:
    """What a client's answer says of its part: how many blocks it trained."""
    assert task.trainable is not None
    blocks = {
        place[:2]
        for depth in model.depths.values()
        for name in task.trainable
        if (place := depth.locate(name))
    }
    return {"active_blocks": float(len(blocks))}


def most_blocks(model: Model) -> int:
    """Adapted blocks of the deepest tower.

    Raises:
        ModelError: there are none.
    """
    model.adapted(0)
    return max(depth.blocks for depth in model.depths.values() if depth.last is not None)


def trained_of(model: Model, active: int, window: int, order: Order) -> frozenset[str]:
    """What is trained with so many active blocks: their adapters, and what is in no block.

    Args:
        model: with adapted blocks.
        active: number of active blocks.
        window: only the newest so many of them; 0: all.
        order: whether blocks are activated from the output or from the input; in a tower that is
            less deep than the deepest, counted from the input of that one.
    """
    outside = model.adapted(0)
    older = max(0, active - window) if window else 0
    if order == "output":
        names = model.adapted(active) - model.adapted(older)
    else:
        most = most_blocks(model)
        names = model.adapted(most - older) - model.adapted(most - active)
    return names | outside
