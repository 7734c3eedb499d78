"""What training a sub-model costs a client, counted on the `meta` device: no memory, no time."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from tesserafl.core import seeds
from tesserafl.core.fit import CrossEntropy, Training
from tesserafl.core.model import Model
from tesserafl.core.submodel import SubModel
from tesserafl.models.compact import CompactEmbedding, CompactLinear
from tesserafl.models.scaling import forward_of


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Of one client's training step on a batch."""

    num_entries: int
    """Parameters that the client holds."""
    num_trained: int
    """Those of them that it trains."""
    bytes_each_way: int
    """Bytes of these parameters, down and up alike."""
    flops_per_example: float
    """Forward and backward, multiply and add counted as two."""
    activation_bytes: int
    """What autograd keeps for the backward pass of one batch."""
    peak_bytes: int
    """Predicted peak of training: received and trained parameters, gradients (once more each where
    they are clipped and where weights decay), the optimiser's buffers, activations, and what the
    model has beside its parameters: the frozen weights under adapters, and once in float32
    the largest matrix of those that are kept in fewer bytes."""
    forward_flops_per_example: float = 0.0
    """Of the forward pass alone, which is all that reference parameters are used for."""


def costs_of(
    model: Model,
    submodel: SubModel,
    training: Training,
    inputs: Tensor,
    labels: Tensor,
    trainable: frozenset[str] | None = None,
) -> Costs:
    """Count a step of `training` on a batch like `inputs` [batch, ...] and `labels`.

    Args:
        model: whose sub-model is trained.
        submodel: what the client holds.
        training: its optimiser and batches.
        inputs: of one batch.
        labels: of the batch.
        trainable: names that are trained; None: all. In front of the first of them nothing is
            kept for a backward pass.

    Matrix products and convolutions are counted; element-wise work is not. A model whose code
    looks at values, which tensors on `meta` do not have, is run once on the processor instead.
    """
    try:
        return _count(model, submodel, training, inputs, labels, trainable, "meta")
    except (RuntimeError, NotImplementedError):
        return _count(model, submodel, training, inputs, labels, trainable, "cpu")


def frozen_entries(model: Model) -> int:
    """Numbers of the frozen model under adapters; 0 where everything is a parameter."""
    module = model.module(device="meta")
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    statistics = {id(buffer) for norm in norms for buffer in norm.buffers()}
    compact = _compact(module)
    entries = {_place(part.values): math.prod(part.layout.shape) for part in compact}
    others = {_place(part.scales) for part in compact if part.scales is not None}
    for buffer in module.buffers():
        counts = buffer.is_floating_point() and id(buffer) not in statistics
        if counts and _place(buffer) not in others:
            entries.setdefault(_place(buffer), buffer.numel())
    return sum(entries.values())


def _compact(module: nn.Module) -> list[CompactLinear | CompactEmbedding]:
    kinds = CompactLinear | CompactEmbedding
    return [part for part in module.modules() if isinstance(part, kinds)]


def _place(tensor: Tensor) -> int:
    """The same for tensors that share memory."""
    place: int = tensor.untyped_storage()._cdata
    return place


def _count(
    model: Model,
    submodel: SubModel,
    training: Training,
    inputs: Tensor,
    labels: Tensor,
    trainable: frozenset[str] | None,
    device: str,
) -> Costs:
    with seeds.seeded(0, "costs"):
        return _counted(model, submodel, training, inputs.to(device), labels.to(device), trainable)


def _counted(
    model: Model,
    submodel: SubModel,
    training: Training,
    inputs: Tensor,
    labels: Tensor,
    trainable: frozenset[str] | None,
) -> Costs:
    module = model.module(submodel.sizes, device=str(inputs.device)).train()
    forward = forward_of(model, submodel, module, "none")
    params = {
        name: torch.zeros(view.shape, device=inputs.device) for name, view in submodel.views.items()
    }
    trained = [t for name, t in params.items() if trainable is None or name in trainable]
    for tensor in trained:
        tensor.requires_grad_()
    frozen = {_place(buffer): buffer for buffer in module.buffers()}
    own = {_place(tensor) for tensor in params.values()} | frozen.keys()
    kept: dict[int, int] = {}
    alive: list[Tensor] = []  # a storage that died would hand its id to the next one

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with (
        FlopCounterMode(display=False) as counter,
        torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
    ):
        loss = CrossEntropy()(forward, params, inputs, labels, {})
        forward_flops = counter.get_total_flops()
        torch.autograd.grad(loss, trained, materialize_grads=True)
    parameter_bytes = sum(tensor.numel() * tensor.element_size() for tensor in params.values())
    trained_bytes = sum(tensor.numel() * tensor.element_size() for tensor in trained)
    frozen_bytes = sum(buffer.numel() * buffer.element_size() for buffer in frozen.values())
    restored = [
        torch.float32.itemsize * math.prod(part.layout.shape)
        for part in _compact(module)
        if isinstance(part, CompactLinear)  # of an embedding only the rows that are asked for
    ]
    activations = sum(kept.values())
    buffers = {"adamw": 2, "sgd": 1 if training.momentum else 0}[training.optimiser]
    copies = (training.clip_norm is not None) + (
        training.optimiser == "sgd" and training.weight_decay > 0
    )
    return Costs(
        num_entries=submodel.num_entries,
        num_trained=sum(tensor.numel() for tensor in trained),
        bytes_each_way=parameter_bytes,
        flops_per_example=counter.get_total_flops() / len(inputs),
        forward_flops_per_example=forward_flops / len(inputs),
        activation_bytes=activations,
        peak_bytes=parameter_bytes
        + trained_bytes * (2 + buffers + copies)
        + activations
        + frozen_bytes
        + max(restored, default=0),
    )
