"""Two experts of a language model: the gate chooses for every place, from what stands before it."""

from __future__ import annotations

import functools
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from tesserafl.core import seeds
from tesserafl.core.axis import Depth, LowRank, Tie, Width
from tesserafl.core.fit import HELD_OUT, IGNORED, Training, logits_of
from tesserafl.core.messages import Client, Memory, Task
from tesserafl.core.method import Predictor
from tesserafl.core.model import Model, Output, Sizes
from tesserafl.core.params import sha256
from tesserafl.data.examples import Examples, FederatedData, Spec
from tesserafl.engines import references
from tesserafl.engines.batches import widest
from tesserafl.engines.client import ClientWorker
from tesserafl.engines.cohort import Cohorts
from tesserafl.engines.kept import Kept
from tesserafl.methods import FedFMSL, PFLMoE
from tesserafl.methods import _mixture as mixture
from tesserafl.models import LoRA
from tesserafl.models.scaling import forward_of
from tesserafl.run.evaluate import Evaluator

pytest.importorskip("transformers")
pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

TIME, WORDS = 7, 12
LANGUAGE = Spec(
    kind="tokens",
    task="causal-lm",
    shape=(TIME,),
    num_classes=WORDS,
    vocab_size=WORDS,
    pad_id=WORDS - 1,
)
TRAINING = Training(lr=0.5, batch_size=4)
CLIENTS = [Client(id=i, num_examples=n) for i, n in enumerate((6, 9, 8))]
FAMILIES = {
    "gpt2": {"n_layer": 2, "n_embd": 16, "n_head": 2},
    "llama": {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 24,
    },
}
DROPOUT = ("resid_pdrop", "embd_pdrop", "attn_pdrop")
METHODS = {
    "shared": FedFMSL(schedule="all", gate_width=4, balance=0.05),
    "linear": FedFMSL(schedule="all", gate="linear"),
    "half": FedFMSL(schedule="all", gate="half"),
    "pfl_moe": PFLMoE(),
}
each_family = pytest.mark.parametrize("family", FAMILIES)
each_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


@functools.cache
def language_model(family: str = "gpt2") -> Model:
    """Two adapted blocks, without dropout, and with weights large enough to matter."""
    options = {**FAMILIES[family], "initializer_range": 0.3}
    if family == "gpt2":
        options |= dict.fromkeys(DROPOUT, 0.0)
    return LoRA(config=family, options=options, rank=2, alpha=4.0).build_model(LANGUAGE)


@functools.cache
def examples_of(client: int) -> Examples:
    """Counting upwards by a step of the client's own; the last text is shorter than the others."""
    count = CLIENTS[client].num_examples
    draw = seeds.generator(client, "texts")
    first = torch.randint(WORDS - 1, (count, 1), generator=draw)
    stream = (first + (client + 1) * torch.arange(TIME + 1)) % (WORDS - 1)
    inputs, labels = stream[:, :-1].int(), stream[:, 1:].clone()
    inputs[-1, 4:], labels[-1, 3:] = LANGUAGE.pad_id, IGNORED
    return Examples(inputs=inputs, labels=labels)


class Run:
    """Rounds of a method, with clients that remember."""

    def __init__(
        self, method: FedFMSL | PFLMoE, family: str | Model = "gpt2", **worker: object
    ) -> None:
        self.method = method
        self.model = language_model(family) if isinstance(family, str) else family
        self.state = method.init(self.model, 0, 4)
        self.memories: dict[int, Memory] = {}
        self.worker = ClientWorker(
            model=self.model, method=method, examples=examples_of, seed=0, **worker
        )

    def tasks(self) -> list[Task]:
        return list(self.method.configure(self.model, self.state, CLIENTS, TRAINING))

    def play(self, rounds: int) -> Run:
        for _ in range(rounds):
            updates = []
            asked = [(task, self.memories.get(task.client.id, {})) for task in self.tasks()]
            together = self.worker.cohorts is not None
            for part in [asked] if together else [[each] for each in asked]:
                for (task, _), answer in zip(part, self.worker.work_together(part), strict=True):
                    assert isinstance(answer, tuple), answer
                    updates.append(answer[0])
                    self.memories[task.client.id] = answer[1]
            self.state = self.method.aggregate(self.model, self.state, CLIENTS, iter(updates))
        return self

    def personal(self, client: int) -> Predictor:
        return self.method.personal(self.model, self.state, self.memories[client])


@torch.no_grad()
def answers(predictor: Predictor, inputs: Tensor) -> Tensor:
    """Logits [batch, time, words]."""
    module = predictor.model.module().eval()
    forward = forward_of(predictor.model, predictor.model.whole(), module, "none")
    rule = predictor.rule
    out = forward if rule is None else functools.partial(rule, forward)
    return out(predictor.params, inputs).logits


@torch.no_grad()
def shares_of(predictor: Predictor, inputs: Tensor) -> Tensor:
    """What the gate says, [batch, time, 2]."""
    module = predictor.model.module().eval()
    forward = forward_of(predictor.model, predictor.model.whole(), module, "none")
    return predictor.rule.shares(forward, predictor.params, inputs)


def some_texts() -> Tensor:
    return examples_of(0).inputs[:3].clone()


# What may be looked at


@each_family
@pytest.mark.parametrize("place", [1, 4, TIME - 1])
def test_a_later_token_changes_no_earlier_answer(family: str, place: int) -> None:
    own = Run(METHODS["shared"], family).play(4).personal(0)
    texts, others = some_texts(), some_texts()
    others[:, place] = (others[:, place] + 5) % (WORDS - 1)
    for read in (answers, shares_of):
        before, after = read(own, texts), read(own, others)
        torch.testing.assert_close(before[:, :place], after[:, :place], rtol=0, atol=1e-6)
        # Such a change is not lost in what the test allows.
        assert (before[:, place:] - after[:, place:]).abs().amax(dim=(1, 2)).min() > 1e-4


@each_family
def test_shares_differ_from_place_to_place(family: str) -> None:
    shares = shares_of(Run(METHODS["shared"], family).play(4).personal(0), some_texts())
    assert shares.shape == (3, TIME, 2)
    torch.testing.assert_close(shares.sum(dim=-1), torch.ones(3, TIME))
    assert (shares[..., 1].std(dim=1) > 1e-3).all()


@each_family
def test_a_text_of_one_token_is_a_text_as_a_whole(family: str) -> None:
    """Where there is one place, its features are those of the text."""
    own = Run(METHODS["shared"], family).play(4).personal(0)
    texts = some_texts()[:, :1]
    module = own.model.module().eval()
    module.per_place = False
    forward = forward_of(own.model, own.model.whole(), module, "none")
    with torch.no_grad():
        pooled = forward(mixture.part_of(own.params, "base"), texts).features
    assert pooled.shape == (3, 16)
    whole = own.rule.gate(own.params, pooled)
    torch.testing.assert_close(shares_of(own, texts), whole[:, None])


# Identities


@each_method
@each_family
def test_the_mixture_begins_as_the_global_expert(
    family: str, method: FedFMSL | PFLMoE, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(method, family).play(2)
    task = run.tasks()[0]
    fit = method.local(run.model, task, {})
    begun = {name: t for name, t in fit.params.items() if name not in fit.beside}
    memory = mixture.named("global", task.params) | mixture.named("own", begun)
    memory |= {name: fit.params[name] for name in fit.beside}
    mixed = method.personal(run.model, run.state, memory)
    whole = method.predictor(run.model, run.state)
    torch.testing.assert_close(answers(mixed, some_texts()), answers(whole, some_texts()))
    assert torch.equal(shares_of(mixed, some_texts()), torch.full((3, TIME, 2), 0.5))


def loss_of(texts: bool, held: list[bool] | None) -> tuple[Tensor, ...]:
    """Loss and slopes for three texts of four places, or for twelve examples of one."""
    draw = seeds.generator(0, "loss")
    own, other, features = (torch.randn(3, 4, n, generator=draw) for n in (5, 5, 6))
    labels = torch.randint(5, (3, 4), generator=draw)
    labels[0, 2:], labels[2, 0] = IGNORED, IGNORED
    marks = None if held is None else torch.tensor(held)
    if not texts:
        own, other, features = (t.flatten(0, 1) for t in (own, other, features))
        labels = labels.flatten()
        marks = None if marks is None else marks.repeat_interleave(4)
    params = {**mixture.new_adapter(6, 2, 0), **mixture.new_choice(6), "own": torch.ones(5)}
    params |= {n: params[n] + 0.1 for n in ("gate/widen", "gate/choose", "gate/offset")}
    params["gate/offset"] = torch.tensor([0.0, 0.7])
    leaves = {name: t.requires_grad_() for name, t in params.items()}
    extra = {"base": features, logits_of("global"): other}
    if marks is not None:
        extra[HELD_OUT] = marks
    before = sha256(extra)
    loss = mixture.MixtureLoss(mixture.Gate(temperature=0.5), own=0.3, balance=0.2)(
        lambda given, inputs: Output(inputs * given["own"], None), leaves, own, labels, extra
    )
    assert sha256(extra) == before
    return (loss, *torch.autograd.grad(loss, list(leaves.values())))


@pytest.mark.parametrize("held", [None, [False, True, False], [True, False, True]])
def test_a_place_counts_as_an_example_does(held: list[bool] | None) -> None:
    for one, other in zip(loss_of(True, held), loss_of(False, held), strict=True):
        torch.testing.assert_close(one, other)


def test_a_mixture_by_hand() -> None:
    offset = {"gate/choose": torch.tensor([[0.0, 0.0], [1.0, 0.0]]), "gate/offset": torch.zeros(2)}
    # Features (5, 3) and (3, 5) have mean 4 and deviation 1: z = (1, -1) and (-1, 1).
    shares = mixture.Gate()(offset, torch.tensor([[[5.0, 3.0], [3.0, 5.0]]]))
    high = 1 / (1 + math.exp(-1.0))
    torch.testing.assert_close(shares[0, :, 1], torch.tensor([high, 1 - high]), rtol=0, atol=1e-5)
    first, second = torch.tensor([[[1.0], [1.0]]]), torch.tensor([[[3.0], [3.0]]])
    mixed = mixture.mixed(shares, first, second)
    assert mixed[0, :, 0].tolist() == pytest.approx([1 + 2 * high, 3 - 2 * high], abs=1e-4)


def test_the_own_experts_share_is_of_the_places_that_count() -> None:
    own = Run(METHODS["shared"]).play(4).personal(0)
    examples = examples_of(0)
    data = FederatedData(spec=LANGUAGE, clients=(), test=examples)
    found = Evaluator(data=data).share(own, examples)
    each = shares_of(own, examples.inputs)[..., 1][examples.labels != IGNORED]
    assert len(each) == 6 * TIME - 4
    assert found == pytest.approx(float(each.mean()), abs=1e-6)


# Who computes it


def close(one: Run, other: Run, tolerance: float) -> None:
    for client in one.memories:
        assert one.memories[client].keys() == other.memories[client].keys()
        for name, value in one.memories[client].items():
            torch.testing.assert_close(
                other.memories[client][name], value, rtol=tolerance, atol=tolerance
            )


class Bag(nn.Module):
    """Predicts from the mean of the words so far: transformers' masks look at values, which a
    cohort's program cannot."""

    words: Tensor
    frozen: Tensor

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        draw = seeds.generator(0, "frozen")
        for name, size in {"words": (WORDS, 8), "frozen": (8, 8)}.items():
            value = torch.empty(size).copy_(torch.randn(size, generator=draw, device="cpu"))
            self.register_buffer(name, value, persistent=False)
        self.down = nn.Parameter(0.4 * torch.randn(sizes["rank"], 8))
        self.up = nn.Parameter(torch.zeros(8, sizes["rank"]))

    def forward(self, inputs: Tensor) -> Output:
        number = torch.arange(1, inputs.shape[-1] + 1, device=inputs.device)
        mean = self.words[inputs.long()].cumsum(dim=-2) / number[:, None]
        features = mean @ self.frozen.T + 2.0 * mean @ self.down.T @ self.up.T
        return Output(features @ self.words.T, features)


BAG = Model(
    build=Bag,
    sizes={"rank": 2, "layers": 1},
    widths={"rank": Width(units=2, quantum=1, size="rank")},
    depths={"layers": Depth(1, ("layers.",), last=0)},
    ties={"down": (Tie("rank", (1,)), None), "up": (None, Tie("rank", (1,)))},
    shapes={"down": (2, 8), "up": (8, 2)},
    low_rank=(LowRank("down", "up", 2.0, None),),
    feature_size=lambda: 8,
)


@each_method
@pytest.mark.parametrize("most", [references.MOST_BYTES, 0], ids=["tables", "per batch"])
def test_a_cohort_trains_as_each_client_alone(
    most: int, method: FedFMSL | PFLMoE, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(references, "MOST_BYTES", most)
    widths = [client.num_examples for client in CLIENTS]
    cohorts = Cohorts(most=4, width=lambda size: max(widest(n, size) for n in widths))
    alone, together = Run(method, BAG).play(4), Run(method, BAG, cohorts=cohorts).play(4)
    close(alone, together, 1e-4)
    own = alone.personal(0)
    if method is METHODS["shared"]:
        assert shares_of(own, some_texts())[..., 1].std() > 1e-3


@each_method
def test_what_is_kept_changes_nothing_but_rounding(method: FedFMSL | PFLMoE) -> None:
    if isinstance(method, FedFMSL):  # one block stays frozen
        method = replace(method, schedule="manual", depths=(1,))
    close(Run(method).play(4), Run(method, kept=Kept(most_bytes=1 << 24)).play(4), 1e-4)


def test_large_features_are_computed_for_every_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    method = METHODS["shared"]
    tables = Run(method).play(4)
    # Neither features nor logits of the texts of any client are that small.
    monkeypatch.setattr(references, "MOST_BYTES", 6 * TIME * WORDS * 4 - 1)
    close(tables, Run(method).play(4), 1e-4)
