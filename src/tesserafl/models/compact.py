"""Frozen weights in fewer bytes; computation is in float32.

A linear layer or an embedding keeps its weight in bfloat16, or a linear layer in 8 or 4 bits as the
bitsandbytes library makes them:

    int8    one scale for every output: Dettmers et al., "LLM.int8(): 8-bit Matrix Multiplication
            for Transformers at Scale", NeurIPS 2022, Section 2 (its outlier columns are for
            activations in 8 bits, which these are not)
    nf4     4-bit NormalFloat, one scale for every 64 entries: Dettmers et al., "QLoRA: Efficient
            Finetuning of Quantized LLMs", NeurIPS 2023, Section 3 (its scales stay in float32)

Every use makes the float32 weight anew, in the forward and in the backward pass, and in the same
memory: that of the largest. New memory for each would lie in pieces between what autograd keeps,
and add up to more than the float32 model. Weights are stored on the processor, so that all devices
hold the same bits.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Set
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from tesserafl.core.errors import ConfigError

Base = Literal["float32", "bfloat16", "int8", "nf4"]
"""How frozen weights are kept."""

_BLOCK = 64
"""Entries with one scale, nf4."""
_SLAB = 1 << 16
"""Entries that are restored at a time where memory is given for them."""


def need_bitsandbytes() -> None:
    """Raise ConfigError unless the library is installed."""
    # It warns of kernels that are not used here.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            "model.base int8 and nf4 need the library bitsandbytes: pip install "
            "'tesserafl[quantised]', or choose bfloat16"
        ) from error


@dataclass(frozen=True, kw_only=True)
class Layout:
    """What a stored weight's bytes mean."""

    base: Base
    shape: tuple[int, ...]
    """Of the weight."""
    turned: bool = False
    """Whether the weight is [in, out], as GPT-2's; else [out, in]."""


class Stored(NamedTuple):
    """A weight in fewer bytes."""

    layout: Layout
    values: Tensor
    """bfloat16 [out, in], int8 [out, in], or two entries in a byte."""
    scales: Tensor | None


def store(weight: Tensor, base: Base, *, turned: bool = False) -> Stored:
    """A weight in fewer bytes.

    Args:
        weight: [out, in].
        base: how it is kept; not float32.
        turned: it is [in, out].
    """
    layout = Layout(base=base, shape=tuple(weight.shape), turned=turned)
    matrix = weight.detach().T.contiguous() if turned else weight.detach()
    if base == "bfloat16":
        return Stored(layout, matrix.to(torch.bfloat16), None)
    if base == "int8":
        values, scales, _ = torch.ops.bitsandbytes.int8_vectorwise_quant(matrix, 0.0)
        return Stored(layout, values, scales)
    # Rows of one block: with others the library's code for processors mixes up the scales (0.50).
    flat = matrix.reshape(-1)
    blocks = functional.pad(flat, (0, -len(flat) % _BLOCK)).view(-1, _BLOCK)
    values, scales = torch.ops.bitsandbytes.quantize_4bit(blocks, _BLOCK, base, torch.uint8)
    return Stored(layout, values.view(-1, _BLOCK // 2), scales)


def restore(
    layout: Layout, values: Tensor, scales: Tensor | None, scratch: Tensor | None = None
) -> Tensor:
    """A stored weight in float32.

    Args:
        layout: what the bytes mean.
        values: as stored.
        scales: as stored.
        scratch: memory to write it to; None: new memory.

    Raises:
        ConfigError: the library has no code for the device.
    """
    rows = layout.shape[::-1] if layout.turned else layout.shape
    if scratch is None or scratch.device != values.device:
        flat = values.float() if scales is None else _dequantised(layout.base, values, scales)
    elif scales is None:
        flat = scratch[: values.numel()].copy_(values.view(-1))
    else:
        width = rows[1] if layout.base == "int8" else _BLOCK
        flat, step = scratch[: len(scales) * width], max(1, _SLAB // width)
        parts = (torch.split(t, step) for t in (values, scales, flat.view(-1, width)))
        for some, their, place in zip(*parts, strict=True):
            place.copy_(_dequantised(layout.base, some, their))
    matrix = flat.reshape(-1)[: math.prod(rows)].view(rows)
    return matrix.T if layout.turned else matrix


def _dequantised(base: Base, values: Tensor, scales: Tensor) -> Tensor:
    """[scales, entries of one]"""
    kernels = torch.ops.bitsandbytes
    try:
        if base == "int8":
            found: Tensor = kernels.int8_vectorwise_dequant(values, scales)
        else:
            shape = (len(scales), _BLOCK)
            found = kernels.dequantize_4bit(values, scales, _BLOCK, base, shape, torch.float32)
        return found
    except NotImplementedError as error:
        raise ConfigError(
            f"model.base {base}: bitsandbytes has no code for {values.device.type!r}; choose "
            f"bfloat16"
        ) from error


def compact(module: nn.Module, base: Base, exempt: Set[str]) -> dict[int, Stored]:
    """The weights of a module that are kept in fewer bytes, by the identity of the parameter.

    Plain linear layers and embeddings are; norms, biases, convolutions and layers with an exempt
    parameter stay as they are. Embeddings, what shares a weight with them and the output to a
    vocabulary are in bfloat16 where the others are in int8 or nf4. What is on a device loses its
    float32 values: each parameter becomes one zero of its shape.

    Args:
        module: frozen.
        base: how weights are kept.
        exempt: names of parameters.
    """
    if base == "float32":
        return {}
    if base != "bfloat16":
        need_bitsandbytes()
    parts = [part for path, part in module.named_modules() if _is_plain(path, part, exempt)]
    uses = Counter(id(p) for _, p in module.named_parameters(remove_duplicate=False))
    plain = Counter(id(part.weight) for part in parts)
    inner: Any = getattr(module, "model", None)
    to_words = inner.get_output_embeddings() if hasattr(inner, "get_output_embeddings") else None
    found: dict[int, Stored] = {}
    for part in parts:
        weight, turned = part.weight, _is_turned(part)
        if uses[id(weight)] == plain[id(weight)] and id(weight) not in found:
            fine = isinstance(part, nn.Embedding) or part is to_words or uses[id(weight)] > 1
            found[id(weight)] = store(weight, "bfloat16" if fine else base, turned=turned)
    for part in parts:
        if id(part.weight) in found and not part.weight.is_meta:
            part.weight.data = part.weight.data.new_zeros(()).expand(part.weight.shape)
    return found


def scratch_for(module: nn.Module, stored: dict[int, Stored]) -> Tensor:
    """Memory for the float32 weight of any one linear layer; one thread may compute with it."""
    sizes = [0]
    for part in module.modules():
        found = stored.get(id(part._parameters.get("weight")))
        if found is not None and not isinstance(part, nn.Embedding):
            nf4 = found.scales is not None and found.layout.base == "nf4"
            sizes.append(2 * found.values.numel() if nf4 else found.values.numel())
    return torch.empty(max(sizes))


def put(part: Any, stored: Stored, scratch: Tensor | None) -> None:
    """Let a layer compute with its stored weight; hooks and what else hangs on it stay.

    Args:
        part: the layer.
        stored: its weight.
        scratch: memory that layers share; None: there are no values.
    """
    kind = CompactEmbedding if isinstance(part, nn.Embedding) else CompactLinear
    del part._parameters["weight"]
    part.__class__ = kind
    part.layout = stored.layout
    part.register_buffer("values", stored.values)
    part.register_buffer("scales", stored.scales)
    part.scratch = scratch


class CompactEmbedding(nn.Module):
    """An embedding with a stored table."""

    layout: Layout
    values: Tensor
    scales: Tensor | None

    @property
    def weight(self) -> Tensor:
        """In float32."""
        return restore(self.layout, self.values, self.scales)

    def forward(self, ids: Tensor) -> Tensor:
        """[..., width] of ids [...]."""
        return functional.embedding(ids, self.values).float()


class CompactLinear(nn.Module):
    """A linear layer with a stored weight."""

    layout: Layout
    values: Tensor
    scales: Tensor | None
    bias: Tensor | None
    scratch: Tensor | None

    @property
    def weight(self) -> Tensor:
        """In float32."""
        return restore(self.layout, self.values, self.scales)

    def forward(self, inputs: Tensor) -> Tensor:
        """[..., out] of inputs [..., in]."""
        given = (inputs, self.layout, self.values, self.scales)
        # torch.func cannot trace functions with a backward pass of their own.
        traced = torch._C._are_functorch_transforms_active()
        apply: Any = _Product.apply
        out: Tensor = _product(*given, None) if traced else apply(*given, self.scratch)
        return out if self.bias is None else out + self.bias


class _Product(torch.autograd.Function):
    """`_product`, of which the stored weight alone is kept for the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        inputs: Tensor,
        layout: Layout,
        values: Tensor,
        scales: Tensor | None,
        scratch: Tensor | None,
    ) -> Tensor:
        ctx.layout, ctx.scratch = layout, scratch
        ctx.save_for_backward(values, scales)
        return _product(inputs, layout, values, scales, scratch)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None, None, None, None]:
        values, scales = ctx.saved_tensors
        weight = restore(ctx.layout, values, scales, ctx.scratch)
        return slope @ (weight.T if ctx.layout.turned else weight), None, None, None, None


def _product(
    inputs: Tensor,
    layout: Layout,
    values: Tensor,
    scales: Tensor | None,
    scratch: Tensor | None,
) -> Tensor:
    """[..., out] of inputs [..., in]."""
    weight = restore(layout, values, scales, scratch)
    return inputs @ (weight if layout.turned else weight.T)


def _is_plain(path: str, part: nn.Module, exempt: Set[str]) -> bool:
    """Whether a layer does nothing but what its weight and bias say."""
    if any(f"{path}.{key}" in exempt for key in part._parameters):
        return False
    if type(part) is nn.Embedding:
        return part.max_norm is None
    return type(part) is nn.Linear or _is_turned(part)


def _is_turned(part: nn.Module) -> bool:
    return type(part).__name__ == "Conv1D"  # of transformers, for GPT-2
