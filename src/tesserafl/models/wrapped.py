"""Models of transformers as modules that take a batch as data sets give it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from tesserafl.core.errors import ModelError
from tesserafl.core.model import Output

if TYPE_CHECKING:
    from tesserafl.models.class_texts import ClassTexts


PROCESSOR_FILES = {"processor_config.json": "image_processor", "preprocessor_config.json": ""}
"""What a saved model says of its images -> under which key; empty: that is all of the file."""


class Scaling(NamedTuple):
    """How a saved model takes images: (p - mean) / deviation of pixels p in [0, 1], by channel."""

    mean: tuple[float, ...]
    deviation: tuple[float, ...]


def scaling_of(folder: Path) -> Scaling | None:
    """A saved model's own; None: it takes images in [-1, 1], as data sets give them.

    Raises:
        ModelError: the file that says so cannot be read, or asks for more than a mean and a
            deviation.
    """
    path, found = _processor_of(folder)
    _check_processor(path, found)
    if not found.get("do_normalize", True):
        return Scaling((0.0,), (1.0,))  # of every channel
    mean, deviation = found.get("image_mean"), found.get("image_std")
    if not (mean and deviation):
        return None
    return Scaling(tuple(mean), tuple(deviation)) if {*mean, *deviation} != {0.5} else None


def _processor_of(folder: Path) -> tuple[Path, dict[str, Any]]:
    """What a saved model says of its images, and the file that does; empty if none does."""
    # In transformers' own order: models with a tokenizer too are saved with the first one alone.
    for name, key in PROCESSOR_FILES.items():
        path = folder / name
        if not path.is_file():
            continue
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ModelError(f"{path} is not valid JSON: {error}") from error
        found = found.get(key) if key else found
        if found:
            return path, found
    return folder, {}


def _check_processor(path: Path, found: dict[str, Any]) -> None:
    """Raise ModelError if images are prepared in a way that is not done here."""
    factor = found.get("rescale_factor")
    wrong = {
        "do_flip_channel_order": bool(found.get("do_flip_channel_order")),
        "do_rescale": found.get("do_rescale", True) is False,
        "rescale_factor": factor is not None and abs(factor * 255 - 1) > 1e-6,
        "rescale_offset": bool(found.get("rescale_offset")),
    }
    if names := [name for name, refused in wrong.items() if refused]:
        raise ModelError(
            f"{path} has {names[0]} {found[names[0]]!r}; images are given to a model as red, green "
            f"and blue, from 0 to 1 (do_flip_channel_order false, do_rescale true, rescale_factor "
            f"1/255, rescale_offset false) and then scaled by image_mean and image_std: choose a "
            f"model that was trained so"
        )


class Wrapped(nn.Module):
    """Takes a batch as data sets give it and answers with an `Output`."""

    def __init__(
        self,
        model: Any,
        pad_id: int | None,
        scaling: Scaling | None = None,
        *,
        per_place: bool = False,
    ) -> None:
        super().__init__()
        self.model = model
        self.pad_id = pad_id
        self.per_place = per_place
        self.pixels = nn.Identity() if scaling is None else _Pixels(scaling)

    def forward(self, inputs: Tensor) -> Output:
        """Token ids [batch, time] or images [batch, C, H, W]."""
        return answer(self.model, self.pixels(inputs), self.pad_id, per_place=self.per_place)


def answer(
    model: Any, inputs: Tensor, pad_id: int | None, *, skip: int = 0, per_place: bool = False
) -> Output:
    """A model's answer to token ids [batch, time] or images [batch, C, H, W].

    Args:
        model: of transformers, with a head.
        inputs: a batch.
        pad_id: token id of padding; None: the inputs are images.
        skip: places at the start of a text that do not count for the features.
        per_place: whether features are of every place of a text; False: pooled over them.
    """
    if pad_id is None:
        out = model(pixel_values=inputs, output_hidden_states=True)
        return Output(out.logits, _pooled(out.hidden_states[-1], None))
    cache = {"use_cache": False} if hasattr(model.config, "use_cache") else {}
    mask = (inputs != pad_id).long()  # [batch, time]
    given: dict[str, Tensor] = {"input_ids": inputs, "attention_mask": mask}
    if inputs.is_meta:
        # Where costs are counted ids have no values, and transformers would look at them.
        given = {"inputs_embeds": model.get_input_embeddings()(inputs)}
    out = model(**given, output_hidden_states=True, **cache)
    hidden, mask = out.hidden_states[-1][:, skip:], mask[:, skip:]
    return Output(out.logits, hidden if per_place else _pooled(hidden, mask))


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

    def __init__(self, model: Any, texts: ClassTexts, scaling: Scaling | None = None) -> None:
        super().__init__()
        self.model = model
        self.pixels = nn.Identity() if scaling is None else _Pixels(scaling)
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
        images = self.pixels(inputs)
        return embedding_of(self.model.get_image_features(pixel_values=images))

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


class _Pixels(nn.Module):
    """Images in [-1, 1], scaled as a saved model takes them."""

    scale: Tensor
    shift: Tensor

    def __init__(self, scaling: Scaling) -> None:
        super().__init__()
        means, deviations = (torch.tensor(values)[:, None, None] for values in scaling)
        self.register_buffer("scale", 0.5 / deviations, persistent=False)
        self.register_buffer("shift", (0.5 - means) / deviations, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """[batch, C, H, W]"""
        return images * self.scale + self.shift


def embedding_of(out: Any) -> Tensor:
    """What a tower's `get_..._features` answers with, as [rows, projection]."""
    found: Tensor = out if isinstance(out, Tensor) else out.pooler_output
    return found
