"""A sentence for every class as token ids, for models that compare images with texts.

The tokenizer is the saved model's own. A model without weights gets one of bytes, which is saved
with it, so that later runs read texts as this one did.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tesserafl.core import seeds
from tesserafl.core.errors import ConfigError, ModelError
from tesserafl.models.configs import Config, knobs_of, places_of
from tesserafl.models.wrapped import embedding_of

if TYPE_CHECKING:
    from tesserafl.data.examples import Spec

TOKENIZER_FILES = ("tokenizer*", "vocab*", "merges.txt", "*.model")
_BEGIN, _END = 256, 257
_PRINTABLE = (*range(33, 127), *range(161, 173), *range(174, 256))
"""Bytes that byte-level tokenizers write as the character of the same number."""

Ids = list[list[int]]


@dataclass(frozen=True, kw_only=True)
class ClassTexts:
    """Token ids of every class's sentence, padded to one length."""

    ids: Ids
    """[classes, tokens]"""
    mask: Ids | None
    """[classes, tokens], 1 where the sentence is; None: the model needs no mask"""
    start: int
    """first place that was left free: 1 where a token begins every sentence, else 0"""
    tokenizer: Any
    """of transformers; what the sentences were read with"""


def two_tower_class(config: Config) -> Any:
    """`AutoModel`, for a config whose model compares images with texts.

    Raises:
        ConfigError: the config is of another kind of model.
    """
    import transformers

    found = transformers.AutoModel._model_mapping.get(type(config), None)
    if not (hasattr(found, "get_image_features") and hasattr(found, "get_text_features")):
        raise ConfigError(
            f"{config.model_type!r} has no tower for images and one for texts; to classify images "
            f"by prompts choose a model.config such as clip, or leave model.prompt empty"
        )
    return transformers.AutoModel


def class_texts(
    config: Config, source: Path | None, has_weights: bool, spec: Spec, prompt: str, context: int
) -> ClassTexts:
    """The classes' sentences as ids.

    Args:
        config: of a two-tower model; without weights its text tower is fitted to bytes.
        source: the folder of a saved model.
        has_weights: whether the folder holds weights.
        spec: the data's classes.
        prompt: the sentence, with {} in the place of the class.
        context: places to leave free in front of a sentence, after the token that begins it;
            they hold the token that follows them.

    Raises:
        ConfigError: the prompt has no place for the class.
        ModelError: the folder has no tokenizer, the classes have no or equal names, a sentence is
            empty or too long, or the model does not tell sentences apart.
    """
    if prompt.count("{}") != 1:
        raise ConfigError(
            f"model.prompt is {prompt!r}; write {{}} once, where the class goes, as in "
            f"'a photo of a {{}}'"
        )
    if not spec.class_names:
        raise ModelError("the data do not name their classes; leave model.prompt empty")
    text = config.get_text_config()
    tokenizer = _tokenizer(text, source, has_weights)
    sentences = [prompt.replace("{}", name) for name in spec.class_names]
    if empty := [i for i, sentence in enumerate(sentences) if not sentence.strip()]:
        raise ModelError(
            f"class {empty[0]} is called {spec.class_names[empty[0]]!r}, so its sentence with "
            f"model.prompt {prompt!r} is empty; name the class in the data, or write words around "
            f"{{}}"
        )
    ids: Ids = tokenizer(sentences)["input_ids"]
    start = int(all(row[0] in tokenizer.all_special_ids for row in ids))
    ids = [[*row[:start], *row[start : start + 1] * context, *row[start:]] for row in ids]
    tower = _shallow(config)
    _check(sentences, ids, text, places_of(config, tower), context)
    filled, mask = _padded(config, tower, ids, tokenizer)
    return ClassTexts(ids=filled, mask=mask, start=start, tokenizer=tokenizer)


def byte_tokenizer() -> Any:
    """UTF-8 bytes as a tokenizer of transformers: ids 0..255 are the bytes, 256 begins a text, and
    257, the largest, ends and pads it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    others = iter(range(256, 512))
    letters = [chr(byte if byte in _PRINTABLE else next(others)) for byte in range(256)]
    begin, end = "<|startoftext|>", "<|endoftext|>"
    vocabulary = {letter: byte for byte, letter in enumerate(letters)} | {begin: _BEGIN, end: _END}
    plain = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    plain.decoder = decoders.ByteLevel()
    plain.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A {end}", special_tokens=[(begin, _BEGIN), (end, _END)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=plain, bos_token=begin, eos_token=end, pad_token=end
    )


def _tokenizer(text: Config, source: Path | None, has_weights: bool) -> Any:
    """The folder's, or one of bytes to which the config of the text tower is fitted."""
    if source is not None and any(any(source.glob(files)) for files in TOKENIZER_FILES):
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(str(source), local_files_only=True)
        except (OSError, ValueError, KeyError) as error:
            raise ModelError(f"{source} holds no tokenizer that can be read: {error}") from error
    if has_weights:
        raise ModelError(
            f"{source} has weights and no tokenizer, so model.prompt cannot be read as the model "
            f"was trained; put its tokenizer's files (tokenizer.json, ...) into the folder"
        )
    text.vocab_size = _END + 1
    text.bos_token_id, text.eos_token_id, text.pad_token_id = _BEGIN, _END, _END
    return byte_tokenizer()


def _check(
    sentences: Sequence[str], ids: Ids, text: Config, limit: int | None, context: int
) -> None:
    if twice := [s for i, s in enumerate(sentences) if ids[i] in ids[:i]]:
        raise ModelError(
            f"two classes have the sentence {twice[0]!r}; give the classes names that differ"
        )
    longest = max(range(len(ids)), key=lambda i: len(ids[i]))
    if limit is not None and len(ids[longest]) > limit:
        also = f", {context} of them learned" if context else ""
        raise ModelError(
            f"the sentence {sentences[longest]!r} has {len(ids[longest])} tokens{also}; the text "
            f"tower reads {limit}. Shorten the prompt or the class's name, or, without saved "
            f"weights, set text_config.max_position_embeddings in model.options"
        )
    largest = max(max(row) for row in ids)
    if largest >= text.vocab_size:
        raise ModelError(
            f"the tokenizer gave id {largest}, the text tower knows {text.vocab_size}; the "
            f"tokenizer in the folder is another model's"
        )


def _padded(config: Config, tower: nn.Module, ids: Ids, tokenizer: Any) -> tuple[Ids, Ids | None]:
    """Padded as the text tower needs it: as short as its embeddings do not depend on padding.

    A tower that looks back only needs no more than the end of a text; one that looks at everything
    needs a mask; one that reads the last place of all, as SigLIP does, gets all its places filled,
    as it was trained. One layer with any weights shows which it is.
    """
    text = config.get_text_config()
    width = max(map(len, ids))
    places = places_of(config, tower) or width + 1
    two = [min(ids, key=len), max(reversed(ids), key=len)][: len(ids)]
    embedded = torch.cat([_embedded(tower, [row], None) for row in two])
    for masked in (False, True):
        longer = _filled(two, min(width + 1, places), tokenizer, masked)
        if torch.allclose(_embedded(tower, *longer), embedded, rtol=1e-9, atol=1e-12):
            filled, mask = _filled(ids, width, tokenizer, masked)
            break
    else:
        filled, mask = _filled(ids, places, tokenizer, False)
        embedded = _embedded(tower, _filled(two, places, tokenizer, False)[0], None)
    if len(two) > 1 and torch.allclose(embedded[0], embedded[1], rtol=1e-9, atol=1e-12):
        raise ModelError(
            f"the text tower of {config.model_type!r} does not tell two classes' sentences apart; "
            f"it reads a text at eos_token_id {text.eos_token_id}, the tokenizer ends one with "
            f"{tokenizer.eos_token_id}: set text_config.eos_token_id in model.options"
        )
    return filled, mask


def _filled(ids: Ids, length: int, tokenizer: Any, masked: bool) -> tuple[Ids, Ids | None]:
    pad = next(
        t for t in (tokenizer.pad_token_id, tokenizer.eos_token_id, ids[0][-1]) if t is not None
    )
    rows = [row + [pad] * (length - len(row)) for row in ids]
    mask = [[1] * len(row) + [0] * (length - len(row)) for row in ids]
    return rows, mask if masked else None


def _shallow(config: Config) -> nn.Module:
    """The model with a layer in each tower, in double precision."""
    import transformers

    small = copy.deepcopy(config)
    for knob in knobs_of(config):
        if knob.axis.endswith("layers"):
            knob.turn(small, 1)
    with torch.device("cpu"), seeds.seeded(0, "texts"):
        model: nn.Module = transformers.AutoModel.from_config(small)
    if not isinstance(getattr(model, "logit_scale", None), Tensor):
        raise ConfigError(
            f"{config.model_type!r} has no logit_scale, so it does not compare images and texts "
            f"as clip does; leave model.prompt empty, or choose another model.config"
        )
    return model.double().eval()


@torch.no_grad()
def _embedded(model: Any, ids: Ids, mask: Ids | None) -> Tensor:
    """[texts, projection]"""
    given = {} if mask is None else {"attention_mask": torch.tensor(mask)}
    return embedding_of(model.get_text_features(input_ids=torch.tensor(ids), **given))
