"""What objectives read beside inputs and labels, for one client alone and in a cohort."""

from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tesserafl.core import seeds
from tesserafl.core.fit import HELD_OUT, IGNORED, Fit, Fitted, Training, logits_of
from tesserafl.core.messages import Client, Task
from tesserafl.core.model import Output
from tesserafl.data.examples import Examples, Spec
from tesserafl.engines import references as references_module
from tesserafl.engines.batches import held_out_of, widest
from tesserafl.engines.client import ClientWorker
from tesserafl.engines.cohort import Cohorts
from tesserafl.engines.execute import execute
from tesserafl.engines.kept import Kept, Shelf
from tesserafl.engines.member import Member
from tesserafl.models import MLP
from tesserafl.models.scaling import forward_of

VECTORS = Spec(kind="vector", task="vector-classification", shape=(6,), num_classes=3)
MODEL = MLP(hidden=(8,)).build_model(VECTORS)
MODULE = MODEL.module().train()
FORWARD = forward_of(MODEL, MODEL.whole(), MODULE, "none")
TRAINING = Training(lr=0.2, momentum=0.5, epochs=2, batch_size=4)
SIZES = (7, 1, 12, 5, 9)


def examples_of(count: int, client: int = 0) -> Examples:
    draw = seeds.generator(3, client)
    return Examples(inputs=torch.randn(count, 6, generator=draw), labels=torch.arange(count) % 3)


def draw_of(client: int = 0) -> torch.Generator:
    return seeds.generator(4, client, "batches")


@dataclass(frozen=True)
class Reading:
    """Distils from a reference, and trains a gate on the examples that are held out."""

    def __call__(self, forward, params, inputs, labels, extra) -> Tensor:
        out = forward({n: t for n, t in params.items() if n != "gate"}, inputs)
        counts = (labels != IGNORED).float()
        taught = F.kl_div(
            out.logits.log_softmax(-1), extra[logits_of("teacher")].softmax(-1), reduction="none"
        )
        near = F.cosine_similarity(out.features, extra["teacher"], dim=-1)
        held = extra[HELD_OUT].float()
        gate = (inputs @ params["gate"] - 1.0).square()
        own = F.cross_entropy(out.logits, labels, ignore_index=IGNORED, reduction="none")
        each = taught.sum(-1) - near + held * gate + (1.0 - held) * own
        return (each * counts).sum() / counts.sum()


def fit_of(client: int = 0, **changes) -> Fit:
    given = {
        "params": {**MODEL.init(0), "gate": torch.zeros(6)},
        "beside": frozenset({"gate"}),
        "training": TRAINING,
        "objective": Reading(),
        "references": {"teacher": MODEL.init(client + 1)},
        "reference_logits": frozenset({"teacher"}),
        "held_out": 0.3,
    }
    return Fit(**(given | changes))


@dataclass(frozen=True)
class Recording:
    """Keeps what it reads."""

    seen: list

    def __call__(self, forward, params, inputs, labels, extra) -> Tensor:
        self.seen.append((inputs.clone(), {n: t.clone() for n, t in extra.items()}))
        return sum(t.square().sum() for t in params.values())


def assert_close(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for name in left:
        torch.testing.assert_close(left[name], right[name], rtol=2e-4, atol=2e-6)


def both_ways(fits: list[Fit], **how) -> tuple[list[Fitted], list[Fitted]]:
    held = [examples_of(count, client) for client, count in enumerate(SIZES)]
    marks = [held_out_of(len(own), 0.3, 2, client) for client, own in enumerate(held)]
    parts = list(zip(fits, held, marks, strict=True))
    alone = [
        execute(fit, FORWARD, own, draw_of(c), "cpu", MODULE, held_out=marked)
        for c, (fit, own, marked) in enumerate(parts)
    ]
    cohorts = Cohorts(most=8, width=lambda size: max(widest(n, size) for n in SIZES), **how)
    members = [
        Member(fit=fit, examples=own, draw=draw_of(c), held_out=marked)
        for c, (fit, own, marked) in enumerate(parts)
    ]
    assert len({member.shape for member in members}) == 1
    return alone, cohorts.train(members, FORWARD, "model")


@pytest.mark.parametrize("most", [1 << 28, 0], ids=["one table", "per batch"])
def test_a_cohort_reads_what_each_client_reads_alone(most: int, monkeypatch) -> None:
    monkeypatch.setattr(references_module, "MOST_BYTES", most)
    fits = [fit_of(client) for client in range(len(SIZES))]
    alone, together = both_ways(fits)
    for size, one, other in zip(SIZES, alone, together, strict=True):
        assert_close(other.params, one.params)
        assert other.metrics["loss"] == pytest.approx(one.metrics["loss"], rel=1e-4)
        gate = one.params["gate"]
        assert bool(gate.any()) == (size > 1)  # of one example none is held out
        passes = size if most else size * TRAINING.epochs
        assert one.num_reference_examples == other.num_reference_examples == passes


def test_a_client_counts_the_passes_that_it_makes_alone(monkeypatch) -> None:
    """Of 9 examples a table has room, of all clients' not."""
    monkeypatch.setattr(references_module, "MOST_BYTES", 9 * 8 * 4)
    alone, together = both_ways([fit_of(client) for client in range(len(SIZES))])
    passes = [7, 1, 2 * 12, 5, 9]
    for fitted in (alone, together):
        assert [each.num_reference_examples for each in fitted] == passes
        assert [each.metrics["reference_examples"] for each in fitted] == passes


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch, in itself
@pytest.mark.slow
def test_a_compiled_cohort_reads_the_same() -> None:
    alone, together = both_ways([fit_of(client) for client in range(len(SIZES))], compiled=True)
    for one, other in zip(alone, together, strict=True):
        assert_close(other.params, one.params)


def test_each_batch_reads_the_outputs_and_the_marks_of_its_own_examples() -> None:
    recording, examples = Recording([]), examples_of(9)
    marked = held_out_of(9, 0.3, 7, 1)
    fit = fit_of(objective=recording)
    fitted = execute(fit, FORWARD, examples, draw_of(), "cpu", MODULE, held_out=marked)
    assert len(recording.seen) == 2 * 2
    for inputs, extra in recording.seen:
        assert extra.keys() == {"teacher", logits_of("teacher"), HELD_OUT}
        out = FORWARD(fit.references["teacher"], inputs)
        torch.testing.assert_close(extra["teacher"], out.features)
        torch.testing.assert_close(extra[logits_of("teacher")], out.logits)
        rows = (inputs[:, None] == examples.inputs).all(-1).int().argmax(1)
        assert torch.equal(extra[HELD_OUT], marked[rows])
        assert not any(tensor.requires_grad for tensor in extra.values())
    assert fitted.params.keys() == fit.params.keys()


def test_without_the_fields_nothing_more_is_read() -> None:
    recording = Recording([])
    fit = fit_of(objective=recording, held_out=0.0, reference_logits=frozenset())
    execute(fit, FORWARD, examples_of(5), draw_of(), "cpu", MODULE)
    assert all(extra.keys() == {"teacher"} for _, extra in recording.seen)


@pytest.mark.parametrize("most", [1 << 28, 0], ids=["one table", "per batch"])
def test_padding_reads_zeros_for_logits_and_is_not_held_out(most: int, monkeypatch) -> None:
    monkeypatch.setattr(references_module, "MOST_BYTES", most)

    @dataclass(frozen=True)
    class Padded:
        """Not a number if padding reads anything but what it should."""

        def __call__(self, forward, params, inputs, labels, extra) -> Tensor:
            padding = labels == IGNORED
            wrong = (padding[:, None] & (extra[logits_of("teacher")] != 0)).any()
            wrong |= (padding[:, None] & (extra["teacher"] != 1)).any()
            wrong |= (padding & extra[HELD_OUT]).any()
            loss = sum(t.square().sum() for t in params.values())
            return torch.where(wrong, torch.nan, loss)

    _, together = both_ways([fit_of(c, objective=Padded()) for c in range(len(SIZES))])
    assert all(fitted.metrics["loss"] > 0 for fitted in together)


def test_large_outputs_are_computed_for_every_batch(monkeypatch) -> None:
    examples, fit = examples_of(12), fit_of()
    expected = execute(fit, FORWARD, examples, draw_of(), "cpu", MODULE)
    size = 12 * 8 * 4  # examples, features, bytes
    monkeypatch.setattr(references_module, "MOST_BYTES", size)
    kept = execute(fit, FORWARD, examples, draw_of(), "cpu", MODULE)
    assert kept.num_reference_examples == 12
    monkeypatch.setattr(references_module, "MOST_BYTES", size - 1)
    late = execute(fit, FORWARD, examples, draw_of(), "cpu", MODULE)
    assert late.num_reference_examples == 2 * 12  # not the part that told their size
    assert_close(late.params, expected.params)


def test_features_or_logits_may_be_too_large(monkeypatch) -> None:
    monkeypatch.setattr(references_module, "MOST_BYTES", 100)
    small, large = torch.zeros(2, 1), torch.zeros(2, 5)  # four bytes a number
    for outputs in ({"features": large}, {"features": small, "logits": large}):
        assert not references_module.too_large(outputs, 2, 5)
        assert references_module.too_large(outputs, 2, 6)


def test_held_out_examples_are_a_share_and_never_all() -> None:
    counts = {(100, 0.29): 29, (10, 0.3): 3, (2, 0.01): 1, (2, 0.99): 1, (1, 0.5): 0, (9, 0.99): 8}
    for (total, share), count in counts.items():
        assert int(held_out_of(total, share, 1, 2).sum()) == count
    assert torch.equal(held_out_of(50, 0.5, 1, 2), held_out_of(50, 0.5, 1, 2))
    assert not torch.equal(held_out_of(50, 0.5, 1, 2), held_out_of(50, 0.5, 1, 3))
    assert not torch.equal(held_out_of(50, 0.5, 1, 2), held_out_of(50, 0.5, 2, 2))


def test_width_scaling_leaves_alone_what_is_beside_the_model() -> None:
    wide = MLP(hidden=(8, 8)).build_model(VECTORS)
    (axis, *_) = wide.cuttable
    part = wide.slice({axis: range(4)})
    module = wide.module(part.sizes).train()
    examples = examples_of(6)
    small = wide.resized(part).init(0)
    fit = fit_of(
        params={**small, "gate": torch.zeros(6)}, references={"teacher": small}, held_out=0.5
    )
    for scaling in ("none", "output", "parameters"):
        forward = forward_of(wide, part, module, scaling)
        own = replace(fit, width_scaling=scaling)
        gate = execute(own, forward, examples, draw_of(), "cpu", module).params["gate"]
        if scaling == "none":
            expected = gate
        torch.testing.assert_close(gate, expected)
    assert bool(expected.any())


def test_members_that_read_other_things_train_apart() -> None:
    def shape(**changes) -> tuple[object, ...]:
        return Member(fit=fit_of(**changes), examples=examples_of(4), draw=draw_of()).shape

    assert shape() == shape()
    for change in (
        {"held_out": 0.0},
        {"reference_logits": frozenset()},
        {"beside": frozenset(), "references": {}, "reference_logits": frozenset()},
    ):
        assert shape() != shape(**change)


def shelf_of(kept: Kept, client: int = 0) -> Shelf:
    return Shelf(kept=kept, client=client, forward="model")


def test_references_that_did_not_change_are_not_computed_again() -> None:
    kept, examples, calls = Kept(most_bytes=1 << 20), examples_of(9), []

    def counting(params, inputs) -> Output:
        calls.append(params)
        return FORWARD(params, inputs)

    def run(fit: Fit, client: int = 0) -> Fitted:
        calls.clear()
        shelf = shelf_of(kept, client)
        return execute(fit, counting, examples, draw_of(), "cpu", MODULE, shelf=shelf)

    def num_calls(fit: Fit, client: int = 0) -> int:
        run(fit, client)
        return len(calls)

    first, steps = run(fit_of()), 2 * 2
    assert len(calls) == 3 + steps
    assert kept.num_bytes == 0  # nobody knows yet whether it comes back
    for number in (3 + steps, steps, steps):
        again = run(fit_of())
        assert len(calls) == number
        assert all(torch.equal(again.params[n], t) for n, t in first.params.items())
        assert again == replace(first, params=again.params, classes=again.classes)
    assert kept.num_bytes == 9 * (8 + 3) * 4  # features and logits
    assert num_calls(fit_of(), client=1) == 3 + steps
    assert num_calls(fit_of(client=1)) == 3 + steps  # another teacher
    # Features alone, or in parts of another size, are other numbers.
    assert num_calls(fit_of(training=replace(TRAINING, batch_size=3))) == 3 + 2 * 3


def test_references_that_change_in_every_round_are_not_kept() -> None:
    kept, examples = Kept(most_bytes=1 << 20, most_asked=3), examples_of(9)

    def run(teacher: int) -> Fitted:
        shelf = shelf_of(kept)
        return execute(fit_of(teacher), FORWARD, examples, draw_of(), "cpu", MODULE, shelf=shelf)

    for teacher in range(5):
        assert run(teacher).num_reference_examples == 9
    run(0)  # so long ago that it is a new one
    assert kept.num_bytes == 0
    run(4)
    assert kept.num_bytes > 0


def test_what_was_asked_for_is_remembered_to_a_bound() -> None:
    kept = Kept(most_bytes=0, most_asked=2)
    assert [kept.again(key) for key in "aabacab"] == [
        *(False, True, False, True, False, True, False)
    ]


def test_the_one_used_longest_ago_goes_first() -> None:
    def entry() -> dict[str, Tensor]:
        return {"t": torch.zeros(25)}  # 100 bytes

    kept = Kept(most_bytes=250)
    kept.put("a", entry())
    kept.put("b", entry())
    assert kept.get("a") is not None
    kept.put("c", entry())
    assert [kept.get(key) is not None for key in "abc"] == [True, False, True]
    kept.put("d", {"t": torch.zeros(63)})
    assert kept.get("d") is None  # larger than all
    assert kept.num_bytes == 200
    kept.put("c", {"t": torch.zeros(10)})  # in its own place
    assert kept.num_bytes == 140
    kept.put("e", {"t": torch.zeros(50)})
    assert [kept.get(key) is not None for key in "ace"] == [False, True, True]
    assert kept.num_bytes == 240


@dataclass(frozen=True)
class Asking:
    """A method of one fit."""

    fit: Fit

    def local(self, model, task, memory) -> Fit:
        return self.fit

    def report(self, model, task, fitted, memory):
        return fitted, memory


def worker_of(fit: Fit, **more) -> ClientWorker:
    return ClientWorker(
        model=MODEL,
        method=Asking(fit),
        examples=lambda client: examples_of(SIZES[client], client),
        seed=2,
        **more,
    )


def tasks(rounds: int = 1) -> list[Task]:
    return [
        Task(
            round=round,
            client=Client(id=client, num_examples=SIZES[client]),
            submodel=MODEL.whole(),
            params=MODEL.init(0),
            training=TRAINING,
        )
        for round in range(rounds)
        for client in range(len(SIZES))
    ]


@pytest.mark.parametrize("together", [False, True])
def test_workers_test_the_parameters_to_start_from(together: bool) -> None:
    held = {0: examples_of(11, 7), 1: examples_of(0), 2: examples_of(5, 8)}
    fit = fit_of(validate=True)
    cohorts = Cohorts(most=8, width=lambda size: max(widest(n, size) for n in SIZES))
    worker = worker_of(
        fit,
        validation=lambda client: held.get(client, examples_of(3)),
        cohorts=cohorts if together else None,
    )
    asked = tasks()[:3]
    answers = worker.work_together([(task, {}) for task in asked])
    for task, (fitted, _) in zip(asked, answers, strict=True):
        own = held[task.client.id]
        if not len(own):
            assert "validation_accuracy" not in fitted.metrics
            continue
        right = FORWARD(fit.params, own.inputs).logits.argmax(-1) == own.labels
        assert fitted.metrics["validation_accuracy"] == pytest.approx(float(right.float().mean()))
    lacking = worker_of(fit).work(asked[0], {})[0]
    unasked = worker_of(fit_of(), validation=held.get).work(asked[0], {})[0]
    assert "validation_accuracy" not in lacking.metrics.keys() | unasked.metrics.keys()
    trained = answers[0][0].params
    for fitted in (lacking, unasked):  # testing changes nothing
        assert_close(fitted.params, trained)


def test_a_worker_holds_out_the_same_examples_in_all_rounds() -> None:
    recording = Recording([])
    worker = worker_of(fit_of(objective=recording))
    marked: dict[int, set] = {}
    for task in tasks(rounds=2):
        recording.seen.clear()
        worker.work(task, {})
        held = {tuple(row.tolist()) for inputs, e in recording.seen for row in inputs[e[HELD_OUT]]}
        assert marked.setdefault(task.client.id, held) == held
    assert [len(marked[client]) for client in range(len(SIZES))] == [2, 0, 3, 1, 2]
    inputs = examples_of(12, 2).inputs[held_out_of(12, 0.3, 2, 2)]
    assert marked[2] == {tuple(row.tolist()) for row in inputs}


@pytest.mark.parametrize("cache_bytes", [0, 600, 1 << 20], ids=["nothing", "little", "all"])
def test_workers_give_the_same_bits_whatever_they_keep(cache_bytes: int) -> None:
    """And whether one does all the work, or each round another."""
    one, turns = (
        worker_of(fit_of()),
        [worker_of(fit_of(), kept=Kept(most_bytes=cache_bytes)) for _ in "ab"],
    )
    for task in tasks(rounds=4):
        expected, _ = one.work(task, {})
        found, _ = turns[(task.round + task.client.id) % 2].work(task, {})
        assert found.metrics == expected.metrics
        for name, tensor in expected.params.items():
            assert torch.equal(found.params[name], tensor)
    assert all(worker.kept.num_bytes <= cache_bytes for worker in turns)
    assert any(worker.kept.num_bytes for worker in turns) == bool(cache_bytes)
