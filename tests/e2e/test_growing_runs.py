"""FLM through whole runs: workers, a cut after the model has grown, the pilot, the report."""

import json
from pathlib import Path

import pytest
from interrupted import cut_off, with_workers
from safetensors.torch import load_file

from tesserafl.core.errors import ConfigError
from tesserafl.run.begin import first_federation
from tesserafl.run.events import read_events
from tesserafl.run.experiment import Experiment, from_json
from tesserafl.run.plan import make_plan
from tesserafl.run.report import write_report
from tesserafl.run.runner import start
from tesserafl.run.setup import prepare


def growing(method: dict[str, object], public: int = 60, **changes: object) -> Experiment:
    settings = {"name": "flm", "depth": [2], "warmup": 1, "cooldown": 2, "support": 0.0}
    return from_json(
        {
            "data": {"num_clients": 8, "public": public},
            "model": {"name": "residual", "stream": 8, "inner": 8, "blocks": 4},
            "method": {**settings, **method},
            "rounds": 8,
            "clients_per_round": 6,
            "checkpoint_every": 1,
            **changes,
        }
    )


SETTINGS: dict[str, dict[str, object]] = {
    "updates": {},
    "functions": {"measure": "functions", "threshold": 0.0},
    "pilot": {"policy": "pilot", "pilot_rounds": 1, "calibrate": 2},
    "own starts": {"start": "own", "align": True, "measure": "parameters", "threshold": 0.0},
}


SLOW = {"functions", "own starts", "pilot"}


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in SETTINGS],
)
def test_a_cut_changes_no_bit(name: str, tmp_path: Path) -> None:
    cut_off(growing(SETTINGS[name]), tmp_path, rounds=5)
    last = [e for e in read_events(tmp_path / "plain" / "events.jsonl") if e["kind"] == "round"][-1]
    inserted = [entry for entry in last["structure"]["log"] if entry[1] == "insert"]
    assert name == "functions" or inserted


@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
def test_workers_change_no_bit(name: str, tmp_path: Path) -> None:
    with_workers(growing(SETTINGS[name]), tmp_path)


def test_a_grown_model_is_served_exported_and_reported(tmp_path: Path) -> None:
    summary = start(growing({"guard": 0.0}), tmp_path / "run")
    rounds = [e for e in read_events(tmp_path / "run" / "events.jsonl") if e["kind"] == "round"]
    depths = [len(e["structure"]["axes"]["blocks"]["order"]) for e in rounds]
    assert depths[0] == 2 and depths[-1] > 2 and depths == sorted(depths)
    for event in rounds:
        for path in event["structure"]["paths"].values():
            assert len(path["blocks"]) == 2
    description = json.loads((tmp_path / "run" / "model" / "model.json").read_text())
    assert description["sizes"]["blocks"] == depths[-1]
    tensors = load_file(tmp_path / "run" / "model" / "model.safetensors")
    held = {int(name.split(".")[1]) for name in tensors if name.startswith("blocks.")}
    assert held == set(range(depths[-1]))
    # As many bytes as averaging models of the clients' depth.
    shallow = {"name": "residual", "stream": 8, "inner": 8, "blocks": 2}
    average = from_json({"model": shallow, "method": {"name": "fedavg"}}, growing({}))
    assert start(average, tmp_path / "average")["bytes_up"] == summary["bytes_up"]
    page = write_report(tmp_path / "run").read_text()
    assert "The model's blocks" in page and "put in" in page and "behind block" in page


def test_nothing_is_written_without_the_public_examples_that_it_needs(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--data\.public"):
        start(growing({"policy": "pilot"}, public=0), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_plan_looks_at_the_first_rounds_parts() -> None:
    plan = make_plan(prepare(growing({"policy": "importance"})), (1, 8))
    (kind,) = plan.classes
    assert kind.depth == 2 and kind.share < 1.0 and plan.coverage[8] < 1.0


def test_the_server_keeps_public_examples_that_no_client_has() -> None:
    setup = prepare(growing({}))
    assert setup.data.public is not None and len(setup.data.public) == 60
    assert sum(client.num_examples for client in setup.clients) == 1437 - 60
    state = first_federation(setup).assembled()
    assert len(state.extra["public/labels"]) == 60
    plain = from_json({"method": {"name": "fedavg"}}, growing({}))
    assert not first_federation(prepare(plain)).assembled().extra
