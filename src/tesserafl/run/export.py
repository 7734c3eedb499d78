"""The trained model as files that need no TesseraFL to load."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save

from tesserafl.core.method import Predictor
from tesserafl.data.examples import FederatedData
from tesserafl.models.normalisation import has_statistics
from tesserafl.run.evaluate import Evaluator
from tesserafl.run.files import write_atomic, write_json


def export_model(predictor: Predictor, folder: Path, data: FederatedData) -> None:
    """Write the model to `folder`.

    A Hugging Face model is saved in its own format, so that `AutoModel*.from_pretrained(folder)`
    loads it. Any other is `model.safetensors` (parameters, and buffers such as BatchNorm's
    statistics) with `model.json` beside it: the sizes to build it from, and the classes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    module = predictor.model.module()
    with torch.no_grad():
        for name, value in module.named_parameters():
            value.copy_(predictor.params[name])
    if has_statistics(module):
        Evaluator(data=data).fill_statistics(module, predictor.params)
    if predictor.model.save is not None:
        predictor.model.save(module, str(folder))
        return
    tensors = {name: value.contiguous() for name, value in module.state_dict().items()}
    description = {
        "sizes": dict(predictor.model.sizes),
        "input": {"kind": data.spec.kind, "shape": list(data.spec.shape)},
        "class_names": list(data.spec.class_names),
    }
    write_atomic(
        folder / "model.safetensors", save(tensors, metadata={"tessera": json.dumps(description)})
    )
    write_json(folder / "model.json", description)
