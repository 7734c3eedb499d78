"""Training beside an encoder that is all frozen: it is computed once for each example."""

from dataclasses import dataclass, field

import pytest
import torch

from tesserafl.core import seeds
from tesserafl.core.fit import Fit, Fitted, Training
from tesserafl.core.model import Model
from tesserafl.data.examples import Examples, Spec
from tesserafl.engines.execute import execute
from tesserafl.engines.kept import Kept, Shelf
from tesserafl.models.feature_adapter import FeatureAdapter
from tesserafl.models.scaling import forward_of, hollow
from tesserafl.models.soft_prompts import Prompts

pytest.importorskip("transformers")

TEXTS = Spec(kind="tokens", task="text-classification", shape=(10,), num_classes=3, vocab_size=40)
PETS = Spec(
    kind="image",
    task="image-classification",
    shape=(3, 16, 16),
    num_classes=3,
    class_names=("cat", "dog", "horse"),
)
SIZES = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2}
SMALL = {**SIZES, "intermediate_size": 24}
BERT = {**SMALL, "hidden_dropout_prob": 0.3}
CLIP = {
    **{f"{part}_config.{key}": size for part in ("text", "vision") for key, size in SMALL.items()},
    "vision_config.patch_size": 4,
    "projection_dim": 12,
}
VIT = {**SMALL, "patch_size": 4, "hidden_dropout_prob": 0.3}
KINDS = {
    "bert": lambda: FeatureAdapter(config="bert", options=BERT, prompt="").build_model(TEXTS),
    "vit": lambda: FeatureAdapter(config="vit", options=VIT, prompt="").build_model(PETS),
    "clip": lambda: FeatureAdapter(config="clip", options=CLIP).build_model(PETS),
    "prompts": lambda: Prompts(config="clip", options=CLIP, context=4).build_model(PETS),
}
TRAINING = Training(lr=0.1, epochs=2, batch_size=4)
COUNT, BATCHES = 10, 6


@dataclass
class Site:
    """A client; counts which blocks of which tower compute."""

    model: Model
    examples: Examples
    most_bytes: int
    calls: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.kept = Kept(most_bytes=self.most_bytes)
        self.module = hollow(self.model.module()).train()
        self.forward = forward_of(self.model, self.model.whole(), self.module, "none")
        for prefix in self.model.frozen_blocks:
            tower = "text" if "text" in prefix else "image" if "vision" in prefix else "only"
            for block in self.module.get_submodule(prefix.rstrip(".")):
                # A part of the block: the block itself is called even if it does not compute.
                part = next(p for p in block.modules() if not list(p.children()))
                part.register_forward_hook(lambda *_, tower=tower: self.calls.append(tower))

    def train(self, round: int) -> Fitted:
        self.calls.clear()
        draw = seeds.generator(5)
        params = {n: 0.3 * torch.randn(s, generator=draw) for n, s in self.model.shapes.items()}
        prefixes = self.model.frozen_blocks
        shelf = Shelf(kept=self.kept, client=0, forward="model", prefixes=prefixes)
        with seeds.seeded(6, round):
            return execute(
                Fit(params=params, training=TRAINING),
                self.forward,
                self.examples,
                seeds.generator(4, round),
                "cpu",
                self.module,
                shelf=shelf,
            )


def examples_of(spec: Spec) -> Examples:
    draw, labels = seeds.generator(3), torch.arange(COUNT) % 3
    if spec is TEXTS:
        tokens = torch.randint(1, 38, (COUNT, 10), generator=draw)
        return Examples(inputs=tokens.int(), labels=labels)
    pixels = torch.randint(0, 256, (COUNT, *PETS.shape), dtype=torch.uint8, generator=draw)
    return Examples(inputs=pixels, labels=labels)


@pytest.mark.parametrize("kind", KINDS)
def test_frozen_towers_are_computed_in_the_first_round_alone(kind: str) -> None:
    model, examples = KINDS[kind](), examples_of(TEXTS if kind == "bert" else PETS)
    split, plain = Site(model, examples, 1 << 20), Site(model, examples, 0)
    for round in range(3):
        found, expected = split.train(round), plain.train(round)
        for name, tensor in expected.params.items():
            torch.testing.assert_close(found.params[name], tensor, rtol=1e-4, atol=1e-6)
        assert len(plain.calls) == 2 * BATCHES * len(model.frozen_blocks)
        if round:  # two blocks in every batch, of the tower that learned vectors go through
            assert split.calls == (["text"] * 2 * BATCHES if kind == "prompts" else [])
    assert 0 < split.kept.num_bytes <= 1 << 20
