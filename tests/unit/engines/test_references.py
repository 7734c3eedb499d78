"""Objectives that read the features that frozen parameter sets give for a batch."""

from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tesserafl.core import seeds
from tesserafl.core.axes import probe
from tesserafl.core.errors import ConfigError, ModelError
from tesserafl.core.fit import IGNORED, CrossEntropy, Fit, Fitted, Training
from tesserafl.core.model import Model, Output
from tesserafl.data.examples import Examples, Spec
from tesserafl.engines.batches import augment, batches, widest
from tesserafl.engines.client import execute
from tesserafl.engines.cohort import Cohorts, Member
from tesserafl.models import CNN, MLP
from tesserafl.models.costs import costs_of
from tesserafl.models.scaling import forward_of

VECTORS = Spec(kind="vector", task="vector-classification", shape=(6,), num_classes=3)
IMAGES = Spec(kind="image", task="image-classification", shape=(1, 8, 8), num_classes=3)
SIZES = (7, 1, 12, 5, 9)
PLAIN = Training(lr=0.1, momentum=0.5, epochs=3, batch_size=4)


@dataclass(frozen=True)
class Contrastive:
    """Cross-entropy and MOON's term: close to the global features, far from the previous ones."""

    def __call__(self, forward, params, inputs, labels, extra) -> Tensor:
        out = forward(params, inputs)
        near = F.cosine_similarity(out.features, extra["global"], dim=-1)
        far = F.cosine_similarity(out.features, extra["previous"], dim=-1)
        each = F.softplus((far - near) / 0.5)
        counts = (labels != IGNORED).float()
        contrast = (each * counts).sum() / counts.sum()
        return F.cross_entropy(out.logits, labels, ignore_index=IGNORED) + contrast


@dataclass(frozen=True)
class Recording:
    """Cross-entropy; keeps what it reads."""

    seen: list

    def __call__(self, forward, params, inputs, labels, extra) -> Tensor:
        self.seen.append((inputs.clone(), {n: t.clone() for n, t in extra.items()}))
        return CrossEntropy()(forward, params, inputs, labels, {})


def examples_of(spec: Spec, count: int, client: int = 0) -> Examples:
    draw = seeds.generator(3, client)
    labels = torch.arange(count) % 3
    if spec.kind == "vector":
        return Examples(inputs=torch.randn(count, 6, generator=draw), labels=labels)
    pixels = torch.randint(0, 256, (count, *spec.shape), dtype=torch.uint8, generator=draw)
    return Examples(inputs=pixels, labels=labels)


def draw_of(client: int = 0) -> torch.Generator:
    return seeds.generator(4, client, "batches")


def contrastive(model: Model, client: int = 0, training: Training = PLAIN) -> Fit:
    """From the global parameters, away from parameters of the client's own."""
    start = model.init(0)
    references = {"global": start, "previous": model.init(client + 1)}
    return Fit(params=start, training=training, objective=Contrastive(), references=references)


def by_hand(fit: Fit, forward, examples: Examples, draw: torch.Generator) -> dict[str, Tensor]:
    """Plain autograd and torch's SGD; references run on every batch."""
    params = {name: t.clone().requires_grad_() for name, t in fit.params.items()}
    training = fit.training
    sgd = torch.optim.SGD(params.values(), lr=training.lr, momentum=training.momentum)
    for _ in range(training.epochs):
        for rows in batches(len(examples), training.batch_size, draw):
            inputs, labels = examples.batch(rows)
            if training.augment:
                inputs = augment(inputs, draw)
            with torch.no_grad():
                extra = {n: forward(p, inputs).features for n, p in fit.references.items()}
            sgd.zero_grad()
            fit.objective(forward, params, inputs, labels, extra).backward()
            sgd.step()
    return {name: t.detach() for name, t in params.items()}


def forward_and_module(model: Model):
    module = model.module().train()
    return forward_of(model, model.whole(), module, "none"), module


def assert_params_close(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for name in left:
        torch.testing.assert_close(left[name], right[name], rtol=2e-4, atol=2e-6)


@pytest.mark.parametrize(
    ("spec", "settings"),
    [
        (VECTORS, MLP(hidden=(8,), norm="layer")),
        (IMAGES, CNN(channels=(4, 8))),
        (IMAGES, CNN(channels=(4, 8), norm="batch")),  # the batch's statistics: never cached
    ],
    ids=["vectors", "images", "batch norm"],
)
def test_training_against_references_is_a_loop_by_hand(spec, settings) -> None:
    model = settings.build_model(spec)
    forward, module = forward_and_module(model)
    fit, examples = contrastive(model), examples_of(spec, 11)
    fitted = execute(fit, forward, examples, draw_of(), "cpu", module)
    expected = by_hand(fit, forward, examples, draw_of())
    assert_params_close(fitted.params, expected)
    plain = by_hand(
        replace(fit, references=dict.fromkeys(fit.references, fit.params)),
        forward,
        examples,
        draw_of(),
    )
    assert not torch.allclose(plain["head.weight"], expected["head.weight"], atol=1e-4)
    assert module.training


def test_every_batch_gets_the_features_of_its_own_examples() -> None:
    model = MLP(hidden=(8,)).build_model(VECTORS)
    forward, _ = forward_and_module(model)
    recording, references = Recording([]), {"one": model.init(1), "two": model.init(2)}
    fit = replace(contrastive(model), objective=recording, references=references)
    fitted = execute(fit, forward, examples_of(VECTORS, 9), draw_of())
    assert len(recording.seen) == 3 * 2  # epochs and batches
    for inputs, extra in recording.seen:
        assert extra.keys() == references.keys()
        for name, features in extra.items():
            assert not features.requires_grad
            torch.testing.assert_close(features, forward(references[name], inputs).features)
    assert fitted.num_reference_examples == 2 * 9  # once, not in every epoch
    assert fitted.metrics["reference_examples"] == 18.0


def test_augmented_batches_are_what_references_see() -> None:
    model = CNN(channels=(4, 8)).build_model(IMAGES)
    forward, module = forward_and_module(model)
    training = replace(PLAIN, augment=True)
    fit, examples = contrastive(model, training=training), examples_of(IMAGES, 9)
    fitted = execute(fit, forward, examples, draw_of(), "cpu", module)
    assert_params_close(fitted.params, by_hand(fit, forward, examples, draw_of()))
    assert fitted.num_reference_examples == 2 * 9 * 3  # two references, in every epoch
    assert fitted.metrics["reference_examples"] == 54.0


def test_vectors_are_not_augmented_and_stay_cached() -> None:
    model = MLP(hidden=(8,)).build_model(VECTORS)
    forward, module = forward_and_module(model)
    fit = contrastive(model, training=replace(PLAIN, augment=True))
    fitted = execute(fit, forward, examples_of(VECTORS, 9), draw_of(), "cpu", module)
    assert fitted.num_reference_examples == 2 * 9


def test_without_references_nothing_is_counted() -> None:
    model = MLP(hidden=(8,)).build_model(VECTORS)
    forward, module = forward_and_module(model)
    fit = Fit(params=model.init(0), training=PLAIN)
    fitted = execute(fit, forward, examples_of(VECTORS, 9), draw_of(), "cpu", module)
    assert fitted.num_reference_examples == 0
    assert fitted.metrics.keys() == {"loss"}


class Forgetful(nn.Module):
    """With dropout, on vectors and on images of as many numbers."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(6, hidden), nn.Linear(hidden, 3)
        self.drop = nn.Dropout(0.5)

    def forward(self, inputs: Tensor) -> Output:
        features = self.drop(torch.relu(self.first(inputs.flatten(1))))
        return Output(self.head(features), features)


@pytest.mark.parametrize("augmented", [False, True], ids=["cached", "per batch"])
def test_references_are_read_without_dropout_and_training_is_not(augmented: bool) -> None:
    model = probe(
        lambda sizes: Forgetful(sizes["hidden"]), {"hidden": 16}, lambda: torch.randn(2, 6)
    )
    forward, module = forward_and_module(model)
    recording, reference = Recording([]), model.init(1)
    fit = Fit(
        params=model.init(0),
        training=replace(PLAIN, augment=augmented),
        objective=recording,
        references={"before": reference},
    )
    vectors = examples_of(VECTORS, 9)
    examples = replace(vectors, inputs=vectors.inputs.view(9, 1, 2, 3)) if augmented else vectors
    fitted = execute(fit, forward, examples, draw_of(), "cpu", module)
    assert fitted.num_reference_examples == (27 if augmented else 9)
    assert module.training and module.drop.training
    still = model.module().eval()
    expected = forward_of(model, model.whole(), still, "none")
    for inputs, extra in recording.seen:
        torch.testing.assert_close(extra["before"], expected(reference, inputs).features)
    # Reading references draws nothing, so that training drops what it drops without them.
    with seeds.seeded(1, "drop"):
        having = execute(fit, forward, examples, draw_of(), "cpu", module)
    with seeds.seeded(1, "drop"):
        lacking = execute(replace(fit, references={}), forward, examples, draw_of(), "cpu", module)
    assert torch.equal(having.params["head.weight"], lacking.params["head.weight"])


def both_ways(
    model: Model, spec: Spec, fits: list[Fit], sizes=SIZES, **how: object
) -> tuple[list[Fitted], list[Fitted]]:
    held = [examples_of(spec, count, client) for client, count in enumerate(sizes)]
    forward, module = forward_and_module(model)
    parts = list(enumerate(zip(fits, held, strict=True)))
    alone = [execute(fit, forward, own, draw_of(c), "cpu", module) for c, (fit, own) in parts]
    cohorts = Cohorts(most=8, width=lambda size: max(widest(n, size) for n in sizes), **how)
    members = [Member(fit=fit, examples=own, draw=draw_of(c)) for c, (fit, own) in parts]
    assert len({member.shape for member in members}) == 1
    return alone, cohorts.train(members, forward, "model")


def assert_alike(alone: list[Fitted], together: list[Fitted]) -> None:
    for one, other in zip(alone, together, strict=True):
        assert_params_close(other.params, one.params)
        assert other.metrics["loss"] == pytest.approx(one.metrics["loss"], rel=1e-4)
        assert one.num_reference_examples == 2 * one.num_examples
        assert other.num_reference_examples == one.num_reference_examples
        assert other.metrics["reference_examples"] == one.metrics["reference_examples"]


@pytest.mark.parametrize("spec", [VECTORS, IMAGES], ids=["vectors", "images"])
def test_a_cohort_reads_references_as_each_client_alone(spec: Spec) -> None:
    settings = MLP(hidden=(8, 8)) if spec is VECTORS else CNN(channels=(4, 8))
    model = settings.build_model(spec)
    fits = [contrastive(model, client) for client in range(len(SIZES))]
    assert_alike(*both_ways(model, spec, fits))


def test_a_cohort_trains_against_references_to_another_result_than_without() -> None:
    model = MLP(hidden=(8,)).build_model(VECTORS)
    fits = [contrastive(model, client) for client in range(len(SIZES))]
    same = [replace(fit, references=dict.fromkeys(fit.references, fit.params)) for fit in fits]
    (_, one), (_, other) = both_ways(model, VECTORS, fits), both_ways(model, VECTORS, same)
    for left, right in zip(one, other, strict=True):
        assert not torch.allclose(left.params["layers.0.weight"], right.params["layers.0.weight"])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch, in itself
def test_a_compiled_cohort_reads_references_too() -> None:
    model = MLP(hidden=(8,)).build_model(VECTORS)
    fits = [contrastive(model, client) for client in range(2)]
    assert_alike(*both_ways(model, VECTORS, fits, (4, 4), compiled=True))


def test_members_with_other_references_train_apart() -> None:
    model = MLP(hidden=(8,)).build_model(VECTORS)
    fit = contrastive(model)

    def shape(references: dict) -> tuple[object, ...]:
        own = replace(fit, references=references)
        return Member(fit=own, examples=examples_of(VECTORS, 4), draw=draw_of()).shape

    assert shape({"a": model.init(0)}) == shape({"a": model.init(1)})
    assert shape({"a": model.init(0)}) != shape({"b": model.init(0)})
    assert shape({"a": model.init(0)}) != shape({})


def test_a_reference_may_not_take_the_name_of_another_tensor() -> None:
    model = MLP(hidden=(8,)).build_model(VECTORS)
    fit = contrastive(model)
    with pytest.raises(ConfigError, match="another tensor of this name"):
        replace(fit, extra={"global": torch.zeros(1)})
    masked = replace(PLAIN, mask_absent_classes=True)
    with pytest.raises(ConfigError, match="classes"):
        replace(fit, training=masked, references={"classes": fit.params})


def test_a_reference_has_the_names_and_the_shapes_of_the_parameters() -> None:
    model = MLP(hidden=(8,)).build_model(VECTORS)
    fit = contrastive(model)
    with pytest.raises(ConfigError, match=r"wrong or missing: head\.bias"):
        lacking = {n: t for n, t in fit.params.items() if n != "head.bias"}
        replace(fit, references={"global": lacking})
    with pytest.raises(ConfigError, match="cut it to the task's sub-model"):
        wide = MLP(hidden=(9,)).build_model(VECTORS).init(0)
        replace(fit, references={"global": wide})


def test_a_model_without_features_is_told() -> None:
    def forward(params, inputs):
        return Output(inputs @ params["w"].T, None)

    start = {"w": torch.zeros(3, 6)}
    fit = Fit(params=start, training=PLAIN, references={"global": start})
    examples = examples_of(VECTORS, 4)
    with pytest.raises(ModelError, match="Output"):
        execute(fit, forward, examples, draw_of())
    members = [Member(fit=fit, examples=examples, draw=draw_of(c)) for c in range(2)]
    with pytest.raises(ModelError, match="Output"):
        Cohorts(most=2, width=lambda size: size).train(members, forward, "model")


def test_a_forward_pass_costs_what_its_products_do() -> None:
    model = MLP(hidden=(8,)).build_model(VECTORS)
    costs = costs_of(model, model.whole(), PLAIN, *examples_of(VECTORS, 4).batch(torch.arange(4)))
    assert costs.forward_flops_per_example == 2 * (6 * 8 + 8 * 3)
    # Backwards: every product twice, but for the first layer's inputs.
    assert costs.flops_per_example == 3 * costs.forward_flops_per_example - 2 * 6 * 8
