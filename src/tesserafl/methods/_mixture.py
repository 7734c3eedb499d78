"""Two experts under a gate: the global one, which is frozen, and a client's own.

    g = softmax((H z' + h) / T),  z' = z + U tanh(D z),  answer = g_1 global(x) + g_2 own(x)

z [batch, d] are features of the frozen foundation model, or of the global expert, brought to mean 0
and variance 1. D [b, d] and U [d, b] are the gate's adapter; H [2, d] and h [2] choose. U, H and h
begin at zero: g is 1/2.
A language model answers at every place of a text; there z is [batch, time, d], and g is chosen for
each place by the features of that place, which know nothing of what comes after it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from tesserafl.core import seeds
from tesserafl.core.fit import HELD_OUT, IGNORED, Forward, logits_of, masked, mean_over
from tesserafl.core.model import Output
from tesserafl.core.params import Params

GLOBAL, OWN, BASE = "global", "own", "base"
"""The experts, and the foundation model."""
NARROW, WIDEN = "gate/narrow", "gate/widen"
"""D and U."""
CHOOSE, OFFSET = "gate/choose", "gate/offset"
"""H and h."""
_EPSILON = 1e-5


def new_adapter(size: int, width: int, seed: int) -> Params:
    """D and U for features of this size, with a bottleneck of this width."""
    draw = seeds.generator(seed, "gate")
    return {
        NARROW: torch.randn(width, size, generator=draw) / size**0.5,
        WIDEN: torch.zeros(size, width),
    }


def new_choice(size: int) -> Params:
    """H and h."""
    return {CHOOSE: torch.zeros(2, size), OFFSET: torch.zeros(2)}


def named(expert: str, params: Params) -> Params:
    """Parameters of an expert, by names that tell experts apart."""
    return {f"{expert}/{name}": tensor for name, tensor in params.items()}


def part_of(params: Mapping[str, Tensor], expert: str) -> Params:
    """The inverse of `named`; empty if there are none of this expert."""
    start = f"{expert}/"
    return {n.removeprefix(start): t for n, t in params.items() if n.startswith(start)}


@dataclass(frozen=True)
class Gate:
    """How much each expert counts, [..., 2], from features [..., d]."""

    temperature: float = 1.0
    """T: the larger, the more alike the two."""
    learned: bool = True
    """False: both count one half."""

    def __call__(self, params: Mapping[str, Tensor], features: Tensor) -> Tensor:
        """Shares of the global expert and of the client's own."""
        if not self.learned:  # of the features only their number is looked at
            return features.new_full((*features.shape[:-1], 2), 0.5)
        z = features - features.mean(dim=-1, keepdim=True)
        z = z / (z.square().mean(dim=-1, keepdim=True) + _EPSILON).sqrt()
        if NARROW in params:
            z = z + torch.tanh(z @ params[NARROW].T) @ params[WIDEN].T
        return torch.softmax((z @ params[CHOOSE].T + params[OFFSET]) / self.temperature, dim=-1)


def mixed(shares: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Logits of two experts [..., classes] by their shares [..., 2]."""
    return shares[..., :1] * first + shares[..., 1:] * second


@dataclass(frozen=True)
class Mixture:
    """How the experts answer together: a `Rule`, for parameters that `named` has named."""

    gate: Gate
    reads: str = BASE
    """Whose features the gate reads."""

    def __call__(self, forward: Forward, params: Params, inputs: Tensor) -> Output:
        """The mixed logits."""
        first = forward(part_of(params, GLOBAL), inputs)
        second = forward(part_of(params, OWN), inputs)
        if self.gate.learned and self.reads != GLOBAL:
            shares = self.shares(forward, params, inputs)
        else:
            shares = self._read(first, params)
        return Output(mixed(shares, first.logits, second.logits), None)

    def shares(self, forward: Forward, params: Params, inputs: Tensor) -> Tensor:
        """What the gate says, as the labels lie: [batch, 2] or [batch, time, 2]."""
        return self._read(forward(part_of(params, self.reads), inputs), params)

    def _read(self, out: Output, params: Params) -> Tensor:
        assert out.features is not None, "a model without features was trained with a gate"
        return self.gate(params, out.features if self.gate.learned else out.logits)


@dataclass(frozen=True)
class MixtureLoss:
    """Cross-entropy of the mixture, of the own expert, and a pull towards equal shares.

    It trains the own expert, which is the model's parameters, and the gate. Of the references it
    reads the logits of `GLOBAL` and the features that the gate does. Where examples are held out,
    the gate learns from these and the expert from the others: on examples that the expert was
    trained on, it looks better than it is.
    """

    gate: Gate
    own: float
    """lambda_1: weight of the own expert's loss, which trains it even where the gate does not."""
    balance: float
    """lambda_b: weight of KL(mean share || 1/2), against a gate that knows one expert only."""
    reads: str = BASE
    """Whose features the gate reads."""

    def __call__(
        self,
        forward: Forward,
        params: Params,
        inputs: Tensor,
        labels: Tensor,
        extra: Mapping[str, Tensor],
    ) -> Tensor:
        """The loss of a batch, a scalar."""
        own = masked(forward(params, inputs).logits, extra)
        other = masked(extra[logits_of(GLOBAL)], extra)
        shares = self.gate(params, extra[self.reads] if self.gate.learned else other)
        counts = (labels.reshape(len(labels), -1) != IGNORED).any(dim=1)
        if HELD_OUT not in extra:
            loss = mean_over(mixed(shares, other, own), labels, counts)
            return loss + self._of_own(own, labels, counts) + self._unequal(shares, labels, counts)
        held = extra[HELD_OUT]
        learns, chooses = counts & ~held, counts & held
        loss = mean_over(mixed(shares.detach(), other, own), labels, learns)
        loss = loss + self._of_own(own, labels, learns)
        loss = loss + mean_over(mixed(shares, other, own.detach()), labels, chooses)
        return loss + self._unequal(shares, labels, chooses)

    def _of_own(self, logits: Tensor, labels: Tensor, rows: Tensor) -> Tensor:
        return self.own * mean_over(logits, labels, rows) if self.own else logits.new_zeros(())

    def _unequal(self, shares: Tensor, labels: Tensor, rows: Tensor) -> Tensor:
        places = (labels != IGNORED) & rows.reshape(len(rows), *[1] * (labels.dim() - 1))
        number = places.sum()
        mean = (shares * places[..., None]).flatten(0, -2).sum(dim=0) / number.clamp(min=1)
        apart = (mean * (2.0 * mean.clamp(min=1e-12)).log()).sum()
        return self.balance * apart * (number > 0)
