"""The rule that decides how clients are trained."""

from dataclasses import replace

import pytest

from tesserafl.core.errors import ConfigError
from tesserafl.run.batching import STEPS_TO_COMPILE, STEPS_TO_TRACE, group_of
from tesserafl.run.experiment import Experiment, from_json, to_json
from tesserafl.run.setup import client_worker, prepare


def experiment(client_steps: int = STEPS_TO_TRACE, **changes: object) -> Experiment:
    """One step a client a round: 10 clients of at most 180 digits, in one batch."""
    base = {
        "data": {"num_clients": 10, "partition": "iid"},
        "model": {"name": "mlp", "hidden": [16]},
        "method": {"name": "heterofl", "ratio": [0.5]},
        "training": {"batch_size": 200},
        "rounds": client_steps // 10,
        "clients_per_round": 10,
    }
    return from_json({**base, **changes})


def chosen(asked: Experiment) -> str:
    return prepare(asked).experiment.engine.batching


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch, in itself
def test_short_runs_are_sequential_long_ones_traced_very_long_ones_compiled() -> None:
    assert chosen(experiment(STEPS_TO_TRACE - 10)) == "sequential"
    assert chosen(experiment(STEPS_TO_TRACE)) == "vmapped"
    assert chosen(experiment(STEPS_TO_COMPILE)) == "compiled"


def test_without_a_compiler_nothing_is_compiled(monkeypatch) -> None:
    monkeypatch.setattr("tesserafl.run.batching._compiles", lambda: False)
    assert chosen(experiment(STEPS_TO_COMPILE)) == "vmapped"


@pytest.mark.parametrize(
    "changes",
    [
        {"model": {"name": "mlp", "hidden": [2000, 2000]}},
        {"model": {"name": "cnn", "channels": [8, 8], "norm": "batch"}},
        {"clients_per_round": 1, "rounds": STEPS_TO_TRACE},
    ],
    ids=["long steps", "batch statistics", "one client a round"],
)
def test_what_does_not_pay_or_cannot_be_is_sequential(changes) -> None:
    assert chosen(experiment(**changes)) == "sequential"


def test_what_was_asked_for_and_cannot_be_is_refused() -> None:
    asked = experiment(
        model={"name": "cnn", "channels": [8, 8], "norm": "batch"}, engine={"batching": "vmapped"}
    )
    with pytest.raises(ConfigError, match=r"BatchNorm.*'sequential' or 'auto'"):
        prepare(asked)


def test_the_choice_is_kept_whatever_the_workers() -> None:
    for workers in (1, 2):
        asked = experiment()
        setup = prepare(replace(asked, engine=replace(asked.engine, workers=workers)))
        again = prepare(from_json(to_json(setup.experiment)))
        assert again.experiment.engine.batching == setup.experiment.engine.batching == "vmapped"
        assert client_worker(again).group == 10


@pytest.mark.parametrize(("cohort", "most", "group"), [(10, 16, 10), (25, 16, 13), (40, 16, 14)])
def test_a_cohort_is_split_evenly(cohort: int, most: int, group: int) -> None:
    asked = experiment(clients_per_round=cohort, engine={"group": most})
    assert group_of(asked) == group


@pytest.mark.parametrize(
    ("trick", "reason"),
    [
        (lambda hidden: hidden - hidden.mean(0), "influence each other"),
        (lambda hidden: hidden * (1.0 if bool(hidden.sum() > 0) else 2.0), "many clients at once"),
    ],
    ids=["mixes a batch", "looks at values"],
)
def test_a_model_that_only_fails_in_a_cohort_is_found_by_a_trial(monkeypatch, trick, reason):
    from tesserafl.models import mlp

    plain = mlp._Net.forward
    monkeypatch.setattr(
        mlp._Net, "forward", lambda net, inputs: plain(net, trick(inputs.flatten(1)))
    )
    assert chosen(experiment()) == "sequential"
    with pytest.raises(ConfigError, match=reason):
        prepare(experiment(engine={"batching": "vmapped"}))
