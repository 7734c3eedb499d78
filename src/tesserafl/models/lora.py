"""Low-rank adapters on a frozen transformers model: the adapters are the parameters, and no more.

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022, Section 4.1: a frozen
weight W becomes W + (alpha / r) B A. The rank is an axis like any other, so clients of unequal
ranks hold sub-models; alpha / r is that of the full rank for all of them, or a cut adapter would be
another function.

The frozen weights are buffers that every module of this process shares (`frozen.py`). The adapters
themselves are the peft library's.
"""

from __future__ import annotations

import re
import warnings
from collections import Counter
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tesserafl.core.axis import Depth, LowRank, Tie, Width
from tesserafl.core.errors import ConfigError, ModelError
from tesserafl.core.model import Model, Sizes
from tesserafl.core.modules import parameters_of
from tesserafl.core.params import Params
from tesserafl.models.compact import Base
from tesserafl.models.frozen import Frozen
from tesserafl.models.huggingface import Family, Option, family_of, refuse_foresight
from tesserafl.models.peft_files import DOWN, UP, need_peft, peft_name, read_adapter

if TYPE_CHECKING:
    from tesserafl.data.examples import Spec

RANK = "rank"
_MERGED = ".base_layer.weight"


@dataclass(frozen=True, kw_only=True)
class LoRA:
    """Adapters on a model of the transformers library; its own weights stay as they are."""

    config: str = "gpt2"
    """model type (gpt2, bert, vit, llama, ...) or a folder with config.json and weights"""
    options: dict[str, Option] = field(default_factory=dict)
    """fields of the config to set, for instance n_embd; text_config.x for a part's field"""
    rank: int = 8
    """r: rank of the global adapters; clients of a smaller ratio hold the first of its rows"""
    alpha: float = 16.0
    """the change is multiplied by alpha / rank"""
    targets: tuple[str, ...] = ()
    """names of the modules that get adapters, or one regular expression of their whole path;
    empty: the library's choice for this type (most often queries and values), else all linear"""
    adapter: Path | None = None
    """folder with a saved adapter (peft format) to start from"""
    train_head: bool = True
    """whether a classifier's output layer is trained and sent as well"""
    prompt: str = ""
    """sentence for a class, for instance 'a photo of a {}': images are classified by the nearest
    class's text, of a model with two towers such as clip; empty: by a classification head"""
    merge: bool = False
    """whether the adapted weights are parameters too, frozen on clients, so that a server can merge
    adapters into them (flora)"""
    base: Base = "float32"
    """how the frozen weights are kept: float32; bfloat16, half the bytes; int8 or nf4 (8 or 4 bits,
    by bitsandbytes) for linear layers and bfloat16 for embeddings. Computation is in float32"""

    def build_model(self, spec: Spec) -> Model:
        """The adapters as a model, for a data set's inputs and classes.

        Raises:
            ConfigError: a library is missing, the config, an option or the rank is wrong, no module
                is a target, or weights are to be merged and kept in fewer bytes.
            ModelError: the data do not fit the model, or a saved adapter does not.
        """
        if self.rank < 1 or not self.alpha > 0:
            raise ConfigError(
                f"model.rank must be at least 1 and model.alpha positive; got {self.rank} and "
                f"{self.alpha}"
            )
        if self.merge and self.base != "float32":
            raise ConfigError(
                f"model.merge makes float32 parameters of the adapted weights, model.base "
                f"{self.base!r} keeps them in fewer bytes; choose one of the two"
            )
        need_peft()
        family = family_of(self.config, self.options, spec, self.prompt)
        family = replace(family, per_place=spec.task == "causal-lm")
        frozen = Frozen(family=family, train_head=self.train_head, base=self.base)
        model = _Adapted(settings=self, family=family, frozen=frozen).model()
        if spec.task == "causal-lm":
            refuse_foresight(family, model)
        return model


@dataclass(kw_only=True)
class _Adapted:
    settings: LoRA
    family: Family
    frozen: Frozen

    def model(self) -> Model:
        depths = self._depths
        sizes = {RANK: self.settings.rank, **self.family.rows}
        sizes |= {axis: depth.blocks for axis, depth in depths.items()}
        module = self.build_on(sizes, "meta")
        ties = {name: self._ties(name, tensor) for name, tensor in module.named_parameters()}
        shapes = {name: tuple(tensor.shape) for name, tensor in module.named_parameters()}
        scale = self.settings.alpha / self.settings.rank
        downs = [name for name in shapes if name.endswith(DOWN)]
        pairs = tuple(self._pair(name.removesuffix(DOWN), scale) for name in downs)
        return Model(
            build=self.build,
            sizes=sizes,
            widths={
                RANK: Width(units=self.settings.rank, quantum=1, size=RANK),
                **self.frozen.widths(),
            },
            depths=depths,
            ties=ties,
            shapes=shapes,
            low_rank=pairs,
            feature_size=self.frozen.feature_size,
            frozen_blocks=self.frozen.blocks_in(module),
            pretrained=None if self.settings.adapter is None else self.load,
            save=self.save,
        )

    def build(self, sizes: Sizes) -> nn.Module:
        """Adapters of this rank, freshly drawn, around the frozen weights."""
        return self.build_on(sizes, torch.get_default_device().type)

    def build_on(self, sizes: Sizes, device: str) -> nn.Module:
        module = self.frozen.copy(device)
        self._adapt(module, sizes[RANK])
        self._leave_out(module, sizes)
        merged: set[str] = set()
        if self.settings.merge:
            merged = {path + _MERGED for path in _adapted_paths(module)}
        for name in merged:
            part = module.get_submodule(name.rpartition(".")[0])
            part.weight = nn.Parameter(part.weight.detach())
        return self.frozen.freeze(module, lambda n: n.endswith((DOWN, UP)) or n in merged)

    def load(self) -> Params:
        """Parameters with the saved adapter's values."""
        assert self.settings.adapter is not None
        params = parameters_of(self.build_on({RANK: self.settings.rank}, "cpu"))
        asked = (self.settings.rank, self.settings.alpha)
        values = read_adapter(self.settings.adapter, *asked)
        missing = {n for n in params if n.endswith((DOWN, UP))} - values.keys()
        other = {n for n in values if n not in params or params[n].shape != values[n].shape}
        if wrong := sorted(missing | other):
            raise ModelError(
                f"the adapter in {self.settings.adapter} and this model differ in {wrong[0]!r} and "
                f"{len(wrong) - 1} more; was it made for other model.targets?"
            )
        return params | {name: value.to(params[name].dtype) for name, value in values.items()}

    def save(self, module: nn.Module, folder: str) -> None:
        """The merged model, as `AutoModel` loads it, and the adapter beside it, as peft does."""
        import peft

        trained = parameters_of(module)
        whole = self.frozen.whole()
        heads = sorted(
            {name.removeprefix("model.").rpartition(".")[0] for name in self.frozen.head}
        )
        rank = next(len(value) for name, value in trained.items() if name.endswith(DOWN))
        config = self._config(rank)
        config.modules_to_save = heads or None
        source = self.family.source
        config.base_model_name_or_path = None if source is None else str(source)
        with warnings.catch_warnings():  # peft reads an attribute that transformers has renamed
            warnings.simplefilter("ignore")
            adapted = peft.get_peft_model(whole.model, config)
        own = {n: value for n, value in trained.items() if not n.endswith(_MERGED)}
        with torch.no_grad():
            for name in trained.keys() - own.keys():
                adapted.base_model.model.get_parameter(name.removeprefix("model.")).copy_(
                    trained[name]
                )
        values = {peft_name(name): value for name, value in own.items()}
        peft.set_peft_model_state_dict(adapted, values)
        if not self.settings.merge:  # else the adapter would be nothing without the merged weights
            # Not "auto", which asks the hub for a base model of this name.
            adapted.save_pretrained(str(Path(folder) / "adapter"), save_embedding_layers=False)
        whole.model = adapted.merge_and_unload()
        self.family.save(whole, folder)

    def _pair(self, path: str, scale: float) -> LowRank:
        pair = LowRank(path + DOWN, path + UP, scale)
        if not self.settings.merge:
            return pair
        turned = type(self.frozen.on_meta.get_submodule(path)).__name__ == "Conv1D"
        return pair._replace(merged=path + _MERGED, turned=turned)

    def _ties(self, name: str, value: Tensor) -> tuple[Tie | None, ...]:
        if name.endswith(DOWN):
            return (Tie(RANK, (1,)), None)
        if name.endswith(UP):
            return (None, Tie(RANK, (1,)))
        rows = Tie("classes", (1,)) if name in self.frozen.outputs else None
        return (rows, *[None] * (value.dim() - 1))

    @cached_property
    def _depths(self) -> dict[str, Depth]:
        """The blocks that are adapted, one axis a tower; none where blocks are not counted.

        They are counted from the adapted one next to the output to the one furthest from it.
        """
        with torch.device("meta"):
            module = self.family.build({})
            self._adapt(module, 1)
        paths, found = _adapted_paths(module), {}
        for axis, depth in self.frozen.blocks.items():
            numbers = [place[1] for path in paths if (place := depth.locate(path))]
            if numbers:
                num_blocks = max(numbers) - min(numbers) + 1
                found[axis] = replace(depth, blocks=num_blocks, last=max(numbers))
        return found

    def _leave_out(self, module: nn.Module, sizes: Sizes) -> None:
        """Take back the adapters of the blocks that are furthest from the output."""
        from peft.tuners.lora import LoraLayer

        for path, part in list(module.named_modules()):
            if isinstance(part, LoraLayer) and any(
                place[1] >= sizes.get(axis, depth.blocks)
                for axis, depth in self._depths.items()
                if (place := depth.locate(path))
            ):
                module.set_submodule(path, part.get_base_layer())

    def _adapt(self, module: nn.Module, rank: int) -> None:
        import peft
        from peft.tuners.lora import Linear, LoraLayer

        # A weight in two places (embedding and output) cannot be merged for one of them.
        uses = Counter(id(p) for _, p in module.named_parameters(remove_duplicate=False))
        try:
            with warnings.catch_warnings():  # of what is refused below
                warnings.filterwarnings("ignore", module="peft")
                peft.inject_adapter_in_model(self._config(rank), module.model)
            for path, part in module.named_modules():
                if isinstance(part, LoraLayer) and not isinstance(part, Linear):
                    raise ValueError(f"{path!r} is no linear module")
                if isinstance(part, Linear) and uses[id(part.get_base_layer().weight)] > 1:
                    raise ValueError(f"{path!r} shares its weight with another module")
        except (ValueError, re.error) as error:
            raise ConfigError(
                f"model.targets {self.settings.targets}: {error}. Name linear modules of "
                f"{self.settings.config}, for instance {', '.join(self._linear_names()[:8])}"
            ) from error

    def _config(self, rank: int) -> Any:
        import peft
        from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as KNOWN

        targets: Any = list(self.settings.targets)
        if len(targets) == 1 and re.search(r"[^\w.]", targets[0]):
            targets = targets[0]  # a pattern
        elif not targets:
            targets = KNOWN.get(self.family.config.model_type) or self._queries_and_values()
        return peft.LoraConfig(
            r=rank,
            lora_alpha=self.settings.alpha * rank / self.settings.rank,
            target_modules=targets,
            exclude_modules=self._excluded() or None,
            # GPT-2's Conv1D keeps [in, out]; peft warns where it finds that out by itself
            fan_in_fan_out=any(type(m).__name__ == "Conv1D" for m in self.frozen.on_meta.modules()),
            bias="none",
        )

    def _excluded(self) -> list[str]:
        """Paths of a classifier's outputs: trained whole, or left alone unless named."""
        explicit = self.settings.targets and not self.settings.train_head
        names = frozenset() if explicit else self.frozen.outputs
        return sorted({name.removeprefix("model.").rpartition(".")[0] for name in names})

    def _queries_and_values(self) -> list[str] | str:
        """Of both towers, where there are two; else all linear modules."""
        found = [name for name in self._linear_names() if name in ("q_proj", "v_proj")]
        return found if self.family.texts is not None and found else "all-linear"

    def _linear_names(self) -> list[str]:
        kinds, parts = ("Linear", "Conv1D"), self.frozen.on_meta.named_modules()
        return sorted({n.rpartition(".")[2] for n, m in parts if type(m).__name__ in kinds})


def _adapted_paths(module: nn.Module) -> list[str]:
    """Paths of the modules that have adapters."""
    names = (name for name, _ in module.named_parameters())
    return [name.removesuffix(DOWN) for name in names if name.endswith(DOWN)]
