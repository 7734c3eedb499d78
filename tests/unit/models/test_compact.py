"""Frozen weights in fewer bytes."""

import functools
import sys

import pytest
import torch
from test_lora import (
    AUTO,
    IMAGES,
    LANGUAGE,
    SPECS,
    TEXTS,
    batch,
    logits,
    lora,
    moved,
    put,
    save_base,
)
from torch.func import grad, vmap
from towers import CLIP, PETS, PROMPT, images

from tesserafl.core.errors import ConfigError
from tesserafl.core.fit import CrossEntropy, Training
from tesserafl.core.model import Model
from tesserafl.engines.graphs import trace
from tesserafl.models import compact
from tesserafl.models.costs import costs_of, frozen_entries
from tesserafl.models.feature_adapter import FeatureAdapter
from tesserafl.models.frozen import Frozen
from tesserafl.models.lora import LoRA
from tesserafl.models.scaling import forward_of
from tesserafl.models.soft_prompts import Prompts
from tesserafl.models.split import cuts_of, towers_of
from tesserafl.run.experiment import from_json, to_json

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")

pytestmark = [
    # peft reads an attribute that transformers has renamed.
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning"),
]
FAMILY = pytest.mark.parametrize("family", SPECS)
BASES = {"bfloat16": 0.01, "int8": 0.02, "nf4": 0.15}
"""Most that outputs and slopes may be off, as a share of their norm."""
BASE = pytest.mark.parametrize("base", BASES)
LARGEST = {"gpt2": 40 * 32, "llama": 32 * 48, "bert": 32 * 48, "vit": 32 * 48}


@functools.cache
def tiny(family: str, base: str) -> Model:
    return lora(family, base=base).build_model(SPECS[family])


def off(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).detach().norm() / other.detach().norm())


def slopes(model: Model, family: str) -> torch.Tensor:
    module = put(model.module(), moved(model, 0.1))
    params = dict(module.named_parameters())
    forward = forward_of(model, model.whole(), module, "none")
    loss = CrossEntropy()(forward, params, *batch(SPECS[family]), {})
    found = torch.autograd.grad(loss, list(params.values()))
    assert all(slope.dtype is torch.float32 and slope.any() for slope in found)
    return torch.cat([slope.flatten() for slope in found])


def num_bytes(model: Model, device: str = "cpu") -> int:
    buffers = list(model.module(device=device).buffers())
    return sum({b.untyped_storage()._cdata: b.nbytes for b in buffers}.values())


# ---- weights


@pytest.mark.parametrize("shape", [(32, 32), (48, 32), (33, 96), (7, 9), (64, 128)])
@pytest.mark.parametrize("turned", [False, True])
def test_a_weight_is_stored_closely_whatever_its_shape(shape, turned):
    """The library's own code for processors is wrong for rows of part of a block."""
    weight = 0.05 * torch.randn(shape, generator=torch.Generator().manual_seed(0))
    for base, most in {"bfloat16": 0.004, "int8": 0.01, "nf4": 0.12}.items():
        stored = compact.store(weight, base, turned=turned)
        again = compact.restore(*stored)
        assert again.shape == shape and again.dtype is torch.float32
        assert 0 < off(again, weight) < most, base


def test_an_output_without_weights_stays_so():
    weight = torch.cat([torch.zeros(64, 64), torch.ones(1, 64)])
    for base in BASES:
        again = compact.restore(*compact.store(weight, base))
        assert not again[:64].any() and torch.allclose(again[64], torch.ones(64))


# ---- what it computes


@BASE
@FAMILY
def test_outputs_and_slopes_are_close_to_those_of_float32(family, base):
    plain, model = tiny(family, "float32"), tiny(family, base)
    assert model.shapes == plain.shapes and model.low_rank == plain.low_rank
    params, spec = moved(plain, 0.1), SPECS[family]
    module = put(model.module(), params)
    assert all(p.dtype is torch.float32 for p in module.parameters())
    out = module(batch(spec)[0])
    assert out.logits.dtype is out.features.dtype is torch.float32
    expected = put(plain.module(), params)(batch(spec)[0])
    assert 0 < off(out.logits, expected.logits) < BASES[base]
    assert 0 < off(out.features, expected.features) < BASES[base]
    assert off(slopes(model, family), slopes(plain, family)) < 1.5 * BASES[base]


@BASE
def test_many_clients_at_once_get_the_slopes_that_each_gets_alone(base):
    model = tiny("vit", base)
    forward = forward_of(model, model.whole(), model.module().train(), "none")
    inputs, labels = batch(IMAGES)
    names = list(model.shapes)

    def slopes_of(*flat: torch.Tensor) -> list[torch.Tensor]:
        def loss(params: dict[str, torch.Tensor]) -> torch.Tensor:
            return CrossEntropy()(forward, params, flat[-1], labels, {})

        found = grad(loss)(dict(zip(names, flat[:-1], strict=True)))
        return [found[name] for name in names]

    both = [torch.stack([t, 2 * t]) for t in (*moved(model, 0.1).values(), inputs)]
    program = trace(lambda *flat: list(vmap(slopes_of)(*flat)), both, compiled=False)
    for i in range(2):
        alone = slopes_of(*[tensor[i] for tensor in both])
        for one, other in zip(program(*both), alone, strict=True):
            assert torch.allclose(one[i], other, atol=1e-6)


@BASE
def test_what_frozen_blocks_give_can_be_kept(base):
    options = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32}
    none = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    settings = lora("bert", base=base, options={**options, "intermediate_size": 48, **none})
    model = settings.build_model(TEXTS)
    module = model.module().train()
    top = [name for name in model.shapes if ".layer.1." in name]
    cuts = cuts_of(module, model.frozen_blocks, top)
    forward = forward_of(model, model.whole(), module, "none")
    towers = towers_of(module, forward, model.init(0), cuts, batch(TEXTS)[0][:2])
    assert [tower.cut.first for tower in towers] == [1]


# ---- what it takes


@BASE
@FAMILY
def test_modules_of_all_ranks_hold_the_same_stored_tensors(family, base):
    model = tiny(family, base)
    modules = [model.module({**model.sizes, "rank": rank}) for rank in (4, 2, 2)]
    places = [{n: b.data_ptr() for n, b in m.named_buffers()} for m in modules]
    assert places[0] == places[1] == places[2]
    before = {name: value.clone() for name, value in modules[0].named_buffers()}
    slopes(model, family)
    assert all(torch.equal(value, before[n]) for n, value in modules[0].named_buffers())


@FAMILY
def test_bytes_are_those_of_the_weights(family):
    entries = frozen_entries(tiny(family, "float32"))
    assert num_bytes(tiny(family, "float32")) >= 4 * entries  # positions are numbers too
    taken = [num_bytes(tiny(family, base)) for base in ("float32", *BASES)]
    assert taken[1] < 0.6 * taken[0] and taken[3] < taken[2] < taken[1]
    for base, whole in zip(BASES, taken[1:], strict=True):
        model = tiny(family, base)
        assert frozen_entries(model) == entries
        assert num_bytes(model, "meta") == whole


def test_bytes_of_one_matrix():
    for base, kinds in {
        "bfloat16": [(torch.bfloat16, 2 * 1024)],
        "int8": [(torch.int8, 1024), (torch.float32, 4 * 32)],
        "nf4": [(torch.uint8, 512), (torch.float32, 4 * 16)],
    }.items():
        part = (
            tiny("bert", base)
            .module()
            .get_submodule("model.bert.encoder.layer.0.attention.self.query.base_layer")
        )
        held = [tensor for tensor in (part.values, part.scales) if tensor is not None]
        assert [(tensor.dtype, tensor.nbytes) for tensor in held] == kinds
        assert part.bias.dtype is torch.float32


def test_embeddings_and_the_output_to_a_vocabulary_are_in_bfloat16():
    tied, untied = tiny("gpt2", "nf4").module().model, tiny("llama", "nf4").module().model
    assert tied.lm_head.values.data_ptr() == tied.transformer.wte.values.data_ptr()
    for part in (tied.lm_head, untied.lm_head, untied.model.embed_tokens):
        assert part.values.dtype is torch.bfloat16
        assert part.weight.shape == (40, 32) and part.weight.dtype is torch.float32
    assert untied.model.layers[0].mlp.up_proj.values.dtype is torch.uint8


@BASE
@FAMILY
def test_costs_count_the_bytes_that_are_kept(family, base):
    plain, model, data = tiny(family, "float32"), tiny(family, base), batch(SPECS[family])
    one = costs_of(plain, plain.whole(), Training(), *data)
    other = costs_of(model, model.whole(), Training(), *data)
    assert other.activation_bytes == one.activation_bytes
    assert other.flops_per_example == one.flops_per_example
    linear = [p for p in model.module().modules() if isinstance(p, compact.CompactLinear)]
    largest = 4 * max(part.weight.numel() for part in linear)
    assert one.peak_bytes - other.peak_bytes == num_bytes(plain) - num_bytes(model) - largest


# ---- files


@BASE
@FAMILY
def test_the_saved_model_is_the_one_that_was_trained(family, base, tmp_path):
    spec = SPECS[family]
    save_base(family, tmp_path / "base")
    settings = {"config": str(tmp_path / "base"), "options": {}, "base": base}
    model = lora(family, **settings).build_model(spec)
    module = put(model.module(), moved(model, 0.1))
    model.save(module, str(tmp_path / "out"))
    library = getattr(transformers, AUTO[spec.task])
    merged = library.from_pretrained(tmp_path / "out")
    assert {p.dtype for p in merged.parameters()} == {torch.float32}
    assert torch.allclose(logits(merged, spec), logits(module, spec), atol=1e-4, rtol=1e-4)
    theirs = library.from_pretrained(tmp_path / "base")  # in float32
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "out" / "adapter")
    assert off(logits(module, spec), logits(theirs, spec)) < 3 * BASES[base]
    again = lora(family, **settings, adapter=tmp_path / "out" / "adapter").build_model(spec)
    ours = logits(put(again.module(), again.init(0)), spec)
    assert torch.equal(ours, logits(module, spec))


# ---- other adapters


@BASE
def test_prompts_and_feature_adapters(base, tmp_path):
    prompts = {"config": "gpt2", "context": 3, "options": {"n_layer": 1, "n_embd": 32, "n_head": 4}}
    adapted = {"config": "clip", "options": CLIP, "prompt": ""}
    for kind, settings, spec, inputs in (
        (Prompts, prompts, LANGUAGE, batch(LANGUAGE)[0]),
        (FeatureAdapter, adapted, PETS, images(4)),
    ):
        plain = kind(**settings).build_model(spec)
        model = kind(**settings, base=base).build_model(spec)
        params = plain.init(3)
        if kind is Prompts:  # tokens of the table
            assert (
                off(model.init(3)["model.transformer.wte.context"], next(iter(params.values())))
                < 0.01
            )
        ours = put(model.module(), params)(inputs)
        assert off(ours.logits, put(plain.module(), params)(inputs).logits) < 2 * BASES[base]
        assert frozen_entries(model) == frozen_entries(plain)
        model.save(put(model.module(), params), str(tmp_path / kind.__name__))
        transformers.AutoModel.from_pretrained(tmp_path / kind.__name__)


@BASE
def test_both_towers_of_a_model_with_a_prompt(base):
    for kind, settings in ((LoRA, {"prompt": PROMPT}), (Prompts, {"context": 2})):
        plain = kind(config="clip", options=CLIP, **settings).build_model(PETS)
        model = kind(config="clip", options=CLIP, **settings, base=base).build_model(PETS)
        params = moved(plain, 0.02)
        ours, expected = (put(m.module(), params)(images(4)) for m in (model, plain))
        assert off(ours.logits, expected.logits) < 3 * BASES[base]  # cosines of noise
        assert 0 < off(ours.features, expected.features) < 2 * BASES[base]


# ---- settings


def test_weights_are_not_read_to_count_what_float32_takes(monkeypatch):
    monkeypatch.setattr(Frozen, "_loaded", property(lambda self: pytest.fail("was read")))
    lora("vit").build_model(IMAGES).module(device="meta")


@BASE
def test_weights_that_are_merged_into_are_not_kept_in_fewer_bytes(base):
    with pytest.raises(ConfigError, match=f"model.merge .*model.base '{base}'.*choose one"):
        lora("bert", base=base, merge=True).build_model(TEXTS)


def test_without_the_library_it_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    for base in ("int8", "nf4"):
        with pytest.raises(ConfigError, match=r"bitsandbytes: pip install 'tesserafl\[quantised\]"):
            lora("bert", base=base).build_model(TEXTS)
    lora("bert", base="bfloat16").build_model(TEXTS)


def test_a_device_that_the_library_does_not_know_is_named(monkeypatch):
    def none(*args: object) -> None:
        raise NotImplementedError("no kernel")

    module = tiny("bert", "int8").module()
    monkeypatch.setattr(torch.ops.bitsandbytes, "int8_vectorwise_dequant", none)
    with pytest.raises(ConfigError, match="int8: bitsandbytes has no code for 'cpu'; choose bf"):
        logits(module, TEXTS)


@BASE
def test_settings_survive_json(base):
    experiment = from_json({"model": {"name": "lora", "base": base}})
    assert from_json(to_json(experiment)) == experiment
    with pytest.raises(ConfigError, match=r"model\.base"):
        from_json({"model": {"name": "lora", "base": "int4"}})
