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
from tesserafl.engines.batches import augment, batches
from tesserafl.engines.cohort import Cohorts, Member
from tesserafl.engines.optimisers import Optimiser
from tesserafl.models.scaling import forward_of, hollow, own_scales

Answer = tuple[Update, Memory]


@dataclass(kw_only=True)
class ClientWorker:
    """Does clients' work in this process; keeps a built module per sub-model shape."""

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
        scaled = replace(fit, params=_scaled(fit.params, scales)) if scales else fit
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
            member, task = part.member, part.task
            # Dropout draws from torch's own generator.
            with seeds.seeded(self.seed, task.round, task.client.id, "fit"):
                fitted.append(
                    execute(member.fit, forward, member.examples, member.draw, self.device)
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
    params = {name: aligned(tensor.to(device)) for name, tensor in fit.params.items()}
    leaves = [params[name].detach().requires_grad_() for name in trainable]
    params.update(zip(trainable, leaves, strict=True))
    training, classes = fit.training, examples.classes
    extra = {name: aligned(tensor.to(device)) for name, tensor in fit.extra.items()}
    if training.mask_absent_classes:
        extra["classes"] = classes.to(device)
    optimiser = Optimiser(training)
    losses: list[Tensor] = []
    sizes: list[int] = []
    steps = 0
    for _ in range(training.epochs):
        losses, sizes = [], []
        for rows in batches(len(examples), training.batch_size, draw):
            inputs, labels = examples.batch(rows)
            if training.augment and inputs.dim() == 4:
                inputs = augment(inputs, draw)
            loss = fit.objective(forward, params, inputs.to(device), labels.to(device), extra)
            # What the loss does not depend on has a gradient of zero, as in a cohort.
            gradients = torch.autograd.grad(loss, leaves, materialize_grads=True)
            leaves = optimiser.step(leaves, gradients)
            del gradients  # before the next ones are made
            params.update(zip(trainable, leaves, strict=True))
            losses.append(loss.detach())
            sizes.append(len(rows))
            steps += 1
    shares = torch.tensor(sizes, dtype=losses[0].dtype, device=device)
    mean = float((torch.stack(losses) * shares).sum()) / len(examples)
    return Fitted(
        params={name: params[name].detach().cpu() for name in trainable},
        num_examples=len(examples),
        num_steps=steps,
        metrics={"loss": mean},
        classes=classes,
    )
