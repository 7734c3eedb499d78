"""Comparisons at equal cost, worked out by hand."""

import json
import re
import statistics
from pathlib import Path

import pytest
from rich.console import Console

from tesserafl.core.errors import CheckpointError
from tesserafl.run.compare import compare

pytestmark = pytest.mark.usefixtures("figures")

DATA = {
    "source": "digits",
    "path": None,
    "name": "",
    "subset": "",
    "num_clients": 4,
    "partition": "dirichlet",
    "alpha": 0.5,
    "classes_per_client": 2,
    "partition_column": "",
}


def config(
    method: str = "fedbrb",
    *,
    ratio: float = 0.5,
    seed: int = 0,
    alpha: float = 0.5,
    lr: float = 0.05,
    **fields: object,
) -> dict:
    return {
        "data": {**DATA, "alpha": alpha},
        "model": {"name": "mlp", "hidden": [16]},
        "method": {"name": method, "ratio": [ratio], **fields},
        "training": {"lr": lr},
        "rounds": 30,
        "seed": seed,
    }


def write_run(
    folder: Path,
    settings: dict,
    points: list[tuple[int, int, float, float]],
    *,
    finished: bool = True,
    entries: int = 250,
    full: int = 1000,
) -> Path:
    """`points` are evaluations: (round, bytes, flops, accuracy); half of the bytes go down."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(settings))
    events: list[dict] = [{"kind": "start", "params_full": full, "clients": []}]
    totals: dict = {}
    for number, num_bytes, flops, accuracy in points:
        totals = {"bytes_down": num_bytes // 2, "bytes_up": num_bytes - num_bytes // 2}
        totals |= {"flops": flops, "seconds": float(number)}
        row = {"client": 0, "entries": entries}
        noted = {"coverage": 0.5, "loss": 1.0, "clients": [row], "failures": []}
        events.append({"kind": "round", "round": number, **totals, **noted})
        events.append(
            {"kind": "evaluate", "round": number, "accuracy": accuracy, "loss": 1.0, **totals}
        )
    if finished:
        summary = {"rounds": points[-1][0], "accuracy": points[-1][3], "coverage": 0.5, **totals}
        summary |= {"accuracy_untrained_zeroed": points[-1][3] / 2, "loss": 1.0}
        summary |= {"params_full": full, "params_largest_client": entries}
        events.append({"kind": "finish", **summary})
    (folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    return folder


@pytest.fixture
def pair(tmp_path):
    # wide: 1000 bytes a round; small: 100 bytes a round and 40 rounds.
    wide = [(10, 10_000, 4e6, 0.5), (20, 20_000, 8e6, 0.9)]
    small = [(10, 1_000, 1e6, 0.1), (20, 2_000, 2e6, 0.3), (40, 12_000, 6e6, 0.7)]
    return [
        write_run(tmp_path / "wide", config("fedavg", ratio=1.0), wide, entries=2000, full=2000),
        write_run(tmp_path / "small", config("fedbrb", ratio=0.5), small),
    ]


def means(comparison, row: int) -> dict[str, float | None]:
    return {key: value and value.mean for key, value in comparison.rows[row].values.items()}


def test_accuracy_at_equal_cost(pair):
    found = compare(pair)
    assert found.equal_cost == {"rounds": 20, "bytes": 12_000, "flops": 6e6}
    wide, small = means(found, 0), means(found, 1)
    assert wide["accuracy"] == 0.9 and small["accuracy"] == 0.7
    # 12,000 of 10,000 .. 20,000 bytes is a fifth of the way from 0.5 to 0.9; 6 of 4 .. 8 a half.
    assert wide["accuracy_at_rounds"] == 0.9
    assert wide["accuracy_at_bytes"] == pytest.approx(0.58)
    assert wide["accuracy_at_flops"] == pytest.approx(0.7)
    assert small["accuracy_at_rounds"] == pytest.approx(0.3)
    assert small["accuracy_at_bytes"] == small["accuracy_at_flops"] == 0.7


def test_no_accuracy_before_the_first_evaluation(tmp_path, pair):
    tiny = write_run(tmp_path / "tiny", config("heterofl"), [(5, 500, 5e5, 0.2)])
    found = compare([*pair, tiny])
    assert found.equal_cost == {"rounds": 5, "bytes": 500, "flops": 5e5}
    for row in (0, 1):
        assert [means(found, row)[f"accuracy_at_{c}"] for c in found.equal_cost] == [None] * 3
    assert means(found, 2)["accuracy_at_bytes"] == 0.2
    assert "| - | - | - |" in found.as_markdown()


def test_other_numbers_of_a_row(pair):
    small = means(compare(pair), 1)
    assert small["accuracy_untrained_zeroed"] == 0.35
    assert small["bytes"] == 12_000 and small["flops"] == 6e6 and small["seconds"] == 40
    assert small["coverage"] == 0.5
    assert small["largest_client"] == 250 / 2000  # of the widest model, not of its own


def test_runs_that_differ_in_the_seed_are_one_row(tmp_path):
    ends = [0.80, 0.86, 0.83]
    runs = [
        write_run(
            tmp_path / f"s{seed}", config(seed=seed), [(10, 1000, 1e6, 0.5), (20, 2000, 2e6, a)]
        )
        for seed, a in enumerate(ends)
    ]
    other = write_run(tmp_path / "other", config("fedavg"), [(20, 2000, 2e6, 0.9)])
    found = compare([*runs, other])
    assert [len(row.runs) for row in found.rows] == [3, 1]
    accuracy = found.rows[0].values["accuracy"]
    assert accuracy.n == 3
    assert accuracy.mean == pytest.approx(0.83)
    assert accuracy.std == pytest.approx(statistics.stdev(ends)) == pytest.approx(0.03)
    assert found.rows[1].values["accuracy"].std is None
    curve = found.rows[0].curves["rounds"]
    assert curve.x == [10, 20]
    assert curve.y == pytest.approx([0.5, 0.83]) and curve.spread == pytest.approx([0.0, 0.03])
    assert "| fedbrb | 3 | 83.0 +- 3.0 |" in found.as_markdown()


def test_mean_curve_where_seeds_spent_different_bytes(tmp_path):
    runs = [
        write_run(tmp_path / "a", config(seed=0), [(1, 100, 1, 0.0), (2, 300, 2, 1.0)]),
        write_run(tmp_path / "b", config(seed=1), [(1, 200, 1, 0.2), (2, 400, 2, 0.6)]),
    ]
    curve = compare(runs).rows[0].curves["bytes"]
    assert curve.x == [200, 300]
    assert curve.y == pytest.approx([(0.5 + 0.2) / 2, (1.0 + 0.4) / 2])


def test_the_same_seed_twice_is_no_second_sample(tmp_path):
    points = [(10, 1000, 1e6, 0.5)]
    runs = [write_run(tmp_path / name, config(), points) for name in ("first", "again")]
    found = compare([*runs, runs[0]])
    assert [row.label for row in found.rows] == [{"run": "first"}, {"run": "again"}]
    assert [row.values["accuracy"].n for row in found.rows] == [1, 1]


def test_labels_show_only_what_differs(tmp_path):
    points = [(10, 1000, 1e6, 0.5)]
    settings = [
        config("fedbrb", broadcast=0.5, ratio=0.25),
        config("fedbrb", broadcast=0.1, ratio=0.25, alpha=0.1),
        config("fedavg", ratio=1.0),
    ]
    runs = [write_run(tmp_path / str(i), value, points) for i, value in enumerate(settings)]
    found = compare(runs)
    assert [dict(row.label) for row in found.rows] == [
        {"method": "fedbrb", "ratio": "1/4", "partition": "dirichlet(0.5)"}
        | {"settings": "method.broadcast=0.5"},
        {"method": "fedbrb", "ratio": "1/4", "partition": "dirichlet(0.1)"}
        | {"settings": "method.broadcast=0.1"},
        {"method": "fedavg", "ratio": "1", "partition": "dirichlet(0.5)", "settings": ""},
    ]
    assert found.common == {"data": "digits", "model": "mlp"}
    assert compare(runs[:1]).rows[0].label == {"method": "fedbrb"}
    one_method = compare(
        [runs[0], write_run(tmp_path / "lr", config(ratio=0.25, broadcast=0.5, lr=1.0), points)]
    )
    assert [row.name for row in one_method.rows] == ["training.lr=0.05", "training.lr=1.0"]


def test_unfinished_and_unevaluated_runs(tmp_path, pair):
    half = write_run(tmp_path / "half", config("fedrolex"), [(20, 4000, 4e6, 0.4)], finished=False)
    new = tmp_path / "new"
    new.mkdir()
    (new / "config.json").write_text(json.dumps(config("heterofl")))
    (new / "events.jsonl").write_text("")
    found = compare([*pair, half, new])
    assert found.equal_cost["bytes"] == 4000  # the run without an evaluation does not count
    assert found.rows[2].label["state"] == "1 of 1 unfinished"
    assert found.rows[2].values["accuracy"].mean == 0.4
    assert found.rows[2].values["accuracy_untrained_zeroed"] is None
    assert set(found.rows[3].values.values()) == {None}
    assert found.write_page(tmp_path / "page.html").exists()
    alone = compare([new])
    assert alone.equal_cost == {}
    assert "No run has been evaluated" in alone.write_page(tmp_path / "page.html").read_text()
    assert "heterofl" in alone.as_markdown()


def test_missing_values_of_some_seeds_are_said(tmp_path):
    points = [(10, 1000, 1e6, 0.5)]
    runs = [
        write_run(tmp_path / "a", config(seed=0), points),
        write_run(tmp_path / "b", config(seed=1), points, finished=False),
    ]
    assert "25.0 (n=1)" in compare(runs).as_markdown()


def test_a_study_stands_for_its_runs(tmp_path, pair):
    study = tmp_path / "study"
    for seed in range(2):
        write_run(study / f"run-{seed}", config(seed=seed), [(10, 1000, 1e6, 0.5)])
    (study / "notes").mkdir()
    found = compare([study, pair[0], study / "run-0"])
    assert [len(row.runs) for row in found.rows] == [2, 1]
    assert found.rows[0].runs == (str(study / "run-0"), str(study / "run-1"))


@pytest.mark.parametrize("content", [None, "config.json", "events.jsonl"])
def test_folder_that_is_no_run(tmp_path, content):
    folder = tmp_path / "holiday"
    folder.mkdir()
    if content:
        (folder / content).write_text("{}")
    with pytest.raises(CheckpointError, match="holiday is not a run folder"):
        compare([folder])
    with pytest.raises(CheckpointError, match="no run was given"):
        compare([])


def test_json_is_plain(pair):
    plain = json.loads(json.dumps(compare(pair).as_json(), allow_nan=False))
    assert plain["equal_cost"]["bytes"] == 12_000
    row = plain["rows"][1]
    assert row["label"] == {"method": "fedbrb", "ratio": "1/2"} and row["n"] == 1
    assert row["accuracy_at_rounds"]["mean"] == pytest.approx(0.3)
    assert row["accuracy_at_rounds"]["std"] is None


@pytest.mark.parametrize("width", [80, 120])
def test_no_number_is_broken_in_a_terminal(tmp_path, width):
    for method in ("fedavg", "federated_dropout"):
        for seed in range(2):
            points = [(30, 184_800_000, 9.99e11, 0.8 + seed / 10)]
            write_run(tmp_path / f"{method}{seed}", config(method, seed=seed), points)
    console = Console(width=width)
    with console.capture() as capture:
        console.print(compare([tmp_path]).as_table())
    text = capture.get()
    assert max(len(line.rstrip()) for line in text.splitlines()) <= width
    for number in ("85.0", "+- 7.1", "42.5", "+- 3.5", "25.0", "176.2", "999.0", "30.0"):
        assert text.count(number) >= 2


def test_page_needs_nothing_but_itself(tmp_path, pair):
    names = [f"<i>{number}</i>" for number in range(8)]
    runs = [
        write_run(
            tmp_path / f"{number}", config(name), [(10, 1000, 1e6, 0.1), (20, 2000, 2e6, 0.2)]
        )
        for number, name in enumerate(names)
    ]
    page = compare([*pair, *runs]).write_page(tmp_path / "page.html").read_text()
    assert page.count("<svg") == 1
    assert not re.search(r"https?:|<script|<link|<img|@import|\bsrc=|<i>", page)
    ids = re.findall(r'\bid="([^"]*)"', page)
    assert len(ids) == len(set(ids)) > 0
    assert page.count("&lt;i&gt;7&lt;/i&gt;") >= 1
    assert len(re.findall(r"<tr>", page)) == 1 + 10
