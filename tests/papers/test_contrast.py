"""The contrastive loss by hand: Li, He and Song (MOON), CVPR 2021, Equations 3 and 4."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tesserafl.core import seeds
from tesserafl.core.errors import ConfigError
from tesserafl.core.fit import IGNORED, Training
from tesserafl.core.messages import Client, Memory
from tesserafl.core.model import Output
from tesserafl.core.params import Params, sha256
from tesserafl.data.examples import Examples, Spec
from tesserafl.engines.client import ClientWorker
from tesserafl.methods import MSfusion
from tesserafl.methods._contrast import Contrast, check_contrast
from tesserafl.models import CNN, HuggingFace, ModelSettings, ResNet

LOG2 = math.log(2.0)
"""Cross-entropy of two classes that the logits do not tell apart."""


def undecided(params: Params, inputs: Tensor) -> Output:
    """Features are inputs x scale; logits are all zero, and do depend on the parameters."""
    features = inputs * params["scale"]
    return Output(features[:, :2] * 0.0, features)


def loss(
    own: Sequence[Sequence[float]],
    fused: Sequence[Sequence[float]],
    negatives: Mapping[str, Sequence[Sequence[float]]],
    entries: Mapping[str, Sequence[int]],
    labels: Sequence[int] | None = None,
    weight: float = 1.0,
    temperature: float = 0.5,
) -> float:
    """Of a batch whose cross-entropy is log 2; `entries[""]` are the own ones."""
    extra = {"fused": torch.tensor(fused)}
    extra |= {name: torch.tensor(features) for name, features in negatives.items()}
    extra |= {f"{name} entries".lstrip(): torch.tensor(e) for name, e in entries.items()}
    objective = Contrast(strength=weight, temperature=temperature, negatives=tuple(negatives))
    given = torch.tensor(labels if labels is not None else [0] * len(own))
    params = {"scale": torch.ones(())}
    return float(objective(undecided, params, torch.tensor(own), given, extra))


def test_one_example_by_hand() -> None:
    # z = z+ = (1, 0), z_m = (0, 1): sim 1 and 0; -log(e^2 / (e^2 + e^0)) = log(1 + e^-2) = 0.126928
    same = {"": [0, 1], "previous": [0, 1]}
    found = loss([[1.0, 0.0]], [[1.0, 0.0]], {"previous": [[0.0, 1.0]]}, same)
    assert found - LOG2 == pytest.approx(0.126928, abs=1e-6)
    # The other way round, sim 0 and 1: log(1 + e^2) = 2.126928, twice of it with lambda 2
    found = loss([[0.0, 1.0]], [[1.0, 0.0]], {"previous": [[0.0, 1.0]]}, same, weight=2.0)
    assert found - LOG2 == pytest.approx(2 * 2.126928, abs=1e-5)
    # tau 1: log(1 + e) = 1.313262
    found = loss([[0.0, 1.0]], [[1.0, 0.0]], {"previous": [[0.0, 1.0]]}, same, temperature=1.0)
    assert found - LOG2 == pytest.approx(1.313262, abs=1e-5)


def test_only_common_channels_are_compared() -> None:
    # Own window 0 1, the other's 1 2: channel 1 alone, 4 against 5, so sim 1.
    # z+ = (4, -3) is orthogonal to z = (3, 4): sim 0. log(1 + e^2) = 2.126928
    entries = {"": [0, 1], "previous": [1, 2]}
    found = loss([[3.0, 4.0]], [[4.0, -3.0]], {"previous": [[5.0, 12.0]]}, entries)
    assert found - LOG2 == pytest.approx(2.126928, abs=1e-5)
    # What the other has elsewhere does not matter, nor do own channels that it lacks.
    found = loss([[3.0, 4.0]], [[4.0, -3.0]], {"previous": [[5.0, -900.0]]}, entries)
    assert found - LOG2 == pytest.approx(2.126928, abs=1e-5)


def test_channels_are_matched_by_their_place_in_the_whole_model() -> None:
    # A window that wraps around lists its channels in ascending order; here any order will do.
    # Own (1, 2, 3) on 0 4 5; the other (30, 10, 20) on 5 0 4: the same direction, sim 1 as z+
    entries = {"": [0, 4, 5], "previous": [5, 0, 4]}
    found = loss([[1.0, 2.0, 3.0]], [[2.0, 4.0, 6.0]], {"previous": [[30.0, 10.0, 20.0]]}, entries)
    assert found - LOG2 == pytest.approx(LOG2, abs=1e-6)


def test_every_negative_counts() -> None:
    # sim+ = 1, two negatives of sim 0: log(1 + 2 e^-2) = 0.239545
    entries = {"": [0, 1], "one": [0, 1], "two": [0, 7]}
    negatives = {"one": [[0.0, 3.0]], "two": [[0.0, 1.0]]}
    found = loss([[1.0, 0.0]], [[5.0, 0.0]], negatives, entries)
    assert found - LOG2 == pytest.approx(0.239545, abs=1e-5)


def test_equal_windows_give_moons_formula() -> None:
    draw = torch.Generator().manual_seed(3)
    z, near, far = (torch.randn(7, 5, generator=draw) for _ in range(3))
    a = torch.exp(F.cosine_similarity(z, near) / 0.3)
    b = torch.exp(F.cosine_similarity(z, far) / 0.3)
    expected = float(-torch.log(a / (a + b)).mean())
    entries = {"": [4, 5, 6, 7, 8], "previous": [4, 5, 6, 7, 8]}
    listed = (z.tolist(), near.tolist(), {"previous": far.tolist()}, entries)
    assert loss(*listed, temperature=0.3) - LOG2 == pytest.approx(expected, abs=1e-5)


def test_padding_does_not_count() -> None:
    entries = {"": [0, 1], "previous": [0, 1]}
    two = loss(
        [[1.0, 0.5], [0.2, 1.0]], [[1.0, 0.0], [1.0, 1.0]], {"previous": [[0.0, 1.0]] * 2}, entries
    )
    three = loss(
        [[1.0, 0.5], [1.0, 1.0], [0.2, 1.0]],
        [[1.0, 0.0], [-1.0, -1.0], [1.0, 1.0]],
        {"previous": [[0.0, 1.0], [1.0, 1.0], [0.0, 1.0]]},
        entries,
        labels=[0, IGNORED, 0],
    )
    assert three == pytest.approx(two, abs=1e-6)


def test_a_text_counts_once_if_one_of_its_tokens_does() -> None:
    def of_tokens(params: Params, inputs: Tensor) -> Output:
        return Output(torch.zeros(len(inputs), 3, 2) * params["scale"], inputs * params["scale"])

    labels = torch.tensor([[0, IGNORED, IGNORED], [0, 1, 1], [IGNORED] * 3])
    z = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    extra = {
        "fused": torch.tensor([[1.0, 0.0]] * 3),
        "previous": torch.tensor([[0.0, 1.0]] * 3),
        "entries": torch.arange(2),
        "previous entries": torch.arange(2),
    }
    objective = Contrast(strength=1.0, temperature=0.5, negatives=("previous",))
    found = float(objective(of_tokens, {"scale": torch.ones(())}, z, labels, extra))
    assert found - LOG2 == pytest.approx((0.126928 + 2.126928) / 2, abs=1e-5)


@pytest.mark.parametrize("own", [[[1.0, 2.0]], [[0.0, 0.0]]], ids=["no common channel", "dead"])
def test_the_gradient_is_finite_where_nothing_can_be_compared(own: list[list[float]]) -> None:
    scale = torch.ones((), requires_grad=True)
    extra = {
        "fused": torch.tensor([[1.0, 0.0]]),
        "previous": torch.tensor([[1.0, 1.0]]),
        "entries": torch.tensor([0, 1]),
        "previous entries": torch.tensor([2, 3]),
    }
    objective = Contrast(strength=1.0, temperature=0.5, negatives=("previous",))
    inputs = torch.tensor(own, requires_grad=True)
    value = objective(undecided, {"scale": scale}, inputs, torch.tensor([0]), extra)
    by_scale, by_inputs = torch.autograd.grad(value, [scale, inputs])
    assert torch.isfinite(value)
    assert torch.isfinite(by_scale)
    assert torch.isfinite(by_inputs).all()


def linear(params: Params, inputs: Tensor) -> Output:
    features = torch.tanh(inputs @ params["body"])
    return Output(features @ params["head"], features)


def test_clients_of_a_cohort_are_computed_at_once() -> None:
    draw = torch.Generator().manual_seed(5)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw)

    params = {"body": random(3, 6, 4), "head": random(3, 4, 2)}
    inputs, labels = random(3, 5, 6), torch.tensor([[0, 1, 0, IGNORED, 1]] * 3)
    extra = {
        "fused": random(3, 5, 4),
        "previous": random(3, 5, 4),
        "peer 0": random(3, 5, 4),
        "entries": torch.tensor([[0, 1, 2, 3], [2, 3, 4, 5], [0, 5, 6, 7]]),
        "previous entries": torch.tensor([[1, 2, 3, 4], [3, 4, 5, 6], [0, 1, 6, 7]]),
        "peer 0 entries": torch.tensor([[4, 5, 6, 7], [2, 3, 4, 5], [1, 5, 6, 7]]),
    }
    objective = Contrast(strength=0.7, temperature=0.5, negatives=("previous", "peer 0"))

    def value(params: Params, inputs: Tensor, labels: Tensor, extra: Params) -> Tensor:
        return objective(linear, params, inputs, labels, extra)

    gradients = torch.func.vmap(torch.func.grad_and_value(value))
    together, values = gradients(params, inputs, labels, extra)
    for client in range(3):
        own = {name: tensor[client] for name, tensor in params.items()}
        given = {name: tensor[client] for name, tensor in extra.items()}
        alone, single = torch.func.grad_and_value(value)(own, inputs[client], labels[client], given)
        torch.testing.assert_close(values[client], single)
        for name, gradient in alone.items():
            torch.testing.assert_close(together[name][client], gradient)


def test_references_are_not_trained_and_the_own_features_are() -> None:
    # Nearer to z+ and farther from z_m: a step along the gradient turns z towards z+.
    z = torch.tensor([[1.0, 1.0]], requires_grad=True)
    extra = {
        "fused": torch.tensor([[1.0, 0.0]]),
        "previous": torch.tensor([[0.0, 1.0]]),
        "entries": torch.arange(2),
        "previous entries": torch.arange(2),
    }
    objective = Contrast(strength=1.0, temperature=0.5, negatives=("previous",))
    value = objective(undecided, {"scale": torch.ones(())}, z, torch.tensor([0]), extra)
    (gradient,) = torch.autograd.grad(value, [z])
    assert gradient[0, 0] < 0 < gradient[0, 1]


def test_settings_that_are_no_loss() -> None:
    check_contrast(0.0, 0.1, 1)
    with pytest.raises(ConfigError, match=r"method\.contrast must be 0 or more"):
        check_contrast(-0.1, 0.5, 1)
    for temperature in (0.0, -1.0, math.nan):
        with pytest.raises(ConfigError, match=r"method\.temperature must be positive"):
            check_contrast(0.1, temperature, 1)
    with pytest.raises(ConfigError, match=r"method\.peer_negatives must be at least 1; got 0"):
        check_contrast(0.1, 0.5, 0)


SMALL = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 16,
}
COLOURS = Spec(kind="image", task="image-classification", shape=(3, 16, 16), num_classes=3)
TEXTS = Spec(
    kind="tokens", task="text-classification", shape=(8,), num_classes=3, vocab_size=40, pad_id=0
)
SPEECH = replace(TEXTS, task="causal-lm", num_classes=40)


@pytest.mark.parametrize(
    ("settings", "spec"),
    [
        (CNN(channels=(16, 16), group_size=4), COLOURS),
        (ResNet(channels=(16, 32), blocks=(1, 1)), COLOURS),
        (HuggingFace(config="vit", options={**SMALL, "patch_size": 8}), COLOURS),
        (HuggingFace(config="bert", options=SMALL), TEXTS),
        (HuggingFace(config="gpt2", options={"n_embd": 16, "n_layer": 1, "n_head": 4}), SPEECH),
    ],
    ids=["cnn", "resnet", "vit", "bert", "gpt2"],
)
def test_it_trains_images_and_texts(settings: ModelSettings, spec: Spec) -> None:
    model = settings.build_model(spec)
    draw = seeds.generator(0, "examples")
    if spec.kind == "image":
        inputs = torch.randint(0, 256, (6, *spec.shape), generator=draw).to(torch.uint8)
    else:
        inputs = torch.randint(1, 40, (6, 8), generator=draw).int()
    labels = inputs.long() if spec.task == "causal-lm" else torch.arange(6) % 3
    examples = Examples(inputs=inputs, labels=labels)
    trained = {}
    for contrast in (0.0, 1.0):
        method = MSfusion(ratio=(0.5,), contrast=contrast, negatives="both")
        worker = ClientWorker(model=model, method=method, examples=lambda client: examples, seed=0)
        state, memories = method.init(model, 0, 5), {0: Memory(), 1: Memory()}
        clients = [Client(id=number, num_examples=6) for number in memories]
        for _ in range(2):
            updates = []
            for task in method.configure(model, state, clients, Training(batch_size=3)):
                update, memories[task.client.id] = worker.work(task, memories[task.client.id])
                updates.append(update)
            state = method.aggregate(model, state, clients, updates)
        assert all(bool(torch.isfinite(tensor).all()) for tensor in state.params.values())
        # Three frozen sub-models (the fused one, the own last one, a peer's), 6 examples each.
        looked_at = updates[0].metrics.get("reference_examples", 0.0)
        assert looked_at == (18.0 if contrast else 0.0)
        trained[contrast] = sha256(state.params)
    assert trained[0.0] != trained[1.0]
