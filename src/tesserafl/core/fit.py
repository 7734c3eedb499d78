"""One client's local work, as data: what to train, on which loss, how long."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from tesserafl.core.errors import ConfigError, did_you_mean
from tesserafl.core.model import Output
from tesserafl.core.params import Params

IGNORED = -100
"""A label that counts in no loss: padding of a text."""
HELD_OUT = "held_out"
"""Name of the tensor that says which examples of a batch are held out (`Fit.held_out`)."""


def logits_of(reference: str) -> str:
    """Name of the tensor with a reference's logits (`Fit.reference_logits`)."""
    return f"{reference}.logits"


@dataclass(frozen=True, kw_only=True)
class Training:
    """How a client trains; the same for every method of a comparison."""

    optimiser: Literal["sgd", "adamw"] = "sgd"
    """the clients' optimiser"""
    lr: float = 0.05
    """learning rate of the first round"""
    schedule: Literal["constant", "cosine"] = "constant"
    """how the learning rate falls over the rounds; cosine ends at zero"""
    momentum: float = 0.0
    """momentum of SGD; the buffer starts empty in every round, unless the method carries it on"""
    weight_decay: float = 0.0
    """decay of the weights (L2 for SGD, decoupled for AdamW)"""
    clip_norm: float | None = None
    """largest norm of a step's gradient; None: not clipped"""
    epochs: int = 1
    """passes over a client's data in a round"""
    steps: int | None = None
    """optimiser steps of a client in a round, over as many passes as that takes; None: `epochs`"""
    batch_size: int = 32
    """examples in a step; a client's last batch of an epoch may be smaller"""
    mask_absent_classes: bool = False
    """HeteroFL's masked loss: logits of classes that a client does not have are set to zero, and
    only owners of a class report its output rows"""
    augment: bool = False
    """random flips and shifts of images in training"""

    def __post_init__(self) -> None:
        for name, allowed in {
            "optimiser": ("sgd", "adamw"),
            "schedule": ("constant", "cosine"),
        }.items():
            given = getattr(self, name)
            if given not in allowed:
                raise ConfigError(f"training.{name}={given!r}; {did_you_mean(str(given), allowed)}")
        for name, low in (("lr", 0.0), ("epochs", 1), ("batch_size", 1)):
            if not getattr(self, name) >= low or getattr(self, name) == 0:
                raise ConfigError(f"training.{name} must be positive; got {getattr(self, name)!r}")
        if self.steps is not None and self.steps < 1:
            raise ConfigError(
                f"training.steps must be positive, or None to train whole epochs; got {self.steps}"
            )
        if not self.weight_decay >= 0.0:
            raise ConfigError(f"training.weight_decay must be 0 or more; got {self.weight_decay!r}")
        if not 0.0 <= self.momentum < 1.0:
            raise ConfigError(f"training.momentum must be in [0, 1); got {self.momentum!r}")
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise ConfigError(
                f"training.clip_norm must be positive, or None for no clipping; "
                f"got {self.clip_norm!r}"
            )

    def lr_at(self, round: int, rounds: int) -> float:
        """Learning rate of a round, counted from 0, of `rounds`."""
        if self.schedule == "cosine":
            return self.lr * 0.5 * (1.0 + float(torch.cos(torch.tensor(torch.pi * round / rounds))))
        return self.lr


Forward = Callable[[Params, Tensor], Output]
"""`forward(params, inputs)`: the model as a function, width scaling included."""


class Objective(Protocol):
    """A loss that knows neither the model's family nor its names: a frozen dataclass.

    It is pure, since engines may run it for many clients at once (`torch.func.vmap`). An example
    whose labels are all `IGNORED` is padding and must not count.
    """

    def __call__(
        self,
        forward: Forward,
        params: Params,
        inputs: Tensor,
        labels: Tensor,
        extra: Mapping[str, Tensor],
    ) -> Tensor:
        """The mean loss of a batch, a scalar."""
        ...


def masked(logits: Tensor, extra: Mapping[str, Tensor]) -> Tensor:
    """The logits, those of classes that the client does not have at 0, where it is asked so.

    Args:
        logits: [batch, classes].
        extra: what the objective reads; "classes" are the client's own, int64 [k].
    """
    if "classes" not in extra:
        return logits
    numbers = torch.arange(logits.shape[-1], device=logits.device)
    owned = (numbers == extra["classes"][:, None]).any(dim=0)
    return logits.masked_fill(~owned, 0.0)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean over the labels that count; logits [batch, ..., classes], labels [batch, ...]."""
    return F.cross_entropy(
        logits.reshape(-1, logits.shape[-1]), labels.reshape(-1), ignore_index=IGNORED
    )


@dataclass(frozen=True)
class CrossEntropy:
    """Mean cross-entropy over the labels that count.

    With `extra["classes"]` (int64 [k], the client's own classes) the other logits are set to 0
    before the softmax, as HeteroFL's code does for non-IID data (Diao et al., ICLR 2021, 3.2).
    """

    def __call__(
        self,
        forward: Forward,
        params: Params,
        inputs: Tensor,
        labels: Tensor,
        extra: Mapping[str, Tensor],
    ) -> Tensor:
        """The mean loss of a batch, a scalar."""
        return cross_entropy(masked(forward(params, inputs).logits, extra), labels)


def mean_over(logits: Tensor, labels: Tensor, rows: Tensor) -> Tensor:
    """Mean cross-entropy over the labels that count, of some examples alone; 0 if there are none.

    Args:
        logits: [batch, ..., classes].
        labels: [batch, ...].
        rows: bool [batch], the examples.
    """
    each = F.cross_entropy(
        logits.reshape(-1, logits.shape[-1]),
        labels.reshape(-1),
        ignore_index=IGNORED,
        reduction="none",
    ).reshape(len(labels), -1)
    counted = (labels.reshape(len(labels), -1) != IGNORED) & rows[:, None]
    return (each * counted).sum() / counted.sum().clamp(min=1)


WidthScaling = Literal["none", "output", "parameters"]
"""A cut layer sums fewer inputs than the full one. `none` leaves it so. `output` multiplies it by
full/kept (HeteroFL's scaler), which makes its steps (full/kept)^2 larger in function space.
`parameters` trains full/kept times the weights and reports the change divided by that: the client
then learns at the pace of a small network of its own."""


@dataclass(frozen=True, kw_only=True)
class Fit:
    """What an engine executes for one client, alone or batched with others of the same shape."""

    params: Params
    """Parameters to start from."""
    training: Training
    """Optimiser, epochs, batch size; its `lr` is the round's."""
    objective: Objective = field(default_factory=CrossEntropy)
    """The loss."""
    trainable: frozenset[str] | None = None
    """Names that are trained; None: all. The others stay as they are and are not reported."""
    beside: frozenset[str] = frozenset()
    """Names in `params` of what is no part of the model: the objective alone reads them. They are
    trained and come back like all others."""
    rebuilt: frozenset[str] = frozenset()
    """Names in `params` that the objective replaces before it runs the model: they count as trained
    where it is asked what stays the same."""
    width_scaling: WidthScaling = "none"
    """How a cut layer makes up for the inputs that it does not sum."""
    extra: Mapping[str, Tensor] = field(default_factory=dict)
    """Tensors that the objective reads."""
    references: Mapping[str, Params] = field(default_factory=dict)
    """Further parameter sets of the names and shapes of `params` without `beside`, which are not
    trained. For every batch the objective reads in `extra[name]` the features [batch, features],
    or [batch, time, features], that the model gives with them for the batch's inputs: detached,
    without dropout, ones for padding. They are scaled as `width_scaling` says."""
    reference_logits: frozenset[str] = frozenset()
    """References of which the objective reads the logits too, in `extra[logits_of(name)]`:
    [batch, classes], or [batch, time, vocabulary]; zeros for padding."""
    held_out: float = 0.0
    """Share of the client's examples, drawn once for the whole run, for which the objective reads
    True in `extra["held_out"]`, bool [batch]. They are batched like all others: it is for the
    objective to train another part on them. 0: there is no such tensor."""
    validate: bool = False
    """Whether the parameters to start from are tested on the client's validation examples, if it
    has any: `Fitted.metrics["validation_accuracy"]`."""
    momentum: Params | None = None
    """SGD's momentum buffers to start with, by trainable name and of its shape; None: empty. Under
    `width_scaling="parameters"` they are those of the scaled parameters, as they came back."""
    keep_momentum: bool = False
    """Whether the buffers are asked for when the last step is done."""

    def __post_init__(self) -> None:
        """Check the references.

        Raises:
            ConfigError: a reference has the name of another tensor that the objective reads, or
                other parameters than `params`; logits are asked of none of them; the share of
                examples held out is not in [0, 1).
        """
        taken = {*self.extra, *(["classes"] if self.training.mask_absent_classes else [])}
        if self.held_out:
            taken.add(HELD_OUT)
        if not 0.0 <= self.held_out < 1.0:
            raise ConfigError(f"Fit.held_out must be in [0, 1); got {self.held_out}")
        if unknown := self.reference_logits - self.references.keys():
            raise ConfigError(
                f"Fit.reference_logits has {', '.join(sorted(unknown))}; the references are "
                f"{', '.join(self.references) or 'none'}"
            )
        own: Params = {}
        if self.references:  # of what lies on a disk every look is a reading
            own = {name: tensor for name, tensor in self.params.items() if name not in self.beside}
        for name, reference in self.references.items():
            if name in taken:
                raise ConfigError(
                    f"Fit.references[{name!r}]: the objective reads another tensor of this name; "
                    f"give the reference a name other than {', '.join(sorted(taken))}"
                )
            check_alike(f"Fit.references[{name!r}]", reference, own)


def check_alike(what: str, given: Params, expected: Params) -> None:
    """Raise unless `given` has the names and the shapes of `expected`.

    Raises:
        ConfigError: it has not; the message begins with `what`.
    """
    if given.keys() != expected.keys():
        wrong = ", ".join(sorted(given.keys() ^ expected.keys()))
        raise ConfigError(
            f"{what} must have exactly the names {', '.join(expected)}; wrong or missing: {wrong}"
        )
    for name, tensor in given.items():
        if tensor.shape != expected[name].shape:
            raise ConfigError(
                f"{what}[{name!r}] has the shape {tuple(tensor.shape)}; it must have "
                f"{tuple(expected[name].shape)}: cut it to the task's sub-model"
            )


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """What came of a `Fit`."""

    params: Params
    """The trained parameters, trainable names only."""
    num_examples: int
    """Examples that the client trained on, each counted once."""
    num_steps: int
    """Optimiser steps."""
    metrics: Mapping[str, float]
    """Of the local training: `loss` is the mean over the last epoch."""
    classes: Tensor
    """int64 [k], the classes that the client owns."""
    num_reference_examples: int = 0
    """Forward passes with the references' parameters, counted in examples: what they are for this
    client alone, with nothing kept from earlier rounds."""
    momentum: Params | None = None
    """SGD's buffers after the last step, by trainable name; None: not asked for."""
