"""FedFMSL's options: other means in stage one, what the gate reads."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from test_fedfmsl import (
    CLIENTS,
    Run,
    answers,
    block_of,
    in_stage_two,
    some_inputs,
    vit,
    worker_fitted,
)
from torch import Tensor

from tesserafl.core.errors import ConfigError
from tesserafl.core.fit import logits_of
from tesserafl.core.lowrank import Collected, aggregation_error
from tesserafl.core.messages import Update
from tesserafl.core.method import State, weights_of
from tesserafl.core.model import Output
from tesserafl.core.params import Params, sha256
from tesserafl.engines.compression import CompressionSettings
from tesserafl.methods import FedFMSL, FedIT, FFALoRA, FlexLoRA, PFLMoE
from tesserafl.methods import _mixture as mixture
from tesserafl.models.scaling import forward_of

pytest.importorskip("transformers")
pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

AVERAGING = {"fedit": FedIT(), "ffa_lora": FFALoRA(), "flexlora": FlexLoRA()}
INPUTS = ("pretrained", "global")
each_averaging = pytest.mark.parametrize("averaging", AVERAGING)
each_input = pytest.mark.parametrize("given", INPUTS)


# How stage one averages


@each_averaging
def test_with_everything_active_stage_one_is_the_named_method_to_the_bit(averaging: str) -> None:
    ours = Run(FedFMSL(schedule="all", stage_one=1.0, averaging=averaging))
    theirs = Run(AVERAGING[averaging])
    for _ in range(3):
        sent, expected = ours.play(), theirs.play()
        assert [u.delta.keys() for u in sent] == [u.delta.keys() for u in expected]
    assert sha256(ours.state.params) == sha256(theirs.state.params)


def error_of(before: State, after: State, updates: list[Update], weighting: str) -> float:
    kept = Collected(vit(), weights_of(CLIENTS, weighting))
    for _ in kept.watching(before.params, updates):
        pass
    error = aggregation_error(vit(), after.params, kept.shares)
    assert error is not None
    return error


@pytest.mark.parametrize("weighting", ["examples", "uniform"])
def test_one_factor_averages_exactly_and_both_do_not(weighting: str) -> None:
    errors = {}
    for averaging in ("fedit", "ffa_lora"):
        settings = {"depths": (1, 2, 3, 4), "stage_one": 1.0, "averaging": averaging}
        run = Run(FedFMSL(schedule="manual", weighting=weighting, **settings))
        for _ in range(4):
            before, updates = run.state, run.updates(run.tasks())
            after = run.fold(updates)
        errors[averaging] = error_of(before, after, updates, weighting)
    assert errors["ffa_lora"] < 1e-6  # float32's rounding
    assert errors["fedit"] > 1e-3


def product(params: Params, pair: object) -> Tensor:
    return params[pair.up].double() @ params[pair.down].double()


def test_a_product_is_averaged_over_those_that_trained_it() -> None:
    run = Run(FedFMSL(schedule="all", caps=(4, 1, 2, 1), averaging="flexlora", stage_one=1.0))
    before, tasks = run.state, run.tasks()
    draw = torch.Generator().manual_seed(1)
    updates = [
        replace(u, delta={n: torch.randn(d.shape, generator=draw) for n, d in u.delta.items()})
        for u in run.updates(tasks)
    ]
    after = run.fold(updates)
    owners = {3: (0, 1, 2, 3), 2: (0, 2), 1: (0,), 0: (0,)}
    weights = {c.id: c.num_examples for c in CLIENTS}
    for pair in vit().low_rank:
        who = owners[block_of(pair.up)]
        mean = sum(
            weights[i]
            * product({n: tasks[i].params[n] + updates[i].delta[n] for n in pair[:2]}, pair)
            for i in who
        ) / sum(weights[i] for i in who)
        u, s, vh = torch.linalg.svd(mean, full_matrices=False)
        best = u[:, :2] * s[:2] @ vh[:2]  # of rank 2, as the adapters are
        torch.testing.assert_close(product(after.params, pair), best, rtol=0, atol=1e-5)
        assert len(who) == 1 or s[2] > 0.1  # something is lost
    for name in before.params.keys() - {n for pair in vit().low_rank for n in pair[:2]}:
        mean = sum(u.delta[name].double() * weights[u.client] for u in updates) / 31
        expected = before.params[name] + mean
        torch.testing.assert_close(after.params[name].double(), expected, rtol=0, atol=1e-7)


@each_averaging
def test_what_nobody_trained_stays_and_order_changes_no_bit(averaging: str) -> None:
    settings = {"schedule": "manual", "depths": (1, 2), "window": 1, "averaging": averaging}
    run = Run(FedFMSL(stage_one=1.0, **settings))
    run.play()
    before, updates = run.state, run.updates(run.tasks())
    found = {
        sha256(run.method.aggregate(vit(), before, CLIENTS, iter(order)).params)
        for order in itertools.permutations(updates)
    }
    assert found == {sha256(run.fold(updates).params)}
    changed = {
        block_of(name)
        for name, value in before.params.items()
        if not torch.equal(value, run.state.params[name])
    }
    assert changed == {None, 2}


def test_own_experts_train_both_factors_and_nothing_is_decomposed() -> None:
    for averaging in ("ffa_lora", "flexlora"):
        run = in_stage_two(averaging=averaging)
        whole = sha256(run.state.params)
        run.play()
        own = mixture.part_of(run.memories[0], "own")
        assert all(not torch.equal(own[n], run.state.params[n]) for n in vit().shapes)
        assert sha256(run.state.params) == whole


def test_what_was_lost_has_no_place_after_a_decomposition() -> None:
    settings = CompressionSettings(deltas="int8", error_feedback=True)
    settings.check(FedFMSL(averaging="ffa_lora"), "star")
    with pytest.raises(ConfigError, match="another order, basis or model"):
        settings.check(FedFMSL(averaging="flexlora"), "star")


# What the gate reads


@each_input
def test_the_mixture_begins_as_the_global_expert_whatever_the_gate_reads(given: str) -> None:
    for settings in ({}, {"gate": "linear"}):
        run = in_stage_two(gate_input=given, **settings)
        task = run.tasks()[0]
        fit = run.method.local(vit(), task, {})
        begun = worker_fitted(run, task, fit.params)
        memory = run.method.own_report(vit(), task, begun, {})[1]
        mixed = answers(run.method.personal(vit(), run.state, memory), some_inputs())
        whole = answers(run.method.predictor(vit(), run.state), some_inputs())
        torch.testing.assert_close(mixed, whole, rtol=0, atol=1e-6)


@each_input
def test_what_the_gate_reads_is_looked_up_once(given: str) -> None:
    run = in_stage_two(gate_input=given)
    (task, *_) = run.tasks()
    assert task.extra["gate/narrow"].shape == (32, 16)
    fit = run.method.local(vit(), task, {})
    assert fit.references.keys() == {"global", *(["base"] if given == "pretrained" else [])}
    assert run.method.num_references == len(fit.references)
    before = run.state.extra
    run.play(2)
    assert all(not torch.equal(before[name], run.state.extra[name]) for name in before)


def test_halves_look_at_the_global_expert_alone() -> None:
    assert FedFMSL(gate="half").num_references == PFLMoE(gate="half").num_references == 1
    assert FedFMSL().num_references == PFLMoE().num_references == 2


@each_input
def test_the_gate_says_in_training_what_it_says_in_a_test(given: str) -> None:
    run = in_stage_two(gate_input=given)
    run.play(2)
    predictor = run.method.personal(vit(), run.state, run.memories[0])
    module = predictor.model.module().eval()
    forward = forward_of(predictor.model, predictor.model.whole(), module, "none")
    own = mixture.part_of(predictor.params, "own")
    with torch.no_grad():
        shares = predictor.rule.shares(forward, predictor.params, some_inputs())
        glob = forward(mixture.part_of(predictor.params, "global"), some_inputs())
        # The foundation model: no adapter.
        came = {n: torch.zeros_like(t) if block_of(n) is not None else t for n, t in own.items()}
        base = forward(came, some_inputs()).features
        extra = {"base": base, "global": glob.features, logits_of("global"): glob.logits}
        mean = answers(predictor, some_inputs())
    assert (shares - 0.5).abs().max() > 1e-3
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    loss = mixture.MixtureLoss(predictor.rule.gate, 0.0, 0.0, reads=predictor.rule.reads)
    with torch.no_grad():
        found = loss(forward, {**predictor.params, **own}, some_inputs(), labels, extra)
    torch.testing.assert_close(found, torch.nn.functional.cross_entropy(mean, labels))


@pytest.mark.parametrize(
    ("settings", "passes"), [({}, 3), ({"gate_input": "global"}, 2), ({"gate": "half"}, 2)]
)
def test_of_what_a_prediction_takes(settings: dict, passes: int) -> None:
    run = in_stage_two(**settings)
    run.play()
    predictor = run.method.personal(vit(), run.state, run.memories[0])
    module = predictor.model.module().eval()
    forward = forward_of(predictor.model, predictor.model.whole(), module, "none")
    calls = []

    def counted(params: Params, inputs: Tensor) -> Output:
        calls.append(params.keys())
        return forward(params, inputs)

    with torch.no_grad():
        predictor.rule(counted, predictor.params, some_inputs())
    assert calls == [vit().shapes.keys()] * passes
