"""The part of a report on adapted blocks, gates and frozen models, from events made by hand."""

from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg

from tesserafl.run.adaptation import adaptation_html, blocks_figure, gates_figure
from tesserafl.run.record import Record


def row(client: int, **more: float) -> dict:
    return {"client": client, "examples": 10 + 10 * client, "trained_entries": 50, **more}


def record(
    rounds: list[list[dict]], finish: dict | None = None, frozen: int | None = None
) -> Record:
    return Record(
        folder=Path("run"),
        config={},
        start={} if frozen is None else {"params_frozen": frozen},
        rounds=[{"round": n, "clients": rows} for n, rows in enumerate(rounds, start=1)],
        evaluations=[],
        finish=finish,
    )


def test_ordinary_runs_have_no_such_part() -> None:
    old = [{"client": 0, "examples": 10}]  # a folder of before there were frozen numbers
    for start in (None, 0):
        for finish in (None, {}, {"accuracy_personal": [0.5]}):
            assert adaptation_html(record([old, [row(0)], []], finish, start)) == ""
    assert adaptation_html(record([])) == ""


def test_a_frozen_model_is_held_against_what_is_trained() -> None:
    page = adaptation_html(record([[row(0), row(1, trained_entries=400)]], frozen=100_000))
    assert page.startswith("<h2>Adapters on a frozen model</h2>")
    assert "frozen model has 100,000 numbers" in page
    assert "at most 400 in a round: 0.400%." in page
    assert "<figure" not in page
    page = adaptation_html(record([[row(0, trained_entries=25_000)]], frozen=100_000))
    assert "at most 25,000 in a round: 25" in page
    assert "at most 0 in a round" in adaptation_html(record([[]], frozen=100))


def test_blocks_and_validation_are_drawn_where_they_were_noted() -> None:
    rounds = [
        [row(0, active_blocks=1.0), row(2, active_blocks=3.0)],
        [row(0, active_blocks=2.0)],
    ]
    page = adaptation_html(record(rounds))
    assert 'aria-label="blocks"' in page
    assert 'aria-label="validation"' not in page and 'aria-label="gates"' not in page
    heard = [[row(0, active_blocks=1.0, validation_accuracy=0.5)], []]
    assert 'aria-label="validation"' in adaptation_html(record(heard))


def test_validation_is_weighted_by_examples(monkeypatch) -> None:
    from tesserafl.run import adaptation

    drawn = []

    def kept(panels: list, width: float) -> object:
        drawn.extend(panels)
        return blocks_figure({(0, 1): 1.0})

    monkeypatch.setattr(adaptation, "panels_figure", kept)
    rows = [
        row(0, active_blocks=1.0, validation_accuracy=0.0),
        row(2, active_blocks=1.0, validation_accuracy=1.0),
        row(1, active_blocks=1.0),  # has no validation examples
    ]
    adaptation_html(record([rows]))
    (line,) = drawn[0].lines
    assert (line.x, line.y) == ([1], [0.75])


def test_gates_are_drawn_and_put_in_words() -> None:
    finish = {"own_share": [0.25, 0.75, 0.5], "accuracy_personal": [0.5, 1.0, 0.0]}
    page = adaptation_html(record([[row(0)]], finish))
    assert 'aria-label="gates"' in page
    words = page[page.rindex("<p>") :]
    assert [part for part in ("50", "25", "75") if part in words] == ["50", "25", "75"]


def texts(figure) -> list[str]:
    FigureCanvasAgg(figure).draw()
    return [text.get_text() for text in figure.axes[0].texts]


def test_a_cell_says_how_many_blocks_and_is_empty_for_who_was_away() -> None:
    figure = blocks_figure({(7, 1): 1.0, (3, 2): 4.0})
    assert texts(figure) == ["4", "1"]
    axes = figure.axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["3", "7"]
    colours = axes.images[0].get_array()
    assert colours.shape == (2, 2, 4)
    strength = colours[..., 3].tolist()
    assert strength[0][0] == strength[1][1] == 0.0
    assert strength[0][1] == 1.0 and 0.0 < strength[1][0] < 1.0
    # Where cells are small their colour has to do.
    assert texts(blocks_figure({(c, r): 1.0 for c in range(25) for r in range(25)})) == []


def test_bars_are_shares_in_percent() -> None:
    figure = gates_figure([0.25, 0.75], [1.0, 0.5])
    FigureCanvasAgg(figure).draw()
    assert [bar.get_height() for bar in figure.axes[0].patches] == [25.0, 75.0]
    assert list(figure.axes[0].lines[0].get_ydata()) == [100.0, 50.0]
