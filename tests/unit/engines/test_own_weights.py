"""Weights that a client may write to: read from a disk, they are trained without a second copy."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from tesserafl.core import seeds
from tesserafl.core.fit import Fit, Training
from tesserafl.core.stored import Place, Stored
from tesserafl.data.examples import Examples, Spec
from tesserafl.engines.execute import execute
from tesserafl.models import MLP
from tesserafl.models.scaling import forward_of

SPEC = Spec(kind="vector", task="vector-classification", shape=(6,), num_classes=3)
MODEL = MLP(hidden=(8, 8)).build_model(SPEC)
FORWARD = forward_of(MODEL, MODEL.whole(), MODEL.module().train(), "none")


def stored(params: dict[str, torch.Tensor], read: list[str]) -> Stored:
    def piece(name: str) -> torch.Tensor:
        read.append(name)
        return params[name]

    return Stored(
        {
            name: Place(shape=tuple(t.shape), dtype=t.dtype, pieces=[partial(piece, name)])
            for name, t in params.items()
        }
    )


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"momentum": 0.9},
        {"weight_decay": 0.1},
        {"clip_norm": 0.01},
        {"momentum": 0.9, "weight_decay": 0.1, "clip_norm": 0.5},
        {"optimiser": "adamw", "weight_decay": 0.1},
    ],
    ids=str,
)
def test_it_trains_to_the_same_bits_and_leaves_the_disk_alone(settings):
    draw = seeds.generator(3, 1)
    examples = Examples(inputs=torch.randn(11, 6, generator=draw), labels=torch.arange(11) % 3)
    training = Training(lr=0.1, epochs=2, batch_size=4, **settings)
    params, read = MODEL.init(0), []
    kept = {name: tensor.clone() for name, tensor in params.items()}

    def trained(given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        fit = Fit(params=given, training=training, trainable=frozenset(list(params)[1:]))
        return execute(fit, FORWARD, examples, seeds.generator(4, 1)).params

    expected, found = trained(params), trained(stored(params, read))
    assert list(found) == list(expected)
    assert sorted(read) == sorted(params)  # each once
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor)
        assert not torch.equal(found[name], kept[name])
    assert all(torch.equal(params[name], tensor) for name, tensor in kept.items())
