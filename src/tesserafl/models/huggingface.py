"""Any transformers config, or a folder with a saved model, as a `Model`.

No family is named here: the config's standard fields say what its sizes are (`configs.py`) and the
probe finds what they mean. The library is imported only when a model is built.
"""

from __future__ import annotations

import difflib
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tesserafl.core import seeds
from tesserafl.core.axes import probe
from tesserafl.core.errors import ConfigError, ModelError, did_you_mean
from tesserafl.core.model import Model, Output, Sizes, parameters_of
from tesserafl.core.params import Params
from tesserafl.models.configs import Config, Knob, knobs_of, resized

if TYPE_CHECKING:
    from tesserafl.data.examples import Spec

# Shapes: token ids [batch, time] or images [batch, C, H, W]; logits [batch, classes] or
# [batch, time, vocabulary]; features [batch, embed], the last hidden state pooled

Option = int | float | str | bool | list[int] | None

_AUTO_CLASSES = {
    "image-classification": "AutoModelForImageClassification",
    "text-classification": "AutoModelForSequenceClassification",
    "causal-lm": "AutoModelForCausalLM",
}
_COMPANIONS = (
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "*.model",
    "preprocessor_config.json",
)
"""Files that make a saved model usable without its source."""


@dataclass(frozen=True, kw_only=True)
class HuggingFace:
    """A model of the transformers library: a config by name, or a folder with a saved model."""

    config: str = "gpt2"
    """model type (gpt2, bert, vit, llama, resnet, ...) or a folder with config.json and weights"""
    options: dict[str, Option] = field(default_factory=dict)
    """fields of the config to set, for instance n_embd; text_config.x for a part's field"""
    axes: tuple[str, ...] = ()
    """sizes that may be cut (embed, heads, mlp, layers, ...); empty: all that are found"""

    def build_model(self, spec: Spec) -> Model:
        """The model for a data set's inputs and classes.

        Raises:
            ConfigError: transformers is missing, or the config, an option or an axis is unknown.
            ModelError: the data do not fit the model, or the model cannot be probed.
        """
        if spec.task not in _AUTO_CLASSES:
            raise ModelError(
                f"model 'huggingface' does {', '.join(_AUTO_CLASSES)}; the data are for "
                f"{spec.task}; use model 'mlp'"
            )
        source = Path(self.config) if (Path(self.config) / "config.json").is_file() else None
        config = _config(self.config, source, self.options)
        _fit_to_data(config, spec, source)
        family = _Family(config=config, spec=spec)
        knobs = _used(family, knobs_of(config), self.axes)
        family = _Family(config=config, spec=spec, knobs={knob.axis: knob for knob in knobs})
        sizes = {knob.axis: knob.size for knob in knobs}
        has_weights = source is not None and any(
            any(source.glob(pattern)) for pattern in ("*.safetensors", "*.bin")
        )
        return probe(
            family.build,
            {**sizes, "classes": family.num_outputs},
            family.example,
            outputs=("classes",),
            quanta={knob.axis: knob.quantum for knob in knobs if knob.quantum},
            pretrained=(lambda: family.load(str(source))) if has_weights else None,
            save=lambda module, folder: _save(module, folder, source),
        )


@dataclass(frozen=True, kw_only=True)
class _Family:
    """One config for one data set, at any sizes."""

    config: Config
    spec: Spec
    knobs: dict[str, Knob] = field(default_factory=dict)

    @property
    def num_outputs(self) -> int:
        if self.spec.task == "causal-lm":
            return int(self.config.get_text_config().vocab_size)
        return int(self.config.num_labels)

    def build(self, sizes: Sizes) -> nn.Module:
        config = resized(self.config, self.knobs, sizes)
        if sizes.get("classes", self.num_outputs) != self.num_outputs:
            if self.spec.task == "causal-lm":
                config.get_text_config().vocab_size = sizes["classes"]
            else:
                config.num_labels = sizes["classes"]
        return _Wrapped(self._auto_class().from_config(config), self._pad_id)

    def example(self) -> Tensor:
        if self.spec.kind == "image":
            return torch.randn(2, *self.spec.shape)
        # Few distinct tokens, so that a tiny vocabulary holds them; none is padding but one.
        tokens = torch.tensor([[1, 3, 2, 5, 4, 6], [4, 2, 6, 1, 5, 3]])
        tokens[tokens == self.spec.pad_id] = 0 if self.spec.pad_id else 7
        tokens[1, -1] = self.spec.pad_id if self.spec.pad_id < 8 else tokens[1, -1]
        return tokens

    def load(self, folder: str) -> Params:
        model, report = self._auto_class().from_pretrained(
            folder,
            config=self.config,
            dtype=torch.float32,
            ignore_mismatched_sizes=True,  # a head for other classes; anything else is refused
            output_loading_info=True,
            local_files_only=True,
        )
        for name, *shapes in report["mismatched_keys"]:
            if not shapes or shapes[-1][0] != self.num_outputs:
                raise ModelError(
                    f"{folder}: {name!r} has another shape in the file than in the config; leave "
                    f"sizes out of model.options when you start from a saved model"
                )
        return parameters_of(_Wrapped(model, self._pad_id))

    @property
    def _pad_id(self) -> int | None:
        return None if self.spec.kind == "image" else self.spec.pad_id

    def _auto_class(self) -> Any:
        import transformers

        return getattr(transformers, _AUTO_CLASSES[self.spec.task])


class _Wrapped(nn.Module):
    """Takes a batch as data sets give it and answers with an `Output`."""

    def __init__(self, model: Any, pad_id: int | None) -> None:
        super().__init__()
        self.model = model
        self.pad_id = pad_id

    def forward(self, inputs: Tensor) -> Output:
        if self.pad_id is None:
            out = self.model(pixel_values=inputs, output_hidden_states=True)
            mask = None
        else:
            mask = (inputs != self.pad_id).long()  # [batch, time]
            cache = {"use_cache": False} if hasattr(self.model.config, "use_cache") else {}
            out = self.model(
                input_ids=inputs, attention_mask=mask, output_hidden_states=True, **cache
            )
        return Output(out.logits, _pooled(out.hidden_states[-1], mask))


def _pooled(hidden: Tensor, mask: Tensor | None) -> Tensor:
    """[batch, embed] from [batch, time, embed] or [batch, embed, height, width]."""
    if hidden.dim() == 4:
        return hidden.mean(dim=(2, 3))
    if mask is None:
        return hidden.mean(dim=1)
    weight = mask[..., None].to(hidden)
    return (hidden * weight).sum(dim=1) / weight.sum(dim=1).clamp(min=1.0)


def _config(name: str, source: Path | None, options: dict[str, Option]) -> Config:
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

    plain, nested = made(), {}
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
    return config


def _fit_to_data(config: Config, spec: Spec, source: Path | None) -> None:
    """Set what the data decide; a saved model must fit them as it is."""
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
        part.pad_token_id = config.pad_token_id = spec.pad_id
        wanted = {"vocab_size": spec.vocab_size}
        longest = getattr(part, "max_position_embeddings", None)
        if longest is not None and spec.shape[0] > longest:
            raise ModelError(
                f"texts are {spec.shape[0]} tokens long, the model reads {longest}; shorten the "
                f"data's sequences or set max_position_embeddings in model.options"
            )
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


def _used(family: _Family, knobs: list[Knob], axes: tuple[str, ...]) -> list[Knob]:
    """The asked knobs, or those that change the model at all: a head may use one tower of two."""
    names = [knob.axis for knob in knobs]
    for axis in axes:
        if axis not in names:
            raise ConfigError(f"model.axes has {axis!r}; {did_you_mean(axis, names)}")
    if axes:
        return [knob for knob in knobs if knob.axis in axes]
    shallow = {k.axis: min(k.size, 2) for k in knobs if "layers" in k.axis}
    every = _Family(config=family.config, spec=family.spec, knobs={k.axis: k for k in knobs})

    def shapes(**changed: int) -> list[tuple[str, torch.Size]]:
        with torch.device("meta"):
            module = every.build(shallow | changed)
        return [(name, value.shape) for name, value in module.named_parameters()]

    plain = shapes()
    return [k for k in knobs if shapes(**{k.axis: 2 * shallow.get(k.axis, k.size)}) != plain]


def _save(module: nn.Module, folder: str, source: Path | None) -> None:
    assert isinstance(module, _Wrapped), type(module)
    module.model.save_pretrained(folder)
    for pattern in _COMPANIONS if source is not None else ():
        for path in Path(source or "").glob(pattern):
            if not path.name.endswith((".safetensors", ".bin")):
                shutil.copy2(path, Path(folder) / path.name)
