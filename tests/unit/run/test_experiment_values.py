"""Experiments from plain values: what is named, and what keeps which default."""

from dataclasses import replace

from tesserafl.methods import FedBRB, FedIT, HeteroFL
from tesserafl.run.experiment import Experiment, from_json


def test_a_method_named_alone_has_its_own_defaults() -> None:
    assert Experiment().method.ratio == (0.25,)  # of the default method
    assert from_json({"method": "fedit"}).method == FedIT()
    assert from_json({"method": {"name": "fedit", "weighting": "uniform"}}).method == FedIT(
        weighting="uniform"
    )
    assert from_json({"method": {"broadcast": 0.1}}).method == FedBRB(broadcast=0.1)


def test_a_method_chosen_for_an_experiment_keeps_its_widths() -> None:
    base = replace(Experiment(), method=FedBRB(ratio=(0.5, 0.125)))
    assert from_json({"method": "heterofl"}, base).method == HeteroFL(ratio=(0.5, 0.125))
    given = from_json({"method": {"name": "heterofl", "ratio": [1.0]}}, base).method
    assert given == HeteroFL(ratio=(1.0,))
