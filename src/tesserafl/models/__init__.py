"""Model families. Each is a settings class with `build_model(spec) -> Model`."""

from __future__ import annotations

from tesserafl.models.cnn import CNN
from tesserafl.models.feature_adapter import FeatureAdapter
from tesserafl.models.huggingface import HuggingFace
from tesserafl.models.lora import LoRA
from tesserafl.models.mlp import MLP
from tesserafl.models.residual import Residual
from tesserafl.models.resnet import ResNet
from tesserafl.models.soft_prompts import Prompts

ModelSettings = MLP | CNN | ResNet | Residual | HuggingFace | LoRA | Prompts | FeatureAdapter

MODELS: dict[str, type[ModelSettings]] = {
    "mlp": MLP,
    "cnn": CNN,
    "resnet": ResNet,
    "residual": Residual,
    "huggingface": HuggingFace,
    "lora": LoRA,
    "prompts": Prompts,
    "feature_adapter": FeatureAdapter,
}

__all__ = [
    "CNN",
    "MLP",
    "MODELS",
    "FeatureAdapter",
    "HuggingFace",
    "LoRA",
    "ModelSettings",
    "Prompts",
    "ResNet",
    "Residual",
]
