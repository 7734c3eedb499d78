"""A transformers config: made, fitted to data, and which of its fields are sizes.

Sizes are known by their standard names alone:

    embed        hidden_size; where heads share it out, whole heads at a time
    heads        num_key_value_heads (and their queries), where head_dim is a field of its own
    mlp          intermediate_size, or 4 x hidden_size where it is None
    layers       num_hidden_layers
    stage0, ...  hidden_sizes        layers0, ...  depths        embedding  embedding_size
    projection   projection_dim

Sub-configs come with a prefix: `text.embed`, `vision.layers`. A family that calls a field otherwise
says so itself, in its `attribute_map`.
"""

from __future__ import annotations

import copy
import difflib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from tesserafl.core.errors import ConfigError, ModelError, did_you_mean

if TYPE_CHECKING:
    from tesserafl.data.examples import Spec

Config = Any
"""A transformers config; the library is imported only where one is made."""

_MLP_FIELDS = ("intermediate_size", "n_inner", "ffn_dim", "d_ff", "hidden_dim")
_EMBED_FOLLOWERS = ("pooler_output_size", "word_embed_proj_dim")
_SUB_CONFIGS = {"text.": "text_config", "vision.": "vision_config"}


@dataclass(frozen=True)
class Knob:
    """One size of a config."""

    axis: str
    size: int
    quantum: int | None
    """Entries of one unit, where the config says so."""
    turn: Callable[[Config, int], None]
    """Sets the size on a config of the same family."""


def knobs_of(config: Config) -> list[Knob]:
    """Every size that the config's fields name, in the order from input to output."""
    knobs = list(_own_knobs(config))
    parts = _parts_of(config)
    for prefix, part in parts.items():
        for knob in _own_knobs(part):
            knobs.append(
                Knob(prefix + knob.axis, knob.size, knob.quantum, _within(prefix, knob.turn))
            )
    if parts and isinstance(getattr(config, "projection_dim", None), int):
        knobs.append(Knob("projection", config.projection_dim, None, _field("projection_dim")))
    return knobs


def resized(config: Config, knobs: Mapping[str, Knob], sizes: Mapping[str, int]) -> Config:
    """A copy of the config at these sizes; sizes without a knob are left to the caller."""
    config = copy.deepcopy(config)
    for axis, size in sizes.items():
        if axis in knobs and size != knobs[axis].size:
            knobs[axis].turn(config, size)
    return config


def config_of(name: str, source: Path | None, options: Mapping[str, Any]) -> Config:
    """The config of a model type, or of the folder `source`, with these fields set.

    Raises:
        ConfigError: transformers is missing, the type or a field is unknown, or blocks are to be
            computed twice.
    """
    try:
        from transformers import CONFIG_MAPPING, AutoConfig
    except ImportError as error:
        raise ConfigError(
            "model 'huggingface' needs transformers; pip install 'tesserafl[huggingface]'"
        ) from error
    if source is None and name not in CONFIG_MAPPING:
        near = ", ".join(difflib.get_close_matches(name, list(CONFIG_MAPPING), n=4)) or "none"
        raise ConfigError(
            f"model.config {name!r} is neither a folder with config.json nor a model type of the "
            f"installed transformers; near names: {near}"
        )

    def made(**fields: object) -> Config:
        if source is None:
            return AutoConfig.for_model(name, **fields)
        return AutoConfig.from_pretrained(str(source), local_files_only=True, **fields)

    plain = made()
    nested: dict[str, Any] = {}
    for key, value in options.items():
        part, dot, own = key.rpartition(".")
        holder = getattr(plain, part, None) if dot else plain
        if holder is None or not hasattr(holder, own):
            known = [name for name in vars(holder or plain) if not name.startswith("_")]
            raise ConfigError(f"model.options has {key!r}; {did_you_mean(own, known)}")
        if dot:
            nested.setdefault(part, holder.to_dict())[own] = value
        else:
            nested[key] = value
    # Made anew, since families derive fields from others when a config is made.
    config = made(**nested)
    config.dtype = torch.float32
    _check_checkpointing(config)
    return config


def _check_checkpointing(config: Config) -> None:
    """Raise ConfigError if blocks are to be computed a second time in the backward pass."""
    # Parameters are put in for a call alone, so the second time the blocks would find others and
    # train nothing, without a word. Refused and not switched off: who asks for it counts on the
    # memory that it saves.
    for prefix, part in {"": config, **_parts_of(config)}.items():
        if getattr(part, "gradient_checkpointing", False):
            name = f"{prefix and _SUB_CONFIGS[prefix] + '.'}gradient_checkpointing"
            raise ConfigError(
                f"the model's config has {name} true, with which no block would be trained here; "
                f"set it to false in model.options, and for less memory take a smaller batch_size"
            )


def _parts_of(config: Config) -> dict[str, Config]:
    """Its sub-configs, by the prefix of their sizes."""
    return {p: getattr(config, f) for p, f in _SUB_CONFIGS.items() if hasattr(config, f)}


def fit_to_data(config: Config, spec: Spec, source: Path | None) -> None:
    """Set on the config what the data decide.

    Raises:
        ModelError: a saved model reads other images or tokens.
    """
    if spec.task != "causal-lm":
        config.num_labels = spec.num_classes
        if spec.class_names:
            config.id2label = dict(enumerate(spec.class_names))
            config.label2id = {label: i for i, label in enumerate(spec.class_names)}
    if spec.kind == "image":
        part = getattr(config, "vision_config", config)
        channels, height, width = spec.shape
        wanted: dict[str, Any] = {
            "num_channels": channels,
            "image_size": height if height == width else [height, width],
        }
    else:
        part = config.get_text_config()
        if spec.task == "causal-lm" and hasattr(part, "is_decoder"):
            part.is_decoder = True  # BERT and its kin look ahead unless told
        part.pad_token_id = config.pad_token_id = spec.pad_id
        wanted = {"vocab_size": spec.vocab_size}
    for name, value in wanted.items():
        given = getattr(part, name, None)
        if given is None or given == value:
            continue
        if source is None:
            setattr(part, name, value)
        elif name != "vocab_size" or value > given:
            raise ModelError(
                f"{source}: the saved model has {name} {given}, the data have {value}; prepare "
                f"the data as the model was trained (its size of images, its tokenizer)"
            )


def places_of(config: Config, module: nn.Module) -> int | None:
    """Tokens of one text that a model has places for; None: any number.

    Args:
        config: of the model.
        module: built from it, on `meta` or not.
    """
    longest = getattr(config.get_text_config(), "max_position_embeddings", None)
    # RoBERTa and its kin give a text the places after padding's own.
    later = [
        len(part.weight) - part.padding_idx - 1
        for path, part in module.named_modules()
        if "position" in path.rpartition(".")[2] and getattr(part, "padding_idx", None) is not None
    ]
    return min((n for n in (longest, *later) if n is not None), default=None)


def check_length(length: int, places: int | None) -> None:
    """Raise ModelError if texts of so many tokens have no room."""
    if places is not None and length > places:
        raise ModelError(
            f"texts are {length} tokens long, the model reads {places}; shorten the data's "
            f"sequences or set max_position_embeddings in model.options"
        )


def _own_knobs(config: Config) -> Iterator[Knob]:
    stages = getattr(config, "hidden_sizes", None)
    depths = getattr(config, "depths", None)
    hidden = getattr(config, "hidden_size", None)
    if isinstance(getattr(config, "embedding_size", None), int):
        yield Knob("embedding", config.embedding_size, None, _field("embedding_size"))
    if isinstance(stages, list | tuple):
        for stage, size in enumerate(stages):
            yield Knob(f"stage{stage}", size, None, _element("hidden_sizes", stage))
    elif isinstance(hidden, int):
        yield from _transformer_widths(config, hidden)
    if isinstance(depths, list | tuple):
        for stage, size in enumerate(depths):
            yield Knob(f"layers{stage}", size, None, _element("depths", stage))
    elif isinstance(getattr(config, "num_hidden_layers", None), int):
        yield Knob("layers", config.num_hidden_layers, None, _set_layers)


def _transformer_widths(config: Config, hidden: int) -> Iterator[Knob]:
    heads = getattr(config, "num_attention_heads", None)
    if not isinstance(heads, int):
        yield Knob("embed", hidden, None, _embed(config, hidden, None))
    else:
        groups = getattr(config, "num_key_value_heads", None) or heads
        if _has_own_head_dim(config):
            yield Knob("embed", hidden, None, _embed(config, hidden, None))
            yield Knob("heads", groups, 1, _heads(heads // groups))
        else:
            unit = hidden // groups
            yield Knob("embed", hidden, unit, _embed(config, hidden, (unit, heads // groups)))
    field = next((name for name in _MLP_FIELDS if hasattr(config, name)), None)
    if field:
        yield Knob("mlp", getattr(config, field) or 4 * hidden, None, _field(field))


def _has_own_head_dim(config: Config) -> bool:
    computed = isinstance(getattr(type(config), "head_dim", None), property)
    return isinstance(getattr(config, "head_dim", None), int) and not computed


def _within(prefix: str, turn: Callable[[Config, int], None]) -> Callable[[Config, int], None]:
    return lambda config, size: turn(getattr(config, _SUB_CONFIGS[prefix]), size)


def _field(name: str) -> Callable[[Config, int], None]:
    return lambda config, size: setattr(config, name, size)


def _element(name: str, position: int) -> Callable[[Config, int], None]:
    def turn(config: Config, size: int) -> None:
        values = list(getattr(config, name))
        values[position] = size
        setattr(config, name, values)

    return turn


def _embed(
    config: Config, hidden: int, unit: tuple[int, int] | None
) -> Callable[[Config, int], None]:
    """`unit`: (entries, query heads) of the heads that share one key, or None if independent."""
    followers = [name for name in _EMBED_FOLLOWERS if getattr(config, name, None) == hidden]
    # A feed-forward size that was left open is 4 x the full size, and no part of this axis.
    open_mlp = [name for name in _MLP_FIELDS if getattr(config, name, 0) is None][:1]

    def turn(config: Config, size: int) -> None:
        config.hidden_size = size
        for name in followers:
            setattr(config, name, size)
        for name in open_mlp:
            if getattr(config, name) is None:
                setattr(config, name, 4 * hidden)
        if unit is not None:
            _heads(unit[1])(config, size // unit[0])

    return turn


def _heads(queries: int) -> Callable[[Config, int], None]:
    def turn(config: Config, size: int) -> None:
        if getattr(config, "num_key_value_heads", None) is not None:
            config.num_key_value_heads = size
        config.num_attention_heads = size * queries

    return turn


def _set_layers(config: Config, size: int) -> None:
    before = config.num_hidden_layers
    for name, value in vars(config).items():
        # Kinds of layers, one a layer: a longer model repeats them from the start.
        if isinstance(value, list) and len(value) == before and "layer" in name:
            setattr(config, name, [value[i % before] for i in range(size)])
    config.num_hidden_layers = size
