"""What is lost when a change is sent in fewer bytes is sent later."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from tesserafl.core import seeds
from tesserafl.core.coding import CODINGS, Coded
from tesserafl.core.errors import ConfigError, UpdateError
from tesserafl.core.fit import Training
from tesserafl.core.messages import Client, Memory, Task, Update, Wanted
from tesserafl.core.submodel import Index, SubModel, View
from tesserafl.core.wire import decode_task, encode_task
from tesserafl.engines.compression import (
    CompressionSettings,
    answer_bytes,
    apart,
    as_sent,
    compressed,
    task_bytes,
)
from tesserafl.methods import METHODS, FedAsync, FedAvg, FedFMSL, FLoRA, Local

WHOLE = (slice(0, 4), slice(0, 3))
LARGE = {"w": (4, 3), "b": (4,)}


def part(*index: Index, bias: Index | None = None) -> SubModel:
    return SubModel({"n": 1}, {"w": View("w", index), "b": View("b", (bias or index[0],))})


def update_of(submodel: SubModel, round: int, **more: Any) -> Update:
    draw = seeds.generator(round, "compression")
    delta = {n: torch.randn(v.shape, generator=draw) for n, v in submodel.views.items()}
    return Update(
        round=round,
        client=0,
        submodel=submodel,
        delta=delta,
        num_examples=1,
        num_steps=1,
        metrics={},
        **more,
    )


@pytest.mark.parametrize("coding", CODINGS)
def test_all_that_was_sent_and_what_is_left_is_all_that_there_was(coding: str) -> None:
    # sum of sent_t + left_T = sum of delta_t, so what is missing does not grow with T.
    settings, left = CompressionSettings(deltas=coding, share=0.1), Memory()
    sent, wanted = ({n: torch.zeros(s).double() for n, s in LARGE.items()} for _ in range(2))
    missing = []
    for round in range(200):
        update = update_of(part(*WHOLE), round)
        answer, left = compressed(update, left, settings)
        for name in LARGE:
            sent[name] += answer.delta[name]
            wanted[name] += update.delta[name]
        missing.append(max(float((wanted[n] - sent[n]).abs().max()) for n in LARGE))
    for name in LARGE:
        rest = left[f"compression/left/{name}"].double()
        torch.testing.assert_close(sent[name] + rest, wanted[name], rtol=0, atol=1e-4)
    bound = {"bfloat16": 0.02, "int8": 0.03, "topk": 40.0}[coding]
    assert max(missing[100:]) < bound
    alone = CompressionSettings(deltas=coding, share=0.1, error_feedback=False)
    lost = {n: torch.zeros(s).double() for n, s in LARGE.items()}
    for round in range(200):
        update = update_of(part(*WHOLE), round)
        answer, kept = compressed(update, {}, alone)
        assert not kept
        for name in LARGE:
            lost[name] += update.delta[name].double() - answer.delta[name]
    assert max(float(each.abs().max()) for each in lost.values()) > missing[-1]


def test_topk_by_hand() -> None:
    settings = CompressionSettings(deltas="topk", share=0.25)
    view = SubModel({}, {"b": View("b", (slice(0, 4),))})
    one = replace(
        update_of(part(*WHOLE), 0), submodel=view, delta={"b": torch.tensor([4.0, 3, 2, 1])}
    )
    answer, left = compressed(one, {}, settings)
    assert answer.delta["b"].tolist() == [4.0, 0, 0, 0]
    answer, left = compressed(one, left, settings)  # 4, 3 + 3, 2 + 2, 1 + 1
    assert answer.delta["b"].tolist() == [0, 6.0, 0, 0]
    answer, left = compressed(one, left, settings)  # 4 + 4, 3, 2 + 4, 1 + 2
    assert answer.delta["b"].tolist() == [8.0, 0, 0, 0]
    assert left["compression/left/b"].tolist() == [0, 3, 6, 3]


def test_what_is_left_is_sent_from_its_place_in_the_large_model() -> None:
    settings = CompressionSettings(deltas="topk", share=1e-9)
    before = part(torch.tensor([3, 0]), slice(0, 2))
    update = update_of(before, 0)
    answer, left = compressed(update, {}, settings)
    rest = torch.zeros(4, 3)
    rest[torch.tensor([[3], [0]]), torch.tensor([0, 1])] = update.delta["w"] - answer.delta["w"]
    for rows, columns in (
        (torch.tensor([3, 0]), slice(0, 2)),
        (slice(0, 2), slice(1, 3)),
        (torch.tensor([2, 3]), torch.tensor([1, 0])),
        (slice(1, 3), slice(0, 2)),  # nothing of it lies here
        (torch.tensor([0, 3]), slice(0, 2)),  # the same in another order
    ):
        now = part(rows, columns)
        later = update_of(now, 1)
        everything = replace(settings, share=1.0)
        answer, after = compressed(later, left, everything)
        expected = later.delta["w"] + View("w", (rows, columns)).read(rest)
        torch.testing.assert_close(answer.delta["w"], expected, rtol=0, atol=0)
        assert not any(float(t.abs().max()) for n, t in after.items() if "/left/" in n)


def test_the_method_does_not_see_what_is_left() -> None:
    _, left = compressed(update_of(part(*WHOLE), 0), {}, CompressionSettings(deltas="int8"))
    own = {"own/w": torch.ones(2)}
    assert apart({**own, **left}) == (own, left)
    assert apart(own) == (own, {})


def test_what_diverged_is_neither_hidden_nor_remembered() -> None:
    update = update_of(part(*WHOLE), 0)
    for wrong in (torch.nan, torch.inf, 300.0):
        delta = {**update.delta, "b": torch.tensor([0.0, wrong, 0.0, 0.0])}
        for coding in CODINGS:
            with pytest.raises(UpdateError, match="'b' reaches"):
                compressed(replace(update, delta=delta), {}, CompressionSettings(deltas=coding))


def test_further_tensors_are_sent_as_they_are_and_none_is_none() -> None:
    update = update_of(part(*WHOLE), 0, extra={"gate": torch.randn(3)})
    answer, _ = compressed(update, {}, CompressionSettings(deltas="int8"))
    assert isinstance(answer.delta, Coded) and answer.extra is update.extra
    assert answer.num_bytes == (12 + 4 * 4) + (4 + 4) + 12
    assert compressed(update, {}, CompressionSettings())[0] is update


def test_bytes_are_known_before_anything_is_sent() -> None:
    update = update_of(part(*WHOLE), 0)
    task = Task(
        round=0,
        client=Client(id=0, num_examples=1),
        submodel=update.submodel,
        params=update.delta,
        training=Training(),
    )
    for coding in CODINGS:
        settings = CompressionSettings(deltas=coding, share=0.3)
        answer, _ = compressed(update, {}, settings)
        assert answer_bytes(task, settings) == answer.num_bytes
    assert answer_bytes(task, CompressionSettings()) == update.num_bytes == 64
    one = replace(task, wanted=Wanted(deltas=frozenset({"b"}), extra={"gate": (3,)}))
    assert answer_bytes(one, CompressionSettings(deltas="bfloat16")) == 8 + 12


def task_of(params: dict[str, torch.Tensor], **more: Any) -> Task:
    views = {name: View(name, tuple(slice(0, n) for n in t.shape)) for name, t in params.items()}
    return Task(
        round=0,
        client=Client(id=0, num_examples=4),
        submodel=SubModel({"n": 1}, views),
        params=params,
        training=Training(),
        **more,
    )


def test_what_goes_down_is_what_the_client_begins_with() -> None:
    """Rounded, in half the bytes, and the same after it was sent."""
    draw = seeds.generator(0, "compression")
    params = {"w": torch.randn(40, 30, generator=draw), "half": torch.ones(2, dtype=torch.bfloat16)}
    extra = {"e": torch.tensor([1.0 + 2**-20])}
    settings = CompressionSettings(params="bfloat16")
    given = task_of(params, extra=extra)
    task = as_sent(given, settings)
    assert torch.equal(task.params["w"], params["w"].bfloat16().float())
    assert not torch.equal(task.params["w"], params["w"])
    assert task.params["half"] is params["half"] and task.extra["e"] is extra["e"]
    assert given.num_bytes == 4 * 1200 + 2 * 2 + 4
    assert task.num_bytes == 2 * 1200 + 2 * 2 + 4
    assert task_bytes(given, settings) == task.num_bytes
    assert task_bytes(given, CompressionSettings()) == given.num_bytes
    message = encode_task(task, {})
    assert len(message) < len(encode_task(given, {})) - 2000
    found, _ = decode_task(message)
    assert found.num_bytes == task.num_bytes
    for name, tensor in task.params.items():
        assert torch.equal(found.params[name], tensor)
        assert found.params[name].dtype == params[name].dtype


def test_what_goes_down_exactly_is_not_rounded() -> None:
    given = task_of({"w": torch.rand(4, 3)}, wanted=Wanted(exact=True))
    assert as_sent(given, CompressionSettings(params="bfloat16")) is given
    given = task_of({"w": torch.rand(4, 3)})
    assert as_sent(given, CompressionSettings(deltas="int8")) is given


def test_what_cannot_be_compressed_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"peers have none: set compression\.params to none"):
        CompressionSettings(params="bfloat16").check(FedAvg(), "peers")
    CompressionSettings(params="bfloat16").check(FedAsync(), "star")
    settings = CompressionSettings(deltas="topk")
    for method in (FedAsync(), Local()):
        with pytest.raises(ConfigError, match="sends none"):
            settings.check(method, "star")
    with pytest.raises(ConfigError, match=r"error_feedback to false"):
        settings.check(FLoRA(), "star")
    replace(settings, error_feedback=False).check(FLoRA(), "star")
    with pytest.raises(ConfigError, match="peers"):
        settings.check(FedAvg(), "peers")
    settings.check(FedAvg(), "tree")
    CompressionSettings().check(Local(), "peers")
    rewriting = {name for name, kind in METHODS.items() if getattr(kind(), "rewrites", False)}
    assert rewriting == {"flora", "flexlora", "matched_averaging", "flm", "fedadapter"}
    with pytest.raises(ConfigError, match=r"error_feedback to false"):
        settings.check(FedFMSL(averaging="flexlora"), "star")
    with pytest.raises(ConfigError, match="share"):
        CompressionSettings(share=0.0)
