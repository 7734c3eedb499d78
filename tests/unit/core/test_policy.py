"""A policy's coordinates and its file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tesserafl.core import seeds
from tesserafl.core.errors import CheckpointError, ConfigError
from tesserafl.core.params import Params
from tesserafl.core.policy import (
    HEADER,
    TENSORS,
    Basis,
    Policy,
    fit_basis,
    policy_files,
    read_policy,
)
from tesserafl.core.submodel import SubModel, View

OPTIONS = {"most_rounds": 5, "most_steps": 10, "unit": 1}


def models(count: int, seed: int = 0) -> list[Params]:
    draw = seeds.generator(seed, "models")
    return [
        {"b": torch.randn(3, generator=draw), "a": torch.randn(2, 4, generator=draw)}
        for _ in range(count)
    ]


def policy(seed: int = 0) -> Policy:
    actor = {"rounds.0.matrix": torch.randn(2, 3, generator=seeds.generator(seed, "actor"))}
    return Policy(
        method="tomtit",
        options=OPTIONS,
        edges=("edge-0", "edge-1"),
        actor=actor,
        basis=fit_basis(models(4), 8),
    )


def written(folder: Path, made: Policy) -> Path:
    folder.mkdir(exist_ok=True)
    data, header = policy_files(made)
    (folder / TENSORS).write_bytes(data)
    (folder / HEADER).write_bytes(header)
    return folder


def test_the_basis_by_hand() -> None:
    # w = -3, 0, 3 along (0.6, -0.8): one component, its largest entry positive, so (-0.6, 0.8).
    line = torch.tensor([0.6, -0.8])
    basis = fit_basis([{"w": factor * line + 5.0} for factor in (-3.0, 0.0, 3.0)], 2)
    assert basis.num_components == 1
    assert torch.allclose(basis.components["w"], torch.tensor([[-0.6, 0.8]]))
    assert torch.allclose(basis.mean["w"], torch.tensor([5.0, 5.0]))
    assert basis.scale == pytest.approx(6**0.5)  # the root of the mean of 9, 0, 9
    assert basis.model({"w": 3 * line + 5.0}) == pytest.approx((-((3 / 2) ** 0.5) * 1.0,), rel=1e-5)
    # A change has no mean to be taken off.
    whole = SubModel({}, {"w": View("w", (slice(0, 2),))})
    assert basis.change({"w": -(6**0.5) * line}, whole) == pytest.approx((1.0,), rel=1e-5)


def test_components_are_orthonormal_and_hold_most_of_what_differs() -> None:
    given = models(5)
    basis = fit_basis(given, 8)
    assert basis.num_components == 4  # five models differ in four directions
    flat = torch.cat([basis.components[name].flatten(1) for name in basis.components], dim=1)
    assert torch.allclose(flat @ flat.T, torch.eye(4), atol=1e-5)
    # In all four directions they are told apart as well as by their own entries.
    places = torch.tensor([basis.model(model) for model in given]) * basis.scale
    rows = torch.stack([torch.cat([m["a"].flatten(), m["b"]]) for m in given])
    assert torch.allclose(torch.cdist(places, places), torch.cdist(rows, rows), atol=1e-3)
    fewer = fit_basis(given, 2)
    assert torch.equal(fewer.components["a"], basis.components["a"][:2])


def test_the_order_of_models_turns_no_sign() -> None:
    given = models(5)
    one, other = fit_basis(given, 4), fit_basis(given[::-1], 4)
    for name in one.components:
        assert torch.allclose(one.components[name], other.components[name], atol=1e-4)


def test_a_change_of_a_part_is_zero_elsewhere() -> None:
    basis = fit_basis(models(5), 4)
    columns = torch.tensor([3, 1])
    part = SubModel({}, {"small": View("a", (slice(1, 2), columns))})
    delta = torch.tensor([[2.0, -1.0]])
    whole = torch.zeros(2, 4)
    whole[1, columns] = delta
    everything = SubModel({}, {"a": View("a", (slice(0, 2), slice(0, 4)))})
    found = basis.change({"small": delta}, part)
    assert found == pytest.approx(basis.change({"a": whole}, everything))
    assert any(abs(value) > 1e-3 for value in found)


def test_models_that_do_not_differ_have_no_basis() -> None:
    (model,) = models(1)
    with pytest.raises(ConfigError, match="do not differ"):
        fit_basis([model, model, model], 4)


def test_a_policy_survives_its_files(tmp_path: Path) -> None:
    made = policy()
    again = read_policy(written(tmp_path, made))
    assert (again.method, again.options, again.edges) == ("tomtit", OPTIONS, made.edges)
    for before, after in (
        (made.actor, again.actor),
        (made.basis.mean, again.basis.mean),
        (made.basis.components, again.basis.components),
    ):
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)
    # The same bits of every coordinate too, so a run decides as it was learnt.
    (model,) = models(1, seed=5)
    assert again.basis.model(model) == made.basis.model(model)
    assert policy_files(again) == policy_files(made)


def changed(name: str, value: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        header = json.loads((folder / HEADER).read_text())
        (folder / HEADER).write_text(json.dumps({**header, name: value}))

    return change


def truncated(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: len(data) // 2])

    return change


def flipped(folder: Path) -> None:
    data = bytearray((folder / TENSORS).read_bytes())
    data[-3] ^= 1
    (folder / TENSORS).write_bytes(bytes(data))


def of_another(folder: Path) -> None:
    (folder / TENSORS).write_bytes(policy_files(policy(seed=1))[0])


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (truncated(HEADER), "policy.json is damaged"),
        (truncated(TENSORS), "does not match the digest"),
        (flipped, "does not match the digest"),
        (of_another, "does not match the digest"),
        (lambda folder: (folder / HEADER).unlink(), "holds no policy"),
        (lambda folder: (folder / TENSORS).unlink(), "holds no policy"),
        (changed("format", 1), "policy.json is damaged: format"),
        (changed("unknown", 2), "policy.json is damaged: unknown"),
        (changed("components", -1), "policy.json is damaged: components"),
        (changed("components", 2), "components' shapes"),
        (changed("shapes", {"rounds.0.matrix": [3, 2]}), "the actor has"),
    ],
)
def test_damaged_policies_are_refused(
    damage: Callable[[Path], None], text: str, tmp_path: Path
) -> None:
    damage(written(tmp_path, policy()))
    with pytest.raises(CheckpointError, match=text) as caught:
        read_policy(tmp_path)
    assert "tessera learn" in str(caught.value)


def test_numbers_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    made = policy()
    made.actor["rounds.0.matrix"][0, 0] = torch.nan
    with pytest.raises(CheckpointError, match="not finite"):
        read_policy(written(tmp_path, made))
    basis = Basis(mean=made.basis.mean, components=made.basis.components, scale=0.0)
    bare = Policy(method="tomtit", options=OPTIONS, edges=(), actor={}, basis=basis)
    with pytest.raises(CheckpointError, match=r"the scale is 0\.0"):
        read_policy(written(tmp_path, bare))


def test_a_policy_for_other_settings_is_refused() -> None:
    made, shapes = policy(), {"a": (2, 4), "b": (3,)}
    made.check("tomtit", OPTIONS, shapes)
    with pytest.raises(ConfigError, match="learnt for method 'tomtit', the run's is 'hwamei'"):
        made.check("hwamei", OPTIONS, shapes)
    with pytest.raises(ConfigError, match=r"method\.most_steps is 12, and .* learnt for 10"):
        made.check("tomtit", {**OPTIONS, "most_steps": 12}, shapes)
    for other in ({"a": (2, 5), "b": (3,)}, {"a": (2, 4)}, {**shapes, "c": (1,)}):
        with pytest.raises(ConfigError, match="learnt for another model"):
            made.check("tomtit", OPTIONS, other)
