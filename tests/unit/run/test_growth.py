"""The part of a report on a model that grows, from events made by hand."""

from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg

from tesserafl.run.growth import blocks_seen, growth_html, held_figure, layers_figure
from tesserafl.run.record import Record


def event(round: int, order: list[int], paths: dict[str, list[int]], log: list[Any]) -> dict:
    families = [[0], [slot for slot in order if slot != 0]]
    axes = {"blocks": {"order": order, "scales": [1.0] * len(order), "families": families}}
    held = {client: {"blocks": path} for client, path in paths.items()}
    known = {"axes": axes, "paths": held, "log": log, "policy": "persistent", "served": None}
    return {"round": round, "clients": [], "structure": known}


INSERTED = [2, "insert", "blocks", 3, 1, [5]]
MERGED = [3, "merge", "blocks", 2, 3, []]
EVENTS = [
    event(1, [0, 1, 2], {"4": [0, 1], "5": [1, 2]}, []),
    event(2, [0, 1, 3, 2], {"4": [0, 1]}, [INSERTED]),
    event(3, [0, 1, 3], {"5": [0, 3]}, [INSERTED, MERGED]),
]


def record(rounds: list[dict]) -> Record:
    return Record(
        folder=Path("run"), config={}, start={}, rounds=rounds, evaluations=[], finish=None
    )


def test_ordinary_runs_have_no_such_part() -> None:
    assert growth_html(record([])) == ""
    assert growth_html(record([{"round": 1, "clients": []}])) == ""


def test_the_log_is_told() -> None:
    page = growth_html(record(EVENTS))
    assert "block 3 of blocks put in" in page and "behind block 1" in page
    assert "block 2 of blocks became one with its neighbour" in page
    assert page.count("<figure") == 3
    assert "No block was put in" in growth_html(record(EVENTS[:1]))


def test_a_path_that_is_served_is_said() -> None:
    last = event(1, [0, 1], {}, [])
    last["structure"]["served"] = {"blocks": [0]}
    assert "blocks: [0]" in growth_html(record([last]))


def test_blocks_that_are_gone_keep_their_place() -> None:
    assert blocks_seen(EVENTS, "blocks") == [0, 1, 3, 2]


def test_shares_are_drawn_by_round() -> None:
    figure = held_figure(EVENTS, "blocks")
    FigureCanvasAgg(figure).draw()
    (axes,) = figure.axes
    cells = axes.images[0].get_array()
    assert cells is not None and cells.shape == (4, 3, 4)
    alpha = cells[:, :, 3]
    assert alpha[1, 0] == 1.0  # both held block 1 in the first round
    assert 0.4 < alpha[0, 0] < 0.6 and alpha[2, 0] == 0.0 and alpha[3, 2] == 0.0
    assert [label.get_text() for label in axes.get_yticklabels()][:3] == [
        "block 0",
        "block 1",
        "block 3",
    ]


def test_layers_are_drawn_where_they_went_last() -> None:
    figure = layers_figure(EVENTS, "blocks")
    FigureCanvasAgg(figure).draw()
    (axes,) = figure.axes
    texts = {(text.get_position(), text.get_text()) for text in axes.texts}
    # Client 4 lies in row 0, client 5 in row 1; columns are blocks 0, 1, 3, 2.
    assert texts == {((0, 0), "1"), ((1, 0), "2"), ((0, 1), "1"), ((2, 1), "2")}
