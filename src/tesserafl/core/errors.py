"""Errors that a user can act on.

    TesseraError (ValueError)
     |- ConfigError       a setting is unknown, out of range or contradicts another
     |- DataError         a data set, a label, a partition or a client's data is unusable
     |- ModelError        a model cannot be probed, cut or built at the asked sizes
     |- CapacityError     a client cannot hold what a method would give it
     |- UpdateError       an update is not finite, too large or does not fit its task
     |- MessageError      bytes that are not a message of ours
     |- TrustError        a key, certificate or token is missing, unusable or refused
     `- CheckpointError   a run folder or a checkpoint is missing, incomplete or damaged

Every message says what was given, what is allowed and what to do.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class TesseraError(ValueError):
    """Root of the errors that are the user's to mend."""


class ConfigError(TesseraError):
    """A setting is unknown, out of range or contradicts another."""


class DataError(TesseraError):
    """A data set, a label, a partition or a client's data is unusable."""


class ModelError(TesseraError):
    """A model cannot be probed, cut or built at the asked sizes."""


class CapacityError(TesseraError):
    """A client cannot hold what a method would give it."""


class UpdateError(TesseraError):
    """An update is not finite, too large or does not fit its task."""


class MessageError(TesseraError):
    """Bytes that are not a message of ours."""


class TrustError(TesseraError):
    """A key, certificate or token is missing, unusable or refused."""


class CheckpointError(TesseraError):
    """A run folder or a checkpoint is missing, incomplete or damaged."""


def did_you_mean(given: str, allowed: Iterable[str]) -> str:
    """A sentence with the nearest allowed name, and all of them."""
    names = sorted(allowed)
    near = difflib.get_close_matches(given, names, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"{hint}allowed: {', '.join(names)}"
