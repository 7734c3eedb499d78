"""Learned vectors in front of a frozen model's text: nothing else is a parameter.

For images the text is a class's name and the model has two towers: Guo et al., "PromptFL: Let
Federated Participants Cooperatively Learn Prompts Instead of Models", IEEE TMC 2023, with M shared
vectors and the name after them, as Zhou et al., "Learning to Prompt for Vision-Language Models",
IJCV 2022, whose code draws them with a deviation of 0.02. For texts: Lester et al., "The Power of
Scale for Parameter-Efficient Prompt Tuning", EMNLP 2021, Section 2; they start as tokens drawn
from the vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tesserafl.core.errors import ConfigError, ModelError
from tesserafl.core.model import Model, Output
from tesserafl.core.modules import parameters_of
from tesserafl.models.compact import Base
from tesserafl.models.frozen import Frozen, whole_model, write_trained
from tesserafl.models.huggingface import Family, Option, family_of, refuse_foresight
from tesserafl.models.wrapped import answer

if TYPE_CHECKING:
    from tesserafl.data.examples import Spec

_CONTEXT = ".context"


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """Learned context vectors in front of class names or texts; the model stays as it is."""

    config: str = "clip"
    """model type (clip for images; bert, gpt2, llama, ... for texts) or a folder with config.json
    and weights"""
    options: dict[str, Option] = field(default_factory=dict)
    """fields of the config to set, for instance n_embd; text_config.x for a part's field"""
    context: int = 16
    """M: number of learned vectors"""
    adapter: Path | None = None
    """folder with the vectors of an earlier run (its model/adapter) to start from"""
    train_head: bool = True
    """whether a text classifier's output layer is trained and sent as well"""
    base: Base = "float32"
    """how the frozen weights are kept: float32, bfloat16, int8 or nf4; see model 'lora'"""

    def build_model(self, spec: Spec) -> Model:
        """The vectors as a model, for a data set's inputs and classes.

        Raises:
            ConfigError: a library is missing, or the config, an option or the number of vectors is
                wrong.
            ModelError: the data or the vectors do not fit the model, or a saved adapter does not.
        """
        if self.context < 1:
            raise ConfigError(f"model.context must be at least 1; got {self.context}")
        if spec.kind == "image":
            family = family_of(self.config, self.options, spec, "{}", self.context)
        else:
            family = family_of(self.config, self.options, spec)
            self._check_places(family)
        frozen = Frozen(family=family, train_head=self.train_head, base=self.base)

        def save(module: nn.Module, folder: str) -> None:
            trained = parameters_of(module)
            frozen.save({name: trained[name] for name in frozen.head}, folder)
            write_trained(trained, Path(folder) / "adapter")

        model = whole_model(
            frozen,
            lambda device: self._build(frozen, device),
            outputs=frozen.outputs if self.train_head else frozenset(),
            adapter=self.adapter,
            save=save,
        )
        if spec.task == "causal-lm":
            refuse_foresight(family, model)
        return model

    def _check_places(self, family: Family) -> None:
        length = family.spec.shape[0]
        places = family.places
        if places is not None and length + self.context > places:
            raise ModelError(
                f"texts of {length} tokens and model.context {self.context} need "
                f"{length + self.context} places, the model has {places}; take at most "
                f"{max(places - length, 0)} vectors, or shorten data.sequence_length"
            )

    def _build(self, frozen: Frozen, device: str) -> nn.Module:
        """The frozen model with freshly drawn vectors."""
        module = frozen.copy(device)
        texts = frozen.family.texts
        tower = module.model if texts is None else module.model.text_model
        embedding = tower.get_input_embeddings()
        with torch.device(device):
            vectors = torch.empty(self.context, embedding.embedding_dim)
        if texts is not None:
            nn.init.normal_(vectors, std=0.02)
        elif not vectors.is_meta:
            table = frozen.value_of(embedding.weight)
            tokens = torch.randint(len(table), (self.context,), device=table.device)
            vectors.copy_(table[tokens])
        embedding.context = nn.Parameter(vectors)
        embedding.context_start = 0 if texts is None else texts.start
        embedding.register_forward_hook(_insert)
        frozen.freeze(module, lambda name: name.endswith(_CONTEXT))
        if texts is not None:
            return module  # type: ignore[no-any-return]
        return SoftPrompted(module.model, module.pad_id, self.context)


class SoftPrompted(nn.Module):
    """A text model whose embedding puts learned vectors over the first places of every text."""

    def __init__(self, model: Any, pad_id: int, context: int) -> None:
        super().__init__()
        self.model = model
        self.pad_id = pad_id
        self.context = context

    def forward(self, inputs: Tensor) -> Output:
        """Token ids [batch, time]; the answer is of these places alone."""
        # Any token but padding: masks, positions and the last token are found from the ids.
        held = inputs.new_full((len(inputs), self.context), int(self.pad_id == 0))
        out = answer(self.model, torch.cat([held, inputs], 1), self.pad_id, skip=self.context)
        if out.logits.dim() == 3:
            return Output(out.logits[:, self.context :], out.features)
        return out


def _insert(embedding: nn.Module, _: object, embedded: Tensor) -> Tensor:
    """The learned vectors in the places [start, start + M) of every text [texts, time, width]."""
    context, start = embedding.context, embedding.context_start
    assert isinstance(context, Tensor) and isinstance(start, int)
    vectors = context.to(embedded).expand(len(embedded), -1, -1)
    return torch.cat([embedded[:, :start], vectors, embedded[:, start + len(context) :]], 1)
