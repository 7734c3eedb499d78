"""What a cloud asks an edge of its clients' own models, and what it takes from the answer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pydantic import BaseModel, ValidationError

from tesserafl.core.buffers import shown
from tesserafl.core.errors import MessageError
from tesserafl.engines.edge_orders import Survey, Surveyed
from tesserafl.engines.orders import Judged
from tesserafl.engines.parcels import Letter
from tesserafl.engines.steps import Told


@dataclass(frozen=True, kw_only=True)
class Surveying:
    """A question to one edge."""

    numbers: Mapping[str, int]
    """Device -> the client that it is, of all below the edge."""
    heard: Mapping[int, int]
    """Client -> the round of the task that it answered last, of all."""
    seconds: float
    """That an edge has."""

    @property
    def most_bytes(self) -> int:
        """None: an honest answer has no tensors."""
        return 0

    def order(self, run: str, letter: Letter, most_bytes: int) -> BaseModel:
        """The order."""
        below = sorted(self.numbers.values())
        return Survey(
            run=run,
            letter=letter.model_dump(),
            numbers=dict(self.numbers),
            heard=[[client, self.heard[client]] for client in below if client in self.heard],
            seconds=self.seconds,
        )

    def judged(self, told: Told) -> dict[int, Judged]:
        """What the edge's clients reach.

        Raises:
            MessageError: it says something else, or tells of others' clients.
        """
        try:
            judged = Surveyed.model_validate(told.parts[0]).judged
        except (ValidationError, RecursionError) as error:
            raise MessageError(f"an edge's answer is wrong: {shown(str(error))}") from error
        found = {each.client: Judged(accuracy=each.accuracy, share=each.share) for each in judged}
        if len(found) < len(judged) or not found.keys() <= set(self.numbers.values()):
            raise MessageError(
                f"it tells of the clients {shown(str([each.client for each in judged]))}; below it "
                f"are {shown(str(sorted(self.numbers.values())))}"
            )
        return found
