"""A module as it predicts, for the time of a block."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def predicting(module: nn.Module | None) -> Iterator[None]:
    """Everything as it predicts, but BatchNorm, which has no statistics but the batch's yet.

    Args:
        module: None: nothing is changed.
    """
    if module is None:
        yield
        return
    was_training = module.training
    module.eval()
    for part in batch_norms(module):
        part.train(was_training)
    try:
        yield
    finally:
        module.train(was_training)


def batch_norms(module: nn.Module | None) -> list[nn.Module]:
    """The parts for which an example's output depends on its batch."""
    parts = [] if module is None else module.modules()
    return [part for part in parts if isinstance(part, nn.modules.batchnorm._BatchNorm)]
