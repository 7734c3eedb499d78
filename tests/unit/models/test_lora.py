import functools
import json
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tesserafl.core import seeds
from tesserafl.core.axis import Depth, LowRank, Tie, Width
from tesserafl.core.errors import ConfigError, ModelError
from tesserafl.core.fit import CrossEntropy, Training
from tesserafl.core.model import Model
from tesserafl.core.modules import parameters_of
from tesserafl.core.submodel import cut
from tesserafl.data.examples import Spec
from tesserafl.models.costs import costs_of
from tesserafl.models.huggingface import HuggingFace, family_of
from tesserafl.models.lora import LoRA
from tesserafl.models.scaling import forward_of
from tesserafl.run.experiment import Experiment, from_file, from_json, to_json

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

HEADS = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32}
FAMILIES = {
    "gpt2": {**HEADS, "tie_word_embeddings": True},
    "llama": {**HEADS, "num_key_value_heads": 2, "intermediate_size": 48},
    "bert": {**HEADS, "intermediate_size": 48},
    "vit": {**HEADS, "intermediate_size": 48, "patch_size": 4},
}
TARGETS = {"gpt2": ["attn.c_attn"], "llama": ["q_proj", "v_proj"], "bert": ["query", "value"]}
TARGETS["vit"] = ["q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"]
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
IMAGES = Spec(kind="image", task="image-classification", shape=(3, 16, 16), num_classes=5)
SPECS = {"gpt2": LANGUAGE, "llama": LANGUAGE, "bert": TEXTS, "vit": IMAGES}
AUTO = {
    "causal-lm": "AutoModelForCausalLM",
    "text-classification": "AutoModelForSequenceClassification",
    "image-classification": "AutoModelForImageClassification",
}
# peft reads an attribute that transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
FAMILY = pytest.mark.parametrize("family", FAMILIES)


def lora(family: str, **changes) -> LoRA:
    settings = {"config": family, "options": FAMILIES[family], "rank": 4, "alpha": 6.0}
    return LoRA(**(settings | changes))


@functools.cache
def tiny(family: str) -> Model:
    return lora(family).build_model(SPECS[family])


def batch(spec: Spec) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    if spec.kind == "image":
        return torch.randn(4, *spec.shape, generator=generator), torch.tensor([0, 1, 2, 3])
    tokens = torch.randint(1, spec.vocab_size - 1, (4, *spec.shape), generator=generator)
    tokens[0, -3:] = spec.pad_id
    return tokens, tokens.roll(-1, 1) if spec.task == "causal-lm" else torch.tensor([0, 1, 2, 0])


def moved(model: Model, size: float = 0.3) -> dict[str, torch.Tensor]:
    """Parameters as training leaves them: neither factor zero."""
    generator = torch.Generator().manual_seed(7)
    return {
        name: size * torch.randn(shape, generator=generator) for name, shape in model.shapes.items()
    }


def put(module: nn.Module, params: dict[str, torch.Tensor]) -> nn.Module:
    own = dict(module.named_parameters())
    assert own.keys() == params.keys()
    with torch.no_grad():
        for name, value in own.items():
            assert value.shape == params[name].shape, name
            value.copy_(params[name])
    return module.eval()


@torch.no_grad()
def logits(module: nn.Module, spec: Spec) -> torch.Tensor:
    """Of our modules and of the library's alike."""
    inputs = batch(spec)[0]
    if hasattr(module, "pad_id"):
        return module.eval()(inputs).logits
    if spec.kind == "image":
        return module.eval()(inputs).logits
    return module.eval()(inputs, attention_mask=(inputs != spec.pad_id).long()).logits


def is_head(name: str) -> bool:
    return name.startswith("model.classifier.")


@torch.no_grad()
def by_hand(model: Model, params: dict[str, torch.Tensor], scale: float) -> nn.Module:
    """The library's model with W + scale B A written into its weights; no peft."""
    frozen = model.module()
    source = {name: value.clone() for name, value in frozen.named_buffers()}
    config = frozen.model.config
    plain = getattr(transformers, AUTO[SPECS[config.model_type].task]).from_config(config)
    changed = 0
    for name, value in plain.named_parameters():
        ours = f"model.{name}"
        path, _, key = ours.rpartition(".")
        if is_head(ours):
            value.copy_(params[ours])
        else:
            value.copy_(source[ours] if ours in source else source[f"{path}.base_layer.{key}"])
        if f"{path}.lora_A.default.weight" in params and key == "weight":
            down = params[f"{path}.lora_A.default.weight"]
            change = scale * params[f"{path}.lora_B.default.weight"] @ down
            value.add_(change.T if config.model_type == "gpt2" else change)
            changed += 1
    assert changed == len(model.low_rank)
    return plain


def save_base(family: str, folder, spec: Spec | None = None, seed: int = 5) -> nn.Module:
    """A saved "pre-trained" model of the family with weights that nobody else draws."""
    spec = spec or SPECS[family]
    module = family_of(family, FAMILIES[family], spec).build({})
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in module.parameters():
            value.copy_(0.3 * torch.randn(value.shape, generator=generator))
    module.model.save_pretrained(folder)
    return module.model.eval()


# ---- what is a parameter


@FAMILY
def test_parameters_are_the_adapters_and_the_head_and_no_more(family):
    model = tiny(family)
    module = model.module()
    assert {n: tuple(p.shape) for n, p in module.named_parameters()} == dict(model.shapes)
    assert all(p.requires_grad for p in module.parameters())
    plain = family_of(family, FAMILIES[family], SPECS[family]).build({}).model
    linear = {
        f"model.{name}": part
        for name, part in plain.named_modules()
        if name.endswith(tuple(f".{target}" for target in TARGETS[family]))
    }
    expected = {}
    for path, part in linear.items():
        entering, leaving = part.weight.shape if family == "gpt2" else part.weight.shape[::-1]
        expected[f"{path}.lora_A.default.weight"] = (4, entering)
        expected[f"{path}.lora_B.default.weight"] = (leaving, 4)
    if family in ("bert", "vit"):
        expected["model.classifier.weight"] = (SPECS[family].num_classes, 32)
        expected["model.classifier.bias"] = (SPECS[family].num_classes,)
    assert dict(model.shapes) == expected
    assert model.low_rank == tuple(
        LowRank(f"{path}.lora_A.default.weight", f"{path}.lora_B.default.weight", 6.0 / 4)
        for path in linear
    )


def test_queries_and_keys_of_grouped_heads_have_their_own_widths():
    path = "model.model.layers.0.self_attn"
    assert tiny("llama").shapes[f"{path}.q_proj.lora_B.default.weight"] == (32, 4)
    assert tiny("llama").shapes[f"{path}.v_proj.lora_B.default.weight"] == (16, 4)


@FAMILY
def test_the_rank_is_the_one_axis_that_is_cut(family):
    model = tiny(family)
    assert model.cuttable == ("rank",)
    assert model.widths["rank"] == Width(units=4, quantum=1, size="rank")
    assert model.widths["classes"].units == SPECS[family].num_classes
    for name, ties in model.ties.items():
        if ".lora_A." in name:
            assert ties == (Tie("rank", (1,)), None)
        elif ".lora_B." in name:
            assert ties == (None, Tie("rank", (1,)))
        else:
            assert ties[0] == Tie("classes", (1,)) and not any(ties[1:])


@FAMILY
@pytest.mark.parametrize("kept", [[0], [0, 1], [1, 3]])
def test_submodels_have_the_shapes_of_their_modules(family, kept):
    model = tiny(family)
    submodel = model.slice({"rank": kept})
    assert submodel.sizes["rank"] == len(kept)
    module = model.module(submodel.sizes, device="meta")
    assert all(t.is_meta for t in [*module.parameters(), *module.buffers()])
    assert {n: tuple(p.shape) for n, p in module.named_parameters()} == {
        n: view.shape for n, view in submodel.views.items()
    }


# ---- what it computes


@FAMILY
def test_at_first_it_is_the_frozen_model(family):
    model = tiny(family)
    params = model.init(1)
    ups = [pair.up for pair in model.low_rank]
    assert not any(params[name].any() for name in ups)
    assert all(params[pair.down].std() > 0 for pair in model.low_rank)
    ours = logits(put(model.module(), params), SPECS[family])
    assert torch.equal(ours, logits(put(model.module(), params | zero_downs(model)), SPECS[family]))
    assert torch.allclose(ours, logits(by_hand(model, params, 0.0), SPECS[family]), atol=1e-6)


def zero_downs(model: Model) -> dict[str, torch.Tensor]:
    return {pair.down: torch.zeros(model.shapes[pair.down]) for pair in model.low_rank}


@FAMILY
def test_the_change_of_a_weight_is_the_scaled_product(family):
    model, params = tiny(family), moved(tiny(family))
    ours = logits(put(model.module(), params), SPECS[family])
    assert torch.allclose(
        ours, logits(by_hand(model, params, 6.0 / 4), SPECS[family]), atol=1e-4, rtol=1e-4
    )
    frozen = logits(by_hand(model, params, 0.0), SPECS[family])
    assert (ours - frozen).abs().max() > 1e-2  # or the test above shows nothing


@FAMILY
def test_the_first_ranks_are_the_full_model_with_the_others_zeroed(family):
    model, params = tiny(family), moved(tiny(family))
    submodel = model.slice({"rank": range(2)})
    cropped = logits(put(model.module(submodel.sizes), cut(params, submodel)), SPECS[family])
    zeroed = dict(params)
    for pair in model.low_rank:
        zeroed[pair.up] = params[pair.up] * torch.tensor([1.0, 1.0, 0.0, 0.0])
    whole = logits(put(model.module(), zeroed), SPECS[family])
    assert torch.allclose(cropped, whole, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(whole, logits(put(model.module(), params), SPECS[family]), atol=1e-3)


def test_every_parameter_gets_a_gradient_and_no_frozen_weight():
    for family in FAMILIES:
        model = tiny(family)
        module = put(model.module(), moved(model, 0.1))
        inputs, labels = batch(SPECS[family])
        loss = CrossEntropy()(
            forward_of(model, model.whole(), module, "none"),
            dict(module.named_parameters()),
            inputs,
            labels,
            {},
        )
        loss.backward()
        assert all(p.grad is not None and p.grad.any() for p in module.parameters()), family
        assert not any(buffer.requires_grad for buffer in module.buffers())


# ---- one copy of what is frozen


@FAMILY
def test_modules_of_all_ranks_hold_the_same_frozen_tensors(family):
    model = tiny(family)
    modules = [model.module({**model.sizes, "rank": rank}) for rank in (4, 4, 2, 1)]
    places = [{n: b.data_ptr() for n, b in m.named_buffers()} for m in modules]
    assert places[0] and all(other == places[0] for other in places)
    of_frozen = set(places[0].values())
    own = [p.data_ptr() for m in modules for p in m.parameters()]
    assert len(set(own)) == len(own) and not of_frozen & set(own)


@FAMILY
def test_training_moves_the_parameters_and_no_frozen_weight(family):
    model = tiny(family)
    module, other = model.module().train(), model.module()
    before = {name: value.clone() for name, value in module.named_buffers()}
    params = {name: value.requires_grad_() for name, value in moved(model, 0.1).items()}
    first = {name: value.detach().clone() for name, value in params.items()}
    forward = forward_of(model, model.whole(), module, "none")
    inputs, labels = batch(SPECS[family])
    for _ in range(3):
        loss = CrossEntropy()(forward, params, inputs, labels, {})
        gradients = torch.autograd.grad(loss, list(params.values()))
        params = {
            name: (value - 0.1 * gradient).detach().requires_grad_()
            for (name, value), gradient in zip(params.items(), gradients, strict=True)
        }
    assert all(not torch.equal(params[name].detach(), first[name]) for name in params)
    assert all(torch.equal(value, before[name]) for name, value in other.named_buffers())


def test_saving_leaves_the_frozen_weights_as_they_are(tmp_path):
    for family in FAMILIES:
        model = tiny(family)
        module = put(model.module(), moved(model))
        before = {name: value.clone() for name, value in module.named_buffers()}
        model.save(module, str(tmp_path / family))
        again = model.module()
        assert all(torch.equal(value, before[name]) for name, value in again.named_buffers())
        assert {n: b.data_ptr() for n, b in again.named_buffers()} == {
            n: b.data_ptr() for n, b in module.named_buffers()
        }


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_twenty_modules_do_not_take_the_memory_of_two():
    options = {"n_layer": 2, "n_embd": 512, "n_head": 8}
    model = LoRA(config="gpt2", options=options, rank=2).build_model(
        replace(LANGUAGE, num_classes=8000, vocab_size=8000)
    )
    frozen = sum(b.untyped_storage().nbytes() for b in model.module().buffers())
    assert frozen > 40 << 20

    def resident() -> int:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * 4096

    before = resident()
    modules = [model.module({**model.sizes, "rank": 1 + i % 2}) for i in range(20)]
    assert resident() - before < frozen / 2
    assert len({module.model.transformer.wte.weight.data_ptr() for module in modules}) == 1
    assert model.num_entries * 4 < frozen / 500


# ---- initialisation and saved weights


@FAMILY
def test_the_seed_draws_the_adapters_and_never_the_frozen_weights(family):
    model, again = tiny(family), lora(family).build_model(SPECS[family])
    params, same, other = model.init(1), again.init(1), model.init(2)
    assert all(torch.equal(params[name], same[name]) for name in params)
    zero = {pair.up for pair in model.low_rank} | {"model.classifier.bias"}
    assert all(not torch.equal(params[n], other[n]) for n in params if n not in zero)
    frozen = dict(again.module().named_buffers())
    assert all(torch.equal(value, frozen[name]) for name, value in model.module().named_buffers())


def test_the_weights_of_a_folder_are_the_frozen_ones(tmp_path):
    for family in FAMILIES:
        base = save_base(family, tmp_path / family)
        settings = lora(family, config=str(tmp_path / family), options={})
        model = settings.build_model(SPECS[family])
        params = model.init(1)
        ours = logits(put(model.module(), params), SPECS[family])
        assert torch.equal(ours, logits(base, SPECS[family])), family
        if SPECS[family].task != "causal-lm":  # a saved head is where its training starts
            assert torch.equal(params["model.classifier.bias"], base.classifier.bias)


@pytest.mark.parametrize("global_seed", [0, 1])
def test_an_encoder_gets_a_head_by_the_seed_that_is_trained(tmp_path, global_seed):
    base = save_base("bert", tmp_path / "whole")
    base.bert.save_pretrained(tmp_path / "encoder")
    settings = lora("bert", config=str(tmp_path / "encoder"), options={})
    torch.manual_seed(global_seed)
    model = settings.build_model(TEXTS)
    first = model.init(3)  # the first call is the one that reads the folder
    assert all(torch.equal(first[name], value) for name, value in model.init(3).items())
    other = settings.build_model(TEXTS)
    with seeds.seeded(9, "elsewhere"):
        frozen = dict(other.module().named_buffers())
    assert all(torch.equal(first[name], value) for name, value in other.init(3).items())
    assert not torch.equal(
        first["model.classifier.weight"], model.init(4)["model.classifier.weight"]
    )
    for name, value in model.module().named_buffers():
        assert torch.equal(value, frozen[name]), name
    path = "bert.encoder.layer.1.attention.self.query"
    weight = dict(model.module().named_buffers())[f"model.{path}.base_layer.weight"]
    assert torch.equal(weight, base.state_dict()[f"{path}.weight"])


def test_a_head_for_other_classes_is_drawn_anew(tmp_path):
    save_base("bert", tmp_path)
    spec = replace(TEXTS, num_classes=2, class_names=("bad", "good"))
    model = lora("bert", config=str(tmp_path), options={}).build_model(spec)
    params = model.init(0)
    assert params["model.classifier.weight"].shape == (2, 32)
    assert not torch.equal(params["model.classifier.bias"], model.init(1)["model.classifier.bias"])


def save_roberta(folder):
    config = transformers.RobertaConfig(
        **HEADS, intermediate_size=48, vocab_size=40, max_position_embeddings=20, pad_token_id=0
    )
    transformers.RobertaModel(config).save_pretrained(folder)
    return lora("bert", config=str(folder), options={})


DENSE = "model.classifier.dense.weight"
"""RoBERTa's head has a layer beside the outputs that is not in an encoder's file."""


def test_what_no_file_holds_is_trained_too(tmp_path):
    settings = save_roberta(tmp_path / "base")
    model = settings.build_model(TEXTS)
    assert DENSE in model.shapes and set(model.ties[DENSE]) == {None}
    torch.manual_seed(1)
    once, again, other = model.init(0), settings.build_model(TEXTS).init(0), model.init(1)
    assert torch.equal(once[DENSE], again[DENSE]) and not torch.equal(once[DENSE], other[DENSE])
    module = put(model.module(), moved(model))
    ours = logits(module, TEXTS)
    model.save(module, str(tmp_path / "out"))
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert torch.allclose(logits(loaded, TEXTS), ours, atol=1e-4, rtol=1e-4)


def test_what_no_file_holds_is_frozen_alike_in_every_process_without_a_head(tmp_path):
    settings = replace(save_roberta(tmp_path), train_head=False)
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        found.append(dict(settings.build_model(TEXTS).module().named_buffers()))
    assert DENSE in found[0]
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


def drop(folder, *names: str) -> None:
    """Take weights out of a folder's file."""
    path = folder / "model.safetensors"
    values = load_file(path)
    for name in names:
        del values[name]
    save_file(values, path, metadata={"format": "pt"})


def test_what_a_file_holds_of_a_part_stays_where_another_weight_of_it_is_missing(tmp_path):
    base = save_base("bert", tmp_path)
    name = "bert.embeddings.LayerNorm"
    with torch.no_grad():
        base.get_parameter(f"{name}.weight").fill_(3.0)
        base.save_pretrained(tmp_path)
    drop(tmp_path, f"{name}.bias", "bert.pooler.dense.bias")
    model = lora("bert", config=str(tmp_path), options={}).build_model(TEXTS)
    assert {f"model.{name}.bias", "model.bert.pooler.dense.bias"} <= set(model.shapes)
    first = model.module()
    held = {n: value.clone() for n, value in first.named_buffers()}
    assert bool((held[f"model.{name}.weight"] == 3.0).all())
    dense = base.get_parameter("bert.pooler.dense.weight")
    assert torch.equal(held["model.bert.pooler.dense.weight"], dense)
    for seed in (1, 2):
        model.init(seed)
        assert all(torch.equal(value, held[n]) for n, value in first.named_buffers())


def test_a_missing_parameter_without_a_module_of_its_own_is_trained(tmp_path):
    save_base("vit", tmp_path)
    name = "vit.embeddings.cls_token"
    drop(tmp_path, name)
    settings = lora("vit", config=str(tmp_path), options={})
    model = settings.build_model(SPECS["vit"])
    first = model.init(0)[f"model.{name}"]
    assert torch.equal(settings.build_model(SPECS["vit"]).init(0)[f"model.{name}"], first)
    module = put(model.module(), moved(model))
    module(batch(SPECS["vit"])[0]).logits.sum().backward()
    assert module.get_parameter(f"model.{name}").grad.any()


def test_a_folder_without_some_blocks_is_refused(tmp_path):
    save_base("bert", tmp_path)
    deeper = lora("bert", config=str(tmp_path), options={"num_hidden_layers": 5})
    with pytest.raises(ModelError, match=r"has no weights for .*leave sizes out of model\.options"):
        deeper.build_model(TEXTS).init(0)


def test_a_model_that_sees_the_future_is_refused():
    speech = replace(SPECS["gpt2"])
    xlm = lora(
        "gpt2",
        config="xlm",
        options={"emb_dim": 16, "n_layers": 1, "n_heads": 2, "max_position_embeddings": 20},
        targets=("q_lin",),
    )
    with pytest.raises(ModelError, match="sees the tokens that it is to predict"):
        xlm.build_model(speech)


# ---- out and in again


@FAMILY
@pytest.mark.parametrize("rank", [4, 2])
def test_peft_and_transformers_load_what_was_saved(family, rank, tmp_path):
    spec = SPECS[family]
    save_base(family, tmp_path / "base")
    settings = lora(family, config=str(tmp_path / "base"), options={})
    model = settings.build_model(spec)
    model = model.resized(model.slice({"rank": range(rank)}))
    module = put(model.module(), moved(model))
    ours = logits(module, spec)
    out = tmp_path / "out"
    model.save(module, str(out))
    auto = getattr(transformers, AUTO[spec.task])
    merged = auto.from_pretrained(out)
    assert torch.allclose(logits(merged, spec), ours, atol=1e-4, rtol=1e-4)
    base = auto.from_pretrained(tmp_path / "base")
    frozen = logits(base, spec)
    assert not torch.allclose(frozen, ours, atol=1e-2)
    adapted = peft.PeftModel.from_pretrained(base, out / "adapter")
    assert torch.allclose(logits(adapted, spec), ours, atol=1e-4, rtol=1e-4)
    described = json.loads((out / "adapter" / "adapter_config.json").read_text())
    assert described["r"] == rank
    assert described["lora_alpha"] == 6.0 * rank / 4
    assert described["base_model_name_or_path"] == str(tmp_path / "base")
    files = {path.name for path in (out / "adapter").iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json"} <= files


@FAMILY
def test_a_saved_adapter_is_where_training_starts(family, tmp_path):
    model = tiny(family)
    params = moved(model)
    model.save(put(model.module(), params), str(tmp_path))
    started = lora(family, adapter=tmp_path / "adapter").build_model(SPECS[family])
    assert started.pretrained is not None
    assert started.init(3).keys() == params.keys()
    assert all(torch.equal(value, params[name]) for name, value in started.init(3).items())
    submodel = started.slice({"rank": [0, 1]})
    small = started.resized(submodel).init(0)
    assert all(torch.equal(small[n], value) for n, value in cut(params, submodel).items())


def test_an_adapter_that_peft_made_is_where_training_starts(tmp_path):
    base = save_base("gpt2", tmp_path / "base")
    config = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=["c_attn"], fan_in_fan_out=True, init_lora_weights=False
    )
    theirs = peft.get_peft_model(base, config)
    theirs.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    settings = lora("gpt2", config=str(tmp_path / "base"), options={}, adapter=tmp_path / "adapter")
    model = settings.build_model(LANGUAGE)
    ours = logits(put(model.module(), model.init(0)), LANGUAGE)
    assert torch.allclose(ours, logits(theirs, LANGUAGE), atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 2}, r"rank 4 and alpha 6.0; set model.rank .*\(they are 2 and 6.0\)"),
        ({"alpha": 3.0}, r"rank 4 and alpha 6.0; .*\(they are 4 and 3.0\)"),
        ({"targets": ("query",)}, "differ in .*value.*other model.targets"),
        ({"targets": ("query", "value", "key")}, "differ in .*key.*other model.targets"),
        ({"train_head": False}, "differ in 'model.classifier"),
    ],
)
def test_an_adapter_of_another_model_is_refused(changes, message, tmp_path):
    model = tiny("bert")
    model.save(model.module(), str(tmp_path))
    settings = lora("bert", **{"adapter": tmp_path / "adapter", **changes})
    with pytest.raises(ModelError, match=message):
        settings.build_model(TEXTS).init(0)


def test_an_adapter_that_is_scaled_otherwise_is_refused(tmp_path):
    model = tiny("bert")
    model.save(model.module(), str(tmp_path))
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"use_rslora": True}))
    with pytest.raises(ModelError, match="use_rslora"):
        lora("bert", adapter=tmp_path / "adapter").build_model(TEXTS).init(0)


@pytest.mark.parametrize("content", [None, b"", b"no tensors at all"])
def test_an_adapter_that_cannot_be_read_is_named(content, tmp_path):
    if content is not None:
        (tmp_path / "adapter_model.safetensors").write_bytes(content)
        (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match=f"model.adapter {tmp_path}"):
        lora("bert", adapter=tmp_path).build_model(TEXTS).init(0)


# ---- settings


def adapted(model: Model) -> set[str]:
    return {pair.down.removesuffix(".lora_A.default.weight") for pair in model.low_rank}


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (("key",), {f"model.bert.encoder.layer.{i}.attention.self.key" for i in (0, 1)}),
        (("layer.1.attention.self.key",), {"model.bert.encoder.layer.1.attention.self.key"}),
        (
            ("key", "intermediate.dense"),
            {f"model.bert.encoder.layer.{i}.attention.self.key" for i in (0, 1)}
            | {f"model.bert.encoder.layer.{i}.intermediate.dense" for i in (0, 1)},
        ),
        (
            (r".*layer\.1\..*(query|key)",),
            {f"model.bert.encoder.layer.1.attention.self.{name}" for name in ("query", "key")},
        ),
    ],
)
def test_targets_are_names_or_one_pattern(targets, expected):
    assert adapted(lora("bert", targets=targets).build_model(TEXTS)) == expected


def test_every_linear_module_of_a_type_that_the_library_does_not_know():
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as KNOWN

    assert "vit" not in KNOWN
    layer = {f"attention.{n}_proj" for n in "qkvo"} | {"mlp.fc1", "mlp.fc2"}
    expected = {f"model.vit.layers.{i}.{name}" for i in (0, 1) for name in layer}
    assert adapted(tiny("vit")) == expected  # not the head, which is trained whole
    assert adapted(lora("vit", targets=("all-linear",)).build_model(IMAGES)) == expected
    assert adapted(lora("vit", train_head=False).build_model(IMAGES)) == expected
    gpt2 = adapted(lora("gpt2", targets=("all-linear",)).build_model(LANGUAGE))
    parts = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    assert gpt2 == {f"model.transformer.h.{i}.{part}" for i in (0, 1) for part in parts}


@pytest.mark.parametrize("family", ["bert", "vit"])
def test_a_head_that_is_not_trained_is_frozen(family, tmp_path):
    spec = SPECS[family]
    base = save_base(family, tmp_path / "base")
    model = lora(family, config=str(tmp_path / "base"), options={}, train_head=False).build_model(
        spec
    )
    assert not any(map(is_head, model.shapes))
    module = put(model.module(), moved(model))
    assert torch.equal(module.model.classifier.bias, base.classifier.bias)
    model.save(module, str(tmp_path / "out"))
    theirs = getattr(transformers, AUTO[spec.task]).from_pretrained(tmp_path / "base")
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "out" / "adapter")
    assert torch.allclose(logits(theirs, spec), logits(module, spec), atol=1e-4, rtol=1e-4)


def test_a_frozen_head_may_have_an_adapter_if_it_is_named():
    model = lora("bert", targets=("query", "classifier"), train_head=False).build_model(TEXTS)
    assert "model.classifier" in adapted(model)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 0}, "model.rank must be at least 1"),
        ({"rank": -3}, "model.rank must be at least 1"),
        ({"alpha": 0.0}, "model.alpha positive"),
        ({"alpha": float("nan")}, "model.alpha positive"),
        ({"targets": ("qeury",)}, r"model.targets \('qeury',\).*for instance .*query"),
        ({"targets": ("(query",)}, r"model.targets .*for instance"),
        ({"targets": ("word_embeddings",)}, "word_embeddings' is no linear module"),
        ({"targets": ("classifier",)}, "model.targets"),
        ({"options": {"hidden_sze": 1}}, "did you mean 'hidden_size'"),
    ],
)
def test_wrong_settings_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        lora("bert", **changes).build_model(TEXTS)


def test_convolutions_are_refused_by_name():
    with pytest.raises(ConfigError, match="projection' is no linear module"):
        lora("vit", targets=("projection",)).build_model(IMAGES)


def test_an_output_that_shares_its_weight_with_the_embedding_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="lm_head' shares its weight"):
        lora("gpt2", targets=("lm_head",)).build_model(LANGUAGE)
    options = {**FAMILIES["gpt2"], "tie_word_embeddings": False}
    model = lora("gpt2", targets=("lm_head", "c_attn"), options=options).build_model(LANGUAGE)
    module = put(model.module(), moved(model))
    model.save(module, str(tmp_path))
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.allclose(logits(merged, LANGUAGE), logits(module, LANGUAGE), atol=1e-3)


def test_the_example_of_an_error_is_a_name_that_works():
    with pytest.raises(ConfigError, match=r"for instance .*c_attn"):
        lora("gpt2", targets=("query",)).build_model(LANGUAGE)


def test_without_the_library_it_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ConfigError, match=r"needs the library peft: pip install"):
        lora("bert").build_model(TEXTS)


def test_settings_survive_json_and_toml(tmp_path):
    settings = lora(
        "bert", rank=3, alpha=5.0, targets=("query",), adapter=tmp_path, train_head=False
    )
    experiment = Experiment(model=settings)
    plain = json.loads(json.dumps(to_json(experiment)))
    assert plain["model"]["name"] == "lora"
    assert from_json(plain) == experiment
    assert from_json({"model": "lora"}).model == LoRA()
    file = tmp_path / "mine.toml"
    file.write_text(
        f'[model]\nname = "lora"\nconfig = "bert"\nrank = 3\nalpha = 5\ntargets = ["query"]\n'
        f'adapter = "{tmp_path}"\ntrain_head = false\n[model.options]\n'
        + "".join(f"{key} = {value}\n" for key, value in FAMILIES["bert"].items())
    )
    assert from_file(file) == experiment
    with pytest.raises(ConfigError, match=r"model\.rnk.*'rank'"):
        from_json({"model": {"name": "lora", "rnk": 2}})


# ---- costs


@FAMILY
def test_costs_count_the_adapters_and_the_work_of_the_whole_model(family):
    spec, training = SPECS[family], Training(momentum=0.9)
    inputs, labels = batch(spec)
    model = tiny(family)
    costs = costs_of(model, model.whole(), training, inputs, labels)
    half = costs_of(model, model.slice({"rank": range(2)}), training, inputs, labels)
    plain = HuggingFace(config=family, options=FAMILIES[family], axes=("mlp",)).build_model(spec)
    full = costs_of(plain, plain.whole(), training, inputs, labels)
    entries = sum(torch.Size(shape).numel() for shape in model.shapes.values())
    assert costs.num_entries == entries and costs.bytes_each_way == 4 * entries
    assert costs.bytes_each_way < full.bytes_each_way / 2
    head = sum(torch.Size(s).numel() for n, s in model.shapes.items() if is_head(n))
    assert 2 * (half.num_entries - head) == entries - head
    assert 0 < half.flops_per_example < costs.flops_per_example < full.flops_per_example
    assert costs.forward_flops_per_example > full.forward_flops_per_example


def test_the_parameters_of_a_module_are_those_of_the_model():
    for family in FAMILIES:
        assert parameters_of(tiny(family).module()).keys() == tiny(family).shapes.keys()


LAYERS = {
    "gpt2": "model.transformer.h.",
    "llama": "model.model.layers.",
    "bert": "model.bert.encoder.layer.",
    "vit": "model.vit.layers.",
}


@FAMILY
def test_adapted_blocks_are_counted_from_the_output(family):
    model = tiny(family)
    assert model.depths == {"layers": Depth(2, (LAYERS[family],), last=1)}
    depth = model.depths["layers"]
    assert depth.locate(LAYERS[family] + "1.x") == (LAYERS[family], 0, "x")
    assert depth.locate(LAYERS[family] + "0.x") == (LAYERS[family], 1, "x")
    top = model.adapted(1)
    assert {n for n in model.shapes if n.startswith(LAYERS[family] + "0.")} == set(
        model.shapes
    ) - top
    assert model.adapted(2) == model.shapes.keys()


@FAMILY
def test_a_part_without_the_lower_adapters_is_the_model_with_these_at_zero(family):
    model, params = tiny(family), moved(tiny(family))
    part = model.slice({"layers": range(1)})
    assert part.views.keys() == model.adapted(1)
    module = model.module(part.sizes)
    assert {n: tuple(t.shape) for n, t in module.named_parameters()} == {
        name: view.shape for name, view in part.views.items()
    }
    for pair in model.low_rank:
        if pair.up not in part.views:
            params[pair.up] = torch.zeros_like(params[pair.up])
    spec = SPECS[family]
    whole, few = put(model.module(), params), put(module, cut(params, part))
    assert torch.equal(logits(whole, spec), logits(few, spec))
    small = model.resized(part)
    assert {pair.up for pair in small.low_rank} < {pair.up for pair in model.low_rank}
    assert small.slice({"layers": range(1)}).views.keys() == part.views.keys()


def test_adapters_are_left_out_from_the_input_side_alone():
    with pytest.raises(ModelError, match="next to the output"):
        tiny("bert").slice({"layers": [1]})


def test_a_tower_without_adapters_is_no_axis():
    options = {f"vision_config.{key}": value for key, value in FAMILIES["vit"].items()}
    towers = LoRA(config="clip", options=options).build_model(IMAGES).depths
    assert towers.keys() == {"vision.layers"}
    one = lora("bert", targets=(r".*layer\.1\.attention\.self\.query",))
    assert len(one.build_model(TEXTS).slice({"layers": range(1)}).views) == 4


@FAMILY
def test_the_features_are_counted(family):
    assert tiny(family).feature_size() == 32


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_features_of_a_language_model_are_of_every_place_and_those_before_it(family):
    module = tiny(family).module().eval()
    tokens = torch.randint(38, (2, 12))
    with torch.no_grad():
        out, shorter = module(tokens), module(tokens[:, :5])
    assert out.features.shape == (2, 12, 32)
    torch.testing.assert_close(out.features[:, :5], shorter.features)
