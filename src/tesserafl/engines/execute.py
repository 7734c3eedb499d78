"""One client's fit, step after step."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tesserafl.core.fit import HELD_OUT, Fit, Fitted, Forward
from tesserafl.core.metrics import Metrics, measure
from tesserafl.core.params import aligned
from tesserafl.core.stored import Stored
from tesserafl.data.examples import Examples
from tesserafl.engines.batches import augment, augments, held_out_of, in_order, passes
from tesserafl.engines.frozen import frozen_below
from tesserafl.engines.kept import Shelf
from tesserafl.engines.optimisers import Optimiser, check_momentum, trained_names
from tesserafl.engines.references import References
from tesserafl.models.modes import predicting


def execute(
    fit: Fit,
    forward: Forward,
    examples: Examples,
    draw: torch.Generator,
    device: str = "cpu",
    module: nn.Module | None = None,
    *,
    held_out: Tensor | None = None,
    shelf: Shelf | None = None,
) -> Fitted:
    """Train `fit.params` on the examples.

    Args:
        fit: what to train.
        forward: the sub-model as a function of its parameters.
        examples: the client's training examples.
        draw: the order of the examples and the augmentation come from it.
        device: where to train; the result is on the CPU.
        module: what `forward` runs, so that references are read without dropout; None: as it is.
        held_out: which examples are, bool [n], if the fit asks; None: as `held_out_of` draws.
        shelf: what is kept of earlier rounds; None: nothing is.

    Raises:
        ConfigError: momentum is to be carried on, and the optimiser has none.
        ModelError: there are references, and the model returns no features.
    """
    check_momentum(fit)
    trainable = trained_names(fit)
    params = {name: aligned(tensor.to(device)) for name, tensor in fit.params.items()}
    leaves = [params[name].detach().requires_grad_() for name in trainable]
    params.update(zip(trainable, leaves, strict=True))
    training, classes = fit.training, examples.classes
    augmented = augments(training, examples)
    extra = {name: aligned(tensor.to(device)) for name, tensor in fit.extra.items()}
    if training.mask_absent_classes:
        extra["classes"] = classes.to(device)
    if fit.held_out and held_out is None:
        held_out = held_out_of(len(examples), fit.held_out)
    frozen = frozen_below(shelf, fit, forward, module, examples, params)
    references = None
    if fit.references:
        references = References(fit, forward, examples, device, module, shelf, frozen)
    momenta = None
    if fit.momentum is not None:
        momenta = [aligned(fit.momentum[name].to(device)) for name in trainable]
    # Copies that were made for this client alone: what is given lies on the CPU.
    own = isinstance(fit.params, Stored) or torch.device(device).type != "cpu"
    optimiser = Optimiser(training, momenta, own)
    losses: list[Tensor] = []
    sizes: list[int] = []
    steps = 0
    for epoch in passes(len(examples), training, draw):
        losses, sizes = [], []
        for rows in epoch:
            inputs, labels = examples.batch(rows)
            if augmented:
                inputs = augment(inputs, draw)
            inputs = inputs.to(device)
            if references is not None:
                extra |= references.read(rows, inputs)
            if fit.held_out and held_out is not None:
                extra[HELD_OUT] = held_out[rows].to(device)
            run = forward if frozen is None else frozen.at(rows, inputs, params)
            loss = fit.objective(run, params, inputs, labels.to(device), extra)
            # What the loss does not depend on has a gradient of zero, as in a cohort.
            gradients = torch.autograd.grad(loss, leaves, materialize_grads=True)
            leaves = optimiser.step(leaves, gradients)
            del gradients  # before the next ones are made
            params.update(zip(trainable, leaves, strict=True))
            losses.append(loss.detach())
            sizes.append(len(rows))
            steps += 1
    shares = torch.tensor(sizes, dtype=losses[0].dtype, device=device)
    metrics = {"loss": float((torch.stack(losses) * shares).sum()) / sum(sizes)}
    if references is not None:
        metrics["reference_examples"] = float(references.num_examples)
    momentum = None
    if fit.keep_momentum and optimiser.momenta is not None:
        momentum = {n: t.cpu() for n, t in zip(trainable, optimiser.momenta, strict=True)}
    return Fitted(
        params={name: params[name].detach().cpu() for name in trainable},
        num_examples=len(examples),
        num_steps=steps,
        metrics=metrics,
        classes=classes,
        num_reference_examples=0 if references is None else references.num_examples,
        momentum=momentum,
    )


@torch.no_grad()
def measured(
    fit: Fit,
    forward: Forward,
    examples: Examples,
    device: str = "cpu",
    module: nn.Module | None = None,
    shelf: Shelf | None = None,
) -> Metrics:
    """What the parameters to start from reach, without dropout.

    Args:
        fit: as it is trained.
        forward: the sub-model as a function of its parameters.
        examples: the client's validation examples.
        device: where it trains.
        module: what `forward` runs; None: its mode does not matter.
        shelf: what is kept of earlier rounds; None: nothing is.
    """
    params = {name: aligned(tensor.to(device)) for name, tensor in fit.params.items()}
    frozen = frozen_below(shelf, fit, forward, module, examples, params, "validation")
    total = Metrics()
    with predicting(module):
        for rows in in_order(len(examples), fit.training.batch_size):
            inputs, labels = examples.batch(rows)
            inputs = inputs.to(device)
            run = forward if frozen is None else frozen.at(rows, inputs, params)
            total += measure(run(params, inputs).logits, labels.to(device))
    return total
