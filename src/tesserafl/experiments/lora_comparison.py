"""Federated adapters: every LoRA method on one model, at equal and at unequal ranks.

Without `--model.config FOLDER` the frozen model has random weights: that shows that it runs, and no
more. `--data.path` and `--data.tokenizer` choose texts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from tesserafl.core.errors import ConfigError
from tesserafl.core.fit import Training
from tesserafl.data import DataSettings, kind_of
from tesserafl.methods import (
    FedAdapter,
    FedIT,
    FedSALoRA,
    FFALoRA,
    FlexLoRA,
    FLoRA,
    HetLoRA,
    Local,
    MethodSettings,
    Ravan,
)
from tesserafl.models import LoRA
from tesserafl.models.huggingface import Option
from tesserafl.run.experiment import Experiment

UNEQUAL = (1.0, 0.5, 0.25)


def lora_comparison(data: DataSettings | None = None) -> Experiment:
    """What the rows share."""
    data = data or DataSettings()
    small: dict[str, Option] = {
        "hidden_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "intermediate_size": 128,
    }
    if kind_of(data) != "tokens":
        small["patch_size"] = 2
    return Experiment(
        data=replace(data, num_clients=10, test=0.2),
        model=LoRA(config="bert" if kind_of(data) == "tokens" else "vit", options=small, rank=8),
        method=FedIT(),
        training=Training(optimiser="adamw", lr=2e-3, epochs=1, batch_size=16, clip_norm=1.0),
        rounds=20,
        clients_per_round=10,
    )


def rows(base: Experiment, asked: frozenset[str]) -> Mapping[str, Experiment]:
    """Methods at equal ranks, those for unequal ranks, and clients on their own."""
    if not isinstance(base.model, LoRA):
        raise ConfigError("lora_comparison is of adapters; leave --model away, or run comparison")
    if any(setting.startswith("method") for setting in asked):
        raise ConfigError("lora_comparison chooses its methods; leave --method... away")
    methods: dict[str, MethodSettings] = {
        "fedit": FedIT(),
        "ffa_lora": FFALoRA(),
        "flexlora": FlexLoRA(),
        "fedsa_lora": FedSALoRA(),
        "ravan": Ravan(),
        "fedadapter": FedAdapter(start_width=2, width_step=2, window=6),
        "local": Local(),
        "unequal-fedit": FedIT(ratio=UNEQUAL),
        "unequal-flexlora": FlexLoRA(ratio=UNEQUAL),
        "unequal-hetlora": HetLoRA(ratio=UNEQUAL),
        "unequal-flora": FLoRA(ratio=UNEQUAL),
        "unequal-ravan": Ravan(ratio=UNEQUAL),
    }
    plain = replace(base, finetune_epochs=0)
    experiments = {label: replace(plain, method=method) for label, method in methods.items()}
    merging = replace(base.model, merge=True)
    experiments["unequal-flora"] = replace(experiments["unequal-flora"], model=merging)
    epochs = base.finetune_epochs or 1
    experiments["fedit"] = replace(experiments["fedit"], finetune_epochs=epochs)
    return experiments
