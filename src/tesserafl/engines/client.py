"""What happens on a client: the method's two client hooks around one executed Fit."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from tesserafl.core import seeds
from tesserafl.core.errors import TesseraError
from tesserafl.core.fit import Fit, Fitted, Forward
from tesserafl.core.messages import Memory, Task, Update
from tesserafl.core.method import Method
from tesserafl.core.model import Model
from tesserafl.core.params import Params, aligned, subtract
from tesserafl.data.examples import Examples
from tesserafl.engines.batches import augment, augments, batches
from tesserafl.engines.cohort import Cohorts, Member
from tesserafl.engines.optimisers import Optimiser, check_momentum, trained_names
from tesserafl.engines.references import References
from tesserafl.models.scaling import forward_of, hollow, own_scales

Answer = tuple[Update, Memory]


@dataclass(kw_only=True)
class ClientWorker:
    """Does clients' work in this process; keeps a built module per sub-model shape.

    Under `width_scaling="parameters"` parameters and references are scaled before training, and the
    change of the parameters is scaled back. Momentum buffers are left in the scaled space on both
    ends, since the next round's steps are made there too.
    """

    model: Model
    method: Method
    examples: Callable[[int], Examples]
    """Training examples of a client."""
    seed: int
    device: str = "cpu"
    cohorts: Cohorts | None = None
    """Trains clients of one shape together; None: one after another."""
    _modules: dict[object, nn.Module] = field(default_factory=dict)
    _forwards: dict[object, Forward] = field(default_factory=dict)

    @property
    def group(self) -> int:
        """Clients of one shape that are trained together, at most."""
        return 1 if self.cohorts is None else self.cohorts.most

    def work(self, task: Task, memory: Memory) -> Answer:
        """Run one task; the same task gives the same bits in every process.

        Raises:
            TesseraError: the client cannot do it.
        """
        (answer,) = self.work_together([(task, memory)])
        if isinstance(answer, TesseraError):
            raise answer
        return answer

    def work_together(self, asked: Sequence[tuple[Task, Memory]]) -> list[Answer | TesseraError]:
        """Run tasks of one shape, each with what its client remembers; answers in their order.

        The same tasks together give the same bits in every process. A task that its client cannot
        do is answered by the error; the others are done.
        """
        answers: dict[int, Answer | TesseraError] = {}
        parts: dict[object, list[tuple[int, _Part]]] = {}
        for position, (task, memory) in enumerate(asked):
            try:
                part = self._part(task, memory)
                together = None if self.cohorts is None else part.member.shape
            except TesseraError as error:
                answers[position] = error
                continue
            parts.setdefault(position if together is None else together, []).append(
                (position, part)
            )
        for group in parts.values():
            try:
                fitted = self._train([part for _, part in group])
            except TesseraError as error:  # of the group, as far as anybody can tell
                answers |= {position: error for position, _ in group}
                continue
            for (position, part), result in zip(group, fitted, strict=True):
                try:
                    answers[position] = self._answer(part, result)
                except TesseraError as error:
                    answers[position] = error
        return [answers[position] for position in range(len(asked))]

    def _part(self, task: Task, memory: Memory) -> _Part:
        fit = self.method.local(self.model, task, memory)
        scales: Mapping[str, float] = {}
        if fit.width_scaling == "parameters":
            scales = own_scales(self.model, task.submodel, self._module(task))
        draw = seeds.generator(self.seed, task.round, task.client.id, "batches")
        scaled = fit
        if scales:
            references = {name: _scaled(params, scales) for name, params in fit.references.items()}
            scaled = replace(fit, params=_scaled(fit.params, scales), references=references)
        member = Member(fit=scaled, examples=self.examples(task.client.id), draw=draw)
        return _Part(task=task, memory=memory, member=member, unscaled=fit.params, scales=scales)

    def _train(self, parts: Sequence[_Part]) -> list[Fitted]:
        task, scaling = parts[0].task, parts[0].member.fit.width_scaling
        key = (task.submodel.shape, scaling)
        if key not in self._forwards:
            module = self._module(task)
            self._forwards[key] = forward_of(self.model, task.submodel, module, scaling)
        forward = self._forwards[key]
        if self.cohorts is not None and len(parts) > 1:
            return self.cohorts.train([part.member for part in parts], forward, key)
        fitted = []
        for part in parts:
            member, task, module = part.member, part.task, self._module(part.task)
            # Dropout draws from torch's own generator.
            with seeds.seeded(self.seed, task.round, task.client.id, "fit"):
                fitted.append(
                    execute(member.fit, forward, member.examples, member.draw, self.device, module)
                )
        return fitted

    def _answer(self, part: _Part, fitted: Fitted) -> Answer:
        if part.scales:
            # By the change, so that what training left alone is left alone to the bit.
            back = {name: 1.0 / scale for name, scale in part.scales.items()}
            change = _scaled(subtract(fitted.params, part.member.fit.params), back)
            params = {name: part.unscaled[name] + change[name] for name in change}
            fitted = replace(fitted, params=params)
        return self.method.report(self.model, part.task, fitted, part.memory)

    def _module(self, task: Task) -> nn.Module:
        key = task.submodel.shape
        if key not in self._modules:
            with seeds.seeded(0, "module"):  # its own weights are never used
                module = self.model.module(task.submodel.sizes)
            self._modules[key] = hollow(module.to(self.device)).train()
        return self._modules[key]


@dataclass(frozen=True, kw_only=True)
class _Part:
    """One task, ready to be trained."""

    task: Task
    memory: Memory
    member: Member
    unscaled: Params
    """The parameters as they were sent."""
    scales: Mapping[str, float]
    """What they were multiplied by."""


def _scaled(params: Params, scales: Mapping[str, float]) -> Params:
    return {name: t * scales[name] if name in scales else t for name, t in params.items()}


def execute(
    fit: Fit,
    forward: Forward,
    examples: Examples,
    draw: torch.Generator,
    device: str = "cpu",
    module: nn.Module | None = None,
) -> Fitted:
    """Train `fit.params` on the examples.

    Args:
        fit: what to train.
        forward: the sub-model as a function of its parameters.
        examples: the client's training examples.
        draw: the order of the examples and the augmentation come from it.
        device: where to train; the result is on the CPU.
        module: what `forward` runs, so that references are read without dropout; None: as it is.

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
    references = References(fit, forward, examples, device, module) if fit.references else None
    momenta = None
    if fit.momentum is not None:
        momenta = [aligned(fit.momentum[name].to(device)) for name in trainable]
    optimiser = Optimiser(training, momenta)
    losses: list[Tensor] = []
    sizes: list[int] = []
    steps = 0
    for _ in range(training.epochs):
        losses, sizes = [], []
        for rows in batches(len(examples), training.batch_size, draw):
            inputs, labels = examples.batch(rows)
            if augmented:
                inputs = augment(inputs, draw)
            inputs = inputs.to(device)
            if references is not None:
                extra |= references.features(rows, inputs)
            loss = fit.objective(forward, params, inputs, labels.to(device), extra)
            # What the loss does not depend on has a gradient of zero, as in a cohort.
            gradients = torch.autograd.grad(loss, leaves, materialize_grads=True)
            leaves = optimiser.step(leaves, gradients)
            del gradients  # before the next ones are made
            params.update(zip(trainable, leaves, strict=True))
            losses.append(loss.detach())
            sizes.append(len(rows))
            steps += 1
    shares = torch.tensor(sizes, dtype=losses[0].dtype, device=device)
    metrics = {"loss": float((torch.stack(losses) * shares).sum()) / len(examples)}
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
