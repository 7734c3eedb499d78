"""Runs in virtual time: the same bits again, cut off or with workers; and what is told of them."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tesserafl.cli import main
from tesserafl.core.errors import ConfigError
from tesserafl.run import runner, setup
from tesserafl.run.compare import compare
from tesserafl.run.events import read_events
from tesserafl.run.experiment import Experiment, from_json
from tesserafl.run.record import read_record
from tesserafl.run.report import write_report
from tesserafl.run.runner import resume, start

Settings = dict[str, Any]


loaded = functools.cache(setup.load)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures and data take most of a small run's time: one test draws, and data are read once."""
    monkeypatch.setattr(runner, "write_report", lambda folder, setup: None)
    monkeypatch.setattr(runner, "write_partition", lambda folder, setup: None)
    monkeypatch.setattr(setup, "load", loaded)


# A task of this model takes a phone and a Raspberry Pi some milliseconds of work, and the link's
# latency several times that.
WORLD: Settings = {
    "profiles": ["phone", "laptop", "raspberry-pi-4"],
    "load": [0.1, 0.8],
    "load_minutes": 0.002,
    "online": 0.8,
    "online_minutes": 0.02,
}
SEMI: Settings = {"mode": "semi-synchronous", "quorum": 0.5, "over_selection": 0.5}
FREE: Settings = {"mode": "asynchronous", "buffer": 2, "concurrency": 4}


def small(**changes: Any) -> Experiment:
    base = {
        "data": {"num_clients": 6, "max_train": 300, "max_test": 100},
        "model": {"name": "mlp", "hidden": [16]},
        "method": {"name": "fedavg"},
        "training": {"batch_size": 16, "momentum": 0.5},
        "engine": {"batching": "sequential"},
        "fleet": WORLD,
        "rounds": 6,
        "clients_per_round": 3,
        "evaluate_every": 100,
        "checkpoint_every": 100,
    }
    return from_json({**base, **changes})


RUNS: dict[str, Settings] = {
    "synchronous": {"dropout": 0.2},
    "bank": {"clock": SEMI},
    "refuse": {"clock": {**SEMI, "deadline_seconds": 0.2, "late": "refuse"}, "dropout": 0.2},
    "fedbuff": {"clock": FREE, "method": {"name": "fedbuff"}, "dropout": 0.2, "rounds": 10},
    "fedasync": {
        "clock": {**FREE, "buffer": 1},
        "method": {"name": "fedasync", "ratio": [1.0, 0.5]},
        "rounds": 12,
    },
    "tree": {
        "fleet": {**WORLD, "edges": 2},
        "method": {"name": "equal_finish", "local_steps": 3, "edge_rounds": 2},
        "dropout": 0.2,
        "clients_per_round": 6,
    },
    "normalised tree": {
        "fleet": {**WORLD, "edges": 2},
        "method": {"name": "hierfavg", "edge_rounds": 2, "normalised": True, "ratio": [1.0, 0.5]},
        "rounds": 4,
    },
}


def told(folder: Path) -> list[Settings]:
    """All events, without the wall's clock and the folder's place."""
    events = []
    for event in read_events(folder / "events.jsonl"):
        rows = [
            {k: v for k, v in row.items() if k != "seconds"} for row in event.get("clients", [])
        ]
        kept = {k: v for k, v in event.items() if k not in ("seconds", "run", "experiment")}
        events.append(kept | ({"clients": rows} if event["kind"] == "round" else {}))
    return events


class Cut(Exception):
    """Stands for a power cut in the middle of a run."""


IN_SHORT = ("bank", "refuse", "fedbuff", "fedasync", "tree")


def check_resume(name: str, folder: Path, cuts: Callable[[int], Sequence[int]]) -> None:
    """Cut off after these rounds and gone on with, a run has the whole one's events and bits."""
    experiment = replace(small(**RUNS[name]), checkpoint_every=1)
    start(experiment, folder / "whole")
    whole = told(folder / "whole")
    rounds = [event for event in whole if event["kind"] == "round"]
    assert rounds[-1]["virtual_seconds"] > 0 and rounds[-1]["joules"] > 0
    if name in ("bank", "refuse", "fedbuff", "fedasync"):
        # Something must have been late, or nothing of it was in a checkpoint.
        rows = [row for event in rounds for row in (*event["clients"], *event["failures"])]
        assert any(row["staleness"] > 0 for row in rows)
    for cut in cuts(len(rounds)):
        seen: list[str] = []

        def cut_off(event: Any, cut: int = cut, seen: list[str] = seen) -> None:
            seen.append(event["kind"])
            if seen.count("round") == cut:
                raise Cut

        with pytest.raises(Cut):
            start(experiment, folder / f"cut {cut}", cut_off)
        resume(folder / f"cut {cut}")
        assert told(folder / f"cut {cut}") == whole


@pytest.mark.parametrize("name", IN_SHORT)
def test_a_run_that_was_cut_off_goes_on_the_same(tmp_path: Path, name: str) -> None:
    check_resume(name, tmp_path, lambda rounds: [rounds // 2 + 1])


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_a_run_that_was_cut_off_anywhere_goes_on_the_same(tmp_path: Path, name: str) -> None:
    check_resume(name, tmp_path, lambda rounds: range(1, rounds + 1))


def test_a_seed_decides_every_event(tmp_path: Path) -> None:
    experiment = small(**RUNS["fedbuff"])
    for folder, seed in (("one", 0), ("again", 0), ("other", 1)):
        start(replace(experiment, seed=seed), tmp_path / folder)
    one, again, other = (told(tmp_path / folder) for folder in ("one", "again", "other"))
    assert one == again
    assert one[-1]["virtual_seconds"] != other[-1]["virtual_seconds"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bank", "fedbuff", "tree"])
@pytest.mark.parametrize("batching", ["sequential", "vmapped"])
def test_the_number_of_workers_changes_nothing(tmp_path: Path, name: str, batching: str) -> None:
    experiments = [
        small(**RUNS[name], engine={"batching": batching, "workers": workers}) for workers in (1, 2)
    ]
    for workers, experiment in enumerate(experiments, 1):
        start(experiment, tmp_path / str(workers))
    one, two = (told(tmp_path / workers) for workers in "12")
    assert one[-1]["state_sha256"] == two[-1]["state_sha256"]
    assert one == two


@pytest.mark.slow
def test_clients_of_a_tree_train_together_as_each_alone(tmp_path: Path) -> None:
    summaries = [
        start(small(**RUNS["tree"], engine={"batching": batching}), tmp_path / batching)
        for batching in ("sequential", "vmapped")
    ]
    assert summaries[1]["loss"] == pytest.approx(summaries[0]["loss"], rel=1e-3)
    assert summaries[1]["virtual_seconds"] == summaries[0]["virtual_seconds"]
    periods = {
        row["steps"]
        for event in told(tmp_path / "vmapped")
        if event["kind"] == "round"
        for row in event["clients"]
    }
    assert len(periods) > 1  # of unequal numbers of steps


def test_methods_that_are_compared_meet_the_same_world(tmp_path: Path) -> None:
    """Who is asked first, when, and how long its work takes does not depend on the method."""
    first = []
    for method in ("fedavg", "fednova"):
        start(small(method={"name": method}, rounds=2), tmp_path / method)
        events = [e for e in told(tmp_path / method) if e["kind"] == "round"]
        first.append([[(r["client"], r["pieces"]) for r in event["clients"]] for event in events])
    assert first[0] == first[1]


# What it is told of.


def test_a_report_tells_time_and_energy(tmp_path: Path) -> None:
    experiment = small(evaluate_every=1)
    summary = start(experiment, tmp_path / "fleet")
    record = read_record(tmp_path / "fleet")
    assert record.costs == ["rounds", "bytes", "flops", "virtual_seconds", "joules"]
    across, accuracy = record.curve("virtual_seconds")
    assert across == sorted(across) and across[-1] == summary["virtual_seconds"]
    assert len(across) == len(accuracy) == 6
    page = write_report(tmp_path / "fleet").read_text()
    for tile in ("virtual time", "energy of the devices"):
        assert f"<dt>{tile}</dt>" in page
    plain = start(replace(experiment, fleet=from_json({}).fleet), tmp_path / "plain")
    assert "virtual_seconds" not in plain and "joules" not in plain
    assert read_record(tmp_path / "plain").costs == ["rounds", "bytes", "flops"]


def test_a_report_of_a_run_that_goes_on(tmp_path: Path) -> None:
    def cut_off(event: Any) -> None:
        if event["kind"] == "round" and event["round"] == 3:
            raise Cut

    with pytest.raises(Cut):
        start(small(evaluate_every=1), tmp_path / "run", cut_off)
    record = read_record(tmp_path / "run")
    last = record.rounds[-1]
    assert record.outcome["virtual_seconds"] == last["virtual_seconds"] > 0
    assert record.outcome["joules"] == last["joules"] > 0
    page = write_report(tmp_path / "run").read_text()
    assert "not finished" in page and "<dt>virtual time</dt>" in page


def test_runs_with_and_without_a_fleet_are_compared(tmp_path: Path) -> None:
    experiment = small(evaluate_every=1)
    summary = start(experiment, tmp_path / "fleet")
    start(replace(experiment, method=from_json({"method": "fednova"}).method), tmp_path / "nova")
    start(replace(experiment, fleet=from_json({}).fleet), tmp_path / "plain")
    both = compare([tmp_path / "fleet", tmp_path / "nova"])
    assert set(both.equal_cost) == {"rounds", "bytes", "flops", "virtual_seconds", "joules"}
    assert "accuracy at" in both.as_markdown()
    mixed = compare([tmp_path / "fleet", tmp_path / "plain"])
    # At the cost that all of them count.
    assert set(mixed.equal_cost) == {"rounds", "bytes", "flops"}
    found = {Path(row.runs[0]).name: row.values for row in mixed.rows}
    assert found["plain"]["virtual_seconds"] is None and found["plain"]["joules"] is None
    time, energy = found["fleet"]["virtual_seconds"], found["fleet"]["joules"]
    assert time is not None and time.mean == summary["virtual_seconds"]
    assert energy is not None and energy.mean == summary["joules"]
    table = mixed.as_markdown()
    assert "virtual time, s" in table and "energy, " in table
    assert len({row.name for row in mixed.rows}) == 2  # what tells them apart is said
    assert json.loads(json.dumps(mixed.as_json()))["rows"]
    page = mixed.write_page(tmp_path / "page.html").read_text()
    assert "virtual time" in page


# From the command line, and from files.

LAB = """
[[edges]]
name = "lab"

[[devices]]
profile = "phone"
count = 4
edge = "lab"

[[devices]]
profile = "laptop"
count = 2
"""
FLAT = '[[devices]]\nprofile = "phone"\ncount = 6\n'


def fleet_file(tmp_path: Path, text: str) -> Settings:
    path = tmp_path / "fleet.toml"
    path.write_text(text, encoding="utf-8")
    return {"file": str(path)}


@pytest.mark.parametrize("method", ["fedavg", "hierfavg"])
def test_a_file_with_edges_is_a_tree(tmp_path: Path, method: str) -> None:
    experiment = small(fleet=fleet_file(tmp_path, LAB), method={"name": method}, rounds=1)
    start(replace(experiment, clients_per_round=6), tmp_path / "run")
    (event,) = (e for e in told(tmp_path / "run") if e["kind"] == "round")
    assert {row["client"]: row["edge"] for row in event["clients"]} == {
        **dict.fromkeys(range(4), "lab"),
        **dict.fromkeys((4, 5), "cloud"),
    }
    assert event["bytes_backhaul"] > 0


def test_a_file_without_edges_is_a_star(tmp_path: Path) -> None:
    fleet = fleet_file(tmp_path, FLAT)
    start(small(fleet=fleet, rounds=1), tmp_path / "run")
    (event,) = (e for e in told(tmp_path / "run") if e["kind"] == "round")
    assert "bytes_backhaul" not in event and "edge" not in event["clients"][0]
    # Where nobody averages in between, periods would be lost without a word.
    with pytest.raises(ConfigError, match=r"'hierfavg' on a tree needs edges and devices"):
        start(small(fleet=fleet, method={"name": "hierfavg"}), tmp_path / "other")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fleet": {"file": "nowhere.toml"}}, r"nowhere\.toml cannot be read"),
        ({"fleet": {}, "clock": {"horizon_seconds": 5.0}}, "settings of the clock need devices"),
        ({"fleet": {"profiles": ["phone"], "edges": 9}}, r"edges is 9, but there are only 6"),
        (
            {"fleet": {"profiles": ["phone"], "edges": 2}, "clock": FREE},
            r"the nodes of a tree play rounds, and clock\.mode 'asynchronous' has none",
        ),
        ({"fleet": {}, "method": {"name": "hierfavg"}}, "'hierfavg' on a tree needs edges"),
        (
            {"network": {"topology": "peers"}, "method": {"name": "dpsgd"}, "clients_per_round": 6},
            "virtual time is for runs with a server",
        ),
        ({"fleet": {"profile": ["phone"]}}, r"unknown setting fleet\.profile; did you mean 'prof"),
        ({"clock": {"mode": "later"}}, r"clock\.mode = 'later' is not allowed"),
    ],
)
def test_what_cannot_be_leaves_no_folder(tmp_path: Path, changes: Settings, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        start(small(**changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_file_of_another_number_of_devices_leaves_no_folder(tmp_path: Path) -> None:
    fleet = fleet_file(tmp_path, FLAT.replace("6", "5"))
    with pytest.raises(ConfigError, match="has 5 devices, the run has 6 clients"):
        start(small(fleet=fleet), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_command_line_takes_fleets_and_clocks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--rounds", "3", "--data.num-clients", "6", "--clients-per-round", "3"]
    arguments += ["--model.hidden", "16", "--method", "fedbuff", "--data.max-train", "300"]
    arguments += ["--fleet.profiles", "phone", "laptop", "--fleet.link", "4g"]
    arguments += ["--clock.mode", "asynchronous", "--clock.buffer", "2"]
    main(["run", "quickstart", *arguments, "--out", str(tmp_path / "run"), "--json"])
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert summary["virtual_seconds"] > 0 and summary["joules"] > 0
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["fleet"]["profiles"] == ["phone", "laptop"]
    assert config["clock"]["mode"] == "asynchronous"
