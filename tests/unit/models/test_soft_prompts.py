import pytest
import torch
from torch.nn import functional
from towers import CLIP, PETS, images, moved, put, save_clip

from tesserafl.core.errors import ConfigError, ModelError
from tesserafl.core.model import Model
from tesserafl.data.examples import Spec
from tesserafl.models.huggingface import family_of
from tesserafl.models.soft_prompts import Prompts

transformers = pytest.importorskip("transformers")

SMALL = {
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 20,
}
GPT2 = {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 20}
TEXTS = Spec(
    kind="tokens",
    task="text-classification",
    shape=(12,),
    num_classes=3,
    class_names=("bad", "fair", "good"),
    vocab_size=40,
)
LANGUAGE = Spec(
    kind="tokens", task="causal-lm", shape=(12,), num_classes=40, vocab_size=40, pad_id=39
)
KINDS = {
    "clip": (CLIP, PETS),
    "bert": (SMALL, TEXTS),
    "roberta": ({**SMALL, "max_position_embeddings": 22}, TEXTS),
    "gpt2": (GPT2, LANGUAGE),
    "llama": (SMALL, LANGUAGE),
}
KIND = pytest.mark.parametrize("kind", KINDS)
CONTEXT = "model.text_model.embeddings.token_embedding.context"


def settings(kind: str, **changes) -> Prompts:
    return Prompts(**({"config": kind, "options": KINDS[kind][0], "context": 4} | changes))


def built(kind: str, **changes) -> Model:
    return settings(kind, **changes).build_model(KINDS[kind][1])


def inputs(kind: str) -> torch.Tensor:
    spec = KINDS[kind][1]
    if spec.kind == "image":
        return images()
    tokens = torch.randint(1, 39, (4, *spec.shape), generator=torch.Generator().manual_seed(0))
    tokens[0, -3:] = spec.pad_id
    return tokens


@torch.no_grad()
def logits(model: Model, params, given: torch.Tensor) -> torch.Tensor:
    return put(model.module(), params)(given).logits


@KIND
def test_the_vectors_and_the_head_are_the_parameters_and_no_more(kind):
    model = built(kind)
    context = {n: shape for n, shape in model.shapes.items() if n.endswith(".context")}
    assert list(context.values()) == [(4, 32)]
    rest = set(model.shapes) - set(context)
    heads = {"bert": "model.classifier.", "roberta": "model.classifier.out_proj."}
    assert rest == ({heads[kind] + k for k in ("weight", "bias")} if kind in heads else set())
    assert set(built(kind, train_head=False).shapes) == set(context)
    assert not model.cuttable and not model.depths
    assert model.module().state_dict().keys() >= model.shapes.keys()


@KIND
def test_every_parameter_gets_a_gradient_and_frozen_weights_are_shared(kind):
    model = built(kind)
    module = put(model.module(), moved(model))
    out = module(inputs(kind)).logits
    functional.cross_entropy(out.flatten(0, -2), torch.zeros(out[..., 0].numel()).long()).backward()
    assert all(p.grad is not None and p.grad.any() for p in module.parameters())
    places = [
        {n: b.data_ptr() for n, b in other.named_buffers()} for other in (module, model.module())
    ]
    assert places[0] == places[1] and len(places[0]) > 10
    assert not any(buffer.requires_grad for buffer in module.buffers())
    on_meta = model.module(device="meta")
    assert all(t.is_meta for t in [*on_meta.parameters(), *on_meta.buffers()])


@KIND
def test_the_vectors_move_the_logits_and_come_from_the_seed(kind):
    model, given = built(kind), inputs(kind)
    params, other = model.init(1), model.init(2)
    name = next(n for n in params if n.endswith(".context"))
    assert torch.equal(built(kind).init(1)[name], params[name])
    assert not torch.equal(other[name], params[name])
    found = logits(model, params, given)
    spec = KINDS[kind][1]
    assert found.shape == ((4, 12, 40) if spec.task == "causal-lm" else (4, spec.num_classes))
    changed = params | {name: moved(model)[name]}
    assert (logits(model, changed, given) - found).abs().max() > 1e-3


def test_image_embeddings_do_not_depend_on_the_vectors():
    model = built("clip")
    first, second = put(model.module(), model.init(0)), put(model.module(), moved(model))
    with torch.no_grad():
        assert torch.equal(first(images()).features, second(images()).features)
        assert not torch.allclose(first.embed_texts(), second.embed_texts(), atol=1e-3)


def test_with_a_sentences_own_embeddings_it_is_the_model_with_that_sentence():
    """[begin, v1 .. v4, name, end] with the vectors of 'one ' is the sentence 'one cat'."""
    model = built("clip")
    module = model.module()
    table = module.model.text_model.embeddings.token_embedding.weight
    params = {CONTEXT: table[torch.tensor(list(b"one "))].clone()}
    plain = family_of("clip", CLIP, PETS, "one {}").build({})
    weights = {n: b for n, b in module.named_buffers() if n in dict(plain.named_parameters())}
    plain.load_state_dict(weights)
    with torch.no_grad():
        expected = plain.eval()(images()).logits
    assert torch.allclose(logits(model, params, images()), expected, atol=1e-5)
    assert not torch.allclose(logits(model, moved(model), images()), expected, atol=1e-2)


@pytest.mark.parametrize("kind", ["bert", "roberta", "gpt2", "llama"])
def test_with_tokens_own_embeddings_it_is_the_model_with_these_tokens_in_front(kind):
    model, given = built(kind), inputs(kind)
    spec, tokens = KINDS[kind][1], torch.tensor([5, 9, 7, 5])
    module = model.module()
    embedding = module.model.get_input_embeddings()
    name = next(n for n in model.shapes if n.endswith(".context"))
    params = model.init(0) | {name: embedding.weight[tokens].clone()}
    plain = family_of(kind, KINDS[kind][0], spec).build({})
    own = {
        n.removeprefix("model."): v for n, v in {**dict(module.named_buffers()), **params}.items()
    }
    plain.model.load_state_dict({n: own[n] for n in plain.model.state_dict()})
    with torch.no_grad():
        whole = plain.eval()(torch.cat([tokens.expand(4, -1), given], 1)).logits
    expected = whole[:, 4:] if spec.task == "causal-lm" else whole
    assert torch.allclose(logits(model, params, given), expected, atol=1e-5)


def test_a_decoder_classifies_by_the_last_token_and_not_by_padding():
    model = Prompts(config="gpt2", options=GPT2, context=4).build_model(TEXTS)
    tokens = torch.tensor([[3, 8, 5, 0, 0, 0]])
    params = model.init(0)
    short = logits(model, params, tokens[:, :3])
    assert torch.allclose(logits(model, params, tokens), short, atol=1e-5)


@KIND
def test_what_was_saved_is_where_a_later_run_starts(kind, tmp_path):
    model = built(kind)
    params, given = moved(model), inputs(kind)
    model.save(put(model.module(), params), str(tmp_path))
    later = settings(kind, config=str(tmp_path), options={}, adapter=tmp_path / "adapter")
    again = later.build_model(KINDS[kind][1])
    start = again.init(3)
    assert all(torch.equal(start[name], value) for name, value in params.items())
    assert torch.allclose(logits(again, start, given), logits(model, params, given), atol=1e-5)
    with pytest.raises(ModelError, match=r"as \[4, 32\], this model as \[5, 32\]"):
        settings(kind, context=5, adapter=tmp_path / "adapter").build_model(KINDS[kind][1]).init(0)
    with pytest.raises(ModelError, match="model/adapter of an earlier run"):
        built(kind, adapter=tmp_path).init(0)


def test_the_saved_model_is_the_frozen_one(tmp_path):
    saved = save_clip(tmp_path / "base")
    model = built("clip", config=str(tmp_path / "base"), options={})
    model.save(put(model.module(), moved(model)), str(tmp_path / "out"))
    loaded = transformers.CLIPModel.from_pretrained(tmp_path / "out")
    assert all(torch.equal(v, saved.state_dict()[n]) for n, v in loaded.state_dict().items())


def test_what_does_not_fit_is_refused():
    with pytest.raises(ConfigError, match="at least 1; got 0"):
        built("clip", context=0)
    with pytest.raises(ConfigError, match="'vit' has no tower"):
        Prompts(config="vit").build_model(PETS)
    with pytest.raises(
        ModelError, match="context 9 need 21 places, the model has 20; take at most 8"
    ):
        built("bert", context=9)
    with pytest.raises(
        ModelError, match="context 10 need 22 places, the model has 21; take at most 9"
    ):
        built("roberta", context=10)  # of 22 places the first is padding's
    model = built("roberta", context=9)
    assert logits(model, model.init(0), inputs("roberta")).shape == (4, 3)
    with pytest.raises(
        ModelError, match="has 80 tokens, 73 of them learned; the text tower reads 77"
    ):
        built("clip", context=73)
