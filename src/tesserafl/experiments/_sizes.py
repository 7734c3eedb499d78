"""The two sizes of every named experiment: on packaged data, and the paper's on a data folder."""

from __future__ import annotations

from dataclasses import replace

from tesserafl.core.fit import Training
from tesserafl.data import DataSettings, kind_of
from tesserafl.methods import MethodSettings
from tesserafl.models import CNN, MLP, HuggingFace
from tesserafl.models.huggingface import Option
from tesserafl.run.experiment import Experiment


def base_for(data: DataSettings | None, method: MethodSettings) -> Experiment:
    """Digits and a perceptron in minutes, or other data and a network of its kind.

    At the paper's size: 100 clients, 10 a round (HeteroFL's protocol); images a CNN, texts BERT.
    """
    if data is None:
        return Experiment(
            data=DataSettings(num_clients=20, partition="dirichlet", alpha=0.5),
            model=MLP(hidden=(256, 256), norm="layer"),
            method=method,
            training=Training(lr=0.05, epochs=2, batch_size=16),
            rounds=60,
            clients_per_round=10,
        )
    common = Experiment(
        data=replace(data, num_clients=100),
        method=method,
        rounds=400,
        clients_per_round=10,
        evaluate_every=20,
    )
    kind = kind_of(data)
    if kind == "image":
        training = Training(lr=0.05, momentum=0.9, epochs=5, batch_size=20, clip_norm=5.0)
        return replace(common, model=CNN(channels=(64, 128, 256)), training=training)
    if kind == "tokens":
        training = Training(optimiser="adamw", lr=5e-4, epochs=1, batch_size=16, clip_norm=1.0)
        options: dict[str, Option] = {
            "hidden_size": 256,
            "num_attention_heads": 16,
            "num_hidden_layers": 4,
            "intermediate_size": 1024,
        }
        return replace(common, model=HuggingFace(config="bert", options=options), training=training)
    return replace(
        common,
        model=MLP(hidden=(256, 256), norm="layer"),
        training=Training(lr=0.05, epochs=2),
    )
