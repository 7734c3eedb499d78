"""Any transformers config, or a folder with a saved model, as a `Model`.

No family is named here: the config's standard fields say what its sizes are (`configs.py`) and the
probe finds what they mean. The library is imported only when a model is built.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tesserafl.core import seeds
from tesserafl.core.axes import probe
from tesserafl.core.errors import ConfigError, ModelError, did_you_mean
from tesserafl.core.model import Model, Sizes
from tesserafl.core.modules import parameters_of
from tesserafl.core.params import Params
from tesserafl.models.class_texts import (
    TOKENIZER_FILES,
    ClassTexts,
    class_texts,
    two_tower_class,
)
from tesserafl.models.configs import (
    Config,
    Knob,
    check_length,
    config_of,
    fit_to_data,
    knobs_of,
    places_of,
    resized,
)
from tesserafl.models.wrapped import PROCESSOR_FILES, Scaling, TwoTower, Wrapped, scaling_of

if TYPE_CHECKING:
    from tesserafl.data.examples import Spec

# Shapes: token ids [batch, time] or images [batch, C, H, W]; logits [batch, classes] or
# [batch, time, vocabulary]; features [batch, embed], the last hidden state pooled, or all of it

Option = int | float | str | bool | list[int] | None

_AUTO_CLASSES = {
    "image-classification": "AutoModelForImageClassification",
    "text-classification": "AutoModelForSequenceClassification",
    "causal-lm": "AutoModelForCausalLM",
}
_COMPANIONS = (*TOKENIZER_FILES, "special_tokens_map.json", "added_tokens.json", *PROCESSOR_FILES)
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
    prompt: str = ""
    """sentence for a class, for instance 'a photo of a {}': images are classified by the nearest
    class's text, of a model with two towers such as clip; empty: by a classification head"""

    def build_model(self, spec: Spec) -> Model:
        """The model for a data set's inputs and classes.

        Raises:
            ConfigError: transformers is missing, or the config, an option or an axis is unknown.
            ModelError: the data do not fit the model, or the model cannot be probed.
        """
        found_family = family_of(self.config, self.options, spec, self.prompt)
        found = knobs_of(found_family.config)
        every = replace(found_family, knobs={knob.axis: knob for knob in found})
        knobs = _used(every, found, self.axes)
        family = replace(every, knobs={knob.axis: knob for knob in knobs})
        try:
            model = probe(
                family.build,
                {**{knob.axis: knob.size for knob in knobs}, **family.rows},
                family.example,
                outputs=tuple(family.rows),
                quanta={knob.axis: knob.quantum for knob in knobs if knob.quantum},
                pretrained=(lambda: family.load()[0]) if family.has_weights else None,
                save=family.save,
            )
            if spec.task == "causal-lm":
                refuse_foresight(family, model)
            return model
        except ModelError as error:
            raise ModelError(
                f"{self.config}: {error}. Its sizes are {', '.join(k.axis for k in found)}; set "
                f"model.axes to those to be cut"
            ) from error


def family_of(
    config: str, options: dict[str, Option], spec: Spec, prompt: str = "", context: int = 0
) -> Family:
    """A config for a data set.

    Args:
        config: a model type, or a folder with config.json and perhaps weights.
        options: fields of the config to set.
        spec: the data's inputs and classes.
        prompt: sentence for a class, to whose text images are compared; empty: a head.
        context: places that are left free in front of the sentence.

    Raises:
        ConfigError: transformers is missing, the config or an option is unknown, or the prompt is
            for another kind of data or model.
        ModelError: the data do not fit the model.
    """
    if spec.task not in _AUTO_CLASSES:
        raise ModelError(
            f"models of transformers do {', '.join(_AUTO_CLASSES)}; the data are for "
            f"{spec.task}; use model 'mlp'"
        )
    source = Path(config) if (Path(config) / "config.json").is_file() else None
    found = config_of(config, source, options)
    if prompt and spec.task != "image-classification":
        raise ConfigError(
            f"model.prompt is for image-classification, the data are for {spec.task}; leave it "
            f"empty"
        )
    auto_class = two_tower_class(found) if prompt else _auto_class(found, spec)
    fit_to_data(found, spec, source)
    scaling = scaling_of(source) if spec.kind == "image" and source is not None else None
    family = Family(config=found, spec=spec, auto_class=auto_class, source=source, scaling=scaling)
    if spec.kind != "image":
        check_length(spec.shape[0], family.places)
    if prompt:
        texts = class_texts(found, source, family.has_weights, spec, prompt, context)
        family = replace(family, texts=texts)
    return family


@dataclass(frozen=True, kw_only=True)
class Family:
    """One config for one data set, at any sizes."""

    config: Config
    spec: Spec
    auto_class: Any
    source: Path | None
    """The folder of a saved model."""
    texts: ClassTexts | None = None
    """A sentence for every class; None: a head."""
    scaling: Scaling | None = None
    """Of images; None: the model takes them as they come."""
    knobs: dict[str, Knob] = field(default_factory=dict)
    per_place: bool = False
    """Whether features are of every place of a text; False: pooled over them."""

    @property
    def has_weights(self) -> bool:
        """Whether the folder holds weights to start from."""
        return self.source is not None and any(
            any(self.source.glob(pattern)) for pattern in ("*.safetensors", "*.bin")
        )

    @property
    def rows(self) -> dict[str, int]:
        """Sizes that the data decide: known so that their rows are, never cut."""
        if self.texts is not None:
            return {}
        if self.spec.kind == "image":
            return {"classes": int(self.config.num_labels)}
        vocabulary = int(self.config.get_text_config().vocab_size)
        if self.spec.task == "causal-lm":
            return {"classes": vocabulary}
        return {"vocabulary": vocabulary, "classes": int(self.config.num_labels)}

    def build(self, sizes: Sizes) -> nn.Module:
        """A module at these sizes, with weights of its own drawing."""
        config = resized(self.config, self.knobs, sizes)
        for axis, size in self.rows.items():
            if sizes.get(axis, size) != size:
                if axis == "vocabulary" or self.spec.task == "causal-lm":
                    config.get_text_config().vocab_size = sizes[axis]
                else:
                    config.num_labels = sizes[axis]
        return self._wrapped(self.auto_class.from_config(config))

    def _wrapped(self, model: Any) -> Wrapped | TwoTower:
        if self.texts is not None:
            return TwoTower(model, self.texts, self.scaling)
        return Wrapped(model, self.pad_id, self.scaling, per_place=self.per_place)

    @property
    def pad_id(self) -> int | None:
        """Token id of padding; None: the inputs are images."""
        return None if self.spec.kind == "image" else self.spec.pad_id

    @property
    def places(self) -> int | None:
        """Tokens of one text that there are places for; None: any number."""
        with torch.device("meta"):
            return places_of(self.config, self.build({}))

    def example(self) -> Tensor:
        """A batch of two."""
        if self.spec.kind == "image":
            return torch.randn(2, *self.spec.shape)
        # Few distinct tokens, so that a tiny vocabulary holds them; none is padding but one.
        tokens = torch.tensor([[1, 3, 2, 5, 4, 6], [4, 2, 6, 1, 5, 3]])
        tokens[tokens == self.spec.pad_id] = 0 if self.spec.pad_id else 7
        tokens[1, -1] = self.spec.pad_id if self.spec.pad_id < 8 else tokens[1, -1]
        return tokens

    def load(self) -> tuple[Params, set[str]]:
        """The folder's parameters, and the names of those that it has not and that are new."""
        model, report = self.auto_class.from_pretrained(
            str(self.source),
            config=self.config,
            dtype=torch.float32,
            ignore_mismatched_sizes=True,  # a head for other classes; anything else is refused
            output_loading_info=True,
            local_files_only=True,
        )
        new = {f"model.{name}" for name in report["missing_keys"]}
        for name, *shapes in report["mismatched_keys"]:
            if not shapes or shapes[-1][0] != self.rows.get("classes"):
                raise ModelError(
                    f"{self.source}: {name!r} has another shape in the file than in the config; "
                    f"leave sizes out of model.options when you start from a saved model"
                )
            new.add(f"model.{name}")
        return parameters_of(self._wrapped(model)), new

    def save(self, module: nn.Module, folder: str) -> None:
        """Write a module of `build` in the library's format, with the source's companions."""
        assert isinstance(module, Wrapped | TwoTower), type(module)
        module.model.save_pretrained(folder)
        if self.texts is not None:
            self.texts.tokenizer.save_pretrained(folder)
        for pattern in _COMPANIONS if self.source is not None else ():
            for path in Path(self.source or "").glob(pattern):
                if not path.name.endswith((".safetensors", ".bin")):
                    shutil.copy2(path, Path(folder) / path.name)


def refuse_foresight(family: Family, model: Model) -> None:
    """Raise ModelError if a language model's answer depends on tokens that come later."""
    few = {axis: range(min(2, model.units(axis))) for axis in (*model.cuttable, *model.depths)}
    with seeds.seeded(0, "foresight"), torch.no_grad():
        module = model.module(model.slice(few).sizes).eval()
        tokens = family.example()
        before = module(tokens).logits[:, :-1]
        tokens[:, -1] = tokens[:, 0]
        after = module(tokens).logits[:, :-1]
    if not torch.allclose(before, after, atol=1e-4):
        raise ModelError(
            "as a language model it sees the tokens that it is to predict; choose a causal model "
            "such as gpt2 or llama"
        )


def _auto_class(config: Config, spec: Spec) -> Any:
    import transformers

    auto_class = getattr(transformers, _AUTO_CLASSES[spec.task])
    known = auto_class._model_mapping
    if type(config) not in known:
        raise ModelError(
            f"transformers has no {spec.task} head for {config.model_type!r}; choose another "
            f"model.config"
        )
    # from_config needs a name where a family has several heads for one task (DeiT's has a teacher).
    if isinstance(known[type(config)], tuple) and config.architectures is None:
        config.architectures = [known[type(config)][0].__name__]
    return auto_class


def _used(family: Family, knobs: list[Knob], axes: tuple[str, ...]) -> list[Knob]:
    """The asked knobs, or those that change the model at all: a head may use one tower of two."""
    names = [knob.axis for knob in knobs]
    for axis in axes:
        if axis not in names:
            raise ConfigError(f"model.axes has {axis!r}; {did_you_mean(axis, names)}")
    if axes:
        return [knob for knob in knobs if knob.axis in axes]
    shallow = {k.axis: min(k.size, 2) for k in knobs if "layers" in k.axis}

    def shapes(**changed: int) -> list[tuple[str, torch.Size]]:
        with torch.device("meta"):
            module = family.build(shallow | changed)
        return [(name, value.shape) for name, value in module.named_parameters()]

    plain = shapes()
    return [k for k in knobs if shapes(**{k.axis: 2 * shallow.get(k.axis, k.size)}) != plain]
