"""Sub-models as plain JSON values: which entries of a large model they are."""

from __future__ import annotations

from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, FailFast, Field

from tesserafl.core.buffers import shown
from tesserafl.core.errors import MessageError
from tesserafl.core.submodel import Index, SubModel, View

_Natural = Annotated[int, Field(ge=0, lt=1 << 62)]
_Entries = Annotated[list[_Natural], Field(min_length=1), FailFast()]
_Slice = Annotated[list[_Natural], Field(min_length=2, max_length=2)]


# JSON has lists where we have pairs.
_View = Annotated[tuple[str, list[_Slice | _Natural]], Field(strict=False)]


class PartHeader(BaseModel):
    """A sub-model as JSON; see `part_to_json`."""

    model_config = ConfigDict(extra="forbid", strict=True)

    sizes: dict[str, _Natural]
    lists: Annotated[list[_Entries], FailFast()]
    views: dict[str, _View]


def part_to_json(submodel: SubModel) -> dict[str, Any]:
    """A sub-model as plain values."""
    # Many views share an index list: each is written once and referred to by its number.
    lists: list[list[int]] = []
    numbers: dict[bytes, int] = {}

    def written(index: Index) -> list[int] | int:
        if isinstance(index, slice):
            return [index.start, index.stop]
        key = index.numpy().tobytes()
        if key not in numbers:
            numbers[key] = len(lists)
            lists.append(index.tolist())
        return numbers[key]

    views = {
        name: [view.name, [written(index) for index in view.index]]
        for name, view in submodel.views.items()
    }
    return {"sizes": dict(submodel.sizes), "views": views, "lists": lists}


def part_from_json(data: PartHeader) -> SubModel:
    """The inverse of `part_to_json`; raises MessageError. It need not fit any model."""
    lists = [torch.tensor(entries, dtype=torch.int64) for entries in data.lists]
    views = {}
    for small, (large, written) in data.views.items():
        index: list[Index] = []
        for item in written:
            if isinstance(item, int):
                if item >= len(lists):
                    raise MessageError(
                        f"sub-model entry {shown(small)} refers to list {item} of {len(lists)}"
                    )
                index.append(lists[item])
            elif item[0] > item[1]:
                raise MessageError(
                    f"sub-model entry {shown(small)} has a slice {item} that runs backwards"
                )
            else:
                index.append(slice(item[0], item[1]))
        views[small] = View(large, tuple(index))
    return SubModel(data.sizes, views)
