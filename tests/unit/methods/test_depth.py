"""Which blocks clients hold: the choices that methods on depth share."""

import math

import pytest
import torch

from tesserafl.core import seeds
from tesserafl.core.errors import ConfigError
from tesserafl.core.messages import Client
from tesserafl.data.examples import Spec
from tesserafl.methods._depth import depth_axes, depth_of, drawn_blocks, first_blocks
from tesserafl.models import MLP, ResNet
from tesserafl.models.residual import Residual

VECTORS = Spec(kind="vector", task="vector-classification", shape=(6,), num_classes=3)
IMAGES = Spec(kind="image", task="image-classification", shape=(1, 8, 8), num_classes=3)


@pytest.fixture(scope="module")
def deep():
    return Residual(stream=8, inner=8, blocks=6).build_model(VECTORS)


@pytest.fixture(scope="module")
def stages():
    return ResNet(channels=(8, 16), blocks=(2, 4)).build_model(IMAGES)


def test_axes_of_blocks(deep, stages):
    assert depth_axes(deep) == ("blocks",)
    assert depth_axes(stages) == ("blocks1", "blocks2")


def test_a_model_without_blocks_is_refused():
    with pytest.raises(ConfigError, match="choose --model residual, resnet or huggingface"):
        depth_axes(MLP(hidden=(8,)).build_model(VECTORS))


def test_classes_are_dealt_in_turn():
    clients = [Client(id=number, num_examples=1) for number in range(5)]
    assert [depth_of((5, 2), client) for client in clients] == [5, 2, 5, 2, 5]


@pytest.mark.parametrize("depths", [(), (0,), (3, -1)])
def test_a_depth_below_one_is_refused(depths):
    with pytest.raises(ConfigError, match="how many blocks each client class trains"):
        depth_of(depths, Client(id=0, num_examples=1))


def test_first_blocks_are_at_most_those_that_there_are(stages):
    assert first_blocks(stages, 3) == {"blocks1": range(2), "blocks2": range(3)}


def test_drawn_blocks_keep_the_order_that_is_given(deep):
    order = [5, 0, 3, 1]
    for number in range(20):
        draw = seeds.generator(0, number, "test")
        (drawn,) = drawn_blocks(deep, {"blocks": order}, 3, draw).values()
        places = [order.index(block) for block in drawn]
        assert len(drawn) == 3 and places == sorted(places)


def test_a_draw_of_all_blocks_is_the_order_itself(deep):
    order = [2, 0, 1]
    assert drawn_blocks(deep, {"blocks": order}, 9, seeds.generator(0, "x")) == {"blocks": order}


def test_what_cannot_move_is_always_held(stages):
    orders = {axis: range(stages.units(axis)) for axis in stages.depths}
    for number in range(20):
        drawn = drawn_blocks(stages, orders, 2, seeds.generator(1, number))
        assert drawn["blocks1"] == [0, 1]
        assert drawn["blocks2"][0] == 0 and len(drawn["blocks2"]) == 2
        stages.slice(drawn)  # and every draw is a sub-model


def counts_of(deep, scores, depth, draws=2000):
    counts = torch.zeros(6)
    for number in range(draws):
        draw = seeds.generator(2, number)
        (drawn,) = drawn_blocks(deep, {"blocks": range(6)}, depth, draw, scores).values()
        counts[drawn] += 1
    return counts / draws


def test_without_scores_a_draw_is_uniform(deep):
    # 2 of 6: 1/3 each, standard deviation 0.0105.
    assert (counts_of(deep, None, 2) - 1 / 3).abs().max() < 5 * 0.0105


def test_one_block_is_drawn_in_proportion_to_its_weight(deep):
    # Gumbel: P(i) = w_i / sum w. Standard deviation at most 0.0112.
    weights = torch.tensor([1.0, 1.0, 2.0, 4.0, 0.0, 2.0])
    logs = [math.log(w) if w else -math.inf for w in weights.tolist()]
    found = counts_of(deep, {"blocks": logs}, 1)
    assert (found - weights / 10).abs().max() < 5 * 0.0112
