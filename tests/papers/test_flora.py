"""FLoRA by hand: Wang et al., NeurIPS 2024; and merged weights in a real model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from worked import TRAINING, adapted, answer, clients, setting, state_of, trained_factors, values

from tesserafl.core.axis import LowRank, Tie, Width
from tesserafl.core.errors import ConfigError
from tesserafl.core.lowrank import aggregation_error, merged
from tesserafl.core.messages import Task
from tesserafl.core.model import Model, Output
from tesserafl.data.examples import Spec
from tesserafl.methods import FedIT, FedSALoRA, FFALoRA, FlexLoRA, FLoRA, HetLoRA
from tesserafl.models import LoRA


class Layer(nn.Module):
    """W [3, 2] and an adapter of alpha / r = 2."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(3, 2))
        self.a = nn.Parameter(torch.randn(rank, 2))
        self.b = nn.Parameter(torch.zeros(3, rank))

    def forward(self, inputs: Tensor) -> Output:
        return Output(inputs @ (self.w + 2.0 * self.b @ self.a).T, None)


def model_of(rank: int) -> Model:
    return Model(
        build=lambda sizes: Layer(sizes["rank"]),
        sizes={"rank": rank},
        widths={"rank": Width(rank, 1, "rank")},
        depths={},
        ties={
            "w": (None, None),
            "a": (Tie("rank", (1,)), None),
            "b": (None, Tie("rank", (1,))),
        },
        shapes={"w": (3, 2), "a": (rank, 2), "b": (3, rank)},
        low_rank=(LowRank("a", "b", 2.0, "w"),),
    )


def tasks_of(model: Model, method: FLoRA, count: int = 2) -> tuple[object, list[Task]]:
    state = method.init(model, 0, 5)
    return state, list(method.configure(model, state, clients(*[1] * count), TRAINING))


def test_the_weighted_products_are_added_to_the_weight() -> None:
    # n = 1, 3.  A_0 = (1 2), B_0 = (4 0 0)^T: (4 8; 0 0; 0 0), A_1 = (0 1), B_1 = (0 4 4)^T.
    # W = 2 (1/4 (4 8; 0 0; 0 0) + 3/4 (0 0; 0 4; 0 4)) = (2 4; 0 6; 0 6)
    model, asked, method = model_of(1), clients(1, 3), FLoRA()
    state = replace(state_of(model), seed=7)
    one, other = method.configure(model, state, asked, TRAINING)
    updates = [
        setting(one, a=[[1, 2]], b=[[4], [0], [0]]),
        setting(other, a=[[0, 1]], b=[[0], [4], [4]]),
    ]
    after = method.aggregate(model, state, asked, updates)
    assert values(after.params, "w") == [[2.0, 4.0], [0.0, 6.0], [0.0, 6.0]]
    assert after.round == 1
    # The adapters begin anew: nothing is changed twice, and every round draws others.
    assert not after.params["b"].any() and after.params["a"].any()
    again = method.aggregate(model, after, asked, [replace(u, round=1) for u in updates])
    assert not torch.equal(again.params["a"], after.params["a"])


@pytest.mark.parametrize("ratio", [(1.0,), (1.0, 0.5), (0.25, 1.0, 0.5)])
def test_it_is_exact_for_any_ranks(ratio: tuple[float, ...]) -> None:
    model, method, asked = model_of(4), FLoRA(ratio=ratio), clients(1, 2, 5)
    state = method.init(model, 0, 5)
    tasks = list(method.configure(model, state, asked, TRAINING))
    updates = [trained_factors(task, seed) for seed, task in enumerate(tasks)]
    for update in updates:
        update.delta.pop("w")  # frozen: not reported
    mean = torch.zeros(3, 2, dtype=torch.float64)
    shares = []
    for task, update, share in zip(tasks, updates, (1 / 8, 2 / 8, 5 / 8), strict=True):
        own = {name: task.params[name] + change for name, change in update.delta.items()}
        mean += share * 2.0 * own["b"].double() @ own["a"].double()
        shares.append((own, share))
    after = method.aggregate(model, state, asked, updates)
    came = after.params["w"].double() - state.params["w"].double()
    assert float((came - mean).norm() / mean.norm()) < 1e-6
    error = aggregation_error(model, after.params, shares, state.params)
    assert error is not None and error < 1e-6
    backwards = method.aggregate(model, state, asked, updates[::-1])
    assert torch.equal(backwards.params["w"], after.params["w"])


def test_merged_weights_are_frozen_on_clients() -> None:
    model, method = model_of(2), FLoRA()
    _, (task, _) = tasks_of(model, method)
    fit = method.local(model, task, {})
    assert fit.trainable == {"a", "b"} and "w" in fit.params


def test_without_answers_nothing_moves() -> None:
    model, method, asked = model_of(2), FLoRA(), clients(1)
    state = state_of(model)
    after = method.aggregate(model, state, asked, [])
    assert all(torch.equal(after.params[name], state.params[name]) for name in state.params)


def test_a_turned_weight_gets_the_product_turned() -> None:
    pair = LowRank("a", "b", 2.0, "w", turned=True)
    up, down = torch.tensor([[1.0], [2.0], [3.0]]).double(), torch.tensor([[1.0, 10.0]]).double()
    assert merged(pair, torch.zeros(2, 3), up, down).tolist() == [[2.0, 4.0, 6.0], [20, 40, 60]]


def test_a_model_that_cannot_merge_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"add --model\.merge"):
        FLoRA().init(adapted(2, 2, 2), 0, 1)


def test_a_saved_adapter_is_merged_once() -> None:
    saved = {"w": torch.ones(3, 2), "a": torch.ones(2, 2), "b": torch.ones(3, 2)}
    model, method, asked = replace(model_of(2), pretrained=lambda: saved), FLoRA(), clients(1)
    state = method.init(model, 0, 5)
    for _ in range(3):  # nobody learns anything
        (task,) = method.configure(model, state, asked, TRAINING)
        state = method.aggregate(model, state, asked, [answer(task, 0.0, w=0.0)])
        assert values(state.params, "w") == [[5.0, 5.0]] * 3  # 1 + 2 x (1 + 1)
        assert not state.params["b"].any()


def test_weights_that_may_be_merged_into_are_for_no_other_method() -> None:
    for method in (FedIT(), FFALoRA(), FlexLoRA(), HetLoRA(), FedSALoRA()):
        with pytest.raises(ConfigError, match=r"leave --model\.merge away"):
            method.init(model_of(2), 0, 1)


SPEECH = Spec(kind="tokens", task="causal-lm", shape=(6,), num_classes=30, vocab_size=30, pad_id=0)


@pytest.mark.parametrize(
    ("config", "options"),
    [
        ("gpt2", {"n_embd": 16, "n_layer": 1, "n_head": 4}),  # keeps [in, out]
        (
            "llama",
            {
                "hidden_size": 16,
                "num_hidden_layers": 1,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "intermediate_size": 16,
            },
        ),
    ],
)
def test_a_merged_model_says_what_the_adapted_one_said(
    config: str, options: dict[str, int], tmp_path: Path
) -> None:
    model = LoRA(config=config, options=dict(options), rank=2, merge=True).build_model(SPEECH)
    method, asked = FLoRA(), clients(1)
    state = method.init(model, 0, 5)
    (task,) = method.configure(model, state, asked, TRAINING)
    update = answer(task, 0.0)
    for number, name in enumerate(sorted(update.delta)):
        frozen = name.endswith("base_layer.weight")
        draw = torch.Generator().manual_seed(number)
        shape = update.delta[name].shape
        update.delta[name] = torch.zeros(shape) if frozen else torch.randn(shape, generator=draw)
    own = {name: task.params[name] + change for name, change in update.delta.items()}
    after = method.aggregate(model, state, asked, [update])
    module, tokens = model.module().eval(), torch.tensor([[1, 2, 3, 4, 5]])

    def logits(params: dict[str, Tensor]) -> Tensor:
        with torch.no_grad():
            out: Output = torch.func.functional_call(module, params, (tokens,))
        return out.logits

    begun = logits(state.params)
    assert float((logits(own) - begun).abs().max()) > 1e-3
    assert torch.allclose(logits(after.params), logits(own), atol=1e-5)
    assert torch.equal(logits(state.params), begun)  # the frozen copy was not written to

    import transformers

    with torch.no_grad():
        for name, value in module.named_parameters():
            value.copy_(after.params[name])
    assert model.save is not None
    model.save(module, str(tmp_path))
    assert not (tmp_path / "adapter").exists()  # it would be nothing without the weights
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.allclose(loaded(tokens).logits, logits(after.params), atol=1e-5)
