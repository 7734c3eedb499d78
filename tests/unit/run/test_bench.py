"""`tessera bench` measures what a run would do."""

from dataclasses import replace

import pytest

from tesserafl.core.errors import ConfigError
from tesserafl.run.bench import Bench, Timing, bench, described
from tesserafl.run.experiment import from_json


def timing(batching: str, start: float, ms: float) -> Timing:
    return Timing(batching=batching, start_seconds=start, round_ms=ms)


def test_a_way_pays_when_its_start_is_made_up_for() -> None:
    slow, fast = timing("sequential", 2.0, 30.0), timing("vmapped", 5.0, 10.0)
    result = Bench(rounds=3, chosen="vmapped", timings=(slow, fast))
    assert result.pays_after(fast) == 150  # 3 s / 20 ms
    assert result.pays_after(slow) is None
    assert result.pays_after(replace(fast, round_ms=31.0)) is None
    assert result.pays_after(replace(fast, start_seconds=1.0)) == 1


@pytest.mark.slow
def test_every_way_is_measured_or_says_why_not() -> None:
    experiment = from_json(
        {
            "data": {"num_clients": 4, "max_train": 100},
            "model": {"name": "cnn", "channels": [4, 4], "norm": "batch"},
            "method": {"name": "heterofl", "ratio": [0.5]},
            "rounds": 2,
            "clients_per_round": 2,
        }
    )
    result = bench(experiment, rounds=2)
    sequential, vmapped, compiled = result.timings
    assert result.chosen == "sequential"
    assert sequential.failure is None
    assert sequential.round_ms > 0 and sequential.steps_per_second > 0 and sequential.peak_mib > 0
    assert "BatchNorm" in str(vmapped.failure) and "BatchNorm" in str(compiled.failure)
    assert len(list(described(result))) == 2


def test_an_experiment_that_cannot_run_is_an_error() -> None:
    with pytest.raises(ConfigError, match="clients_per_round"):
        bench(from_json({"data": {"num_clients": 3}, "clients_per_round": 5}), rounds=1)
