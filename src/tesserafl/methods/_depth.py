"""Which blocks of a model a client holds: the choices that methods on depth share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from tesserafl.core.errors import ConfigError
from tesserafl.core.messages import Client, Update
from tesserafl.core.method import State
from tesserafl.core.model import Model
from tesserafl.core.params import Params


def depth_axes(model: Model) -> tuple[str, ...]:
    """The axes whose units are blocks.

    Raises:
        ConfigError: there are none.
    """
    axes = tuple(axis for axis, depth in model.depths.items() if depth.last is None)
    if not axes:
        raise ConfigError(
            "the method leaves out blocks, and the model has none that it counts; choose --model "
            "residual, resnet or huggingface"
        )
    return axes


def depth_of(depths: tuple[int, ...], client: Client) -> int:
    """Blocks that the client trains: classes are dealt to the clients in turn.

    Raises:
        ConfigError: there is no class, or one of less than a block.
    """
    check_depths(depths)
    return depths[client.id % len(depths)]


def check_depths(depths: tuple[int, ...]) -> None:
    """Raise ConfigError unless there is a client class, and each trains a block or more."""
    if not depths or min(depths) < 1:
        raise ConfigError(
            f"method.depth holds how many blocks each client class trains, at least 1; got "
            f"{list(depths)}"
        )


def first_blocks(model: Model, depth: int) -> dict[str, range]:
    """The first blocks of every depth axis, at most `depth` of each."""
    return {axis: range(min(depth, model.units(axis))) for axis in depth_axes(model)}


def drawn_blocks(
    model: Model,
    orders: Mapping[str, Sequence[int]],
    depth: int,
    draw: torch.Generator,
    scores: Mapping[str, Sequence[float]] | None = None,
) -> dict[str, list[int]]:
    """`depth` blocks of every axis, drawn without replacement, in the order that is given.

    Blocks that cannot stand elsewhere are always among them.

    Args:
        model: the global model.
        orders: axis -> its blocks from input to output.
        depth: blocks to draw on every axis; fewer where it has fewer.
        draw: where the randomness comes from.
        scores: axis -> logarithm of every block's weight, in the same order; None: equal ones
            (Gumbel top-k, Kool et al., ICML 2019).
    """
    drawn: dict[str, list[int]] = {}
    for axis, order in orders.items():
        noise = torch.rand(len(order), generator=draw, dtype=torch.float64)
        keys = -(-noise.clamp(min=1e-300).log()).log()
        if scores is not None:
            keys = keys + torch.tensor(scores[axis], dtype=torch.float64)
        movable = set(model.movable(axis))
        keys[[place for place, block in enumerate(order) if block not in movable]] = torch.inf
        kept = keys.topk(min(depth, len(order))).indices.tolist()
        drawn[axis] = [order[place] for place in sorted(kept)]
    return drawn


def block_names(model: Model, axis: str) -> list[dict[str, str]]:
    """For every block of a depth axis: the parameter's name within the block -> its whole name."""
    found: list[dict[str, str]] = [{} for _ in range(model.units(axis))]
    for name in model.shapes:
        if place := model.depths[axis].locate(name):
            found[place[1]][place[0] + place[2]] = name
    return found


def blocks_in_order(model: Model, axis: str, params: Params, slots: Sequence[int]) -> list[Params]:
    """The blocks in these slots, by names within the block."""
    names = block_names(model, axis)
    return [{rest: params[name] for rest, name in names[slot].items()} for slot in slots]


def client_blocks(model: Model, state: State, axis: str, update: Update) -> list[Params]:
    """The client's blocks as it trained them, by names within the block."""
    blocks: dict[int, Params] = {}
    for name, change in update.delta.items():
        if place := model.depths[axis].locate(name):
            view = update.submodel.views[name]
            value = state.params[view.name].clone()
            view.add(value, change)  # masked classes: only some rows are reported
            blocks.setdefault(place[1], {})[place[0] + place[2]] = value
    return [blocks[number] for number in sorted(blocks)]
