"""Lower blocks that a fit does not train are computed once, and results are what they were."""

import functools
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tesserafl.core import seeds
from tesserafl.core.fit import CrossEntropy, Fit, Fitted, Training, logits_of
from tesserafl.core.messages import Client, Task
from tesserafl.core.model import Model
from tesserafl.data.examples import Examples, Spec
from tesserafl.engines import kept as kept_module
from tesserafl.engines.client import ClientWorker
from tesserafl.engines.execute import execute, measured
from tesserafl.engines.kept import Kept, Shelf
from tesserafl.models.lora import LoRA
from tesserafl.models.scaling import forward_of, hollow

pytest.importorskip("transformers")
pytest.importorskip("peft")
# peft reads an attribute that transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

HEADS = {"num_hidden_layers": 3, "num_attention_heads": 4, "hidden_size": 32}
BERT_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
FAMILIES = {
    "gpt2": {**HEADS, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "llama": {**HEADS, "num_key_value_heads": 2, "intermediate_size": 48},
    "bert": {**HEADS, "intermediate_size": 48, **BERT_DROPOUT},
    "vit": {**HEADS, "intermediate_size": 48, "patch_size": 4},
}
TEXTS = Spec(kind="tokens", task="text-classification", shape=(10,), num_classes=3, vocab_size=40)
LANGUAGE = Spec(
    kind="tokens", task="causal-lm", shape=(10,), num_classes=40, vocab_size=40, pad_id=39
)
IMAGES = Spec(kind="image", task="image-classification", shape=(3, 16, 16), num_classes=3)
SPECS = {"gpt2": LANGUAGE, "llama": LANGUAGE, "bert": TEXTS, "vit": IMAGES}
TRAINING = Training(lr=0.1, epochs=2, batch_size=4)
FAMILY = pytest.mark.parametrize("family", FAMILIES)
PLENTY = 1 << 30


@functools.cache
def tiny(family: str, **more) -> Model:
    options = {**FAMILIES[family], **more}
    return LoRA(config=family, options=options, rank=2).build_model(SPECS[family])


def examples_of(spec: Spec, count: int = 10, client: int = 0) -> Examples:
    draw = seeds.generator(3, client)
    labels = torch.arange(count) % 3
    if spec.kind == "image":
        pixels = torch.randint(0, 256, (count, *spec.shape), dtype=torch.uint8, generator=draw)
        return Examples(inputs=pixels, labels=labels)
    tokens = torch.randint(1, 38, (count, *spec.shape), dtype=torch.int32, generator=draw)
    tokens[0, -3:] = spec.pad_id
    if spec.task == "causal-lm":
        labels = tokens.long().roll(-1, 1)
        labels[:, -1] = -100
    return Examples(inputs=tokens, labels=labels)


def params_of(model: Model) -> dict[str, Tensor]:
    """Adapters that change something, in all blocks."""
    draw = seeds.generator(5)
    return {n: 0.2 * torch.randn(s, generator=draw) for n, s in model.shapes.items()}


def block_of(name: str) -> int | None:
    numbers = [int(part) for part in name.split(".") if part.isdigit()]
    return numbers[0] if numbers else None


def fit_of(model: Model, first: int = 2, **changes) -> Fit:
    """Trains the adapters of the blocks from `first` on, and the head."""
    names = {n for n in model.shapes if (b := block_of(n)) is None or b >= first}
    given = {"params": params_of(model), "training": TRAINING, "trainable": frozenset(names)}
    return Fit(**(given | changes))


@dataclass(kw_only=True)
class Site:
    """A client with a module; counts how often each block is computed."""

    model: Model
    examples: Examples
    kept: Kept
    client: int = 0

    def __post_init__(self) -> None:
        self.module = hollow(self.model.module()).train()
        self.forward = forward_of(self.model, self.model.whole(), self.module, "none")
        (depth,) = self.model.depths.values()
        (self.prefix,) = depth.prefixes
        self.calls: list[int] = []
        for number, block in enumerate(self.blocks):
            # A part of the block: the block itself is called even if it does not compute.
            part = next(p for p in block.modules() if not list(p.children()))
            part.register_forward_hook(lambda *_, number=number: self.calls.append(number))

    @property
    def blocks(self) -> nn.ModuleList:
        return self.module.get_submodule(self.prefix.rstrip("."))

    @property
    def shelf(self) -> Shelf:
        return Shelf(kept=self.kept, client=self.client, forward="model", prefixes=(self.prefix,))

    def train(self, fit: Fit, round: int = 0) -> Fitted:
        self.calls.clear()
        draw = seeds.generator(4, round, self.client)
        with seeds.seeded(6, round):
            return execute(
                fit, self.forward, self.examples, draw, "cpu", self.module, shelf=self.shelf
            )


def site(family: str, most_bytes: int = PLENTY, **more) -> Site:
    kept = Kept(most_bytes=most_bytes)
    return Site(model=tiny(family, **more), examples=examples_of(SPECS[family]), kept=kept)


def assert_close(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for name in left:
        torch.testing.assert_close(left[name], right[name], rtol=1e-4, atol=1e-6)


def assert_bits(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


@FAMILY
@pytest.mark.parametrize("first", [1, 2, 3])  # 3: the head alone, or for language models nothing
def test_results_are_those_of_the_whole_model(family: str, first: int) -> None:
    plain, split = site(family, 0), site(family)
    names = fit_of(plain.model, first).trainable
    if not names:
        return
    fit = fit_of(plain.model, first)
    expected, found = plain.train(fit), split.train(fit)
    assert split.kept.num_bytes > 0
    assert_close(found.params, expected.params)
    assert found.metrics["loss"] == pytest.approx(expected.metrics["loss"], rel=1e-4)
    start = fit.params
    assert any(not torch.equal(start[n], t) for n, t in found.params.items())


@FAMILY
def test_lower_blocks_are_computed_once(family: str) -> None:
    worker = site(family)
    fit = fit_of(worker.model)
    worker.train(fit)
    worker.calls.clear()
    worker.train(fit, round=1)
    # Three batches in each of two epochs.
    assert worker.calls == [2] * 6
    other = site(family, 0)
    other.train(fit)
    assert other.calls == [0, 1, 2] * 6


def test_a_first_round_computes_the_lower_blocks_once_per_example() -> None:
    worker = site("bert")
    fit = fit_of(worker.model)
    worker.train(fit)  # looks at the module
    worker.client = 1
    worker.train(fit)
    assert worker.calls == [0, 1] * 3 + [2] * 6


def test_a_changed_lower_parameter_is_noticed() -> None:
    worker, plain = site("bert"), site("bert", 0)
    fit = fit_of(worker.model)
    worker.train(fit)
    before = worker.kept.num_bytes
    lower = next(n for n in fit.params if block_of(n) == 1 and "value.lora_A" in n)
    changed = replace(fit, params=fit.params | {lower: -4.0 * fit.params[lower]})
    found = worker.train(changed, round=1)
    assert worker.calls == [0, 1] * 3 + [2] * 6
    assert worker.kept.num_bytes == 2 * before
    assert_close(found.params, plain.train(changed, round=1).params)
    old = plain.train(fit, round=1).params
    assert any(not torch.allclose(found.params[n], old[n], atol=1e-5) for n in old)


def test_a_changed_upper_parameter_does_not_matter_below() -> None:
    worker, plain = site("bert"), site("bert", 0)
    fit = fit_of(worker.model)
    worker.train(fit)
    upper = next(n for n in fit.params if block_of(n) == 2 and "value.lora_A" in n)
    changed = replace(fit, params=fit.params | {upper: -4.0 * fit.params[upper]})
    found = worker.train(changed, round=1)
    assert worker.calls == [2] * 6
    assert_close(found.params, plain.train(changed, round=1).params)


@pytest.mark.parametrize(
    "more", [{"hidden_dropout_prob": 0.1}, {"attention_probs_dropout_prob": 0.1}]
)
def test_dropout_below_switches_it_off(more: dict[str, float]) -> None:
    worker, plain = site("bert", **more), site("bert", 0, **more)
    fit = fit_of(worker.model)
    found = worker.train(fit)
    assert worker.kept.num_bytes == 0
    worker.train(fit)
    assert worker.calls == [0, 1, 2] * 6
    assert_bits(found.params, plain.train(fit).params)


def test_dropout_above_drops_what_it_drops_without() -> None:
    more = {"classifier_dropout": 0.5}
    worker, plain = site("bert", **more), site("bert", 0, **more)
    fit = fit_of(worker.model)
    found, expected = worker.train(fit), plain.train(fit)
    assert worker.kept.num_bytes > 0
    assert_close(found.params, expected.params)
    assert_close(worker.train(fit).params, expected.params)  # kept: nothing is looked at


def test_augmented_images_are_computed_anew() -> None:
    worker, plain = site("vit"), site("vit", 0)
    fit = fit_of(worker.model, training=replace(TRAINING, augment=True))
    assert_bits(worker.train(fit).params, plain.train(fit).params)
    assert worker.kept.num_bytes == 0


def test_what_has_gone_comes_back_to_the_same_bits() -> None:
    whole = site("gpt2")
    fit = fit_of(whole.model)
    expected = [whole.train(fit, round).params for round in range(2)]
    size = whole.kept.num_bytes
    tight = site("gpt2", size)  # room for one client
    others = examples_of(LANGUAGE, 10, client=1)
    found = []
    for round in range(2):
        found.append(tight.train(fit, round).params)
        mine, tight.examples, tight.client = tight.examples, others, 1
        tight.train(fit, round)
        assert tight.kept.num_bytes == size
        tight.examples, tight.client = mine, 0
    for one, other in zip(expected, found, strict=True):
        assert_bits(one, other)


def test_what_is_larger_than_the_bound_is_not_kept_and_no_block_is_left_out() -> None:
    size = 10 * 10 * 32 * 4  # examples, time, width, bytes
    worker, small, plain = site("gpt2", size), site("gpt2", size - 1), site("gpt2", 0)
    fit = fit_of(worker.model)
    worker.train(fit)
    assert worker.kept.num_bytes == size
    assert_bits(small.train(fit).params, plain.train(fit).params)
    assert small.kept.num_bytes == 0


@FAMILY
def test_two_processes_give_the_same_bits(family: str) -> None:
    """One has trained another client and other blocks before, the other has not."""
    fresh, used = site(family), site(family)
    fit = fit_of(fresh.model)
    used.client, used.examples = 1, examples_of(SPECS[family], 7, client=1)
    used.train(fit)
    used.train(fit_of(used.model, first=1))
    used.client, used.examples = 0, fresh.examples
    used.train(fit, round=3)
    assert_bits(fresh.train(fit, round=4).params, used.train(fit, round=4).params)


def test_a_client_with_one_example() -> None:
    worker, plain = site("bert"), site("bert", 0)
    worker.examples = plain.examples = examples_of(TEXTS, 1)
    fit = fit_of(worker.model)
    assert_close(worker.train(fit).params, plain.train(fit).params)
    assert worker.kept.num_bytes > 0


@dataclass(frozen=True)
class Elsewhere:
    """Looks at the model at other inputs, and with other parameters below, than the batch's."""

    def __call__(self, forward, params, inputs, labels, extra) -> Tensor:
        moved = {name: 1.1 * tensor for name, tensor in params.items()}
        other = forward(params, inputs.flip(1)).logits
        third = forward(moved, inputs).logits
        return F.cross_entropy(other + third + forward(params, inputs).logits, labels)


def test_an_objective_may_call_the_model_as_it_likes() -> None:
    worker, plain = site("bert"), site("bert", 0)
    fit = fit_of(worker.model, objective=Elsewhere())
    assert_close(worker.train(fit).params, plain.train(fit).params)
    assert worker.kept.num_bytes > 0


@dataclass(frozen=True)
class Smooth:
    """The loss of inputs that were moved to where it is larger."""

    def __call__(self, forward, params, inputs, labels, extra) -> Tensor:
        inputs.requires_grad_()
        loss = F.cross_entropy(forward(params, inputs).logits, labels)
        (slope,) = torch.autograd.grad(loss, inputs)
        moved = (inputs + 0.1 * slope.sign()).detach()
        return F.cross_entropy(forward(params, moved).logits, labels)


def test_an_objective_may_ask_for_the_slope_in_the_inputs() -> None:
    worker, plain = site("vit"), site("vit", 0)
    fit = fit_of(worker.model, objective=Smooth())
    assert_close(worker.train(fit).params, plain.train(fit).params)
    assert worker.kept.num_bytes > 0


@dataclass(frozen=True)
class Rebuilding:
    """Puts other adapters in for some of those that it is given."""

    names: frozenset

    def __call__(self, forward, params, inputs, labels, extra) -> Tensor:
        built = {n: 1.5 * t if n in self.names else t for n, t in params.items()}
        return F.cross_entropy(forward(built, inputs).logits, labels)


def test_nothing_is_kept_below_what_the_objective_replaces() -> None:
    worker, plain = site("bert"), site("bert", 0)
    names = frozenset(n for n in worker.model.shapes if block_of(n) == 1)
    fit = fit_of(worker.model, objective=Rebuilding(names), rebuilt=names)
    assert_close(worker.train(fit).params, plain.train(fit).params)
    worker.train(fit, round=1)
    assert worker.calls == [1, 2] * 6  # block 0 alone may be left out
    names = frozenset(n for n in worker.model.shapes if block_of(n) == 0)
    fit = fit_of(worker.model, objective=Rebuilding(names), rebuilt=names)
    before = worker.kept.num_bytes
    worker.train(fit)
    assert worker.calls == [0, 1, 2] * 6
    assert worker.kept.num_bytes == before


def test_lower_parameters_are_hashed_once(monkeypatch) -> None:
    looked: list[str] = []
    plain = kept_module.sha256
    monkeypatch.setattr(kept_module, "sha256", lambda given: looked.extend(given) or plain(given))
    worker = site("bert")
    fit = fit_of(worker.model)
    worker.train(fit)
    assert sorted(looked) == sorted(n for n in fit.params if block_of(n) in (0, 1))
    looked.clear()
    worker.train(replace(fit, references={"before": fit.params}))
    assert len(looked) == len(fit.params) + sum(block_of(n) in (0, 1) for n in fit.params)


@dataclass(frozen=True)
class Imitating:
    """The loss and how far logits and features are from the reference's."""

    def __call__(self, forward, params, inputs, labels, extra) -> Tensor:
        out = forward(params, inputs)
        far = (out.features - extra["before"]).square().mean()
        far = far + (out.logits - extra[logits_of("before")]).square().mean()
        return far + CrossEntropy()(forward, params, inputs, labels, {})


@pytest.mark.parametrize("same", [True, False], ids=["same below", "others below"])
def test_references_start_from_the_kept_states_if_they_may(same: bool) -> None:
    worker, plain = site("bert"), site("bert", 0)
    fit = fit_of(worker.model)
    blocks = {2} if same else {0, 2}
    reference = {n: t + (block_of(n) in blocks) * 0.3 for n, t in fit.params.items()}
    fit = replace(
        fit,
        objective=Imitating(),
        references={"before": reference},
        reference_logits=frozenset({"before"}),
    )
    worker.train(fit)
    worker.client = plain.client = 1
    found, expected = worker.train(fit), plain.train(fit)
    own = [2] * 3 if same else [0, 1, 2] * 3
    assert worker.calls == [0, 1] * 3 + own + [2] * 6 * 2  # Imitating calls the model twice
    assert_close(found.params, expected.params)
    assert found.num_reference_examples == expected.num_reference_examples == 10
    worker.train(fit, round=1)
    assert worker.calls == own + [2] * 6 * 2  # it came back, and is kept from now on
    again = worker.train(fit, round=2)
    assert worker.calls == [2] * 6 * 2
    assert again.num_reference_examples == again.metrics["reference_examples"] == 10


@FAMILY
def test_validation_starts_from_kept_states_too(family: str) -> None:
    worker, plain = site(family), site(family, 0)
    fit, held = fit_of(worker.model), examples_of(SPECS[family], 6, client=9)

    def test(where: Site) -> float:
        where.calls.clear()
        return measured(fit, where.forward, held, "cpu", where.module, where.shelf).accuracy

    expected = test(plain)
    assert plain.calls == [0, 1, 2] * 2
    worker.train(fit)
    size = worker.kept.num_bytes // 10  # of one example
    assert test(worker) == expected
    assert worker.kept.num_bytes == (10 + 6) * size
    assert test(worker) == expected
    assert worker.calls == [2] * 2
    assert worker.module.training


def test_validation_drops_nothing() -> None:
    more = {"hidden_dropout_prob": 0.3, "classifier_dropout": 0.5}
    worker = site("bert", **more)
    fit, held = fit_of(worker.model), examples_of(TEXTS, 6, client=9)
    found = measured(fit, worker.forward, held, "cpu", worker.module, worker.shelf)
    worker.module.eval()
    inputs, labels = held.batch(torch.arange(6))
    logits = worker.forward(fit.params, inputs).logits
    loss = float(F.cross_entropy(logits, labels))
    assert found.loss == pytest.approx(loss, rel=1e-4)


PETS = replace(IMAGES, class_names=("cat", "dog", "horse"))
CLIP = {
    f"{part}_config.{name}": value
    for part, heads in (("text", 4), ("vision", 2))
    for name, value in {
        "hidden_size": 8 * heads,
        "num_attention_heads": heads,
        "num_hidden_layers": 3,
        "intermediate_size": 24,
        **({"patch_size": 4} if part == "vision" else {}),
    }.items()
}


def test_the_tower_of_the_class_prompts_is_kept_once_for_all_clients() -> None:
    settings = LoRA(config="clip", options={**CLIP, "projection_dim": 12}, prompt="a {}", rank=2)
    model = settings.build_model(PETS)
    top = {n for n in model.shapes if block_of(n) == 2}
    assert {n.split(".")[1].split("_")[0] for n in top} == {"text", "vision"}
    sizes: list[int] = []
    workers = {
        bound: ClientWorker(
            model=model,
            method=Top(),
            examples=lambda client: examples_of(PETS, 5, client),
            seed=2,
            kept=Kept(most_bytes=bound),
        )
        for bound in (0, PLENTY)
    }
    for client in (0, 2, 0):
        task = Task(
            round=len(sizes),
            client=Client(id=client, num_examples=5),
            submodel=model.whole(),
            params=params_of(model),
            training=TRAINING,
        )
        plain, split = (workers[bound].work(task, {})[0] for bound in workers)
        assert_close(split.params, plain.params)
        sizes.append(workers[PLENTY].kept.num_bytes)
    texts = 3 * len("a horse" + "<>") * 32 * 4  # classes, tokens, width, bytes
    images = (16 + 1) * 16 * 4  # patches and one more, width, bytes
    assert sizes == [texts + 5 * images, texts + 10 * images, texts + 10 * images]


@dataclass(frozen=True)
class Top:
    """Every client trains the last blocks, clients of odd numbers one more."""

    def local(self, model, task, memory) -> Fit:
        return fit_of(model, first=2 - task.client.id % 2, params=task.params)

    def report(self, model, task, fitted, memory):
        return fitted, memory


@pytest.mark.parametrize("cache_bytes", [30_000, PLENTY], ids=["two clients", "all clients"])
@FAMILY
def test_workers_give_the_same_bits_whatever_they_keep(family: str, cache_bytes: int) -> None:
    """And whether one does all the work, or each round another; adapters below change once."""
    model, counts = tiny(family), (10, 7, 5, 6)

    def worker_of(cache_bytes: int) -> ClientWorker:
        return ClientWorker(
            model=model,
            method=Top(),
            examples=lambda client: examples_of(SPECS[family], counts[client], client),
            seed=2,
            kept=Kept(most_bytes=cache_bytes),
        )

    one, turns, plain = worker_of(PLENTY), [worker_of(cache_bytes) for _ in "ab"], worker_of(0)
    for round in range(4):
        params = {n: t * (1.0 if round < 2 else 1.5) for n, t in params_of(model).items()}
        for number, count in enumerate(counts):
            task = Task(
                round=round,
                client=Client(id=number, num_examples=count),
                submodel=model.whole(),
                params=params,
                training=TRAINING,
            )
            expected, _ = one.work(task, {})
            found, _ = turns[(round + number // 2) % 2].work(task, {})
            assert_bits(found.params, expected.params)
            assert found.metrics == expected.metrics
            assert_close(expected.params, plain.work(task, {})[0].params)
    assert one.kept.num_bytes > cache_bytes or cache_bytes == PLENTY
    assert all(0 < worker.kept.num_bytes <= cache_bytes for worker in turns)
    assert plain.kept.num_bytes == 0
