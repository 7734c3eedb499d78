"""Trees whose devices adapt unequal numbers of blocks, and unequal shares of the rank."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import Any

import pytest
import torch

from tesserafl.core.coverage import Coverage
from tesserafl.core.errors import ConfigError, ModelError
from tesserafl.core.fit import Training
from tesserafl.core.method import State
from tesserafl.core.params import sha256
from tesserafl.data import DataSettings
from tesserafl.engines.fleet import FleetSettings
from tesserafl.methods import EqualFinish, HierFAVG, Hwamei, MethodSettings, Tomtit
from tesserafl.models import MLP, LoRA
from tesserafl.run.begin import first_federation
from tesserafl.run.experiment import Experiment
from tesserafl.run.player import Clocked, player_of
from tesserafl.run.setup import make_engine, prepare

VIT = {
    "hidden_size": 8,
    "num_attention_heads": 2,
    "num_hidden_layers": 3,
    "intermediate_size": 16,
    "image_size": 8,
    "patch_size": 4,
    "initializer_range": 0.3,
}


def experiment(method: MethodSettings, **changes: Any) -> Experiment:
    """Four devices at two edges, one of each class at either."""
    asked = Experiment(
        data=DataSettings(num_clients=4, max_train=80),
        model=LoRA(config="vit", options=VIT, rank=4, alpha=8.0),
        method=method,
        training=Training(lr=0.1, batch_size=8, steps=2),
        fleet=FleetSettings(profiles=("phone", "laptop"), edges=2),
        rounds=2,
        clients_per_round=4,
    )
    return replace(asked, **changes)


def played(asked: Experiment) -> tuple[State, State, list[dict[str, Any]]]:
    """The state before the first round and after the last, and the rows of the last round."""
    setup = prepare(asked)
    with contextlib.closing(make_engine(setup)) as engine:
        federation = first_federation(setup)
        before = federation.assembled()
        player = player_of(setup, engine, federation, setup.costs())
        assert isinstance(player, Clocked)
        coverage = Coverage({n: tuple(t.shape) for n, t in federation.shapes.items()})
        while not player.over:
            notes = player.play(coverage)
    return before, federation.assembled(), notes.clients


def moved(before: State, after: State) -> set[str]:
    """Blocks of which something changed, numbered from the input."""
    return {
        name.split("layers.")[1].split(".")[0] if "layers." in name else "outside"
        for name in before.params
        if not torch.equal(before.params[name], after.params[name])
    }


@pytest.mark.parametrize("rounds", [1, 2])
def test_blocks_that_nobody_trains_stay(rounds: int) -> None:
    method = HierFAVG(local_steps=2, edge_rounds=rounds, depth=(1, 2))
    before, after, _ = played(experiment(method))
    assert moved(before, after) == {"outside", "1", "2"}


@pytest.mark.slow
def test_all_blocks_are_the_same_bits_as_no_setting() -> None:
    for plain, deep in (
        (HierFAVG(local_steps=2), HierFAVG(local_steps=2, depth=(3,))),
        (EqualFinish(), EqualFinish(depth=(9,))),
        (Tomtit(ratio=(1.0, 0.5)), Tomtit(ratio=(1.0, 0.5), depth=(3,))),
        (Hwamei(), Hwamei(depth=(3,))),
    ):
        ends = [played(experiment(method))[1] for method in (plain, deep)]
        assert sha256(ends[0].params) == sha256(ends[1].params)


def test_who_trains_fewer_blocks_has_less_to_do_and_less_to_send() -> None:
    *_, rows = played(experiment(HierFAVG(local_steps=2, depth=(1, 3))))
    few, many = (next(row for row in rows if row["client"] % 2 == kind) for kind in (0, 1))
    assert few["flops"] < many["flops"]
    assert few["bytes_up"] < many["bytes_up"] and few["trained_entries"] < many["trained_entries"]
    assert few["bytes_down"] == many["bytes_down"]


def test_depth_is_for_adapters() -> None:
    with pytest.raises(ModelError, match="no adapters in numbered blocks"):
        played(experiment(HierFAVG(depth=(1,)), model=MLP(hidden=(4,))))
    with pytest.raises(ConfigError, match="at least 1; got"):
        played(experiment(HierFAVG(depth=(0,))))
