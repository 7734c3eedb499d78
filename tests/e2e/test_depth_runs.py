"""Methods on depth through whole runs: workers, a cut, a part that is served."""

from pathlib import Path

import pytest
from interrupted import cut_off, with_workers

from tesserafl.core.errors import CapacityError, ConfigError
from tesserafl.core.method import Predictor, State
from tesserafl.core.model import Model
from tesserafl.core.submodel import cut
from tesserafl.methods import DepthFL
from tesserafl.run.begin import first_federation
from tesserafl.run.events import read_events
from tesserafl.run.experiment import Experiment, from_json
from tesserafl.run.plan import make_plan
from tesserafl.run.runner import start
from tesserafl.run.setup import prepare

METHODS = {
    "random_depth": {"depth": [2, 3]},
    "depthfl": {"depth": [2, 3], "ramp": 0.5},
    "progressive": {"depth": [2], "start": "copy"},
}


def small(name: str, **changes: object) -> Experiment:
    exits = name == "depthfl"
    return from_json(
        {
            "data": {"num_clients": 6},
            "model": {"name": "residual", "stream": 8, "inner": 8, "blocks": 4, "exits": exits},
            "method": {"name": name, **METHODS[name]},
            "rounds": 4,
            "clients_per_round": 4,
            "checkpoint_every": 1,
            **changes,
        }
    )


SLOW = {"random_depth", "depthfl"}


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in METHODS],
)
def test_a_cut_changes_no_bit(name: str, tmp_path: Path) -> None:
    """It comes in the first round of progressive training's second phase."""
    cut_off(small(name), tmp_path, rounds=3)


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_workers_change_no_bit(name: str, tmp_path: Path) -> None:
    with_workers(small(name), tmp_path)


def test_progressive_runs_grow_and_send_back_what_they_trained(tmp_path: Path) -> None:
    summary = start(small("progressive"), tmp_path / "run")
    rounds = [e for e in read_events(tmp_path / "run" / "events.jsonl") if e["kind"] == "round"]
    for entry, earlier in zip(rounds[1:], rounds, strict=False):
        entry["up"] = entry["bytes_up"] - earlier["bytes_up"]
        entry["down"] = entry["bytes_down"] - earlier["bytes_down"]
    assert rounds[0]["bytes_up"] == rounds[0]["bytes_down"] == rounds[1]["up"]  # all is trained
    assert rounds[2]["down"] > rounds[1]["down"]  # two blocks more, and those below as well
    assert rounds[2]["up"] < rounds[1]["up"]  # without the stem, which is frozen
    assert summary["coverage"] == 1.0
    assert summary["params_largest_client"] == summary["params_full"]
    assert summary["params_trained"] < summary["params_full"]
    assert "params_served" not in summary


def test_the_plan_counts_what_is_trained_of_what_is_held() -> None:
    plan = make_plan(prepare(small("progressive")), (1, 2, 3))
    assert plan.coverage[1] == plan.coverage[2] < plan.coverage[3] == 1.0
    (kind,) = plan.classes
    assert kind.num_trained == kind.num_entries < plan.num_entries


def test_a_plan_has_a_row_for_every_depth() -> None:
    """Both hold whole widths; the shallow ones come first, so a look at one would be too low."""
    setup = prepare(small("random_depth"))
    plan = make_plan(setup, (1,))
    assert [(kind.depth, kind.num_clients) for kind in plan.classes] == [(2, 3), (3, 3)]
    shallow, deep = plan.classes
    assert shallow.num_entries < deep.num_entries < plan.num_entries
    assert shallow.peak_bytes < deep.peak_bytes


def test_a_client_that_is_too_small_for_its_depth_is_refused(tmp_path: Path) -> None:
    plan = make_plan(prepare(small("random_depth")), (1,))
    shallow, deep = (kind.peak_bytes / 2**20 for kind in plan.classes)
    limit = (shallow + deep) / 2
    with pytest.raises(CapacityError, match="client 1 has"):
        start(small("random_depth", client_memory_mib=[limit]), tmp_path / "run")


def test_a_model_that_nobody_holds_is_not_fine_tuned() -> None:
    data = {"num_clients": 6, "test": 0.2}
    with pytest.raises(ConfigError, match=r"method\.depth to all blocks"):
        first_federation(prepare(small("random_depth", data=data, finetune_epochs=1)))


def test_a_part_that_is_served_is_measured_and_counted_as_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks 0 and 3, of which clients with the first two trained the first only."""

    def blocks(model: Model) -> Predictor:
        part = model.slice({"blocks": [0, 3]})
        return Predictor(model=model.resized(part), params={}, part=part)

    def predictor(self: DepthFL, model: Model, state: State) -> Predictor:
        found = blocks(model)
        assert found.part is not None
        return Predictor(model=found.model, params=cut(state.params, found.part), part=found.part)

    asked = []

    def watching(self: object, params: dict, part: object = None) -> dict:
        zeroed = plain(self, params, part)
        asked.append({name for name in params if not zeroed[name].any() and params[name].any()})
        return zeroed

    from tesserafl.core.coverage import Coverage

    plain = Coverage.zero_untrained
    monkeypatch.setattr(Coverage, "zero_untrained", watching)
    monkeypatch.setattr(DepthFL, "predictor", predictor)
    experiment = small("depthfl", method={"name": "depthfl", "depth": [2]})
    summary = start(experiment, tmp_path / "run")
    model = prepare(experiment).model
    assert summary["params_full"] == model.num_entries
    assert summary["params_served"] == blocks(model).model.num_entries < model.num_entries
    (zeroed,) = asked
    assert zeroed and all(name.split(".")[1] == "1" for name in zeroed)  # its second is block 3
    assert {name.split(".")[0] for name in zeroed} == {"blocks", "exits"}
