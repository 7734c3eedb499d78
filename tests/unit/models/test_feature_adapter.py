from dataclasses import replace

import pytest
import torch
from torch.nn import functional
from towers import CLIP, PETS, images, moved, put, save_clip

from tesserafl.core.axis import Tie
from tesserafl.core.errors import ConfigError, ModelError
from tesserafl.core.model import Model
from tesserafl.data.examples import Spec
from tesserafl.models.feature_adapter import FeatureAdapter
from tesserafl.models.huggingface import family_of

transformers = pytest.importorskip("transformers")

SMALL = {
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "intermediate_size": 48,
}
TEXTS = Spec(
    kind="tokens",
    task="text-classification",
    shape=(12,),
    num_classes=3,
    class_names=("bad", "fair", "good"),
    vocab_size=40,
)
KINDS = {
    "clip": ({"options": CLIP}, PETS),
    "vit": ({"options": {**SMALL, "patch_size": 4}, "prompt": ""}, PETS),
    "bert": ({"options": SMALL, "prompt": ""}, TEXTS),
}
KIND = pytest.mark.parametrize("kind", KINDS)


def built(kind: str, **changes) -> Model:
    changed, spec = KINDS[kind]
    return FeatureAdapter(**({"config": kind} | changed | changes)).build_model(spec)


def inputs(kind: str) -> torch.Tensor:
    if kind != "bert":
        return images()
    tokens = torch.randint(1, 40, (4, 12), generator=torch.Generator().manual_seed(0))
    tokens[0, -3:] = 0
    return tokens


@KIND
def test_the_adapter_and_the_head_are_the_parameters_and_no_more(kind):
    model = built(kind)
    size = 24 if kind == "clip" else 32
    expected = {f"attention.{i}.weight": (size, size) for i in (0, 2)}
    expected |= {f"attention.{i}.bias": (size,) for i in (0, 2)}
    if kind != "clip":
        expected |= {"head.weight": (3, size), "head.bias": (3,)}
        assert model.ties["head.weight"] == (Tie("classes", (1,)), None)
    assert dict(model.shapes) == expected
    assert not model.cuttable and model.feature_size() == size
    module = put(model.module(), moved(model))
    functional.cross_entropy(module(inputs(kind)).logits, torch.tensor([0, 1, 2, 0])).backward()
    assert all(p.grad is not None and p.grad.any() for p in module.parameters())


def test_it_has_as_many_parameters_as_the_paper_says():
    """Two 512 x 512 layers: 525,312."""
    options = {**CLIP, "projection_dim": 512}
    assert built("clip", options=options).num_entries == 525_312


@KIND
def test_modules_share_the_frozen_weights(kind):
    model = built(kind)
    places = [{n: b.data_ptr() for n, b in model.module().named_buffers()} for _ in range(3)]
    assert places[0] == places[1] == places[2] and len(places[0]) > 10
    on_meta = model.module(device="meta")
    assert all(t.is_meta for t in [*on_meta.parameters(), *on_meta.buffers()])


def test_logits_are_cosines_of_adapted_features():
    model, params = built("clip"), moved(built("clip"))
    module = put(model.module(), params)
    plain = family_of("clip", CLIP, PETS, "a photo of a {}").build({})
    frozen = {n.removeprefix("frozen."): b for n, b in module.named_buffers()}
    plain.load_state_dict({n: frozen[n] for n in plain.state_dict()})
    with torch.no_grad():
        z = plain.eval().embed_images(images())  # [batch, projection]
        hidden = torch.tanh(z @ params["attention.0.weight"].T + params["attention.0.bias"])
        a = torch.softmax(hidden @ params["attention.2.weight"].T + params["attention.2.bias"], 1)
        cosines = functional.cosine_similarity((a * z)[:, None], plain.embed_texts()[None], dim=2)
        expected = plain.model.logit_scale.exp() * cosines
        ours = module(images())
        assert torch.allclose(ours.logits, expected, atol=1e-5)
        assert torch.allclose(ours.features, 24 * a * z, atol=1e-5)
        even = {name: torch.zeros_like(value) for name, value in params.items()}
        assert torch.allclose(put(module, even)(images()).logits, plain(images()).logits, atol=1e-5)


def test_a_head_reads_adapted_features():
    model, params = built("vit"), moved(built("vit"))
    module = put(model.module(), params)
    with torch.no_grad():
        out = module(images())
        z = module.frozen(images()).features
        expected = out.features @ params["head.weight"].T + params["head.bias"]
        assert torch.allclose(out.logits, expected, atol=1e-5)
        even = {n: v * (not n.startswith("attention")) for n, v in params.items()}
        assert torch.allclose(put(module, even)(images()).features, z, atol=1e-5)


@KIND
def test_what_was_saved_is_where_a_later_run_starts(kind, tmp_path):
    model = built(kind)
    params, given = moved(model), inputs(kind)
    module = put(model.module(), params)
    model.save(module, str(tmp_path))
    again = built(kind, config=str(tmp_path), options={}, adapter=tmp_path / "adapter")
    start = again.init(3)
    assert all(torch.equal(start[name], value) for name, value in params.items())
    with torch.no_grad():
        assert torch.allclose(
            put(again.module(), start)(given).logits, module(given).logits, atol=1e-5
        )
    transformers.AutoModel.from_pretrained(tmp_path)


def test_the_weights_of_a_folder_are_the_frozen_ones(tmp_path):
    saved = save_clip(tmp_path)
    module = built("clip", config=str(tmp_path), options={}).module()
    frozen = dict(module.named_buffers())
    for name, value in saved.named_parameters():
        assert torch.equal(frozen[f"frozen.model.{name}"], value), name


def test_other_classes_take_the_same_adapter_but_for_a_head(tmp_path):
    two = replace(PETS, num_classes=2, class_names=("owl", "tit"))
    for kind in ("clip", "vit"):
        model = built(kind)
        model.save(put(model.module(), moved(model)), str(tmp_path / kind))
        settings = KINDS[kind][0] | {"config": kind, "adapter": tmp_path / kind / "adapter"}
        later = FeatureAdapter(**settings).build_model(two)
        if kind == "clip":
            assert torch.equal(later.init(0)["attention.0.bias"], moved(model)["attention.0.bias"])
        else:
            with pytest.raises(ModelError, match=r"'head.bias' as \[3\], this model as \[2\]"):
                later.init(0)


def test_what_does_not_fit_is_refused():
    language = Spec(kind="tokens", task="causal-lm", shape=(12,), num_classes=40, vocab_size=40)
    with pytest.raises(ConfigError, match="use model 'prompts' or 'lora'"):
        FeatureAdapter(config="gpt2").build_model(language)
    with pytest.raises(ConfigError, match=r"leave model\.prompt empty"):
        FeatureAdapter(config="vit").build_model(PETS)
    with pytest.raises(ConfigError, match="for text-classification"):
        FeatureAdapter(config="bert").build_model(TEXTS)
