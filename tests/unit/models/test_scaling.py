import pytest
import torch
from torch import nn
from torch.func import functional_call

from tesserafl.core.axes import probe
from tesserafl.core.model import Model, Output
from tesserafl.core.modules import parameters_of
from tesserafl.core.submodel import SubModel, cut, index_tensor
from tesserafl.data.examples import Spec
from tesserafl.models.cnn import CNN
from tesserafl.models.mlp import MLP
from tesserafl.models.resnet import ResNet
from tesserafl.models.scaling import fan_in_scales, forward_of

IMAGES = Spec(kind="image", task="image-classification", shape=(3, 16, 16), num_classes=5)
VECTORS = Spec(kind="vector", task="vector-classification", shape=(6,), num_classes=5)


def random_units(model: Model, share: float) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        axis: torch.randperm(model.units(axis), generator=generator)[
            : int(share * model.units(axis))
        ]
        for axis in model.cuttable
    }


def with_noise(model: Model) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return {
        name: (value + 0.1 * torch.randn(value.shape, generator=generator)).double()
        for name, value in model.init(0).items()
    }


def masked(params: dict[str, torch.Tensor], submodel: SubModel) -> dict[str, torch.Tensor]:
    """The large parameters with everything outside the sub-model zero."""
    kept = {name: torch.zeros_like(value) for name, value in params.items()}
    for view in submodel.views.values():
        grid = torch.meshgrid(*(index_tensor(index) for index in view.index), indexing="ij")
        kept[view.name][grid] = params[view.name][grid]
    return kept


@pytest.mark.parametrize(
    ("settings", "spec"),
    [
        (MLP(hidden=(16, 24)), VECTORS),
        (CNN(channels=(8, 16, 16), norm="none"), IMAGES),
        (CNN(channels=(8, 16, 16), group_size=4), IMAGES),
        (ResNet(channels=(8, 16), blocks=(2, 2), group_size=4), IMAGES),
        (ResNet(channels=(8, 16), blocks=(1, 2), norm="none"), IMAGES),
    ],
)
def test_a_cut_model_is_the_full_one_with_the_other_units_masked(settings, spec):
    model = settings.build_model(spec)
    submodel = model.slice(random_units(model, 0.5))
    params = with_noise(model)
    inputs = torch.randn(3, *spec.shape, dtype=torch.float64)
    full, small = model.module().double(), model.module(submodel.sizes).double()
    expected = functional_call(full, masked(params, submodel), (inputs,)).logits
    got = forward_of(model, submodel, small, "none")(cut(params, submodel), inputs)
    assert torch.allclose(got.logits, expected, atol=1e-10)


def test_equal_blocks_give_the_full_output_when_scaled():
    model = MLP(hidden=(16, 32)).build_model(VECTORS)
    params = with_noise(model)
    for name, ties in model.ties.items():  # four equal blocks along every axis
        for dim, tie in enumerate(ties):
            if tie is not None and tie.axis in model.cuttable:
                first = params[name].narrow(dim, 0, params[name].shape[dim] // 4)
                params[name] = torch.cat([first] * 4, dim=dim)
    submodel = model.slice({axis: range(model.units(axis) // 4) for axis in model.cuttable})
    small = model.module(submodel.sizes).double()
    inputs = torch.randn(3, 6, dtype=torch.float64)
    expected = functional_call(model.module().double(), params, (inputs,)).logits
    got = forward_of(model, submodel, small, "output")(cut(params, submodel), inputs)
    assert torch.allclose(got.logits, expected, atol=1e-12)


def test_only_weights_with_cut_inputs_have_a_scale():
    model = MLP(hidden=(16, 32)).build_model(VECTORS)
    submodel = model.slice({"hidden1": range(4), "hidden2": range(16)})
    scales = fan_in_scales(model, submodel, model.module(submodel.sizes))
    assert scales == {"layers.1.weight": 4.0, "head.weight": 2.0}


class Tied(nn.Module):
    def __init__(self, sizes):
        super().__init__()
        self.tokens = nn.Embedding(9, sizes["embed"])
        self.head = nn.Linear(sizes["embed"], 9, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, tokens):
        return self.head(self.tokens(tokens))


def test_a_shared_weight_is_scaled_in_the_head_alone():
    tokens = torch.tensor([[1, 2], [3, 4]])
    model = probe(Tied, {"embed": 8}, lambda: tokens)
    submodel = model.slice({"embed": range(4)})
    module = model.module(submodel.sizes)
    assert fan_in_scales(model, submodel, module) == {"head.weight": 2.0}
    params = parameters_of(module)
    weight = params["tokens.weight"].requires_grad_()
    got = forward_of(model, submodel, module, "output")(params, tokens)
    assert isinstance(got, Output) and got.features is None
    assert torch.allclose(got.logits, weight[tokens] @ (2.0 * weight).T)
    (gradient,) = torch.autograd.grad(got.logits.sum(), [weight])
    assert torch.isfinite(gradient).all() and module.tokens.weight.grad is None


def test_nothing_is_scaled_where_nothing_is_cut():
    model = MLP(hidden=(8,)).build_model(VECTORS)
    module, params = model.module(), model.init(0)
    assert fan_in_scales(model, model.whole(), module) == {}
    inputs = torch.randn(2, 6)
    got = forward_of(model, model.whole(), module, "output")(params, inputs)
    assert torch.equal(got.logits, functional_call(module, params, (inputs,)).logits)
