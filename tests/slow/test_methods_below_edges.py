"""Every method on a tree of devices: the bits of the same tree in this process."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from edges_at_hand import TreeAtHand, at_once, events_of, simulated

from tesserafl.core.fit import Training
from tesserafl.data import DataSettings
from tesserafl.engines.network import NetworkSettings
from tesserafl.engines.settings import EngineSettings
from tesserafl.methods import METHODS
from tesserafl.models import MLP, LoRA, Residual
from tesserafl.run import runner
from tesserafl.run.deployed import serve_over
from tesserafl.run.experiment import Experiment

pytestmark = pytest.mark.slow

VIT = {
    "hidden_size": 8,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "intermediate_size": 16,
    "image_size": 8,
    "patch_size": 4,
    "initializer_range": 0.3,
}
ADAPTERS = LoRA(config="vit", options=VIT, rank=4, alpha=8.0)
MODELS: dict[str, Any] = {
    **dict.fromkeys(
        ("fedit", "ffa_lora", "flexlora", "hetlora", "fedsa_lora", "ravan", "fedadapter"), ADAPTERS
    ),
    **dict.fromkeys(("fedfmsl", "pfl_moe"), ADAPTERS),
    "flora": replace(ADAPTERS, merge=True),
    **dict.fromkeys(("flm", "random_depth", "progressive"), Residual()),
    "depthfl": Residual(exits=True),
}
"""Of methods that need more than a plain one."""
ALIKE = ("state_sha256", "accuracy", "loss", "bytes_up", "bytes_down", "flops", "accuracy_personal")
MEASURED = ("equal_finish", "hwamei", "tomtit")
"""Their periods follow from measured time."""


@pytest.mark.parametrize("name", METHODS)
def test_every_method_runs_below_edges(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    for function in ("write_report", "export_model"):  # others test these
        monkeypatch.setattr(runner, function, lambda *_: None)
    method = METHODS[name]()
    experiment = Experiment(
        data=DataSettings(num_clients=4, max_train=160, max_test=50, test=0.2, validation=0.2),
        model=MODELS.get(name, MLP(hidden=(16, 16))),
        method=method,
        training=Training(lr=0.1, batch_size=8),
        engine=EngineSettings(batching="sequential"),
        rounds=4,
        clients_per_round=4,
        network=NetworkSettings(topology="tree" if method.topology == "peers" else "auto"),
    )
    tree = TreeAtHand(folder=tmp_path)
    served = serve_over(tree.post, tree.begin(experiment), watch=at_once)
    chosen = tmp_path / "served" if name in MEASURED else None
    here = simulated(experiment, 2, tmp_path / "here", chosen)
    assert {key: served.get(key) for key in ALIKE} == {key: here.get(key) for key in ALIKE}
    assert not any(event["failures"] for event in events_of(tmp_path / "served"))
    assert hasattr(method, "personal") == ("accuracy_personal" in served)
