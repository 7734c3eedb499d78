"""Model families. Each is a settings class with `build_model(spec) -> Model`."""

from __future__ import annotations

from tesserafl.models.cnn import CNN
from tesserafl.models.huggingface import HuggingFace
from tesserafl.models.lora import LoRA
from tesserafl.models.mlp import MLP
from tesserafl.models.resnet import ResNet

ModelSettings = MLP | CNN | ResNet | HuggingFace | LoRA

MODELS: dict[str, type[ModelSettings]] = {
    "mlp": MLP,
    "cnn": CNN,
    "resnet": ResNet,
    "huggingface": HuggingFace,
    "lora": LoRA,
}

__all__ = ["CNN", "MLP", "MODELS", "HuggingFace", "LoRA", "ModelSettings", "ResNet"]
