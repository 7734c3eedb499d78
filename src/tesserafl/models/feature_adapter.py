"""Attention on the features of a frozen model: which of their entries count for the task at hand.

Lu et al., "FedCLIP: Fast Generalization and Personalization for CLIP in Federated Learning", IEEE
Data Engineering Bulletin 2023, Section 3. https://arxiv.org/abs/2302.13485

    a = softmax(W2 tanh(W1 z + b1) + b2)        z' = a * z

Departures: the loss compares an image with the texts of all classes, not with those of the images
in its batch, where two images of one class would count as each other's negatives. z' is multiplied
by its number of entries, so that a mean a is 1: cosines do not see it, a linear head does. z is
what the frozen model answers with, without dropout in training too: it is the same in every step.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tesserafl.core.errors import ConfigError
from tesserafl.core.model import CLASSES, Model, Output
from tesserafl.core.modules import parameters_of
from tesserafl.models.compact import Base
from tesserafl.models.frozen import Frozen, whole_model, write_trained
from tesserafl.models.huggingface import Option, family_of
from tesserafl.models.wrapped import Wrapped

if TYPE_CHECKING:
    from tesserafl.data.examples import Spec


@dataclass(frozen=True, kw_only=True)
class FeatureAdapter:
    """An attention adapter on the features of a model of transformers, which stays as it is."""

    config: str = "clip"
    """model type (clip, vit, bert, ...) or a folder with config.json and weights"""
    options: dict[str, Option] = field(default_factory=dict)
    """fields of the config to set; text_config.x for a part's field"""
    prompt: str = "a photo of a {}"
    """sentence for a class: images are classified by the nearest class's text; empty: by a linear
    head on the adapted features, which is trained too"""
    adapter: Path | None = None
    """folder with the adapter of an earlier run (its model/adapter) to start from"""
    base: Base = "float32"
    """how the frozen weights are kept: float32, bfloat16, int8 or nf4; see model 'lora'"""

    def build_model(self, spec: Spec) -> Model:
        """The adapter as a model, for a data set's inputs and classes.

        Raises:
            ConfigError: a library is missing, the config, an option or the prompt is wrong, or the
                data are for language modelling.
            ModelError: the data do not fit the model, or a saved adapter does not.
        """
        if spec.task == "causal-lm":
            raise ConfigError(
                "model 'feature_adapter' classifies, the data are for causal-lm; use model "
                "'prompts' or 'lora'"
            )
        family = family_of(self.config, self.options, spec, self.prompt)
        frozen = Frozen(family=family, train_head=False, base=self.base)
        size = frozen.feature_size()
        classes = family.rows.get(CLASSES)

        def build_on(device: str) -> nn.Module:
            inner = frozen.freeze(frozen.copy(device), lambda name: False)
            with torch.device(device):
                return AdaptedFeatures(inner, size, classes)

        def save(module: nn.Module, folder: str) -> None:
            # Without a head, which would be one that nobody trained.
            whole = frozen.whole()
            base = Wrapped(whole.model.base_model, family.pad_id) if classes else whole
            family.save(base, folder)
            write_trained(parameters_of(module), Path(folder) / "adapter")

        return whole_model(
            frozen,
            build_on,
            outputs=frozenset({"head.weight", "head.bias"}),
            adapter=self.adapter,
            save=save,
        )


class AdaptedFeatures(nn.Module):
    """Classifies by adapted features: against the classes' texts, or with a linear head."""

    def __init__(self, frozen: Any, size: int, classes: int | None) -> None:
        super().__init__()
        self.frozen = frozen
        self.attention = nn.Sequential(
            nn.Linear(size, size), nn.Tanh(), nn.Linear(size, size), nn.Softmax(dim=-1)
        )
        self.head = None if classes is None else nn.Linear(size, classes)
        self.train()

    def train(self, mode: bool = True) -> AdaptedFeatures:
        """All but the frozen model, which always predicts: nothing in it learns from noise."""
        super().train(mode)
        self.frozen.eval()
        return self

    def forward(self, inputs: Tensor) -> Output:
        """Images [batch, C, H, W] or token ids [batch, time]."""
        if self.head is None:
            features = self._adapted(self.frozen.embed_images(inputs))
            return Output(self.frozen.compare(features, self.frozen.embed_texts()), features)
        features = self._adapted(self.frozen(inputs).features)
        return Output(self.head(features), features)

    def _adapted(self, features: Tensor) -> Tensor:
        """z' of z, [batch, features]."""
        attention: Tensor = self.attention(features)
        return features.shape[-1] * attention * features
