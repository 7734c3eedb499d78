import functools
import json
import math

import pytest
import torch

from tesserafl.core.axes import probe
from tesserafl.core.axis import Tie
from tesserafl.core.errors import ConfigError, ModelError
from tesserafl.core.fit import CrossEntropy
from tesserafl.core.model import Model, Output
from tesserafl.core.modules import parameters_of
from tesserafl.core.submodel import SubModel, cut
from tesserafl.data.examples import Spec
from tesserafl.models.configs import config_of
from tesserafl.models.huggingface import HuggingFace, family_of
from tesserafl.models.scaling import fan_in_scales, forward_of

transformers = pytest.importorskip("transformers")

HEADS = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32}
FAMILIES = {
    "gpt2": HEADS,
    "bert": {**HEADS, "intermediate_size": 48},
    "vit": {**HEADS, "intermediate_size": 48, "patch_size": 4},
    "llama": {
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 6,
        "hidden_size": 32,
        "intermediate_size": 48,
    },
    "resnet": {"embedding_size": 8, "hidden_sizes": [16, 32], "depths": [2, 2]},
}


def texts(vocab_size=40, pad_id=0, length=12) -> Spec:
    return Spec(
        kind="tokens",
        task="text-classification",
        shape=(length,),
        num_classes=3,
        class_names=("bad", "fair", "good"),
        vocab_size=vocab_size,
        pad_id=pad_id,
    )


def language(vocab_size=40, length=12) -> Spec:
    return Spec(
        kind="tokens",
        task="causal-lm",
        shape=(length,),
        num_classes=vocab_size,
        vocab_size=vocab_size,
    )


def images(side=16, channels=3) -> Spec:
    shape = (channels, side, side)
    return Spec(kind="image", task="image-classification", shape=shape, num_classes=5)


SPECS = {
    "gpt2": language(),
    "bert": texts(),
    "vit": images(),
    "llama": language(),
    "resnet": images(32),
}


@functools.cache
def tiny(family: str) -> Model:
    return HuggingFace(config=family, options=FAMILIES[family]).build_model(SPECS[family])


def random_cut(model: Model, share: float) -> SubModel:
    """Other units on every axis, also on those that share a size."""
    generator = torch.Generator().manual_seed(0)
    return model.slice(
        {
            axis: torch.randperm(model.units(axis), generator=generator)[
                : max(1, int(share * model.units(axis)))
            ]
            for axis in model.cuttable
        }
    )


def batch(spec: Spec) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    if spec.kind == "image":
        return torch.randn(4, *spec.shape, generator=generator), torch.tensor([0, 1, 2, 3])
    tokens = torch.randint(1, spec.vocab_size, (4, *spec.shape), generator=generator)
    tokens[0, -3:] = spec.pad_id
    return tokens, tokens.roll(-1, 1) if spec.task == "causal-lm" else torch.tensor([0, 1, 2, 0])


def load(module: torch.nn.Module, params: dict[str, torch.Tensor]) -> None:
    own = dict(module.named_parameters())
    assert own.keys() == params.keys()
    with torch.no_grad():
        for name, value in own.items():
            assert value.shape == params[name].shape, name
            value.copy_(params[name])


@pytest.mark.parametrize("share", [0.5, 0.25])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_cut_model_trains_and_is_loaded_without_us(family, share, tmp_path):
    spec = SPECS[family]
    model = tiny(family)
    submodel = random_cut(model, share)
    assert submodel.num_entries < model.num_entries
    module = model.module(submodel.sizes).train()
    params = cut(model.init(0), submodel)
    load(module, params)

    inputs, labels = batch(spec)
    forward = forward_of(model, submodel, module, "output")
    assert fan_in_scales(model, submodel, module)
    params = {name: value.requires_grad_() for name, value in params.items()}
    losses = []
    for _ in range(3):
        loss = CrossEntropy()(forward, params, inputs, labels, {})
        gradients = torch.autograd.grad(loss, list(params.values()), allow_unused=True)
        params = {
            name: (value - 0.01 * (0 if gradient is None else gradient)).detach().requires_grad_()
            for (name, value), gradient in zip(params.items(), gradients, strict=True)
        }
        losses.append(float(loss.detach()))
    assert all(map(math.isfinite, losses))

    load(module, {name: value.detach() for name, value in params.items()})
    model.save(module, str(tmp_path))
    auto = {
        "image-classification": transformers.AutoModelForImageClassification,
        "text-classification": transformers.AutoModelForSequenceClassification,
        "causal-lm": transformers.AutoModelForCausalLM,
    }[spec.task]
    alone = auto.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        ours = module.eval()(inputs)
        if spec.kind == "image":
            theirs = alone(inputs).logits
        else:
            theirs = alone(inputs, attention_mask=(inputs != spec.pad_id).long()).logits
    assert torch.allclose(ours.logits, theirs, atol=1e-5)
    assert ours.features.shape[0] == 4 and ours.features.dim() == 2


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_can_be_left_out(family):
    model = tiny(family)
    submodel = model.slice({axis: [0] for axis in model.depths})
    load(model.module(submodel.sizes), cut(model.init(0), submodel))


def test_the_axes_of_the_families():
    gpt2 = tiny("gpt2")
    assert list(gpt2.widths) == ["embed", "embed.attn", "mlp", "classes"]
    assert gpt2.ties["model.transformer.h.0.attn.c_attn.weight"] == (
        Tie("embed", (8,)),
        Tie("embed.attn", (8, 8, 8)),
    )
    assert gpt2.ties["model.transformer.wte.weight"] == (Tie("classes", (1,)), Tie("embed", (8,)))
    assert list(tiny("bert").widths) == [
        "embed",
        "embed.attention",
        "embed.pooler",
        "mlp",
        "vocabulary",
        "classes",
    ]
    assert list(tiny("vit").widths) == ["embed", "embed.attention", "mlp", "classes"]
    llama = tiny("llama")
    assert list(llama.widths) == ["embed", "heads", "mlp", "classes"]
    assert llama.ties["model.model.layers.1.self_attn.q_proj.weight"] == (
        Tie("heads", (12,)),
        Tie("embed", (1,)),
    )
    resnet = tiny("resnet")
    assert list(resnet.widths) == [
        "embedding",
        *(f"stage{i}{part}" for i in range(2) for part in ("", ".layer", ".layer2")),
        "classes",
    ]
    assert resnet.widths["stage1"].quantum == 4  # one channel inside a bottleneck, four outside
    assert list(resnet.depths) == ["layers0", "layers1"]


FULL = {
    "gpt2": ({}, language(50257), 124_439_808),
    "bert": ({}, texts(30522), 109_484_547),
    "vit": ({}, images(224), 85_802_501),
    "llama": (
        {
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 16,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 64,
            "tie_word_embeddings": True,
        },
        language(128256),
        1_235_814_400,
    ),
    "resnet": ({}, images(32), 23_518_277),
}


SLOW = {"bert", "vit"}
"""Of these names and layouts are tested with tiny models too, as those of the others are."""


@pytest.mark.parametrize(
    "family",
    [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in FULL],
)
def test_real_sizes_are_probed_without_their_memory(family):
    options, spec, entries = FULL[family]
    model = HuggingFace(config=family, options=options).build_model(spec)
    assert model.num_entries == entries
    for share in (0.5, 0.25):
        submodel = random_cut(model, share)
        module = model.module(submodel.sizes, device="meta")
        assert {n: tuple(p.shape) for n, p in module.named_parameters()} == {
            n: view.shape for n, view in submodel.views.items()
        }


class Pairs(torch.nn.Module):
    """CLIP's two towers on images and a fixed set of captions."""

    def __init__(self, config):
        super().__init__()
        self.clip = transformers.CLIPModel(config)
        self.captions = [[1, 5, 2, 9], [1, 7, 9, 9], [1, 3, 4, 9]]

    def forward(self, images):
        return self.clip(
            input_ids=torch.tensor(self.captions, device=images.device), pixel_values=images
        ).logits_per_image


def test_clips_towers_are_probed_together():
    from tesserafl.models.configs import knobs_of, resized

    config = transformers.CLIPConfig(
        text_config={
            **HEADS,
            "intermediate_size": 48,
            "vocab_size": 10,
            "eos_token_id": 9,
            "bos_token_id": 1,
            "pad_token_id": 0,
        },
        vision_config={**HEADS, "intermediate_size": 48, "image_size": 16, "patch_size": 4},
        projection_dim=12,
    )
    knobs = {knob.axis: knob for knob in knobs_of(config)}
    model = probe(
        lambda sizes: Pairs(resized(config, knobs, sizes)),
        {axis: knob.size for axis, knob in knobs.items()},
        lambda: torch.randn(2, 3, 16, 16),
        quanta={axis: knob.quantum for axis, knob in knobs.items() if knob.quantum},
    )
    assert list(model.widths) == [
        "text.embed",
        "text.embed.self_attn",
        "text.mlp",
        "vision.embed",
        "vision.embed.self_attn",
        "vision.mlp",
        "projection",
    ]
    assert list(model.depths) == ["text.layers", "vision.layers"]
    submodel = random_cut(model, 0.5)
    module = model.module(submodel.sizes)
    params = cut(model.init(0), submodel)
    load(module, params)
    out = forward_of(model, submodel, module, "output")(params, torch.randn(2, 3, 16, 16))
    assert out.logits.shape == (2, 3) and bool(out.logits.isfinite().all())


def test_clip_as_a_classifier_has_the_axes_of_its_vision_tower():
    options = {f"vision_config.{name}": value for name, value in HEADS.items()}
    model = HuggingFace(
        config="clip", options={**options, "vision_config.patch_size": 4}
    ).build_model(images())
    assert list(model.widths) == [
        "vision.embed",
        "vision.embed.self_attn",
        "vision.mlp",
        "classes",
    ]


def test_a_forced_wrong_layout_is_refused():
    """Fused queries, keys and values cannot be cut as if they were interleaved heads."""

    class Crossed(torch.nn.Module):
        def __init__(self, sizes):
            super().__init__()
            config = transformers.GPT2Config(
                n_embd=sizes["embed"], n_head=4, n_layer=1, vocab_size=20, n_positions=8
            )
            self.model = transformers.GPT2LMHeadModel(config)

        def forward(self, tokens):
            return Output(self.model(tokens).logits, None)

    with pytest.raises(ModelError, match=r"axis 'embed' .* cannot be cut"):
        # Four heads at every size: units that are no heads.
        probe(
            Crossed,
            {"embed": 32},
            lambda: torch.randint(0, 20, (2, 6)),
            quanta={"embed": 4},
        )


def saved_bert(folder, spec=None):
    config = transformers.BertConfig(
        **HEADS, intermediate_size=48, vocab_size=40, num_labels=2, max_position_embeddings=16
    )
    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification(config)
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "vocab.txt").write_text("[PAD]")
    return model


def test_a_saved_model_is_where_training_starts(tmp_path):
    saved = saved_bert(tmp_path / "source")
    model = HuggingFace(config=str(tmp_path / "source")).build_model(texts())
    params = model.init(3)
    theirs = parameters_of(saved)
    for name, value in params.items():
        if not name.startswith("model.classifier"):
            assert torch.equal(value, theirs[name.removeprefix("model.")]), name
    assert params["model.classifier.weight"].shape == (3, 32)  # a head for our classes
    assert torch.equal(params["model.classifier.weight"], model.init(3)["model.classifier.weight"])
    small = model.resized(random_cut(model, 0.5))
    module = small.module()
    load(module, small.init(3))
    small.save(module, str(tmp_path / "out"))
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
    assert (tmp_path / "out" / "vocab.txt").exists()
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (written["hidden_size"], written["num_attention_heads"]) == (16, 2)
    assert written["id2label"] == {"0": "bad", "1": "fair", "2": "good"}


def test_a_base_model_gets_a_head(tmp_path):
    base = saved_bert(tmp_path).bert
    base.save_pretrained(tmp_path)
    params = HuggingFace(config=str(tmp_path)).build_model(texts()).init(0)
    name = "encoder.layer.1.attention.self.query.weight"
    assert torch.equal(params[f"model.bert.{name}"], base.state_dict()[name])


@pytest.mark.parametrize(
    ("options", "spec", "error", "message"),
    [
        ({}, texts(vocab_size=41), ModelError, "vocab_size 40, the data have 41"),
        ({}, texts(length=17), ModelError, "17 tokens long, the model reads 16"),
        ({"hidden_sze": 3}, texts(), ConfigError, "did you mean 'hidden_size'"),
    ],
)
def test_a_saved_model_that_does_not_fit_is_refused(options, spec, error, message, tmp_path):
    saved_bert(tmp_path)
    with pytest.raises(error, match=message):
        HuggingFace(config=str(tmp_path), options=options).build_model(spec)


@pytest.mark.parametrize(("config", "pad"), [("roberta", 0), ("roberta", 3), ("mpnet", 1)])
def test_places_of_padding_are_none_of_a_text(config, pad):
    options = {**HEADS, "intermediate_size": 48, "max_position_embeddings": 16}
    settings = HuggingFace(config=config, options=options)
    room = 16 - pad - 1
    with pytest.raises(ModelError, match=f"{room + 1} tokens long, the model reads {room}"):
        settings.build_model(texts(pad_id=pad, length=room + 1))
    family = family_of(config, options, texts(pad_id=pad, length=room))
    assert family.places == room
    tokens = torch.full((1, room), 7)
    assert family.build({}).eval()(tokens).logits.shape == (1, 3)
    with pytest.raises((IndexError, RuntimeError), match="out of"):
        family.build({}).eval()(torch.full((1, room + 1), 7))


def test_blocks_that_are_computed_twice_are_refused(tmp_path):
    """Under a call with other parameters the second time would find the module's own."""
    saved_bert(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "gradient_checkpointing": True}))
    with pytest.raises(ConfigError, match=r"gradient_checkpointing true.*in model\.options"):
        HuggingFace(config=str(tmp_path)).build_model(texts())
    switched_off = {"gradient_checkpointing": False}
    assert HuggingFace(config=str(tmp_path), options=switched_off).build_model(texts()).shapes
    part = {"text_config": {"gradient_checkpointing": True}}
    transformers.CLIPConfig(**part).save_pretrained(tmp_path / "clip")
    with pytest.raises(ConfigError, match=r"text_config\.gradient_checkpointing true"):
        config_of("clip", tmp_path / "clip", {})


def test_a_saved_model_of_other_sizes_is_refused(tmp_path):
    saved_bert(tmp_path)
    model = HuggingFace(config=str(tmp_path), options={"hidden_size": 16}).build_model(texts())
    with pytest.raises(ModelError, match="another shape in the file"):
        model.init(0)


def test_a_folder_without_weights_is_a_config_alone(tmp_path):
    transformers.BertConfig(**HEADS, vocab_size=40).save_pretrained(tmp_path)
    assert HuggingFace(config=str(tmp_path)).build_model(texts()).pretrained is None


def test_wrong_settings_are_refused():
    vectors = Spec(kind="vector", task="vector-classification", shape=(3,), num_classes=2)
    with pytest.raises(ModelError, match="use model 'mlp'"):
        HuggingFace().build_model(vectors)
    with pytest.raises(ConfigError, match=r"near names: .*gpt2"):
        HuggingFace(config="gpt-2").build_model(language())
    with pytest.raises(ConfigError, match="did you mean 'mlp'"):
        HuggingFace(config="gpt2", options=HEADS, axes=("mpl",)).build_model(language())
    with pytest.raises(ModelError, match="no causal-lm head for 'resnet'"):
        HuggingFace(config="resnet").build_model(language())


def test_only_the_asked_sizes_become_axes():
    model = HuggingFace(config="gpt2", options=HEADS, axes=("mlp",)).build_model(language())
    assert model.cuttable == ("mlp",) and not model.depths


def test_padding_changes_nothing_for_the_tokens_before_it():
    module = tiny("bert").module().eval()
    short, long = torch.tensor([[3, 4, 5]]), torch.tensor([[3, 4, 5, 0, 0]])
    with torch.no_grad():
        assert torch.allclose(module(short).logits, module(long).logits, atol=1e-6)
        assert torch.allclose(module(short).features, module(long).features, atol=1e-6)
