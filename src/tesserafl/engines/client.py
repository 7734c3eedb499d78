"""What happens on a client: the method's two client hooks around one executed Fit."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from tesserafl.core import seeds
from tesserafl.core.fit import Fit, Fitted, Forward, Training
from tesserafl.core.messages import Memory, Task, Update
from tesserafl.core.method import Method
from tesserafl.core.model import Model
from tesserafl.core.params import Params, subtract
from tesserafl.data.examples import Examples
from tesserafl.models.scaling import forward_of, own_scales


@dataclass(kw_only=True)
class ClientWorker:
    """Does clients' work in this process; keeps a built module per sub-model shape."""

    model: Model
    method: Method
    examples: Callable[[int], Examples]
    """Training examples of a client."""
    seed: int
    device: str = "cpu"
    _modules: dict[tuple[tuple[str, int], ...], nn.Module] = field(default_factory=dict)

    def work(self, task: Task, memory: Memory) -> tuple[Update, Memory]:
        """Run one task; the same task gives the same bits in every process."""
        fit = self.method.local(self.model, task, memory)
        module = self._module(task)
        forward = forward_of(self.model, task.submodel, module, fit.width_scaling)
        scales: dict[str, float] = {}
        if fit.width_scaling == "parameters":
            scales = own_scales(self.model, task.submodel, module)
            unscaled, fit = fit, replace(fit, params=_scaled(fit.params, scales))
        key = (self.seed, task.round, task.client.id)
        examples = self.examples(task.client.id)
        with seeds.seeded(*key, "fit"):  # dropout draws from torch's own generator
            fitted = execute(fit, forward, examples, seeds.generator(*key, "batches"), self.device)
        if scales:
            # By the change, so that what training left alone is left alone to the bit.
            change = _scaled(
                subtract(fitted.params, fit.params), {n: 1.0 / s for n, s in scales.items()}
            )
            params = {name: unscaled.params[name] + change[name] for name in change}
            fitted = replace(fitted, params=params)
        return self.method.report(self.model, task, fitted, memory)

    def _module(self, task: Task) -> nn.Module:
        key = tuple(sorted(task.submodel.sizes.items()))
        if key not in self._modules:
            with seeds.seeded(0, "module"):  # its own weights are never used
                module = self.model.module(task.submodel.sizes)
            self._modules[key] = module.to(self.device).train()
        return self._modules[key]


def _scaled(params: Params, scales: Mapping[str, float]) -> Params:
    return {name: t * scales[name] if name in scales else t for name, t in params.items()}


def execute(
    fit: Fit, forward: Forward, examples: Examples, draw: torch.Generator, device: str = "cpu"
) -> Fitted:
    """Train `fit.params` on the examples.

    Args:
        fit: what to train.
        forward: the sub-model as a function of its parameters.
        examples: the client's training examples.
        draw: the order of the examples and the augmentation come from it.
        device: where to train; the result is on the CPU.
    """
    trainable = [name for name in fit.params if fit.trainable is None or name in fit.trainable]
    params = {name: tensor.to(device) for name, tensor in fit.params.items()}
    for name in trainable:
        params[name] = params[name].detach().clone().requires_grad_()
    leaves = [params[name] for name in trainable]
    training, classes = fit.training, examples.classes()
    extra = {name: tensor.to(device) for name, tensor in fit.extra.items()}
    if training.mask_absent_classes:
        extra["classes"] = classes.to(device)
    optimiser = _optimiser(training, leaves)
    losses: list[Tensor] = []
    steps = 0
    for _ in range(training.epochs):
        losses = []
        for rows in _batches(len(examples), training.batch_size, draw):
            inputs, labels = examples.batch(rows)
            if training.augment and inputs.dim() == 4:
                inputs = _augment(inputs, draw)
            loss = fit.objective(forward, params, inputs.to(device), labels.to(device), extra)
            for leaf, gradient in zip(leaves, torch.autograd.grad(loss, leaves), strict=True):
                leaf.grad = gradient
            if training.clip_norm is not None:
                nn.utils.clip_grad_norm_(leaves, training.clip_norm)
            optimiser.step()
            losses.append(loss.detach() * len(rows))
            steps += 1
    mean = float(torch.stack(losses).sum()) / len(examples)
    return Fitted(
        params={name: params[name].detach().cpu() for name in trainable},
        num_examples=len(examples),
        num_steps=steps,
        metrics={"loss": mean},
        classes=classes,
    )


def _optimiser(training: Training, leaves: list[Tensor]) -> torch.optim.Optimizer:
    if training.optimiser == "adamw":
        return torch.optim.AdamW(leaves, lr=training.lr, weight_decay=training.weight_decay)
    return torch.optim.SGD(
        leaves,
        lr=training.lr,
        momentum=training.momentum,
        weight_decay=training.weight_decay,
    )


def _batches(total: int, size: int, draw: torch.Generator) -> Iterator[Tensor]:
    batches = list(torch.split(torch.randperm(total, generator=draw), size))
    if len(batches) > 1 and len(batches[-1]) == 1:
        # One example alone has no batch statistics: it joins the batch before it.
        batches[-2:] = [torch.cat(batches[-2:])]
    yield from batches


def _augment(images: Tensor, draw: torch.Generator) -> Tensor:
    """Flip with probability 1/2 and shift by up to 4 pixels (He et al., CVPR 2016, 4.2)."""
    batch, _, height, width = images.shape
    flip = torch.rand(batch, generator=draw) < 0.5
    images = torch.where(flip[:, None, None, None], images.flip(3), images)
    padded = nn.functional.pad(images, (4, 4, 4, 4))
    top, left = torch.randint(0, 9, (2, batch), generator=draw)
    rows = top[:, None] + torch.arange(height)  # [batch, height]
    columns = left[:, None] + torch.arange(width)  # [batch, width]
    position = torch.arange(batch)[:, None, None]
    return padded.permute(0, 2, 3, 1)[position, rows[:, :, None], columns[:, None, :]].permute(
        0, 3, 1, 2
    )


@contextlib.contextmanager
def threads(number: int) -> Iterator[None]:
    """Torch computes with this many threads inside the block; bits depend on it.

    On a GPU, convolutions and matrix products take kernels that repeat their bits.
    """
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
