"""What a plan says of edges: the bytes that a run counts on their links."""

from __future__ import annotations

import pytest
from edges_at_hand import events_of

from tesserafl.cli import main
from tesserafl.core.errors import ConfigError
from tesserafl.data import DataSettings
from tesserafl.engines.fleet import FleetSettings
from tesserafl.engines.network import NetworkSettings
from tesserafl.engines.settings import EngineSettings
from tesserafl.methods import FedAvg, FedBRB, HierFAVG, Local, MethodSettings
from tesserafl.models import MLP
from tesserafl.run.experiment import Experiment
from tesserafl.run.on_devices import as_tree
from tesserafl.run.plan import described, make_plan
from tesserafl.run.runner import start
from tesserafl.run.setup import prepare


def _experiment(method: MethodSettings, **changes: object) -> Experiment:
    settings = {
        "data": DataSettings(num_clients=4, max_train=80, max_test=20),
        "model": MLP(hidden=(16, 16)),
        "method": method,
        "engine": EngineSettings(batching="sequential"),
        "rounds": 1,
        "clients_per_round": 4,
    }
    return Experiment(**{**settings, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "method",
    [FedAvg(), FedAvg(ratio=(0.5,)), Local(), HierFAVG(edge_rounds=3), FedBRB(ratio=(0.5,))],
    ids=["whole", "halves", "nothing", "several", "updates"],
)
def test_a_plan_names_the_bytes_that_a_run_counts(tmp_path, monkeypatch, method) -> None:
    monkeypatch.setattr("tesserafl.run.runner.write_report", lambda folder, setup: None)
    experiment = _experiment(method, fleet=FleetSettings(profiles=("phone",), edges=2))
    start(experiment, tmp_path / "run")
    (event,) = events_of(tmp_path / "run")
    (first, *_) = event["clients"]
    elsewhere = _experiment(method)
    for asked in (experiment, as_tree(elsewhere)):
        edge = make_plan(prepare(asked), (1,)).edge
        assert edge is not None
        up = edge.bytes_up_once if getattr(method, "edge_rounds", 1) == 1 else edge.bytes_up_several
        if up is None:  # two devices below each edge
            up = 2 * first["bytes_up"]
        assert event["bytes_backhaul"] == 2 * (edge.bytes_down + up)
    (line,) = [part for part in described(make_plan(prepare(asked))) if "edge" in str(part)]
    assert ("it can average once only" in str(line)) == isinstance(method, FedBRB)


def test_only_trees_have_edges_to_plan() -> None:
    assert make_plan(prepare(_experiment(FedAvg())), (1,)).edge is None
    with pytest.raises(ConfigError, match=r"network\.topology is 'star'"):
        as_tree(_experiment(FedAvg(), network=NetworkSettings(topology="star")))


def test_the_command_plans_edges_that_are_machines(capsys: pytest.CaptureFixture[str]) -> None:
    args = ["plan", "quickstart", "--method", "hierfavg"]
    with pytest.raises(SystemExit):
        main(args)
    assert "needs edges" in capsys.readouterr().err
    main([*args, "--edges"])
    assert "The link of an edge, in a round of the cloud" in capsys.readouterr().out
