"""FedFMSL's claims: against what its readers would try, and part by part.

Reconstructed (docs/methods/fedfmsl.md): 10 clients that all take part, Dirichlet(0.1), two stages
of equal length, adapters of rank 4. On images a two-tower model with class prompts, on texts an
encoder; `--model.config FOLDER` says which.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from tesserafl.core.errors import ConfigError
from tesserafl.core.fit import Training
from tesserafl.data import DataSettings, kind_of
from tesserafl.methods import (
    FedAvg,
    FedFMSL,
    FedIT,
    FedSALoRA,
    FFALoRA,
    FlexLoRA,
    Local,
    MethodSettings,
    PFLMoE,
)
from tesserafl.models import FeatureAdapter, LoRA, Prompts
from tesserafl.models.huggingface import Option
from tesserafl.run.experiment import Experiment

_SIZES: dict[str, Option] = {
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 128,
}


def paper_fedfmsl(data: DataSettings | None = None) -> Experiment:
    """What the rows share; without a folder in --model.config the frozen model is random."""
    data = data or DataSettings()
    if kind_of(data) == "tokens":
        model = LoRA(config="bert", options=_SIZES, rank=4, alpha=8.0)
    else:
        towers: dict[str, Option] = {
            f"{tower}_config.{name}": size
            for tower in ("vision", "text")
            for name, size in _SIZES.items()
        }
        options: dict[str, Option] = {
            **towers,
            "vision_config.patch_size": 2,
            "text_config.max_position_embeddings": 40,
            "projection_dim": 64,
        }
        model = LoRA(config="clip", options=options, rank=4, alpha=8.0, prompt="a photo of a {}")
    return Experiment(
        data=replace(data, num_clients=10, alpha=0.1, test=0.2, validation=0.1),
        model=model,
        method=FedFMSL(),
        training=Training(optimiser="adamw", lr=1e-3, weight_decay=0.01, schedule="cosine"),
        rounds=50,
        clients_per_round=10,
    )


def rows(base: Experiment, asked: frozenset[str]) -> Mapping[str, Experiment]:
    """FedFMSL, its baselines, and FedFMSL without each of its parts."""
    method, model = base.method, base.model
    if not isinstance(method, FedFMSL) or not isinstance(model, LoRA):
        raise ConfigError(
            "paper_fedfmsl varies FedFMSL's settings on adapters; leave --method and --model away, "
            "or run lora_comparison"
        )
    methods: dict[str, MethodSettings] = {
        "fedfmsl": method,
        "local": Local(),
        "fedit": FedIT(),
        "ffa_lora": FFALoRA(),
        "flexlora": FlexLoRA(),
        "fedsa_lora": FedSALoRA(),
        "pfl_moe": PFLMoE(),
    }
    plain = replace(base, finetune_epochs=0)
    experiments = {label: replace(plain, method=each) for label, each in methods.items()}
    epochs = base.finetune_epochs or 1
    experiments["fedit"] = replace(experiments["fedit"], finetune_epochs=epochs)
    prompts = Prompts(config=model.config, options=model.options)
    adapter = FeatureAdapter(config=model.config, options=model.options, prompt=model.prompt)
    experiments["promptfl"] = replace(plain, method=FedAvg(), model=prompts)
    experiments["fedclip"] = replace(plain, method=FedAvg(), model=adapter)
    return experiments | {
        f"ablation-{label}": replace(plain, method=each)
        for label, each in ablations(method).items()
    }


def ablations(method: FedFMSL) -> dict[str, FedFMSL]:
    """FedFMSL without each of its parts, and with each alternative."""
    return {
        "all-active": replace(method, schedule="all"),
        "linear": replace(method, schedule="linear"),
        "from-input": replace(method, order="input"),
        "window": replace(method, window=method.start),
        "capped": replace(method, caps=(1, 2, 1_000_000)),
        "gate-private": replace(method, gate="private"),
        "gate-linear": replace(method, gate="linear"),
        "gate-half": replace(method, gate="half"),
        "gate-on-global": replace(method, gate_input="global"),
        "gate-on-all": replace(method, held_out=0.0),
        "one-factor": replace(method, averaging="ffa_lora"),
        "products": replace(method, averaging="flexlora"),
        "no-stage-one": replace(method, stage_one=0.0),
        "from-scratch": replace(method, own_start="pretrained"),
        "plain-loss": replace(method, own=0.0, balance=0.0),
    }
