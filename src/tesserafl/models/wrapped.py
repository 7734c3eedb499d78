"""Models of transformers as modules that take a batch as data sets give it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from tesserafl.core.model import Output

if TYPE_CHECKING:
    from tesserafl.models.class_texts import ClassTexts


class Wrapped(nn.Module):
    """Takes a batch as data sets give it and answers with an `Output`."""

    def __init__(self, model: Any, pad_id: int | None) -> None:
        super().__init__()
        self.model = model
        self.pad_id = pad_id

    def forward(self, inputs: Tensor) -> Output:
        """Token ids [batch, time] or images [batch, C, H, W]."""
        if self.pad_id is None:
            out = self.model(pixel_values=inputs, output_hidden_states=True)
            mask = None
        else:
            cache = {"use_cache": False} if hasattr(self.model.config, "use_cache") else {}
            mask = (inputs != self.pad_id).long()  # [batch, time]
            given: dict[str, Tensor] = {"input_ids": inputs, "attention_mask": mask}
            if inputs.is_meta:
                # Where costs are counted ids have no values, and transformers would look at them.
                given = {"inputs_embeds": self.model.get_input_embeddings()(inputs)}
            out = self.model(**given, output_hidden_states=True, **cache)
        return Output(out.logits, _pooled(out.hidden_states[-1], mask))


def _pooled(hidden: Tensor, mask: Tensor | None) -> Tensor:
    """[batch, embed] from [batch, time, embed] or [batch, embed, height, width]."""
    if hidden.dim() == 4:
        return hidden.mean(dim=(2, 3))
    if mask is None:
        return hidden.mean(dim=1)
    weight = mask[..., None].to(hidden)
    return (hidden * weight).sum(dim=1) / weight.sum(dim=1).clamp(min=1.0)


class TwoTower(nn.Module):
    """Classifies an image by the nearest class's text."""

    class_ids: Tensor
    class_mask: Tensor | None

    def __init__(self, model: Any, texts: ClassTexts) -> None:
        super().__init__()
        self.model = model
        # No weights: the text tower reads them anew in every call, and they are not saved.
        self.register_buffer("class_ids", torch.tensor(texts.ids), persistent=False)
        mask = None if texts.mask is None else torch.tensor(texts.mask)
        self.register_buffer("class_mask", mask, persistent=False)

    def forward(self, inputs: Tensor) -> Output:
        """Images [batch, C, H, W]."""
        images = self.embed_images(inputs)
        return Output(self.compare(images, self.embed_texts()), images)

    def embed_images(self, inputs: Tensor) -> Tensor:
        """[batch, projection], not normalised."""
        return embedding_of(self.model.get_image_features(pixel_values=inputs))

    def embed_texts(self) -> Tensor:
        """[classes, projection], not normalised."""
        mask = {} if self.class_mask is None else {"attention_mask": self.class_mask}
        return embedding_of(self.model.get_text_features(input_ids=self.class_ids, **mask))

    def compare(self, images: Tensor, texts: Tensor) -> Tensor:
        """Scaled cosines [batch, classes] of image and text embeddings."""
        images, texts = functional.normalize(images, dim=-1), functional.normalize(texts, dim=-1)
        logits: Tensor = self.model.logit_scale.exp() * images @ texts.T
        bias = getattr(self.model, "logit_bias", None)  # SigLIP has one
        return logits if bias is None else logits + bias


def embedding_of(out: Any) -> Tensor:
    """What a tower's `get_..._features` answers with, as [rows, projection]."""
    found: Tensor = out if isinstance(out, Tensor) else out.pooler_output
    return found
