"""FedBRB by hand: Xu et al., arXiv 2402.17202, as reconstructed in docs/methods/fedbrb.md."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from worked import (
    TRAINING,
    answer,
    clients,
    mlp,
    rounds_of,
    share,
    state_of,
    times_trained,
    units_of,
    values,
)

from tesserafl.core.axes import probe
from tesserafl.core.axis import Tie, Width
from tesserafl.core.errors import CapacityError, ConfigError, ModelError
from tesserafl.core.method import State
from tesserafl.core.model import Model, Sizes
from tesserafl.core.params import Params
from tesserafl.core.submodel import cut
from tesserafl.data.examples import Spec
from tesserafl.methods import FedBRB
from tesserafl.models import CNN, MLP, ResNet
from tesserafl.models.scaling import forward_of

IMAGES = Spec(kind="image", task="image-classification", shape=(1, 8, 8), num_classes=3)


@cache
def small_resnet() -> Model:
    """Axes in triangles: a shortcut joins two streams, which the inner channels join too."""
    settings = ResNet(channels=(12, 24, 12), blocks=(2, 1, 1), group_size=1)
    return settings.build_model(IMAGES)


MODELS: dict[str, Callable[[], Model]] = {
    "mlp": lambda: mlp(12, 24, 12),
    "resnet": small_resnet,
}


def cut_dims(model: Model, name: str) -> int:
    """How many dimensions of a parameter lie on axes that are cut."""
    return sum(tie is not None and tie.axis in model.cuttable for tie in model.ties[name])


def between_cut_axes(model: Model) -> list[str]:
    found = [name for name in model.shapes if cut_dims(model, name) == 2]
    assert found
    return found


# Rolling


@pytest.mark.parametrize("s", [2, 3, 4])
@pytest.mark.parametrize("which", MODELS)
@pytest.mark.parametrize("start", [0, 5])
@pytest.mark.parametrize("rolling", ["lattice", "independent"])
def test_one_client_trains_every_block_once_in_s_squared_rounds(
    which: str, s: int, start: int, rolling: str
) -> None:
    model, method = MODELS[which](), FedBRB(ratio=(1 / s,), rolling=rolling)  # type: ignore[arg-type]
    counts = times_trained(model, rounds_of(method, model, 1, range(start, start + s * s)))
    for name, count in counts.items():
        # s^2 blocks between two axes, s blocks on one, one block elsewhere.
        assert count.unique().tolist() == [s ** (2 - cut_dims(model, name))]


@pytest.mark.parametrize("s", [2, 3, 4])
@pytest.mark.parametrize("which", MODELS)
@pytest.mark.parametrize("round", [0, 1, 7])
@pytest.mark.parametrize("rolling", ["lattice", "independent"])
def test_s_squared_clients_train_every_block_once_in_one_round(
    which: str, s: int, round: int, rolling: str
) -> None:
    model, method = MODELS[which](), FedBRB(ratio=(1 / s,), rolling=rolling)  # type: ignore[arg-type]
    counts = times_trained(model, rounds_of(method, model, s * s, [round]))
    for name in between_cut_axes(model):
        assert counts[name].unique().tolist() == [1]


@pytest.mark.parametrize("which", MODELS)
def test_ten_clients_cover_sixteen_blocks_in_seven_rounds(which: str) -> None:
    # Digest 4.3: s = 4, m = 10. One client alone needs sixteen.
    model = MODELS[which]()
    counts = times_trained(model, rounds_of(FedBRB(ratio=(0.25,)), model, 10, range(7)))
    assert all(share(counts[name]) == 1.0 for name in counts)
    alone = times_trained(model, rounds_of(FedBRB(ratio=(0.25,)), model, 1, range(7)))
    assert all(share(alone[name]) == 7 / 16 for name in between_cut_axes(model))


@pytest.mark.parametrize("s", [2, 3, 4])
@pytest.mark.parametrize("which", MODELS)
def test_the_diagonal_covers_s_of_s_squared_blocks_for_ever(which: str, s: int) -> None:
    model, method = MODELS[which](), FedBRB(ratio=(1 / s,), rolling="diagonal")
    counts = times_trained(model, rounds_of(method, model, 3, range(2 * s * s)))
    for name, count in counts.items():
        assert share(count) == (1 / s if cut_dims(model, name) == 2 else 1.0)


def test_lattice_turns_by_hand() -> None:
    # s = 2, hidden1 has (a, b) = (1, 0), hidden2 (1, 1); slot 0: u = t, v = floor(t / 2)
    #   t       0  1  2  3
    #   u mod 2 0  1  0  1     group of hidden1
    #   u + v   0  1  1  0     group of hidden2
    model = mlp(4, 4)
    kept = [units_of(model, r[0]) for r in rounds_of(FedBRB(ratio=(0.5,)), model, 1, range(4))]
    first, second = [0, 1], [2, 3]
    assert [k["hidden1"] for k in kept] == [first, second, first, second]
    assert [k["hidden2"] for k in kept] == [first, second, second, first]


def test_a_client_of_ratio_rho_over_s_holds_rho_by_rho_neighbouring_blocks() -> None:
    # Ratios 1/4 and 1/2 of 8 units: s = 4, groups of 2 units, rho = 1 and 2 (cyclic).
    model = mlp(8, 8)
    seen = set()
    # Three in a round: two would leave every slot with every other group, as 2 divides s.
    for small, large, _ in rounds_of(FedBRB(ratio=(0.25, 0.5, 0.5)), model, 3, range(16)):
        for task, rho in ((small, 1), (large, 2)):
            for axis, units in units_of(model, task).items():
                groups = sorted({unit // 2 for unit in units})
                assert units == [unit for group in groups for unit in (2 * group, 2 * group + 1)]
                neighbours = {tuple(sorted(((g + k) % 4) for k in range(rho))) for g in range(4)}
                assert tuple(groups) in neighbours
                seen.add((axis, rho, tuple(groups)))
            assert task.submodel.views["layers.1.weight"].shape == (2 * rho, 2 * rho)
    assert len(seen) == 2 * 2 * 4  # every axis, either width, every place


def test_an_independent_client_is_glued_from_one_block_number_in_every_layer() -> None:
    # s = 2, turn b = t: (p, q) = (0, 1) in round 1. Rows of group 0, columns of group 1, and the
    # bias with its rows, although the layer in front gives group 0.
    model, method = mlp(4, 4), FedBRB(ratio=(0.5,), rolling="independent")
    ((task,),) = rounds_of(method, model, 1, [1])
    views = task.submodel.views
    assert views["layers.1.weight"].index == (slice(0, 2), slice(2, 4))
    assert views["layers.0.bias"].index == views["layers.1.bias"].index == (slice(0, 2),)


class _AllMeet(nn.Module):
    """Four axes of which any two meet in a weight, as in a densely connected network."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        widths = [sizes[axis] for axis in "abcd"]
        self.layers = nn.ModuleList(
            nn.ModuleList(nn.Linear(width, out) for width in [3, *widths[:i]])
            for i, out in enumerate(widths)
        )
        self.head = nn.Linear(widths[-1], 2)

    def forward(self, inputs: Tensor) -> Tensor:
        streams = [inputs]
        for layers in self.layers:
            parts = [layer(x) for layer, x in zip(layers, streams, strict=True)]
            streams.append(torch.relu(torch.stack(parts).sum(dim=0)))
        return self.head(streams[-1])  # type: ignore[no-any-return]


@pytest.mark.parametrize("s", [2, 4])
def test_axes_that_all_meet_are_covered_or_refused_but_not_left_out_silently(s: int) -> None:
    model = probe(_AllMeet, dict.fromkeys("abcd", 4), lambda: torch.randn(3, 3))
    try:
        rounds = rounds_of(FedBRB(ratio=(1 / s,)), model, 1, range(s * s))
    except (ConfigError, ModelError):
        return
    counts = times_trained(model, rounds)
    missed = [name for name in between_cut_axes(model) if share(counts[name]) < 1.0]
    assert not missed


# Weighted broadcast


def broadcast_round(
    method: FedBRB, *, round: int = 0, rounds: int = 10
) -> tuple[Model, State, list[list[float]]]:
    """B = ((0, 8), (16, 24)), one unit a block; client 0 adds 4 to B_00, client 1 -4 to B_11.

    Client 0 has one example, client 1 three. In round 0 they hold the groups 0 and 1 of all axes.
    """
    model, asked = mlp(2, 2), clients(1, 3)
    state = state_of(
        model, round=round, rounds=rounds, layers_1_weight=[[0, 8], [16, 24]], head_bias=[8, 8]
    )
    one, other = method.configure(model, state, asked, TRAINING)
    updates = [answer(one, 4.0), answer(other, -4.0)]
    after = method.aggregate(model, state, asked, updates)
    return model, after, after.params["layers.1.weight"].tolist()


@pytest.mark.parametrize(
    ("weighting", "beta", "expected"),
    [
        # B~_00 = 4, B~_11 = 20; v = 1 and 3: B- = (4 + 3 x 20) / 4 = 16
        ("examples", 0.5, [[10.0, 12.0], [16.0, 18.0]]),
        ("examples", 0.25, [[7.0, 10.0], [16.0, 19.0]]),
        # v = 1 and 1: B- = 12
        ("uniform", 0.5, [[8.0, 10.0], [14.0, 16.0]]),
        # beta = 0: pure rolling; beta = 1: all blocks are tied
        ("uniform", 0.0, [[4.0, 8.0], [16.0, 20.0]]),
        ("uniform", 1.0, [[12.0, 12.0], [12.0, 12.0]]),
        ("examples", 1.0, [[16.0, 16.0], [16.0, 16.0]]),
    ],
)
def test_broadcast_by_hand(weighting: str, beta: float, expected: list[list[float]]) -> None:
    method = FedBRB(ratio=(0.5,), weighting=weighting, broadcast=beta)  # type: ignore[arg-type]
    assert broadcast_round(method)[2] == expected


@pytest.mark.parametrize(
    ("beta", "expected"),
    [
        # Changes 4 and -4 with v = 1 and 3: their mean is (4 - 12) / 4 = -2.
        # Trained: 4 + beta (-2 - 4) and -4 + beta (-2 + 4); untrained: beta (-2).
        (0.0, [[4.0, 8.0], [16.0, 20.0]]),
        (0.5, [[1.0, 7.0], [15.0, 21.0]]),
        (1.0, [[-2.0, 6.0], [14.0, 22.0]]),  # every block moves alike, and stays what it was
    ],
)
def test_broadcast_of_updates_by_hand(beta: float, expected: list[list[float]]) -> None:
    method = FedBRB(ratio=(0.5,), weighting="examples", broadcast=beta, broadcast_of="updates")
    assert broadcast_round(method)[2] == expected


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_what_is_not_cut_has_one_block_and_is_averaged(beta: float) -> None:
    # 8 + (1 x 4 - 3 x 4) / 4 = 6, whatever beta is
    method = FedBRB(ratio=(0.5,), weighting="examples", broadcast=beta)
    assert values(broadcast_round(method)[1].params, "head_bias") == [6.0, 6.0]


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_vectors_and_ends_have_s_blocks(beta: float) -> None:
    # Zeros; one client adds 4 to its segment (or row, or column): B- = 4, the other gets 4 beta.
    model, asked, method = mlp(2, 2), clients(1), FedBRB(ratio=(0.5,), broadcast=beta)
    state = state_of(model)
    (task,) = method.configure(model, state, asked, TRAINING)
    after = method.aggregate(model, state, asked, [answer(task, 4.0)]).params
    far = 4.0 * beta
    assert values(after, "layers_0_bias") == values(after, "layers_1_bias") == [4.0, far]
    assert values(after, "layers_0_weight") == [[4.0, 4.0], [far, far]]  # 2 inputs, not cut
    assert values(after, "head_weight") == [[4.0, far], [4.0, far]]  # 2 classes, not cut
    assert values(after, "layers_1_weight") == [[4.0, far], [far, far]]


@pytest.mark.parametrize(
    ("round", "beta"),
    # beta_t = 1/2 (1 + cos(pi t / T)) / 2, T = 4
    [(0, 0.5), (1, 0.25 * (1 + math.sqrt(0.5))), (2, 0.25), (3, 0.25 * (1 - math.sqrt(0.5)))],
)
def test_broadcast_is_annealed_to_zero(round: int, beta: float) -> None:
    annealed = FedBRB(ratio=(0.5,), broadcast=0.5, anneal="cosine")
    constant = replace(annealed, broadcast=beta, anneal="constant")
    results = [
        torch.tensor(broadcast_round(method, round=round, rounds=4)[2])
        for method in (annealed, constant)
    ]
    torch.testing.assert_close(*results)


def test_similarity_weights_by_hand() -> None:
    # Changes 4 and -1: B~ = 4 and 23, weights exp(-4) and exp(-1), so 1 and e^3.
    # B- = (4 + 23 e^3) / (1 + e^3) = 22.0989; beta = 1
    model, asked = mlp(2, 2), clients(1, 3)
    method = FedBRB(ratio=(0.5,), broadcast=1.0, broadcast_weight="similarity")
    state = state_of(model, layers_1_weight=[[0, 8], [16, 24]])
    one, other = method.configure(model, state, asked, TRAINING)
    updates = [answer(one, 4.0), answer(other, -1.0)]
    after = method.aggregate(model, state, asked, updates)
    expected = (4 + 23 * math.e**3) / (1 + math.e**3)
    torch.testing.assert_close(after.params["layers.1.weight"], torch.full((2, 2), expected))
    # With examples 1 and 3: (4 + 3 x 23 e^3) / (1 + 3 e^3)
    weighted = replace(method, weighting="examples").aggregate(model, state, asked, updates)
    expected = (4 + 69 * math.e**3) / (1 + 3 * math.e**3)
    torch.testing.assert_close(weighted.params["layers.1.weight"], torch.full((2, 2), expected))


def test_similarity_takes_the_norm_over_the_whole_block() -> None:
    # Four units, blocks of 2 x 2: changes of 1 everywhere have norm 2, none has 0.
    # B~ = 1 and 0 with weights e^-2 and 1: B- = 1 / (1 + e^2)
    model, asked = mlp(4, 4), clients(1, 1)
    method = FedBRB(ratio=(0.5,), broadcast=1.0, broadcast_weight="similarity")
    state = state_of(model)
    one, other = method.configure(model, state, asked, TRAINING)
    after = method.aggregate(model, state, asked, [answer(one, 1.0), answer(other, 0.0)])
    expected = torch.full((4, 4), 1 / (1 + math.e**2))
    torch.testing.assert_close(after.params["layers.1.weight"], expected)


def test_blocks_are_laid_over_each_other_unit_by_unit() -> None:
    # Client 0 gives its 2 x 2 block; beta = 1 copies it to the three others, not mirrored or mixed.
    model, asked, method = mlp(4, 4), clients(1), FedBRB(ratio=(0.5,), broadcast=1.0)
    state = state_of(model)
    (task,) = method.configure(model, state, asked, TRAINING)
    block: list[object] = [[1, 2], [3, 4]]
    after = method.aggregate(model, state, asked, [answer(task, 0.0, layers_1_weight=block)])
    assert values(after.params, "layers_1_weight") == [[1, 2, 1, 2], [3, 4, 3, 4]] * 2


def test_blocks_of_a_fused_projection_take_every_part() -> None:
    # 3 units, 2 parts (say queries, then keys): unit g owns entries g and 3 + g. One client answers
    # for unit 0 with (5, 7): beta = 1 gives 5 to every unit's first part and 7 to its second.
    ties = {"fused": (Tie("heads", (1, 1)),)}
    model = Model(
        build=lambda sizes: nn.Identity(),
        sizes={"heads": 3},
        widths={"heads": Width(3, 1, "heads")},
        depths={},
        ties=ties,
        shapes={"fused": (6,)},
    )
    method, asked = FedBRB(ratio=(1 / 3,), broadcast=1.0), clients(1)
    state = state_of(model)
    (task,) = method.configure(model, state, asked, TRAINING)
    after = method.aggregate(model, state, asked, [answer(task, 0.0, fused=[5, 7])])
    assert values(after.params, "fused") == [5.0, 5.0, 5.0, 7.0, 7.0, 7.0]


def test_a_larger_client_counts_in_each_of_its_blocks() -> None:
    # s = 4, rho = 2 in round 0: client 1 (slot 1) trains groups {1, 2} of both axes with +4, client
    # 0 group 0 with +8. Between the axes: 4 blocks of 4 and one of 8: B- = 24 / 5.
    model, asked = mlp(4, 4), clients(1, 1)
    method = FedBRB(ratio=(0.25, 0.5), broadcast=1.0)
    state = state_of(model)
    small, large = method.configure(model, state, asked, TRAINING)
    assert units_of(model, large) == {"hidden1": [1, 2], "hidden2": [1, 2]}
    after = method.aggregate(model, state, asked, [answer(small, 8.0), answer(large, 4.0)])
    torch.testing.assert_close(after.params["layers.1.weight"], torch.full((4, 4), 24 / 5))
    torch.testing.assert_close(after.params["layers.1.bias"], torch.full((4,), 16 / 3))


def test_untrained_blocks_do_not_count_in_the_mean() -> None:
    # Only client 1 answers: B- = 20 = B~_11, the others move half way to it.
    model, asked, method = mlp(2, 2), clients(1, 3), FedBRB(ratio=(0.5,), broadcast=0.5)
    state = state_of(model, layers_1_weight=[[0, 8], [16, 24]])
    _, other = method.configure(model, state, asked, TRAINING)
    after = method.aggregate(model, state, asked, [answer(other, -4.0)])
    assert values(after.params, "layers_1_weight") == [[10.0, 14.0], [18.0, 20.0]]


@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
@pytest.mark.parametrize("beta", [0.25, 0.5, 1.0])
def test_one_block_is_the_plain_average_to_the_bit(kind: torch.dtype, beta: float) -> None:
    # s = 1: a block is its own mean, whatever beta is.
    model, asked = mlp(64, 64), clients(3, 7, 9)
    plain = FedBRB(ratio=(1.0,), strict=False, weighting="examples", broadcast=0.0)
    params = {name: torch.randn(shape, dtype=kind) for name, shape in model.shapes.items()}
    state = replace(state_of(model), params=params)

    def after(method: FedBRB) -> State:
        tasks = method.configure(model, state, asked, TRAINING)
        updates = (answer(task, 0.1 * (task.client.id + 1)) for task in tasks)
        return method.aggregate(model, state, asked, updates)

    averaged, spread = after(plain), after(replace(plain, broadcast=beta))
    for name, tensor in averaged.params.items():
        assert torch.equal(spread.params[name], tensor)


# A model whose blocks are all equal


@cache
def families() -> dict[str, tuple[Model, Model]]:
    """A model and one of a quarter of its width."""
    vectors = Spec(kind="vector", task="vector-classification", shape=(5,), num_classes=3)
    return {
        "mlp": (
            MLP(hidden=(8, 12, 8)).build_model(vectors),
            MLP(hidden=(2, 3, 2)).build_model(vectors),
        ),
        "cnn": (
            CNN(channels=(16, 32), group_size=2).build_model(IMAGES),
            CNN(channels=(4, 8), group_size=2).build_model(IMAGES),
        ),
        "cnn without norms": (
            CNN(channels=(8, 16), norm="none", group_size=1).build_model(IMAGES),
            CNN(channels=(2, 4), norm="none", group_size=1).build_model(IMAGES),
        ),
        "resnet": (
            ResNet(channels=(16, 32), blocks=(2, 1), group_size=2).build_model(IMAGES),
            ResNet(channels=(4, 8), blocks=(2, 1), group_size=2).build_model(IMAGES),
        ),
    }


FAMILIES = ("mlp", "cnn", "cnn without norms", "resnet")


def batch_for(which: str) -> Tensor:
    draw = torch.Generator().manual_seed(0)
    return torch.randn(4, *((5,) if which == "mlp" else (1, 8, 8)), generator=draw)


def tied(model: Model, small: Params, s: int) -> Params:
    """W = 1_{s x s} (x) B for every parameter whose dimensions are cut."""
    params = {}
    for name, shape in model.shapes.items():
        times = [full // kept for full, kept in zip(shape, small[name].shape, strict=True)]
        assert all(time in (1, s) for time in times)
        params[name] = small[name].repeat(*times)
    return params


def logits(model: Model, params: Params, inputs: Tensor) -> Tensor:
    output = functional_call(model.module().eval(), params, (inputs,))
    return output.logits  # type: ignore[no-any-return]


@pytest.mark.parametrize("which", FAMILIES)
def test_tied_blocks_make_the_full_output_the_scaled_local_output(which: str) -> None:
    # Digest 4.4: W = 1 (x) B, x = 1 (x) u: the full output is s B u, which the scaler gives too.
    full, small = families()[which]
    draws = small.init(0)
    draws = {name: value + 0.1 * torch.randn_like(value) for name, value in draws.items()}
    params, inputs = tied(full, draws, 4), batch_for(which)
    whole = logits(full, params, inputs)
    for tasks in rounds_of(FedBRB(ratio=(0.25,)), full, 2, range(4)):
        for task in tasks:
            module = full.module(task.submodel.sizes).eval()
            part = cut(params, task.submodel)
            local = forward_of(full, task.submodel, module, "output")(part, inputs).logits
            torch.testing.assert_close(local, whole, rtol=1e-4, atol=1e-5)
    if which in ("mlp", "cnn without norms"):
        plain = forward_of(full, task.submodel, module, "none")(part, inputs).logits
        assert not torch.allclose(plain, whole, rtol=0.05)


@pytest.mark.parametrize("which", FAMILIES)
def test_a_tiled_model_begins_as_the_smallest_client(which: str) -> None:
    # W = 1 (x) B / s: s equal blocks sum to one B u.
    full, small = families()[which]
    state = FedBRB(ratio=(0.25,), init_blocks="tiled").init(full, 5, 10)
    assert {n: tuple(p.shape) for n, p in state.params.items()} == dict(full.shapes)
    inputs = batch_for(which)
    torch.testing.assert_close(
        logits(full, state.params, inputs), logits(small, small.init(5), inputs)
    )
    ((task,),) = [list(FedBRB().configure(full, state, clients(1), TRAINING))]
    for name, block in task.params.items():
        times = [f // k for f, k in zip(full.shapes[name], block.shape, strict=True)]
        assert torch.equal(state.params[name], block.repeat(*times))


def test_independent_blocks_begin_as_the_models_own_initialisation() -> None:
    model = mlp(8, 8)
    state = FedBRB(init_blocks="independent").init(model, 5, 10)
    assert all(torch.equal(state.params[name], value) for name, value in model.init(5).items())


@pytest.mark.parametrize("which", FAMILIES)
def test_full_broadcast_keeps_tied_blocks_tied(which: str) -> None:
    # beta = 1 from a tiled model: after any answers all blocks are equal again, to the bit.
    full, small = families()[which]
    method, asked = FedBRB(ratio=(0.25,), broadcast=1.0), clients(2, 3, 1)
    state = method.init(full, 0, 4)
    for _ in range(3):
        tasks = list(method.configure(full, state, asked, TRAINING))
        updates = [answer(task, 0.37 * (task.client.id - 1) + 0.01) for task in tasks]
        state = method.aggregate(full, state, asked, updates)
    blocks = cut(state.params, tasks[0].submodel)
    for name, value in tied(full, blocks, 4).items():
        assert torch.equal(state.params[name], value)
    assert blocks.keys() == small.shapes.keys()


# What is refused


def test_a_client_that_would_hold_the_model_is_refused_with_the_numbers() -> None:
    # mlp(4, 4): 2 x 4 + 4 + 4 x 4 + 4 + 4 x 2 + 2 = 42 parameters
    model = mlp(4, 4)
    with pytest.raises(CapacityError, match=r"ratio 1\.0 would hold 42 of the model's 42") as error:
        FedBRB(ratio=(0.5, 1.0)).init(model, 0, 1)
    assert "strict" in str(error.value)
    FedBRB(ratio=(0.5, 1.0), strict=False).init(model, 0, 1)
    FedBRB(ratio=(0.5, 0.25)).init(model, 0, 1)


def test_a_width_that_does_not_divide_is_refused_with_the_ratios_that_do() -> None:
    with pytest.raises(ConfigError, match="'hidden1' has 6 units") as error:
        FedBRB(ratio=(0.25,)).init(mlp(6, 4), 0, 1)
    assert "1/1, 1/2, 1/3, 1/6" in str(error.value)


@pytest.mark.parametrize(
    ("ratio", "says"),
    [
        ((0.3,), r"1 over a whole number.*0\.3"),
        ((0.25, 0.6), r"0\.6 is not a multiple.*1/4, 2/4, 3/4, 4/4"),
        ((), "empty"),
        ((0.0,), r"0\.0"),
        ((2.0,), r"2\.0"),
    ],
)
def test_ratios_that_do_not_tile_the_model_are_refused(ratio: tuple[float, ...], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        FedBRB(ratio=ratio).init(mlp(12), 0, 1)


@pytest.mark.parametrize("beta", [-0.1, 1.1, math.nan])
def test_a_broadcast_outside_of_0_to_1_is_refused(beta: float) -> None:
    # At 1.1 blocks overshoot their mean, at -0.1 they run away from it.
    with pytest.raises(ConfigError, match="broadcast"):
        FedBRB(ratio=(0.5,), broadcast=beta).init(mlp(4, 4), 0, 1)
