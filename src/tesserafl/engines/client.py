"""What happens on a client: the method's two client hooks around one executed Fit."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import nn

from tesserafl.core import seeds
from tesserafl.core.errors import TesseraError
from tesserafl.core.fit import Fitted, Forward
from tesserafl.core.messages import Memory, Task, Update
from tesserafl.core.method import Method
from tesserafl.core.model import Model
from tesserafl.core.params import Params, num_entries, subtract
from tesserafl.data.examples import Examples
from tesserafl.engines.batches import held_out_of
from tesserafl.engines.cohort import Cohorts
from tesserafl.engines.compression import CompressionSettings, apart, compressed
from tesserafl.engines.execute import execute, measured
from tesserafl.engines.kept import Kept, Shelf, nothing_kept
from tesserafl.engines.member import Member
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
    validation: Callable[[int], Examples] | None = None
    """Validation examples of a client; None: nobody has any."""
    kept: Kept = field(default_factory=nothing_kept)
    """What frozen parameters gave, between rounds, for clients that train one after another; if it
    keeps nothing, no frozen block is left out."""
    compression: CompressionSettings = field(default_factory=CompressionSettings)
    """How changes are sent."""
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
        memory, left = apart(memory)
        fit = self.method.local(self.model, task, memory)
        scales: Mapping[str, float] = {}
        if fit.width_scaling == "parameters":
            scales = own_scales(self.model, task.submodel, self._module(task))
        draw = seeds.generator(self.seed, task.round, task.client.id, "batches")
        scaled = fit
        if scales:
            references = {name: _scaled(params, scales) for name, params in fit.references.items()}
            scaled = replace(fit, params=_scaled(fit.params, scales), references=references)
        examples, held_out = self.examples(task.client.id), None
        if fit.held_out:
            held_out = held_out_of(len(examples), fit.held_out, self.seed, task.client.id)
        member = Member(fit=scaled, examples=examples, draw=draw, held_out=held_out)
        return _Part(
            task=task,
            memory=memory,
            left=left,
            member=member,
            unscaled=fit.params,
            scales=scales,
        )

    def _train(self, parts: Sequence[_Part]) -> list[Fitted]:
        task, scaling = parts[0].task, parts[0].member.fit.width_scaling
        key = (task.submodel.shape, scaling)
        if key not in self._forwards:
            module = self._module(task)
            self._forwards[key] = forward_of(self.model, task.submodel, module, scaling)
        forward = self._forwards[key]
        accuracies = [self._validated(part, forward, key) for part in parts]
        if self.cohorts is not None and len(parts) > 1:
            fitted = self.cohorts.train([part.member for part in parts], forward, key)
        else:
            fitted = [self._execute(part, forward, key) for part in parts]
        return [
            replace(each, metrics={**each.metrics, **more}) if more else each
            for each, more in zip(fitted, accuracies, strict=True)
        ]

    def _execute(self, part: _Part, forward: Forward, key: Hashable) -> Fitted:
        member, task, module = part.member, part.task, self._module(part.task)
        shelf = self._shelf(task, key)
        # Dropout draws from torch's own generator.
        with seeds.seeded(self.seed, task.round, task.client.id, "fit"):
            return execute(
                member.fit,
                forward,
                member.examples,
                member.draw,
                self.device,
                module,
                held_out=member.held_out,
                shelf=shelf,
            )

    def _validated(self, part: _Part, forward: Forward, key: Hashable) -> Mapping[str, float]:
        """The accuracy of the parameters to start from, as they are trained; none if not asked."""
        fit, client = part.member.fit, part.task.client.id
        if not fit.validate or self.validation is None:
            return {}
        examples = self.validation(client)
        if not len(examples):
            return {}
        module, shelf = self._module(part.task), self._shelf(part.task, key)
        metrics = measured(fit, forward, examples, self.device, module, shelf)
        return {
            "validation_accuracy": metrics.accuracy,
            "validation_examples": float(len(examples)),
        }

    def _shelf(self, task: Task, key: Hashable) -> Shelf:
        prefixes = self.model.frozen_blocks
        return Shelf(kept=self.kept, client=task.client.id, forward=key, prefixes=prefixes)

    def _answer(self, part: _Part, fitted: Fitted) -> Answer:
        if part.scales:
            # By the change, so that what training left alone is left alone to the bit.
            back = {name: 1.0 / scale for name, scale in part.scales.items()}
            change = _scaled(subtract(fitted.params, part.member.fit.params), back)
            params = {name: part.unscaled[name] + change[name] for name in change}
            fitted = replace(fitted, params=params)
        metrics = {**fitted.metrics, "trained_entries": float(num_entries(fitted.params))}
        fitted = replace(fitted, metrics=metrics)
        update, memory = self.method.report(self.model, part.task, fitted, part.memory)
        left = part.left
        if not part.task.wanted.exact:
            # Here and nowhere else: every engine then folds what it would have received.
            update, left = compressed(update, left, self.compression)
        return update, {**memory, **left} if left else memory

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
    """What the method keeps."""
    left: Memory
    """What was lost of the last change."""
    member: Member
    unscaled: Params
    """The parameters as they were sent."""
    scales: Mapping[str, float]
    """What they were multiplied by."""


def _scaled(params: Params, scales: Mapping[str, float]) -> Params:
    return {name: t * scales[name] if name in scales else t for name, t in params.items()}
