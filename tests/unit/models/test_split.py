"""Which towers may be run from stored hidden states: found by running them."""

import pytest
import torch
from torch import Tensor, nn

from tesserafl.core import seeds
from tesserafl.core.fit import Fit, Training
from tesserafl.core.model import Output
from tesserafl.data.examples import Examples
from tesserafl.engines.frozen import Frozen, frozen_below
from tesserafl.engines.kept import Kept, Shelf
from tesserafl.models.split import cuts_of, towers_of


class Blocks(nn.Module):
    """Two towers: one follows the batch, one is the same for any; blocks answer with tuples."""

    def __init__(self, kind: str = "plain") -> None:
        super().__init__()
        self.kind = kind
        self.left = nn.ModuleList(Block(kind) for _ in range(3))
        self.right = nn.ModuleList(Block("plain") for _ in range(3))
        self.first, self.head = nn.Linear(6, 6), nn.Linear(6, 6)
        if kind == "no list":
            self.left = nn.Sequential(*self.left)

    def forward(self, inputs: Tensor) -> Output:
        hidden, words = self.first(inputs), torch.eye(6)[:4]
        early = hidden
        for number, block in enumerate(self.left):
            hidden, *_ = block(hidden)
            early = hidden if number == 0 else early
            if self.kind == "twice":
                hidden, *_ = block(hidden)
        if self.kind == "looks below" and "forward" in vars(self.left[0]):
            raise RuntimeError("not without its blocks")
        for block in self.right:
            words, *_ = block(words)
        if self.kind == "bypass":
            hidden = hidden + early
        return Output(self.head(hidden) @ words.T, hidden)


class Block(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.draw = seeds.generator(1)  # of its own
        self.kind, self.linear, self.norm = kind, nn.Linear(6, 6), nn.BatchNorm1d(6)
        if "batch norm" not in kind:
            del self.norm

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        if self.kind == "strict batch norm":
            hidden = self.norm(hidden)
        if self.kind == "needs two" and len(hidden) < 2:
            raise RuntimeError("a batch of one")
        if self.kind == "batch norm":
            hidden = self.norm(torch.cat([hidden, hidden + 1.0]))[: len(hidden)]
        if self.kind == "layer drop" and self.training and float(torch.rand(())) < 1e-6:
            return hidden, None
        if self.kind == "noise":
            hidden = hidden + torch.randn(hidden.shape[1:], generator=self.draw)
        out = torch.tanh(self.linear(hidden)) + hidden
        return out, out if self.kind == "more" else None


def towers(kind: str, trained: list[str]) -> dict[str, bool]:
    """Paths of the towers that are split -> whether they are constant."""
    with seeds.seeded(8):
        module = Blocks(kind).train()
    params = {name: value.detach() for name, value in module.named_parameters()}
    forward = lambda given, inputs: torch.func.functional_call(module, given, (inputs,))  # noqa: E731
    cuts = cuts_of(module, ["left.", "right."], trained)
    inputs = torch.randn(2, 6, generator=seeds.generator(9))
    found = towers_of(module, forward, params, cuts, inputs)
    assert all(not tower.names & set(trained) for tower in found)
    return {tower.cut.path: tower.constant for tower in found}


def test_a_tower_that_does_not_follow_the_batch_is_constant() -> None:
    assert towers("plain", ["left.2.linear.weight"]) == {"left": False, "right": True}
    assert towers("plain", ["right.0.linear.weight", "left.1.linear.bias"]) == {"left": False}
    assert towers("plain", ["left.0.linear.bias", "right.0.linear.bias"]) == {}


@pytest.mark.parametrize(
    "kind",
    [
        "twice",
        "batch norm",
        "strict batch norm",
        "layer drop",
        "noise",
        "more",
        "no list",
        "needs two",
        "looks below",
    ],
)
def test_a_tower_that_is_not_what_it_should_be_is_left_whole(kind: str) -> None:
    assert "left" not in towers(kind, ["left.2.linear.weight"])


def test_a_state_that_goes_around_the_cut_is_noticed() -> None:
    assert towers("bypass", ["left.2.linear.weight"]) == {}


def test_a_trained_parameter_in_front_of_the_blocks_is_found() -> None:
    with seeds.seeded(8):
        module = Blocks().train()
    params = {name: value.detach() for name, value in module.named_parameters()}
    forward = lambda given, inputs: torch.func.functional_call(module, given, (inputs,))  # noqa: E731
    cuts = cuts_of(module, ["left."], ["first.weight", "left.2.linear.weight"])
    (tower,) = towers_of(module, forward, params, cuts, torch.randn(2, 6))
    lower = {f"left.{n}.linear.{kind}" for n in (0, 1) for kind in ("weight", "bias")}
    assert tower.names == lower | {"first.weight", "first.bias"}


def test_a_trained_parameter_in_front_of_the_blocks_switches_it_off() -> None:
    with seeds.seeded(8):
        module = Blocks().train()
    params = {name: value.detach() for name, value in module.named_parameters()}
    forward = lambda given, inputs: torch.func.functional_call(module, given, (inputs,))  # noqa: E731
    draw = seeds.generator(9)
    examples = Examples(inputs=torch.randn(5, 6, generator=draw), labels=torch.arange(5) % 3)
    shelf = Shelf(kept=Kept(most_bytes=1000), client=0, forward="model", prefixes=("left.",))

    def below(*names: str) -> Frozen | None:
        fit = Fit(params=params, training=Training(batch_size=4), trainable=frozenset(names))
        return frozen_below(shelf, fit, forward, module, examples, params)

    assert below("left.2.linear.weight", "first.weight") is None
    assert shelf.kept.num_bytes == 0
    assert below("left.2.linear.weight") is not None
    assert shelf.kept.num_bytes == 5 * 6 * 4
