"""FLM's claims: a deep model out of shallow clients, against averaging at either depth.

Reconstructed (docs/methods/flm.md): 20 clients, Dirichlet(0.5), 5 of 7 blocks; `--model.blocks` is
the server's most, `--method.depth` the clients'. All rows send as many bytes and train as many
blocks as their depth says; compare at equal bytes and at equal FLOPs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from tesserafl.core.errors import ConfigError
from tesserafl.core.fit import Training
from tesserafl.data import DataSettings, kind_of
from tesserafl.methods import (
    FLM,
    DepthFL,
    FedAvg,
    MatchedAveraging,
    MethodSettings,
    Progressive,
    RandomDepth,
)
from tesserafl.models import HuggingFace, Residual
from tesserafl.run.experiment import Experiment


def paper_flm(data: DataSettings | None = None) -> Experiment:
    """What the rows share: images or vectors a residual network, texts a small GPT-2."""
    packaged = data is None
    data = replace(data or DataSettings(), num_clients=20, alpha=0.5)
    method = FLM(depth=(5,))
    if kind_of(data) == "tokens":
        return Experiment(
            data=replace(data, public=256),
            model=HuggingFace(config="gpt2", options={"n_embd": 128, "n_layer": 6, "n_head": 4}),
            method=replace(method, depth=(4,)),
            training=Training(optimiser="adamw", lr=1e-3, epochs=1, batch_size=16, clip_norm=1.0),
            rounds=200,
            clients_per_round=10,
        )
    return Experiment(
        data=replace(data, public=100 if packaged else 500),
        model=Residual(stream=16, inner=16, blocks=7, patch=2 if packaged else 4),
        method=replace(method, warmup=15, cooldown=10) if packaged else method,
        training=Training(
            lr=0.05, momentum=0.9, epochs=1, batch_size=25, clip_norm=5.0, schedule="cosine"
        ),
        rounds=60 if packaged else 400,
        clients_per_round=10,
    )


def rows(base: Experiment, asked: frozenset[str]) -> Mapping[str, Experiment]:
    """FLM with each policy, averaging at either depth, one machine, and the baselines of depth."""
    method = base.method
    if not isinstance(method, FLM):
        raise ConfigError(
            "paper_flm varies FLM's settings; leave --method away, or run another experiment"
        )
    shallow = with_blocks(base, max(method.depth))
    methods: dict[str, MethodSettings] = {
        f"flm-{policy}": replace(method, policy=policy)
        for policy in ("persistent", "resampled", "importance", "slots", "pilot")
    }
    methods |= {
        "flm-by-parameters": replace(method, measure="parameters"),
        "flm-by-functions": replace(method, measure="functions"),
        "flm-unscaled": replace(method, scaling=False),
        "flm-calibrated": replace(method, calibrate=30),
        "flm-own-starts": replace(method, start="own", align=True, measure="parameters"),
        "random_depth": RandomDepth(depth=method.depth),
        "progressive": Progressive(depth=method.depth),
    }
    experiments = {
        "fedavg-shallow": replace(shallow, method=FedAvg()),
        "fedavg-deep": replace(base, method=FedAvg()),
        "central-deep": central(base),
        "matched_averaging": replace(shallow, method=MatchedAveraging()),
    }
    experiments |= {label: replace(base, method=each) for label, each in methods.items()}
    if isinstance(base.model, Residual):
        exits = replace(base.model, exits=True)
        experiments["depthfl"] = replace(base, model=exits, method=DepthFL(depth=method.depth))
    return experiments


def with_blocks(experiment: Experiment, blocks: int) -> Experiment:
    """The experiment with a global model of so many blocks.

    Raises:
        ConfigError: the model's depth is not one number.
    """
    model = experiment.model
    if isinstance(model, Residual):
        return replace(experiment, model=replace(model, blocks=blocks))
    if isinstance(model, HuggingFace):
        known = ("n_layer", "num_hidden_layers", "num_layers")
        name = next((name for name in known if name in model.options), None)
        if name is not None:
            options: dict[str, Any] = {**model.options, name: blocks}
            return replace(experiment, model=replace(model, options=options))
    raise ConfigError(
        "paper_flm compares two depths of one model; choose --model residual, or --model "
        "huggingface with its number of layers in --model.options"
    )


def central(experiment: Experiment) -> Experiment:
    """All clients' data on one machine, which sees as many examples as the clients of a run do."""
    share = experiment.clients_per_round / experiment.data.num_clients
    return replace(
        experiment,
        data=replace(experiment.data, num_clients=1, partition="iid"),
        clients_per_round=1,
        rounds=max(1, round(experiment.rounds * share)),
        method=FedAvg(),
    )
