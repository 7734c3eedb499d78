"""Square cores between frozen orthonormal bases, in place of trained low-rank factors.

    up [out, R] = [B_1 s_1 H_1, ..., B_h s_h H_h]        down [R, in] = [A_1; ...; A_h]

The columns of [B_1, ..., B_h] are orthonormal, and so are the rows of `down`: heads never overlap.
Bases follow from a seed and the shapes, so whoever knows these need not be sent any.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from tesserafl.core import seeds
from tesserafl.core.errors import ConfigError
from tesserafl.core.fit import CrossEntropy, Fit, Forward, Objective
from tesserafl.core.layout import Shape
from tesserafl.core.messages import Task
from tesserafl.core.model import Model
from tesserafl.core.params import Params
from tesserafl.core.submodel import Index, SubModel, whole


class Bases(NamedTuple):
    """Of one low-rank change; shared, never written to."""

    up: Tensor
    """[out, heads, r]: B of every head."""
    down: Tensor
    """[R, in]: A of every head, one below the other."""


def core(pair: int) -> str:
    """Name of the cores of the model's low-rank change of this number."""
    return f"core/{pair}"


def scale(pair: int) -> str:
    """Name of the heads' scales."""
    return f"scale/{pair}"


def check_heads(model: Model, heads: int) -> None:
    """Raise ConfigError unless the rank is `heads` equal parts that can be orthogonal."""
    for pair in model.low_rank:
        (out, rank), width = model.shapes[pair.up], model.shapes[pair.down][1]
        if heads < 1 or rank % heads:
            raise ConfigError(
                f"method.heads={heads} must divide model.rank={rank}: every head has a core of "
                f"rank / heads; choose another number of heads, or another rank"
            )
        if rank > min(out, width):
            raise ConfigError(
                f"model.rank={rank} is more than the smaller side of an adapted weight "
                f"[{out}, {width}], so its heads cannot be orthogonal; set model.rank to at most "
                f"{min(out, width)}"
            )


def zeros(model: Model, heads: int, dtype: torch.dtype) -> Params:
    """Cores [heads, r, r] of every low-rank change, as they begin."""
    ranks = [model.shapes[pair.down][0] // heads for pair in model.low_rank]
    return {core(i): torch.zeros(heads, r, r, dtype=dtype) for i, r in enumerate(ranks)}


def factors_of_cores(model: Model, cores: Params, seed: int) -> Params:
    """The model's factors: bases of this seed with these cores (times their scales) between.

    By way of double precision: of the same bits wherever it is worked out.
    """
    factors: Params = {}
    pairs = zip(model.low_rank, _bases_of(model, cores, seed), strict=True)
    for number, (pair, bases) in enumerate(pairs):
        between = cores[core(number)]
        wide = torch.einsum("ohi,hij->ohj", bases.up.double(), between.double())
        factors[pair.down] = bases.down
        factors[pair.up] = wide.reshape(len(wide), -1).to(between.dtype)
    return factors


def chosen(
    cores: Params, count: int, by: Literal["random", "largest"], seed: int, *keys: int
) -> list[list[int]]:
    """Per low-rank change so many of its heads, ascending; equal norms are told apart at random.

    Args:
        cores: of all heads.
        count: how many.
        by: a draw, or the Frobenius norms of the cores.
        seed: the run's.
        keys: the round and the client: each draws for itself.
    """
    picked = []
    for number in range(len(cores)):
        between = cores[core(number)]
        order = torch.randperm(
            len(between), generator=seeds.generator(seed, "heads", number, *keys)
        )
        if by == "largest":
            norms = between.double().flatten(1).norm(dim=1)
            order = order[norms[order].sort(descending=True, stable=True).indices]
        picked.append(order[:count].sort().values.tolist())
    return picked


def fit_of(model: Model, task: Task, rest: Params, seed: int, heads: list[list[int]]) -> Fit:
    """Training of the chosen heads of `task.extra` and of `rest`, what is no factor."""
    trained: Params = {}
    extra: Params = {}
    for number, bases in enumerate(_bases_of(model, task.extra, seed)):
        between, own = task.extra[core(number)], heads[number]
        trained |= {core(number): between[own], scale(number): between.new_ones(len(own))}
        extra |= {
            f"bases/{number}": bases.up,
            f"start/{number}": between[own],
            f"place/{number}": torch.eye(len(between), dtype=between.dtype)[:, own],
        }
    ups = tuple(pair.up for pair in model.low_rank)
    return Fit(
        params={**rest, **factors_of_cores(model, task.extra, seed), **trained},
        training=task.training,
        objective=OfCores(ups),
        trainable=frozenset([*rest, *trained]),
        beside=frozenset(trained),
        rebuilt=frozenset(ups),
        extra=extra,
    )


def changes_of(params: Params, cores: Params, heads: list[list[int]]) -> Params:
    """What s_h H_h moved by [k, r, r], of the trained heads, by the name of their cores."""
    return {
        core(i): params[scale(i)][:, None, None] * params[core(i)] - cores[core(i)][own]
        for i, own in enumerate(heads)
    }


def only(model: Model, submodel: SubModel, cores: Params, heads: list[list[int]]) -> SubModel:
    """The sub-model with the ranks of these heads alone, of every low-rank change."""
    rows: dict[str, dict[int, Index]] = {}
    for number, (pair, own) in enumerate(zip(model.low_rank, heads, strict=True)):
        r = cores[core(number)].shape[-1]
        ranks = (torch.tensor(own)[:, None] * r + torch.arange(r)).reshape(-1)
        rows |= {pair.down: {0: ranks}, pair.up: {1: ranks}}
    return submodel.restrict(rows)


def places(cores: Params, heads: list[list[int]]) -> SubModel:
    """Where the reported cores of these heads lie among all."""
    everything = whole({}, {name: tuple(tensor.shape) for name, tensor in cores.items()})
    return everything.restrict({core(i): {0: torch.tensor(own)} for i, own in enumerate(heads)})


def shapes(cores: Params, heads: list[list[int]]) -> dict[str, Shape]:
    """Shapes of what is reported of these heads."""
    return {core(i): (len(own), *cores[core(i)].shape[1:]) for i, own in enumerate(heads)}


def _bases_of(model: Model, cores: Params, seed: int) -> tuple[Bases, ...]:
    shapes = tuple((*model.shapes[p.up], model.shapes[p.down][1]) for p in model.low_rank)
    first = cores[core(0)]
    return _drawn(shapes, len(first), seed, first.dtype)


# Clients of one process share them: they are asked for once a task, and are as large as adapters.
@lru_cache(maxsize=2)
def _drawn(
    shapes: tuple[tuple[int, ...], ...], heads: int, seed: int, dtype: torch.dtype
) -> tuple[Bases, ...]:
    drawn = []
    for number, (out, rank, width) in enumerate(shapes):
        up = _orthonormal(out, rank, seeds.generator(seed, "bases", number, "up"))
        down = _orthonormal(width, rank, seeds.generator(seed, "bases", number, "down")).T
        drawn.append(
            Bases(up.to(dtype).reshape(out, heads, rank // heads), down.to(dtype).contiguous())
        )
    return tuple(drawn)


def _orthonormal(rows: int, columns: int, draw: torch.Generator) -> Tensor:
    """Gram-Schmidt of normal columns, in double precision.

    Rounded afterwards, machines whose last bits differ mostly agree; the signs are those of
    Gram-Schmidt, which a QR decomposition leaves open.
    """
    q, r = torch.linalg.qr(torch.randn(rows, columns, dtype=torch.float64, generator=draw))
    turned: Tensor = q * r.diagonal().sign()
    return turned


@dataclass(frozen=True)
class OfCores:
    """A loss of the model whose factors come from cores and scales.

    Of change number i it reads the parameters `core(i)` [k, r, r] and `scale(i)` [k] of the k heads
    that are trained, and in `extra` their bases, start and places. The factor itself is frozen as
    it was received: what the cores moved by is added, so training begins at exactly that model.
    """

    ups: tuple[str, ...]
    """The factors that are made up, in the model's order."""
    inner: Objective = field(default_factory=CrossEntropy)
    """The loss."""

    def __call__(
        self,
        forward: Forward,
        params: Params,
        inputs: Tensor,
        labels: Tensor,
        extra: Mapping[str, Tensor],
    ) -> Tensor:
        """The mean loss of a batch, a scalar."""
        built = dict(params)
        for pair, name in enumerate(self.ups):
            products = params[scale(pair)][:, None, None] * params[core(pair)]
            moved = products - extra[f"start/{pair}"]
            # Not by an index: clients of one cohort may train different heads.
            every = torch.einsum("hk,kij->hij", extra[f"place/{pair}"], moved)
            wide = torch.einsum("ohi,hij->ohj", extra[f"bases/{pair}"], every)
            built[name] = params[name] + wide.reshape(params[name].shape)
        return self.inner(forward, built, inputs, labels, extra)
