"""Low-rank factors of several clients: their products, and what became of the mean product."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from tesserafl.core.axis import LowRank
from tesserafl.core.checks import check_delta
from tesserafl.core.errors import ConfigError
from tesserafl.core.messages import Update
from tesserafl.core.model import Model
from tesserafl.core.params import Params
from tesserafl.core.submodel import SubModel, cut


def factors_of(model: Model) -> frozenset[str]:
    """Names of all factors of the model's low-rank changes."""
    return frozenset(name for pair in model.low_rank for name in (pair.down, pair.up))


def check_adapted(model: Model, method: str, merging: bool = False) -> None:
    """Raise ConfigError unless the model has low-rank adapters, on frozen weights or to merge."""
    if not model.low_rank:
        raise ConfigError(
            f"{method} averages low-rank adapters, and this model has none; choose "
            f"--model lora, or a method of whole layers such as fedavg"
        )
    if not merging and any(pair.merged for pair in model.low_rank):
        raise ConfigError(
            f"{method} leaves the adapted weights alone, and with model.merge they are "
            f"parameters that it would train; leave --model.merge away, or choose --method flora"
        )


@dataclass
class Collected:
    """The clients' factors of a round, kept aside while the updates pass by."""

    model: Model
    weights: Mapping[int, int]
    """Client -> its weight in the mean."""
    values: dict[int, Params] = field(default_factory=dict)
    """Client -> the factors of the pairs that it trained, at its own rank."""
    rebuilt: Callable[[Update], Params] | None = None
    """The factors that an answer stands for, where clients send something else (a method's
    `factors`); None: they send these."""

    def watching(self, params: Params, updates: Iterable[Update]) -> Iterator[Update]:
        """Pass updates on as they are, and keep their factors; `params` are of before."""
        for update in updates:
            for _ in self.apart(params, [update]):
                yield update

    def apart(self, params: Params, updates: Iterable[Update]) -> Iterator[Update]:
        """Pass updates on without their factors, which are kept; `params` are of before.

        Raises:
            UpdateError: a factor does not fit or is not finite, as where updates are summed.
        """
        own = factors_of(self.model)
        for update in updates:
            check_delta(update.submodel, update.delta, params)
            pairs = [
                (p.down, p.up)
                for p in self.model.low_rank
                if p.down in update.delta or p.up in update.delta
            ]
            views = update.submodel.views
            small = {name: views[name] for pair in pairs for name in pair}
            if self.rebuilt is None:
                values = cut(params, SubModel(update.submodel.sizes, small))
            else:
                values = self.rebuilt(update)
            rest = {}
            for name, delta in update.delta.items():
                if name in own:
                    values[name] = values[name] + delta
                else:
                    rest[name] = delta
            self.values[update.client] = values
            yield replace(update, delta=rest)

    @property
    def shares(self) -> list[tuple[Params, float]]:
        """Each client's factors with its share of the weight, by client, whatever the order."""
        total = sum(self.weights[client] for client in self.values)
        return [
            (values, self.weights[client] / total) for client, values in sorted(self.values.items())
        ]

    def shares_of(self, pair: LowRank) -> list[tuple[Params, float]]:
        """Of the clients that trained this pair, each one's factors with its share of their weight.

        By client, whatever the order.
        """
        values = {c: each for c, each in sorted(self.values.items()) if pair.down in each}
        total = sum(self.weights[client] for client in values)
        return [(each, self.weights[client] / total) for client, each in values.items()]


def stacked(pair: LowRank, shares: Sequence[tuple[Params, float]]) -> tuple[Tensor, Tensor]:
    """up [out, sum of ranks] and down [sum of ranks, in] whose product is the mean product.

    Exact for any ranks (FLoRA's stacking); in double precision. The scale is left out.
    """
    ups = [values[pair.up].double() * share for values, share in shares]
    downs = [values[pair.down].double() for values, _ in shares]
    return torch.cat(ups, dim=1), torch.cat(downs, dim=0)


def truncated(up: Tensor, down: Tensor, old: Tensor) -> tuple[Tensor, Tensor]:
    """The best product of the rank of `old` [rank, in]: up with the singular values, and down.

    The singular value decomposition of up @ down by way of the QR decompositions of both factors,
    so that no matrix [out, in] is made. Where there are fewer directions than ranks, the other
    columns of `up` are zero and the other rows of `down` are those of `old`: they can still learn.
    What rounding leaves of a singular value of zero is no direction.
    """
    rank = len(old)
    left, inner_left = torch.linalg.qr(up)
    right, inner_right = torch.linalg.qr(down.T)
    u, s, vh = torch.linalg.svd(inner_left @ inner_right.T, full_matrices=False)
    kept = min(rank, int((s > 1e-12 * s[0]).sum()))
    new_up = up.new_zeros(up.shape[0], rank)
    new_down = old.to(down)
    new_up[:, :kept] = left @ (u[:, :kept] * s[:kept])
    new_down = torch.cat([vh[:kept] @ right.T, new_down[kept:]])
    return new_up, new_down


def product_norm(up: Tensor, down: Tensor) -> Tensor:
    """Frobenius norm of up @ down, from the factors' Gram matrices."""
    return ((up.T @ up) * (down @ down.T)).sum().clamp(min=0.0).sqrt()


def merged(pair: LowRank, weight: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """The weight with the product added to it, of the weight's type."""
    change = pair.scale * (up @ down)
    return (weight.double() + (change.T if pair.turned else change)).to(weight.dtype)


def aggregation_error(
    model: Model,
    after: Params,
    shares: Sequence[tuple[Params, float]],
    before: Params | None = None,
) -> float | None:
    """||new change - mean product|| / ||mean product|| over all adapted weights; None: no mean.

    The mean of a product is over the clients that trained it; a weight of which nobody did, counts
    for nothing.
    The new change is the product of the factors after the round and, where products are merged into
    the weights, what came to them in it: that takes the parameters of `before`.
    """
    difference, size = 0.0, 0.0
    for pair in model.low_rank:
        trained = [(values, share) for values, share in shares if pair.down in values]
        if not trained:
            continue
        whole = sum(share for _, share in trained)
        up, down = stacked(pair, [(values, share / whole) for values, share in trained])
        ups, downs = [after[pair.up].double(), -up], [after[pair.down].double(), down]
        if pair.merged is None or before is None:
            difference += float(product_norm(torch.cat(ups, 1), torch.cat(downs, 0)).square())
        else:
            came = after[pair.merged].double() - before[pair.merged].double()
            came = (came.T if pair.turned else came) / pair.scale
            wrong = came + torch.cat(ups, 1) @ torch.cat(downs, 0)
            difference += float(wrong.square().sum())
        size += float(product_norm(up, down).square())
    return (difference / size) ** 0.5 if size else None
