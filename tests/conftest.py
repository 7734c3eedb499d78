"""What all tests share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import IO, Any

import pytest
from matplotlib.figure import Figure

_drawn = Figure.savefig


def _blank(_: Figure, file: IO[Any], *, format: str, **__: object) -> None:
    file.write("<svg></svg>" if format == "svg" else b"")


@pytest.fixture(autouse=True, scope="session")
def _nothing_is_drawn() -> Iterator[None]:
    """Most of a short run's time is its report's figures; see `figures`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", _blank)
        yield


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests that look at figures: they are drawn."""
    monkeypatch.setattr(Figure, "savefig", _drawn)
