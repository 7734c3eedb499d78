"""A family's weights, frozen, and what adapters of every kind do with them.

A module with adapters has the frozen module's structure around the same tensors, as buffers: one
copy in this process, never sent, never averaged. Beside the adapters a classifier's outputs may be
trained, and whatever is in no file, since frozen as drawn it is noise.
"""

from __future__ import annotations

import contextlib
import copy
import re
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tesserafl.core import seeds
from tesserafl.core.axes import depth_of
from tesserafl.core.axis import Depth, Tie, Width
from tesserafl.core.errors import ModelError
from tesserafl.core.model import CLASSES, Model, Sizes
from tesserafl.core.modules import parameters_of
from tesserafl.core.params import Params
from tesserafl.models.compact import Base, Stored, compact, put, restore, scratch_for
from tesserafl.models.configs import knobs_of
from tesserafl.models.huggingface import Family

_FILE = "adapter.safetensors"


@dataclass(kw_only=True)
class Frozen:
    """The weights of a family that stay as they are."""

    family: Family
    train_head: bool
    """Whether a classifier's outputs are trained."""
    base: Base = "float32"
    """How the weights are kept."""

    @property
    def module(self) -> Any:
        """The one copy of the frozen weights in this process; never to be written to.

        Weights that are kept in fewer bytes lie beside it (`value_of`).
        """
        return self._loaded[0]

    @property
    def drawn(self) -> frozenset[str]:
        """Names of the parameters that are in no file."""
        return self._loaded[1]

    @cached_property
    def _loaded(self) -> tuple[nn.Module, frozenset[str], dict[int, Stored]]:
        # Both draw what is in no file; that must be the same in every process.
        with torch.device("cpu"), seeds.seeded(0, "frozen"):
            module = self.family.build({})
            loaded, new = self.family.load() if self.family.has_weights else ({}, self.outputs)
        if blocks := sorted(n for n in new - self.outputs if re.search(r"\.\d+\.", n)):
            raise ModelError(
                f"{self.family.source} has no weights for {blocks[0]!r} and {len(blocks) - 1} "
                f"more, and frozen as drawn they are noise: leave sizes out of model.options"
            )
        with torch.no_grad():
            for name, value in module.named_parameters():
                if name in loaded:
                    value.copy_(loaded[name])
        stored = compact(module.requires_grad_(False), self.base, self.outputs | new)
        return module, frozenset(new), stored

    @cached_property
    def _stored_on_meta(self) -> dict[int, Stored]:
        if self.base == "float32":
            return {}  # without a look at the files
        return compact(self.on_meta, self.base, self.outputs | self.drawn)

    @cached_property
    def _scratch(self) -> Tensor:
        with torch.device("cpu"):
            return scratch_for(self.module, self._loaded[2])

    def value_of(self, parameter: Tensor) -> Tensor:
        """What a parameter of a copy holds, in float32."""
        stored = self._loaded[2].get(id(parameter))
        return parameter if stored is None else restore(*stored)

    def whole(self) -> Any:
        """A copy of the frozen module to write to, in float32."""
        values = {key: nn.Parameter(restore(*kept), False) for key, kept in self._loaded[2].items()}
        return copy.deepcopy(self.module, values)

    @cached_property
    def on_meta(self) -> nn.Module:
        """The frozen module's structure."""
        with torch.device("meta"):
            return self.family.build({}).requires_grad_(False)

    @property
    def head(self) -> frozenset[str]:
        """The parameters that are trained beside the adapters: outputs, and what is in no file."""
        if not self.train_head:
            return frozenset()
        return self.outputs | (self.drawn if self.family.has_weights else frozenset())

    @cached_property
    def outputs(self) -> frozenset[str]:
        """Parameters of a classifier's outputs: those that grow with the number of classes."""
        if self.family.spec.task == "causal-lm" or CLASSES not in self.family.rows:
            return frozenset()
        with torch.device("meta"):
            more = self.family.build({CLASSES: self.family.rows[CLASSES] + 1})
        plain = {name: value.shape for name, value in self.on_meta.named_parameters()}
        return frozenset(n for n, value in more.named_parameters() if value.shape != plain[n])

    @cached_property
    def blocks(self) -> dict[str, Depth]:
        """The frozen blocks of every tower, by the axis that counts them."""
        plain = {name: tuple(value.shape) for name, value in self.on_meta.named_parameters()}
        found = {}
        for knob in knobs_of(self.family.config):
            if knob.axis.rpartition(".")[2] != "layers":
                continue
            longer = replace(self.family, knobs={knob.axis: knob})
            with torch.device("meta"):
                doubled = longer.build({knob.axis: 2 * knob.size})
            shapes = {name: tuple(value.shape) for name, value in doubled.named_parameters()}
            with contextlib.suppress(ModelError):  # not one block after another: not counted
                found[knob.axis] = depth_of(knob.axis, knob.size, plain, shapes)
        return found

    def blocks_in(self, module: nn.Module) -> tuple[str, ...]:
        """What the names of the frozen blocks begin with in a module that has them somewhere."""
        prefixes = [prefix for depth in self.blocks.values() for prefix in depth.prefixes]
        paths = [f"{path}." for path, _ in module.named_modules() if path]
        return tuple(path for path in paths for p in prefixes if f".{path}".endswith(f".{p}"))

    def copy(self, device: str) -> Any:
        """The frozen module's structure around its own tensors; on `meta` without any."""
        frozen = self.on_meta if device == "meta" else self.module
        shared = {id(t): t for t in [*frozen.parameters(), *frozen.buffers()]}
        return copy.deepcopy(frozen, shared)

    def freeze(self, module: nn.Module, own: Callable[[str], bool]) -> nn.Module:
        """Make buffers of a copy's parameters, in place, but for its `own` and the head."""
        on_meta = any(value.is_meta for value in module.parameters())
        stored = self._stored_on_meta if on_meta else self._loaded[2]
        redrawn = frozenset() if on_meta else self.head & self.drawn
        for path, part in module.named_modules():
            for key, value in list(part._parameters.items()):
                name = f"{path}.{key}" if path else key
                if value is None or own(name):
                    continue
                if id(value) in stored:
                    put(part, stored[id(value)], None if on_meta else self._scratch)
                elif name in self.head:
                    part._parameters[key] = nn.Parameter(value.detach().clone())
                else:
                    del part._parameters[key]
                    part.register_buffer(key, value.detach())
            if keys := [k for k in part._parameters if (f"{path}.{k}" if path else k) in redrawn]:
                _redraw(part, keys)  # by the run's seed
        return module.requires_grad_(True)

    def save(self, trained: Params, folder: str) -> None:
        """Write the frozen model with these values in place of its own, in the library's format."""
        whole = self.whole()
        with torch.no_grad():
            for name, value in trained.items():
                whole.get_parameter(name).copy_(value)
        self.family.save(whole, folder)

    def feature_size(self) -> int:
        """Entries of the features that heads and gates read."""
        # Not on meta: some models look at values in their forward pass.
        with torch.no_grad(), torch.device("cpu"), seeds.seeded(0, "features"):
            features: Tensor = self.module(self.family.example()).features
        return int(features.shape[-1])

    def widths(self) -> dict[str, Width]:
        """The axes that the data decide: known, never cut."""
        return {
            axis: Width(units=size, quantum=1, size=axis, cuttable=False)
            for axis, size in self.family.rows.items()
        }


def _redraw(part: Any, keys: Sequence[str]) -> None:
    """Draw these parameters of a part anew, as it does itself, and nothing else of it.

    Where it does not say how, as of one parameter among other modules, they stay as they are: drawn
    like all of the frozen module.
    """
    if not hasattr(part, "reset_parameters"):
        return
    # Elsewhere: it draws all that it holds, and what was in the file is shared.
    drawn = copy.deepcopy(part)
    drawn.reset_parameters()
    with torch.no_grad():
        for key in keys:
            part._parameters[key].copy_(drawn._parameters[key])


def whole_model(
    frozen: Frozen,
    build_on: Callable[[str], nn.Module],
    *,
    outputs: Set[str],
    adapter: Path | None,
    save: Callable[[nn.Module, str], None],
) -> Model:
    """A model that is trained whole: nothing of it can be cut.

    Args:
        frozen: the weights beside its parameters.
        build_on: makes a module on a device.
        outputs: parameters with a row for every class.
        adapter: folder to start from.
        save: writes a trained module.
    """

    def build(sizes: Sizes) -> nn.Module:
        return build_on(torch.get_default_device().type)

    def load() -> Params:
        assert adapter is not None
        return read_trained(adapter, parameters_of(build_on("cpu")))

    module = build_on("meta")
    shapes = {name: tuple(value.shape) for name, value in module.named_parameters()}
    return Model(
        build=build,
        sizes=frozen.family.rows,
        widths=frozen.widths(),
        depths={},
        ties={
            name: (Tie(CLASSES, (1,)) if name in outputs else None, *[None] * (len(shape) - 1))
            for name, shape in shapes.items()
        },
        shapes=shapes,
        feature_size=frozen.feature_size,
        frozen_blocks=frozen.blocks_in(module),
        pretrained=None if adapter is None else load,
        save=save,
    )


def write_trained(params: Params, folder: Path) -> None:
    """Write trained parameters into the folder, as `read_trained` takes them."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({n: v.detach().cpu().contiguous() for n, v in params.items()}, folder / _FILE)


def read_trained(folder: Path, params: Params) -> Params:
    """The parameters of a saved adapter, in place of `params`.

    Raises:
        ModelError: there is none, or it is of another shape.
    """
    try:
        values = load_file(folder / _FILE)
    except (OSError, SafetensorError) as error:
        raise ModelError(
            f"model.adapter {folder}: {error}; give the folder model/adapter of an earlier run"
        ) from error
    found = {name: tuple(value.shape) for name, value in values.items()}
    wanted = {name: tuple(value.shape) for name, value in params.items()}
    if found != wanted:
        name = sorted(n for n in found | wanted if found.get(n) != wanted.get(n))[0]
        raise ModelError(
            f"the adapter in {folder} has {name!r} as {list(found.get(name, ())) or 'nothing'}, "
            f"this model as {list(wanted.get(name, ())) or 'nothing'}; was it made with other "
            f"settings, another model or other classes?"
        )
    return {name: values[name].to(params[name].dtype) for name in params}
