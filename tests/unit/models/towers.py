"""A small two-tower model and its data, for the tests of what is built on one."""

import torch

from tesserafl.core.model import Model
from tesserafl.data.examples import Spec
from tesserafl.models.huggingface import family_of

PROMPT = "a photo of a {}"
PARTS = {
    "text_config.hidden_size": 32,
    "text_config.num_attention_heads": 4,
    "text_config.num_hidden_layers": 2,
    "text_config.intermediate_size": 48,
    "vision_config.hidden_size": 48,
    "vision_config.num_attention_heads": 4,
    "vision_config.num_hidden_layers": 2,
    "vision_config.intermediate_size": 64,
    "vision_config.patch_size": 4,
}
CLIP = {**PARTS, "projection_dim": 24}
PETS = Spec(
    kind="image",
    task="image-classification",
    shape=(3, 16, 16),
    num_classes=3,
    class_names=("cat", "dog", "horse"),
)


def images(number: int = 4) -> torch.Tensor:
    return torch.randn(number, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def save_clip(folder, seed: int = 5, **options):
    """A saved model with weights that nobody else draws, and its tokenizer of bytes."""
    family = family_of("clip", {**CLIP, **options}, PETS, PROMPT)
    generator = torch.Generator().manual_seed(seed)
    module = family.build({})
    with torch.no_grad():
        for value in module.parameters():
            value.copy_(0.3 * torch.randn(value.shape, generator=generator))
    family.save(module, str(folder))
    return module.model.eval()


def moved(model: Model, size: float = 0.3) -> dict[str, torch.Tensor]:
    """Parameters as training leaves them."""
    generator = torch.Generator().manual_seed(7)
    return {
        name: size * torch.randn(shape, generator=generator) for name, shape in model.shapes.items()
    }


def put(module, params):
    """The module with these values, as it predicts."""
    own = dict(module.named_parameters())
    assert own.keys() == params.keys()
    with torch.no_grad():
        for name, value in own.items():
            assert value.shape == params[name].shape, name
            value.copy_(params[name])
    return module.eval()
