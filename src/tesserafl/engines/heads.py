"""What the heads of messages are made of."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Natural = Annotated[int, Field(ge=0, lt=1 << 48)]
Pair = Annotated[list[Natural], Field(min_length=2, max_length=2)]
"""JSON has lists where we have pairs."""
Share = Annotated[float, Field(ge=0, le=1)]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
RunId = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
"""Also the name of a folder on the device, so nothing else may be in it."""


class Strict(BaseModel):
    """JSON values of the stated types, and no others."""

    model_config = ConfigDict(extra="forbid", strict=True)
