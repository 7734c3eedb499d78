"""The mean of what clients report beside the model's parameters (`Update.extra`)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from tesserafl.core.exactsum import ExactSum
from tesserafl.core.messages import Client, Update
from tesserafl.core.method import Weighting, weights_of
from tesserafl.core.params import Params
from tesserafl.core.submodel import merge, whole


class ExtraSum:
    """The exact weighted sum of the changes of further tensors, noted while updates pass by.

    Args:
        tensors: before the round; an update's `extra` has the same names and shapes, or none.
        clients: those that were asked.
        weighting: of a client in the mean.
    """

    def __init__(self, tensors: Params, clients: Sequence[Client], weighting: Weighting) -> None:
        self._tensors, self._weights = tensors, weights_of(clients, weighting)
        self._places = whole({}, {name: tuple(t.shape) for name, t in tensors.items()})
        self._total = ExactSum(max_weight=max(1, sum(self._weights.values())))
        self._heard = False

    def adding(self, updates: Iterable[Update]) -> Iterator[Update]:
        """Pass updates on as they are.

        Raises:
            UpdateError: a tensor does not fit, or is not finite.
        """
        for update in updates:
            if update.extra:
                weight = self._weights[update.client]
                self._heard = True
                self._total.fold(self._places, update.extra, weight, self._tensors)
            yield update

    def merged(self) -> Params:
        """The tensors after the round."""
        return merge(self._tensors, self._total) if self._heard else self._tensors
