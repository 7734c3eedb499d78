"""How much an update counts that began with an older model (Xie et al. 2019, Section 5.2)."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from tesserafl.core.errors import ConfigError
from tesserafl.core.messages import Update

Decay = Literal["constant", "polynomial", "hinge"]


def check_decay(decay: str, a: float, b: float, method: str) -> None:
    """Raise ConfigError unless the function is one."""
    if decay not in ("constant", "polynomial", "hinge"):
        raise ConfigError(f"{method}: staleness={decay!r}; allowed: constant, hinge, polynomial")
    if not a > 0 or not b >= 0:
        raise ConfigError(f"{method}: a must be positive and b 0 or more; got {a} and {b}")


def decayed(staleness: int, decay: Decay, a: float, b: float) -> float:
    """s(t - tau): 1 for a fresh update; (1 + staleness)^-a; or 1 up to b, then 1/(a (s - b) + 1).

    Args:
        staleness: versions of the model since the one that the client began with.
        decay: which function.
        a: how fast it falls.
        b: hinge: versions up to which nothing is lost.
    """
    if decay == "polynomial":
        return float((1.0 + staleness) ** -a)
    if decay == "hinge" and staleness > b:
        return 1.0 / (a * (staleness - b) + 1.0)
    return 1.0


def times(update: Update, factor: float) -> Update:
    """The update with its change multiplied; a factor of 1 changes no bit."""
    if factor == 1.0:
        return update
    return replace(update, delta={name: tensor * factor for name, tensor in update.delta.items()})
