"""report.html and the partition picture, from event files written by hand."""

import json
import re
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg

from tesserafl.core.errors import CheckpointError
from tesserafl.data.examples import ClientData, Examples, FederatedData, Spec
from tesserafl.run.page import svg_of
from tesserafl.run.plots import Line, Panel, graph_figure, human, panels_figure, partition_figure
from tesserafl.run.report import write_partition, write_report

pytestmark = pytest.mark.usefixtures("figures")

CONFIG = {
    "data": {
        "source": "digits",
        "path": None,
        "name": "",
        "subset": "",
        "num_clients": 4,
        "partition": "dirichlet",
        "alpha": 0.5,
        "classes_per_client": 2,
        "partition_column": "",
    },
    "model": {"name": "mlp", "hidden": [16, 16]},
    "method": {"name": "fedbrb", "ratio": [1.0, 0.5], "note": "<script>alert(1)</script>"},
    "training": {"lr": 0.05},
    "rounds": 10,
    "clients_per_round": 3,
    "seed": 7,
}
START = {
    "kind": "start",
    "experiment": CONFIG,
    "params_full": 1000,
    "clients": [{"id": number, "num_examples": 10} for number in range(4)],
}


def client(number: int, entries: int, bytes_down: int, flops: float) -> dict:
    return {
        "client": number,
        "examples": 10,
        "steps": 1,
        "loss": 1.0,
        "entries": entries,
        "bytes_down": bytes_down,
        "bytes_up": 512,
        "flops": flops,
        "seconds": 0.5,
    }


def played(number: int, clients: list[dict], failures: list[dict]) -> dict:
    return {
        "kind": "round",
        "round": number,
        "asked": 3,
        "answered": len(clients),
        "loss": 1.0 / number if clients else None,
        "coverage": 0.25 * number,
        "bytes_down": 2048 * number,
        "bytes_up": 1024 * number,
        "flops": 5e6 * number,
        "seconds": 90.0 * number,
        "clients": clients,
        "failures": failures,
    }


def evaluated(number: int, accuracy: float) -> dict:
    totals = {"bytes_down": 2048 * number, "bytes_up": 1024 * number, "flops": 5e6 * number}
    return {"kind": "evaluate", "round": number, "accuracy": accuracy, "loss": 0.75, **totals}


ROUNDS = [
    played(1, [client(0, 1000, 4096, 2e6), client(1, 250, 1024, 1e6)], []),
    evaluated(1, 0.5),
    played(
        2,
        [client(2, 250, 3072, 3e6)],
        [
            {"client": 0, "reason": "offline", "text": "did not answer"},
            {"client": 1, "reason": "error", "text": "the update holds <NaN>"},
        ],
    ),
    evaluated(2, 0.8125),
]
FINISH = {
    "kind": "finish",
    "rounds": 2,
    "accuracy": 0.8125,
    "accuracy_untrained_zeroed": 0.4375,
    "loss": 0.75,
    "params_full": 1000,
    "params_largest_client": 1000,
    "coverage": 0.5,
    "bytes_down": 4096,
    "bytes_up": 2048,
    "flops": 1e7,
    "seconds": 180.0,
}


def write_run(folder: Path, events: list[dict]) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    return folder


def report(folder: Path, events: list[dict]) -> str:
    return write_report(write_run(folder, events)).read_text()


def tiles(page: str) -> dict[str, str]:
    return dict(re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", page))


def table(page: str, title: str) -> list[list[str]]:
    body = page.split(f"<h2>{title}</h2>")[1].split("</table>")[0]
    return [re.findall(r"<td.*?>(.*?)</td>", line) for line in body.split("\n")[1:]]


def test_headline_numbers_of_a_finished_run(tmp_path):
    page = report(tmp_path / "run", [START, *ROUNDS, FINISH])
    assert tiles(page) == {
        "accuracy": "81.2 %",
        "accuracy, untrained entries zeroed": "43.8 %",
        "test loss": "0.75",
        "coverage: share ever trained": "50.0 %",
        "largest client's share of the model": "100.0 %",
        "bytes received by participants": "4.00 KiB",
        "bytes sent by participants": "2.00 KiB",
        "FLOPs of the clients": "10.0 MFLOP",
        "time of the rounds": "3.00 min",
    }
    assert "<h1>fedbrb, ratio 1, 1/2</h1>" in page
    for fact in ("digits, dirichlet(0.5)", "4 clients, 3 a round", "10 rounds", "seed 7"):
        assert fact in page
    assert "not finished" not in page


def test_clients_are_grouped_by_the_parameters_they_held(tmp_path):
    page = report(tmp_path / "run", [START, *ROUNDS, FINISH])
    assert table(page, "Classes of clients") == [
        ["1", "1,000", "100.0 %", "4.00 KiB", "512 B", "2.00 MFLOP", "500 ms"],
        ["2", "250", "25.0 %", "2.00 KiB", "512 B", "2.00 MFLOP", "500 ms"],
    ]
    assert "have not answered in any round: 1." in page  # client 3


def test_failures_by_reason(tmp_path):
    page = report(tmp_path / "run", [START, *ROUNDS])
    assert table(page, "Answers that did not come") == [
        ["error", "the update holds &lt;NaN&gt;", "1", "1"],
        ["offline", "did not answer", "1", "1"],
    ]
    assert "times, of 6 asked" in page
    without = report(tmp_path / "calm", [START, *ROUNDS[:2]])
    assert "Answers that did not come" not in without


def test_unfinished_run_shows_what_is_known(tmp_path):
    page = report(tmp_path / "run", [START, *ROUNDS])
    assert "2 of 10 rounds (not finished)" in page
    shown = tiles(page)
    assert shown["accuracy"] == "81.2 %"
    assert shown["accuracy, untrained entries zeroed"] == "-"
    assert shown["coverage: share ever trained"] == "50.0 %"
    assert shown["largest client's share of the model"] == "100.0 %"


def test_run_before_its_first_evaluation(tmp_path):
    page = report(tmp_path / "run", [START, ROUNDS[0]])
    assert tiles(page)["accuracy"] == "-"
    assert "has not been evaluated" in page
    assert page.count("<svg") == 1


@pytest.mark.parametrize("events", [[], [START]])
def test_run_before_its_first_round(tmp_path, events):
    page = report(tmp_path / "run", events)
    assert "0 of 10 rounds (not finished)" in page
    assert "No round has ended yet" in page
    assert set(tiles(page).values()) == {"-"}


def test_round_without_answers_and_diverged_loss(tmp_path):
    diverged = {**played(3, [], []), "loss": float("nan"), "round": 3}
    page = report(tmp_path / "run", [START, played(1, [], []), ROUNDS[2], diverged])
    assert page.count("<svg") == 1


def test_page_needs_nothing_but_itself(tmp_path):
    folder = write_run(tmp_path / "run", [START, *ROUNDS, FINISH])
    (folder / "partition.json").write_text(
        json.dumps({"counts": [[1, 2]] * 70, "class_names": ["a", "b"]})
    )
    page = write_report(folder).read_text()
    assert page.count("<svg") == 3
    assert not re.search(r"https?:|<script|<link|<img|@import|\bsrc=", page)
    links = re.findall(r'href="([^"]*)"', page) + re.findall(r"url\(([^)]*)\)", page)
    ids = re.findall(r'\bid="([^"]*)"', page)
    assert len(ids) == len(set(ids)) > 0
    outside = {link for link in links if not link.startswith("data:image/png;base64,")}
    assert outside and outside <= {f"#{name}" for name in ids}
    assert "prefers-color-scheme:dark" in page and "currentColor" in page
    assert "&lt;script&gt;alert(1)" in page


def test_same_run_gives_the_same_page(tmp_path):
    folder = write_run(tmp_path / "run", [START, *ROUNDS, FINISH])
    assert write_report(folder).read_bytes() == write_report(folder).read_bytes()


def test_command_to_run_again_is_quoted(tmp_path):
    folder = tmp_path / "my run"
    command = re.search(r"<code>(tessera .*?)</code>", report(folder, [START]))[1]
    words = shlex.split(command.replace("&#x27;", "'"))
    assert words == ["tessera", "run", str(folder / "config.json")]


def test_folder_that_is_no_run(tmp_path):
    with pytest.raises(CheckpointError, match=re.escape(str(tmp_path))):
        write_report(tmp_path)


def setup_of(labels: list[list[int]], task: str, names: tuple[str, ...]) -> SimpleNamespace:
    def examples(own: list[int]) -> Examples:
        rows = torch.tensor(own, dtype=torch.int64)
        if task == "causal-lm":
            rows = rows[:, None].expand(-1, 5)
        return Examples(inputs=torch.zeros(len(own), 3), labels=rows)

    clients = tuple(
        ClientData(train=examples(own), validation=examples([]), test=examples([]))
        for own in labels
    )
    spec = Spec(kind="vector", task=task, shape=(3,), num_classes=3, class_names=names)
    return SimpleNamespace(data=FederatedData(spec=spec, clients=clients, test=examples([])))


def test_partition_is_counted_per_client_and_class(tmp_path):
    setup = setup_of([[0, 2, 2, -100], [1]], "vector-classification", ("a", "b", "c"))
    write_partition(tmp_path, setup)
    assert json.loads((tmp_path / "partition.json").read_text()) == {
        "counts": [[1, 0, 2], [0, 1, 0]],
        "class_names": ["a", "b", "c"],
    }
    assert (tmp_path / "partition.png").read_bytes().startswith(b"\x89PNG")


def test_partition_of_a_language_model_is_sizes(tmp_path):
    write_partition(tmp_path, setup_of([[5, 6, 7], [8]], "causal-lm", ()))
    assert json.loads((tmp_path / "partition.json").read_text()) == {
        "counts": [[3], [1]],
        "class_names": [],
    }


def test_report_draws_the_partition_with_and_without_a_setup(tmp_path):
    folder = write_run(tmp_path / "run", [START, *ROUNDS, FINISH])
    assert "Who holds what" not in write_report(folder).read_text()
    setup = setup_of([[0, 2], [1]], "vector-classification", ("a", "b", "c"))
    first = write_report(folder, setup).read_text()
    assert "Who holds what" in first
    assert write_report(folder).read_text() == first


def circles(figure) -> list[tuple[float, float, float]]:
    dots = figure.axes[1].collections[0]
    return [
        (*place, size) for place, size in zip(dots.get_offsets(), dots.get_sizes(), strict=True)
    ]


def test_area_of_a_circle_is_its_examples():
    found = circles(partition_figure([[100, 0], [25, 50]], ["a", "b"]))
    areas = {(int(x), int(y)): size for x, y, size in found}
    assert areas.keys() == {(0, 0), (1, 0), (1, 1)}
    assert areas[0, 0] == pytest.approx(2 * areas[1, 1]) == pytest.approx(4 * areas[1, 0])


@pytest.mark.parametrize("clients", [1, 10, 60, 61, 130])
@pytest.mark.parametrize("classes", [1, 2, 20, 21])
def test_partition_figure_at_every_size(clients, classes):
    counts = [[(7 * i + j) % 5 + 1 for j in range(classes)] for i in range(clients)]
    figure = partition_figure(counts, [f"$_$ {j} and a long name besides" for j in range(classes)])
    svg_of(figure, "p")
    sizes_only = classes in (1, 21)
    assert len(figure.axes) == (1 if sizes_only else 2)
    if not sizes_only:
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        renderer = canvas.get_renderer()
        for text in (
            figure.axes[0].title,
            figure.axes[1].xaxis.label,
            *figure.axes[1].get_yticklabels(),
        ):
            box = text.get_window_extent(renderer)
            assert box.x0 >= 0 and box.x1 <= figure.bbox.x1, f"{text.get_text()!r} is cut"


def test_line_without_points_and_a_name_that_looks_like_mathematics():
    lines = [Line(label="$_$", x=[], y=[]), Line(label="b$^", x=[1], y=[0.5], spread=[0.1])]
    figure = panels_figure([Panel(title="t", across="bytes", up="percent", lines=lines, mark=1.0)])
    assert svg_of(figure, "p").startswith("<svg viewBox=")


@pytest.mark.parametrize(
    ("value", "quantity", "text"),
    [
        (None, "bytes", "-"),
        (0, "bytes", "0 B"),
        (1023, "bytes", "1,023 B"),
        (1024, "bytes", "1.00 KiB"),
        (123.4 * 2**20, "bytes", "123 MiB"),
        (4.56e12, "flops", "4.56 TFLOP"),
        (0.0042, "seconds", "4 ms"),
        (119, "seconds", "119 s"),
        (5400, "seconds", "90.0 min"),
        (0.8134, "percent", "81.3 %"),
        (1, "rounds", "1 round"),
        (2000, "rounds", "2,000 rounds"),
    ],
)
def test_numbers_for_people(value, quantity, text):
    assert human(value, quantity) == text


def test_peers_have_a_graph_and_their_own_accuracies(tmp_path):
    own = {"params_stored": 1000, "consensus": 0.125, "round_coverage": 0.5}
    rounds = [{**event, **own} if event["kind"] == "round" else event for event in ROUNDS]
    start = {**START, "links": [[0, 1], [1, 2], [2, 3]]}
    finish = {**FINISH, "accuracy_peers": [0.5, 0.75, 0.75, 1.0]}
    folder = write_run(tmp_path / "run", [start, *rounds, finish])
    network = {"graph": "file", "loss": 0.25, "delay": 0.0, "failure": 0.0}
    (folder / "config.json").write_text(json.dumps({**CONFIG, "network": network}))
    page = write_report(folder).read_text()
    assert "<h2>Peers</h2>" in page and "Consensus distance" in page
    assert "Graph file, loss 0.25" in page and "1,000 of 1,000 parameters" in page
    assert "75.0 % on average, 50.0 % at least" in page
    lean = [{k: v for k, v in e.items() if k != "consensus"} for e in rounds]
    (folder / "events.jsonl").write_text("\n".join(map(json.dumps, [START, *lean])) + "\n")
    page = write_report(folder).read_text()
    assert "<h2>Peers</h2>" in page and "Consensus distance" not in page


def test_the_graph_shows_every_peer_and_link():
    figure = graph_figure(4, [[0, 1], [1, 2], [2, 3]])
    (axes,) = figure.axes
    assert len(axes.lines) == 3
    assert [text.get_text() for text in axes.texts] == ["0", "1", "2", "3"]
    assert not graph_figure(80, [[0, 79]]).axes[0].texts  # no room for names


def test_a_star_has_no_peers_in_its_report(tmp_path):
    assert "<h2>Peers</h2>" not in report(tmp_path / "run", [START, *ROUNDS, FINISH])
