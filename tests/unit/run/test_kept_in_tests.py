"""What frozen blocks give for a test is computed once, and results keep their bits."""

from dataclasses import dataclass, field, replace

import pytest
import torch
from torch import Tensor

from tesserafl.core import seeds
from tesserafl.core.method import Predictor
from tesserafl.core.model import Model
from tesserafl.data.examples import ClientData, Examples, FederatedData, Spec
from tesserafl.engines.kept import Kept
from tesserafl.methods._mixture import (
    BASE,
    GLOBAL,
    OWN,
    Gate,
    Mixture,
    named,
    new_adapter,
    new_choice,
)
from tesserafl.models.feature_adapter import FeatureAdapter
from tesserafl.models.lora import LoRA
from tesserafl.models.soft_prompts import Prompts
from tesserafl.run import evaluate
from tesserafl.run.evaluate import Evaluator

pytest.importorskip("transformers")
pytest.importorskip("peft")
# peft reads an attribute that transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

SPEC = Spec(
    kind="tokens", task="text-classification", shape=(8,), num_classes=3, vocab_size=40, pad_id=0
)
SIZES = {"num_hidden_layers": 3, "num_attention_heads": 2, "hidden_size": 16}
BERT = {**SIZES, "intermediate_size": 24}  # with dropout, which a test does not have
TOP = (r".*layer\.2\.attention\.self\.(query|value)",)
BATCH, COUNT = 4, 10
ROWS = [4, 4, 2]
PLENTY = 1 << 20
ROW_BYTES = 8 * 16 * 4


def examples_of(number: int, count: int = COUNT) -> Examples:
    draw = seeds.generator(1, number)
    tokens = torch.randint(1, 40, (count, 8), dtype=torch.int32, generator=draw)
    return Examples(inputs=tokens, labels=torch.arange(count) % 3)


def params_of(model: Model, number: int = 0) -> dict[str, Tensor]:
    draw = seeds.generator(5, number)
    return {n: 0.3 * torch.randn(s, generator=draw) for n, s in model.shapes.items()}


def block_of(name: str) -> int:
    return next((int(part) for part in name.split(".") if part.isdigit()), 3)


def moved(params: dict[str, Tensor], first: int) -> dict[str, Tensor]:
    """Others from a block on."""
    return {n: t + 1.0 if block_of(n) >= first else t for n, t in params.items()}


@dataclass
class Site:
    """An evaluator; counts the rows that each block of its model computes."""

    model: Model
    most_bytes: int = PLENTY
    calls: list[tuple[int, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        clients = tuple(
            ClientData(train=examples_of(9), test=examples_of(n + 1), validation=examples_of(n + 5))
            for n in range(2)
        )
        self.data = FederatedData(spec=SPEC, clients=clients, test=examples_of(0))
        self.evaluator = Evaluator(data=self.data, kept=Kept(most_bytes=self.most_bytes))
        module = self.evaluator._module(self.predictor(params_of(self.model)))
        (prefix,) = self.model.frozen_blocks
        for number, block in enumerate(module.get_submodule(prefix.rstrip("."))):
            # A part of the block: the block itself is called even if it does not compute.
            part = next(p for p in block.modules() if not list(p.children()))
            part.register_forward_hook(
                lambda _, args, __, number=number: self.calls.append((number, len(args[0])))
            )

    def predictor(self, params: dict[str, Tensor]) -> Predictor:
        return Predictor(model=self.model, params=params)

    def test(self, params: dict[str, Tensor], examples: Examples | None = None) -> list[int]:
        """Numbers of the blocks that compute; asserts the bits of a test without a store."""
        found = self._measured(self.predictor(params), examples or self.data.test)
        plain = Evaluator(data=self.data)
        assert found == plain.evaluate(self.predictor(params), examples or self.data.test)
        return [number for number, _ in self.calls]

    def _measured(self, predictor: Predictor, examples: Examples):
        self.calls.clear()
        return self.evaluator.evaluate(predictor, examples)


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate, "_TEXT_BATCH", BATCH)


def lora(targets: tuple[str, ...] = TOP) -> Model:
    return LoRA(config="bert", options=BERT, rank=2, targets=targets).build_model(SPEC)


def test_blocks_without_adapters_are_computed_in_the_first_test_alone() -> None:
    site = Site(lora())
    params = params_of(site.model)
    site.test(params)
    assert {number for number, _ in site.calls} == {0, 1, 2}
    for round in range(1, 4):
        assert site.test(params_of(site.model, round)) == [2] * 3
        assert [rows for _, rows in site.calls] == ROWS
    assert site.evaluator.kept.num_bytes == COUNT * ROW_BYTES


def test_with_nothing_kept_every_test_computes_all() -> None:
    site = Site(lora(), most_bytes=0)
    for _ in range(2):
        assert site.test(params_of(site.model)) == [0, 1, 2] * 3


def test_what_does_not_fit_is_computed_again() -> None:
    site = Site(lora(), most_bytes=COUNT * ROW_BYTES - 1)
    for _ in range(2):
        site.test(params_of(site.model))
        assert site.evaluator.kept.num_bytes == 0
    assert [number for number, _ in site.calls] == [0, 1, 2] * 3


def test_every_set_of_examples_has_states_of_its_own() -> None:
    site = Site(lora())
    params = params_of(site.model)
    held = [site.data.test, *(c.test for c in site.data.clients)]
    held += [c.validation for c in site.data.clients]
    for _ in range(2):
        last = [site.test(params, examples) for examples in held]
    assert last == [[2] * 3] * 5
    assert site.evaluator.kept.num_bytes == 5 * COUNT * ROW_BYTES
    site.test(params, examples_of(0))  # of nobody: nothing is known of how long they last
    assert [number for number, _ in site.calls] == [0, 1, 2] * 3


def test_adapted_blocks_below_those_that_change_are_left_out_too() -> None:
    site = Site(lora((r".*attention\.self\.(query|value)",)))
    params = params_of(site.model)
    assert site.test(params) == [0, 1, 2] * 3  # nothing is known yet
    for number in range(3):
        params = moved(params, 2)
        called = site.test(params)
        assert (called == [2] * 3) == (number > 0)
    params = moved(params, 1)  # a block more is active
    site.test(params)
    assert {number for number, _ in site.calls} == {0, 1, 2}
    params = moved(params, 1)
    assert site.test(params) == [1, 2] * 3
    params = moved(params, 0)
    assert site.test(params) == [0, 1, 2] * 3


def test_parameters_put_in_place_of_others_are_seen() -> None:
    """Zeroed where nobody trained, say: blocks below may have changed with them."""
    site = Site(lora((r".*attention\.self\.(query|value)",)))
    params = params_of(site.model)
    for _ in range(3):
        params = moved(params, 2)
        site.test(params)
    other = {name: torch.zeros_like(tensor) for name, tensor in params.items()}
    found = site.evaluator.evaluate(site.predictor(params), site.data.test, other)
    assert found == Evaluator(data=site.data).evaluate(site.predictor(other), site.data.test)
    site.test(params)
    assert [number for number, _ in site.calls] == [2] * 3


def test_an_encoder_under_a_feature_adapter_is_computed_once() -> None:
    site = Site(FeatureAdapter(config="bert", options=BERT, prompt="").build_model(SPEC))
    site.test(params_of(site.model))
    assert {number for number, _ in site.calls} == {0, 1, 2}
    assert site.test(params_of(site.model, 1)) == []


def test_nothing_lies_below_a_soft_prompt_of_a_text() -> None:
    site = Site(Prompts(config="bert", options=BERT, context=2).build_model(SPEC))
    for number in range(3):
        called = site.test(params_of(site.model, number))
    assert called == [0, 1, 2] * 3
    assert site.evaluator.kept.num_bytes == 0


@pytest.mark.parametrize("learned", [True, False])
def test_the_experts_of_a_mixture_share_what_lies_below(learned: bool) -> None:
    site = Site(lora())
    gate = Gate(learned=learned)
    own = {
        **named(GLOBAL, params_of(site.model)),
        **named(OWN, params_of(site.model, 1)),
        **(named(BASE, params_of(site.model, 2)) if learned else {}),
        **(new_adapter(16, 4, 0) | new_choice(16) if learned else {}),
    }
    mixed = Predictor(model=site.model, params=own, rule=Mixture(gate))
    plain, examples = Evaluator(data=site.data), site.data.clients[1].test
    expected = plain.evaluate(mixed, examples)
    assert site._measured(mixed, examples) == expected
    other = replace(mixed, params={n: 1.5 * t for n, t in own.items()})
    site._measured(other, examples)
    assert [number for number, _ in site.calls] == [2] * 3 * (3 if learned else 2)
    if learned:
        site.calls.clear()
        assert site.evaluator.share(mixed, examples) == plain.share(mixed, examples)
        assert [number for number, _ in site.calls] == [2] * 3
