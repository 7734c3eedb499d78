"""PFL-MoE: FedAvg of adapters, then two experts and a gate on every client, by hand."""

from __future__ import annotations

import functools
import itertools
import math

import pytest
import torch
from torch import Tensor

from tesserafl.core.errors import ConfigError
from tesserafl.core.fit import HELD_OUT, Training, logits_of
from tesserafl.core.messages import Client, Memory, Task, Update
from tesserafl.core.method import Predictor
from tesserafl.core.model import Model, Output
from tesserafl.core.params import sha256
from tesserafl.data.examples import Examples, FederatedData, Spec
from tesserafl.engines.client import ClientWorker
from tesserafl.methods import FedIT, PFLMoE
from tesserafl.methods._mixture import part_of
from tesserafl.models import MLP, LoRA
from tesserafl.models.scaling import forward_of
from tesserafl.run.evaluate import Evaluator

pytest.importorskip("transformers")
pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

IMAGES = Spec(kind="image", task="image-classification", shape=(1, 4, 4), num_classes=3)
TRAINING = Training(lr=0.2, batch_size=4)
CLIENTS = [Client(id=i, num_examples=n) for i, n in enumerate((6, 10, 8))]
GATE = {"gate/choose", "gate/offset"}


@functools.cache
def vit() -> Model:
    options = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "patch_size": 2,
        "initializer_range": 0.3,
    }
    return LoRA(config="vit", options=options, rank=2, alpha=4.0).build_model(IMAGES)


@functools.cache
def examples_of(client: int) -> Examples:
    draw = torch.Generator().manual_seed(client)
    labels = torch.arange(CLIENTS[client].num_examples) % 2 + client % 2
    noise = torch.randint(0, 90, (len(labels), 1, 4, 4), generator=draw)
    inputs = noise + 80 * labels[:, None, None, None]
    return Examples(inputs=inputs.clamp(max=255).to(torch.uint8), labels=labels)


class Run:
    """Rounds of a method, with clients that remember."""

    def __init__(self, method: PFLMoE | FedIT, rounds: int = 4) -> None:
        self.method = method
        self.state = method.init(vit(), 0, rounds)
        self.memories: dict[int, Memory] = {}
        self.worker = ClientWorker(model=vit(), method=method, examples=examples_of, seed=0)

    def tasks(self) -> list[Task]:
        return list(self.method.configure(vit(), self.state, CLIENTS, TRAINING))

    def play(self, rounds: int = 1, clients: list[Client] = CLIENTS) -> list[Update]:
        for _ in range(rounds):
            updates = []
            for task in self.method.configure(vit(), self.state, clients, TRAINING):
                update, memory = self.worker.work(task, self.memories.get(task.client.id, {}))
                self.memories[task.client.id] = memory
                updates.append(update)
            self.state = self.method.aggregate(vit(), self.state, clients, iter(updates))
        return updates

    def personal(self, client: int) -> Predictor:
        return self.method.personal(vit(), self.state, self.memories.get(client, {}))


def in_stage_two(**settings: object) -> Run:
    run = Run(PFLMoE(**settings))
    run.play(2)
    return run


def some_inputs() -> Tensor:
    return examples_of(0).batch(torch.arange(6))[0]


@torch.no_grad()
def answers(predictor: Predictor) -> Tensor:
    module = predictor.model.module().eval()
    forward = forward_of(predictor.model, predictor.model.whole(), module, "none")
    if predictor.rule is not None:
        return predictor.rule(forward, predictor.params, some_inputs()).logits
    return forward(predictor.params, some_inputs()).logits


def test_stage_one_is_fedit_to_the_bit() -> None:
    ours, theirs = Run(PFLMoE()), Run(FedIT())
    for _ in range(2):
        sent = ours.play()
        theirs.play()
        assert all(update.delta.keys() == vit().shapes.keys() for update in sent)
    assert sha256(ours.state.params) == sha256(theirs.state.params)
    assert not any(ours.memories.values())
    # The half of the rounds is over: from here on the global expert stays.
    ours.play(2)
    assert sha256(ours.state.params) == sha256(theirs.state.params)


@pytest.mark.parametrize("share", [0.0, 0.25, 0.75, 1.0])
def test_stage_one_has_its_share_of_the_rounds(share: float) -> None:
    run = Run(PFLMoE(stage_one=share))
    averaged = []
    for _ in range(4):
        averaged.append(bool(run.play()[0].delta))
    assert averaged == [round < 4 * share for round in range(4)]


def test_in_stage_two_the_global_expert_goes_down_once_and_nothing_else() -> None:
    run = in_stage_two()
    first = run.tasks()
    assert all(task.params.keys() == vit().shapes.keys() for task in first)
    before = sha256(run.state.params)
    for updates in (run.play(1, CLIENTS[:2]), run.play(1, CLIENTS[:2])):
        assert [update.num_bytes for update in updates] == [0, 0]
        assert sha256(run.state.params) == before
        # Who was away still has to get it.
        assert [bool(task.num_bytes) for task in run.tasks()] == [False, False, True]
    assert [sha256(part_of(run.memories[i], "global")) for i in (0, 1)] == [before, before]


def test_the_own_expert_and_the_mixture_begin_as_the_global_expert() -> None:
    run = in_stage_two()
    task = run.tasks()[0]
    fit = run.method.local(vit(), task, {})
    assert fit.beside == GATE == fit.params.keys() - vit().shapes.keys()
    assert all(torch.equal(fit.params[n], run.state.params[n]) for n in vit().shapes)
    assert not any(fit.params[name].any() for name in GATE)
    fitted = run.worker.work(task, {})[1]
    begun = {name: fit.params[name.removeprefix("own/")] for name in fitted if "own/" in name}
    memory = {**fitted, **begun, **{name: fit.params[name] for name in GATE}}
    mixed = run.method.personal(vit(), run.state, memory)
    whole = run.method.predictor(vit(), run.state)
    torch.testing.assert_close(answers(mixed), answers(whole), rtol=0, atol=1e-6)


def test_the_answer_is_the_mixture_of_both_experts() -> None:
    """y = g global(x) + (1 - g) own(x), g from the frozen model's features."""
    run = in_stage_two()
    run.play(2)
    found, memory = run.personal(1), run.memories[1]
    assert {name for name in memory if name.startswith("gate/")} == GATE

    def parted(params: dict[str, Tensor]) -> Output:
        module = vit().module().eval()
        with torch.no_grad():
            return forward_of(vit(), vit().whole(), module, "none")(params, some_inputs())

    ups = {pair.up for pair in vit().low_rank}
    expert = part_of(memory, "global")
    frozen = {n: torch.zeros_like(t) if n in ups else t for n, t in expert.items()}
    features = parted(frozen).features
    assert features is not None
    z = features - features.mean(dim=1, keepdim=True)
    z = z / (z.square().mean(dim=1, keepdim=True) + 1e-5).sqrt()
    scores = z @ memory["gate/choose"].T + memory["gate/offset"]
    own = (1 / (1 + (scores[:, 0] - scores[:, 1]).exp()))[:, None]
    expected = (1 - own) * parted(expert).logits
    expected = expected + own * parted(part_of(memory, "own")).logits
    torch.testing.assert_close(answers(found), expected, rtol=0, atol=1e-5)
    assert own.std() > 0  # it differs from example to example

    # What runs say of it: accuracy and the own expert's mean share.
    evaluator = Evaluator(data=FederatedData(spec=IMAGES, clients=(), test=examples_of(0)))
    labels = examples_of(0).labels
    accuracy = float((expected.argmax(dim=1) == labels).double().mean())
    assert evaluator.evaluate(found, examples_of(0)).accuracy == pytest.approx(accuracy)
    share = evaluator.share(found, examples_of(0))
    assert share == pytest.approx(float(own.mean()), abs=1e-5) and abs(share - 0.5) > 1e-3
    assert evaluator.share(run.method.predictor(vit(), run.state), examples_of(0)) is None


def test_the_loss_is_the_mixtures_and_the_own_experts() -> None:
    run = in_stage_two()
    fit = run.method.local(vit(), run.tasks()[0], {})
    assert fit.held_out == 0.0 and not fit.validate
    own = torch.tensor([[0.0, 1.0]])
    extra = {"base": torch.randn(1, 2), logits_of("global"): torch.tensor([[2.0, 0.0]])}
    gate = {"gate/choose": torch.zeros(2, 2), "gate/offset": torch.zeros(2)}
    loss = fit.objective(lambda *_: Output(own, None), gate, own, torch.tensor([0]), extra)
    # Mixed logits (1, 1/2); the own expert is behind by 1.
    expected = math.log(1 + math.exp(-0.5)) + math.log(1 + math.e)
    assert float(loss) == pytest.approx(expected)
    assert HELD_OUT not in fit.extra


def test_the_experts_stay_apart_and_unknown_clients_get_the_global_one() -> None:
    run = in_stage_two()
    run.play(2, CLIENTS[:2])
    whole = answers(run.method.predictor(vit(), run.state))
    found = [answers(run.personal(client)) for client in (0, 1)]
    assert all(not torch.allclose(a, b) for a, b in itertools.combinations([*found, whole], 2))
    assert torch.equal(answers(run.personal(2)), whole)
    # What others do in later rounds changes nothing for a client.
    run.play(1, CLIENTS[1:])
    assert torch.equal(answers(run.personal(0)), found[0])


def test_halves_need_no_gate() -> None:
    run = in_stage_two(gate="half", held_out=0.5)
    fit = run.method.local(vit(), run.tasks()[0], {})
    assert fit.params.keys() == vit().shapes.keys()
    assert not fit.beside and fit.held_out == 0.0  # there is nothing that would learn there
    run.play()
    memory = run.memories[0]
    assert not any(name.startswith("gate/") for name in memory)
    experts = [
        answers(Predictor(model=vit(), params=part_of(memory, e))) for e in ("global", "own")
    ]
    mixed = answers(run.personal(0))
    torch.testing.assert_close(mixed, (experts[0] + experts[1]) / 2, rtol=0, atol=1e-6)


def test_with_fewer_ranks_a_client_has_smaller_experts() -> None:
    run = in_stage_two(ratio=(1.0, 0.5))
    run.play(2)
    assert [run.personal(client).model.sizes["rank"] for client in (0, 1)] == [2, 1]
    assert answers(run.personal(1)).shape == (6, 3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stage_one": 1.5}, r"method.stage_one must be in \[0, 1\]; got 1.5"),
        ({"stage_one": -0.1}, "method.stage_one"),
        ({"held_out": 1.0}, "method.held_out"),
        ({"own": -1.0}, "method.own"),
        ({"balance": -1.0}, "method.balance"),
        ({"temperature": 0.0}, "method.temperature"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PFLMoE(**settings).init(vit(), 0, 4)


def test_a_model_without_adapters_is_refused() -> None:
    model = MLP(hidden=(8,)).build_model(IMAGES)
    with pytest.raises(ConfigError, match="averages low-rank adapters"):
        PFLMoE().init(model, 0, 4)
