"""HeteroFL by hand: Diao, Ding and Tarokh, ICLR 2021, Algorithm 1."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from worked import (
    TRAINING,
    answer,
    clients,
    mlp,
    rounds_of,
    share,
    state_of,
    times_trained,
    trained,
    units_of,
    values,
)

from tesserafl.core.errors import ConfigError
from tesserafl.core.fit import WidthScaling
from tesserafl.methods import HeteroFL


def test_an_entry_is_averaged_over_those_who_trained_it() -> None:
    # Four units; client 0 has all (r = 1), client 1 the first two (r = 1/2).
    # W = (10, 20, 30, 40); changes +2 and +4: the first two get (2 + 4) / 2, the others 2.
    model, asked, method = mlp(4), clients(1, 3), HeteroFL(ratio=(1.0, 0.5))
    state = state_of(model, layers_0_bias=[10, 20, 30, 40], head_bias=[1, 1])
    whole, half = method.configure(model, state, asked, TRAINING)
    updates = [answer(whole, 2.0), answer(half, 4.0)]
    after = method.aggregate(model, state, asked, updates)
    assert values(after.params, "layers_0_bias") == [13.0, 23.0, 32.0, 42.0]
    assert values(after.params, "head_weight") == [[3.0, 3.0, 2.0, 2.0]] * 2
    assert values(after.params, "head_bias") == [4.0, 4.0]
    # Weighted by 1 and 3 examples: (2 + 3 x 4) / 4 = 3.5
    weighted = replace(method, weighting="examples").aggregate(model, state, asked, updates)
    assert values(weighted.params, "layers_0_bias") == [13.5, 23.5, 32.0, 42.0]


def test_what_nobody_trained_keeps_its_value() -> None:
    model, asked, method = mlp(4), clients(1), HeteroFL(ratio=(0.5,))
    state = state_of(model, layers_0_bias=[10, 20, 30, 40])
    (task,) = method.configure(model, state, asked, TRAINING)
    assert values(task.params, "layers_0_bias") == [10.0, 20.0]
    after = method.aggregate(model, state, asked, [answer(task, 1.0)])
    assert values(after.params, "layers_0_bias") == [11.0, 21.0, 30.0, 40.0]


def test_parts_are_nested_prefixes_and_widths_round_up() -> None:
    # ceil(r K) of K = 5 and 6: r = 1 -> 5, 6; 1/2 -> 3, 3; 1/8 -> 1, 1
    model, method = mlp(5, 6), HeteroFL(ratio=(1.0, 0.5, 0.125))
    for tasks in rounds_of(method, model, 6, range(3)):  # the same in every round
        kept = [units_of(model, task) for task in tasks]
        assert kept[:3] == kept[3:]
        assert [len(part["hidden1"]) for part in kept[:3]] == [5, 3, 1]
        assert [len(part["hidden2"]) for part in kept[:3]] == [6, 3, 1]
        assert all(units == list(range(len(units))) for part in kept for units in part.values())


@pytest.mark.parametrize("s", [2, 4, 8, 16])
def test_a_square_of_the_ratio_is_ever_trained_between_hidden_layers(s: int) -> None:
    # Digest 1.1: .250, .063, .016, .004; the ends, whose other side is whole, get r.
    model = mlp(128, 128)
    counts = times_trained(model, rounds_of(HeteroFL(ratio=(1 / s,)), model, 2, range(3)))
    assert share(counts["layers.1.weight"]) == 1 / s**2
    assert share(counts["layers.0.weight"]) == share(counts["head.weight"]) == 1 / s
    assert share(counts["head.bias"]) == 1.0


@pytest.mark.parametrize(
    ("width_scaling", "expected"),
    [
        # Half of four units, features (1, 2), p = (1/2, 1/2), y = 0, eta = 1/2.
        ("none", [0.25, 0.5]),  # eta (1 - p) h
        ("output", [0.5, 1.0]),  # logits = 2 W h: the gradient has the factor 2
        ("parameters", [0.125, 0.25]),  # W' = 2 W moves as for "none"; W moves by half of it
    ],
)
def test_the_scaler_by_hand(width_scaling: WidthScaling, expected: list[float]) -> None:
    model, method = mlp(4), HeteroFL(ratio=(0.5,), width_scaling=width_scaling)
    front = [[1, 0], [0, 1], [9, 9], [9, 9]]
    state = state_of(model, layers_0_weight=front)
    (task,) = method.configure(model, state, clients(1), TRAINING)
    update = trained(method, model, task, [[1.0, 2.0]], [0])
    assert values(update.delta, "head_weight") == [expected, [-v for v in expected]]
    assert values(update.delta, "head_bias") == [0.25, -0.25]  # biases are never scaled
    # In front only the inputs are whole, and nothing passes back through a head of zeros.
    assert not torch.count_nonzero(update.delta["layers.0.weight"])


@pytest.mark.parametrize("width_scaling", ["none", "output", "parameters"])
@pytest.mark.parametrize("s", [2, 3, 4, 7])
def test_what_does_not_learn_is_reported_as_unmoved(width_scaling: WidthScaling, s: int) -> None:
    # A head of zeros passes no gradient on, so the layer in front of it stays: its change is 0.
    model = mlp(4 * s, 8 * s)
    method = HeteroFL(ratio=(1 / s,), width_scaling=width_scaling)
    state = state_of(model)
    params = model.init(0)
    params |= {name: torch.zeros_like(value) for name, value in params.items() if "head" in name}
    (task,) = method.configure(model, replace(state, params=params), clients(1), TRAINING)
    update = trained(method, model, task, [[1.0, 2.0]], [0])
    assert bool(torch.count_nonzero(update.delta["head.weight"]))
    assert not torch.count_nonzero(update.delta["layers.1.weight"])


def test_only_the_owners_of_a_class_report_its_rows() -> None:
    # Classes 0, 1, 2. Client 0 has 0 and 1, client 1 has 1: class 2 is nobody's.
    model, asked, method = mlp(2, classes=3), clients(2, 1), HeteroFL(ratio=(1.0,))
    training = replace(TRAINING, mask_absent_classes=True)
    state = state_of(model, layers_0_weight=[[1, 0], [0, 1]], head_bias=[0, 0, 5])
    one, other = method.configure(model, state, asked, training)
    updates = [
        trained(method, model, one, [[0.0, 0.0], [0.0, 0.0]], [0, 1]),
        trained(method, model, other, [[0.0, 0.0]], [1]),
    ]
    assert [len(update.delta["head.bias"]) for update in updates] == [2, 1]
    # Masked logits are 0, so p = 1/3 each. Client 0: mean gradient (1/3 - 1/2) for both classes,
    # eta = 1/2: +1/12. Client 1: 1/3 - 1 for class 1: +1/3.
    after = method.aggregate(model, state, asked, updates)
    torch.testing.assert_close(
        after.params["head.bias"], torch.tensor([1 / 12, (1 / 12 + 1 / 3) / 2, 5.0])
    )


@pytest.mark.parametrize("ratio", [(), (0.0,), (0.5, 1.5), (-0.5,), (float("nan"),)])
def test_a_ratio_outside_of_0_to_1_is_refused(ratio: tuple[float, ...]) -> None:
    model = mlp(4)
    with pytest.raises(ConfigError, match=r"method\.ratio"):
        list(HeteroFL(ratio=ratio).configure(model, state_of(model), clients(1), TRAINING))
