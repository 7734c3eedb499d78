import json
import shutil
from dataclasses import replace

import pytest
import torch
from towers import CLIP, PARTS, PETS, PROMPT, images, moved, put, save_clip

from tesserafl.core.errors import ConfigError, ModelError
from tesserafl.core.fit import Training
from tesserafl.core.submodel import cut
from tesserafl.data.examples import Spec
from tesserafl.models.class_texts import byte_tokenizer
from tesserafl.models.costs import costs_of
from tesserafl.models.huggingface import HuggingFace, family_of
from tesserafl.models.lora import LoRA
from tesserafl.models.soft_prompts import Prompts
from tesserafl.models.wrapped import Scaling, scaling_of

transformers = pytest.importorskip("transformers")
pytest.importorskip("peft")

# peft reads an attribute that transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

SIGLIP = {
    **PARTS,
    "text_config.projection_size": 48,
    # The library's own defaults are ids outside of its vocabulary.
    "text_config.bos_token_id": 0,
    "text_config.eos_token_id": 0,
}


# ---- bytes as a tokenizer


def test_bytes_are_read_as_their_values_between_begin_and_end():
    tokenizer = byte_tokenizer()
    every = bytes(range(128)).decode() + "é€🙂"
    for text in ("a photo of A Cat", "  two  blanks ", "", every):
        ids = tokenizer([text])["input_ids"][0]
        assert ids == [256, *text.encode(), 257]
    assert len(tokenizer) == 258 and tokenizer.pad_token_id == 257


def test_a_saved_tokenizer_of_bytes_reads_as_before(tmp_path):
    save_clip(tmp_path)
    again = transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = "A  café, 4 Ätzend\n"
    assert again([text])["input_ids"] == byte_tokenizer()([text])["input_ids"]


# ---- what it computes


@pytest.mark.parametrize(
    ("config", "options"),
    [("clip", CLIP), ("siglip", SIGLIP), ("altclip", CLIP), ("chinese_clip", CLIP)],
)
def test_logits_are_the_librarys_own(config, options):
    family = family_of(config, options, PETS, PROMPT)
    module = family.build({}).eval()
    ids = torch.tensor(family.texts.ids)
    given = {} if family.texts.mask is None else {"attention_mask": torch.tensor(family.texts.mask)}
    with torch.no_grad():
        ours = module(images())
        theirs = module.model(input_ids=ids, pixel_values=images(), **given)
        embedded = module.model.get_image_features(pixel_values=images()).pooler_output
    assert torch.allclose(ours.logits, theirs.logits_per_image, atol=1e-5)
    assert torch.equal(ours.features, embedded)
    assert ours.logits.shape == (4, 3)
    assert (ours.logits[:, 0] - ours.logits[:, 1]).abs().max() > 1e-4


def test_texts_are_padded_as_the_tower_reads_them():
    """CLIP looks back from a text's end, BERT needs a mask, SigLIP reads the last of its places."""
    short = {kind: family_of(kind, CLIP, PETS, PROMPT).texts for kind in ("clip", "altclip")}
    siglip = family_of("siglip", SIGLIP, PETS, PROMPT).texts
    longest = len(b"a photo of a horse") + 2
    assert len(short["clip"].ids[0]) == len(short["altclip"].ids[0]) == longest
    assert short["clip"].mask is None
    assert short["altclip"].mask[0] == [1] * (longest - 2) + [0, 0]
    assert len(siglip.ids[0]) == 64 and siglip.mask is None


def test_an_embedding_does_not_depend_on_the_other_classes():
    module = family_of("clip", CLIP, PETS, PROMPT).build({}).eval()
    other = replace(PETS, num_classes=2, class_names=("dog", "a very long name of an animal"))
    two = family_of("clip", CLIP, other, PROMPT).build({}).eval()
    two.load_state_dict(module.state_dict())
    with torch.no_grad():
        assert torch.allclose(module.embed_texts()[1], two.embed_texts()[0], atol=1e-6)
        assert torch.allclose(module(images()).logits[:, 1], two(images()).logits[:, 0], atol=1e-5)


def test_texts_are_no_weights():
    family = family_of("clip", CLIP, PETS, PROMPT)
    module = family.build({})
    assert "class_ids" in dict(module.named_buffers())
    assert not [name for name in module.state_dict() if "class_ids" in name]
    with torch.device("meta"):
        assert family.build({}).class_ids.is_meta


def test_the_library_loads_what_was_saved_and_it_starts_a_later_model(tmp_path):
    saved = save_clip(tmp_path / "first")
    loaded = transformers.CLIPModel.from_pretrained(tmp_path / "first").eval()
    given = {
        "input_ids": torch.tensor(family_of("clip", CLIP, PETS, PROMPT).texts.ids),
        "pixel_values": images(),
    }
    with torch.no_grad():
        expected = saved(**given).logits_per_image
        assert torch.equal(loaded(**given).logits_per_image, expected)
    settings = HuggingFace(config=str(tmp_path / "first"), prompt=PROMPT)
    model = settings.build_model(PETS)
    module = put(model.module(), model.init(0))
    with torch.no_grad():
        assert torch.allclose(module(images()).logits, expected, atol=1e-5)
    model.save(module, str(tmp_path / "second"))
    names = {path.name for path in (tmp_path / "second").iterdir()}
    assert {"tokenizer.json", "model.safetensors", "config.json"} <= names
    # Other classes and another sentence, with the same bytes.
    birds = replace(PETS, num_classes=2, class_names=("Owl", "Great Tit"))
    later = family_of(str(tmp_path / "second"), {}, birds, "{}.")
    assert later.texts.ids[1] == [256, *b"Great Tit.", 257]


def test_pixels_are_scaled_as_the_saved_model_was_trained(tmp_path):
    save_clip(tmp_path)
    plain = family_of(str(tmp_path), {}, PETS, PROMPT)
    mean, deviation = [0.48, 0.46, 0.41], [0.27, 0.26, 0.28]
    processor = {"do_normalize": True, "image_mean": mean, "image_std": deviation}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
    scaled = family_of(str(tmp_path), {}, PETS, PROMPT)
    module, other = plain.build({}).eval(), scaled.build({}).eval()
    other.load_state_dict(module.state_dict())
    theirs = (images() / 2 + 0.5 - torch.tensor(mean)[:, None, None]) / torch.tensor(deviation)[
        :, None, None
    ]
    with torch.no_grad():
        assert torch.allclose(other(images()).logits, module(theirs).logits, atol=1e-4)
        assert not torch.allclose(other(images()).logits, module(images()).logits, atol=1e-2)
    (tmp_path / "preprocessor_config.json").write_text('{"image_mean": [0.5], "image_std": [0.5]}')
    assert family_of(str(tmp_path), {}, PETS, PROMPT).scaling is None


def test_a_saved_processor_says_how_pixels_are_scaled(tmp_path):
    """As transformers saves it: no preprocessor_config.json beside it."""
    save_clip(tmp_path / "base")
    images_as = transformers.CLIPImageProcessorPil()
    tokenizer = byte_tokenizer()
    processor = transformers.CLIPProcessor(image_processor=images_as, tokenizer=tokenizer)
    processor.save_pretrained(tmp_path / "base")
    assert not (tmp_path / "base" / "preprocessor_config.json").exists()
    expected = Scaling(tuple(images_as.image_mean), tuple(images_as.image_std))
    family = family_of(str(tmp_path / "base"), {}, PETS, PROMPT)
    assert family.scaling == expected
    family.save(family.build({}), str(tmp_path / "out"))
    assert family_of(str(tmp_path / "out"), {}, PETS, PROMPT).scaling == expected
    # Older ones say nothing of images there.
    (tmp_path / "base" / "processor_config.json").write_text('{"processor_class": "CLIPProcessor"}')
    assert scaling_of(tmp_path / "base") is None
    other = {"image_mean": [0.1] * 3, "image_std": [0.2] * 3}
    (tmp_path / "base" / "preprocessor_config.json").write_text(json.dumps(other))
    assert scaling_of(tmp_path / "base") == Scaling((0.1,) * 3, (0.2,) * 3)


def test_pixels_that_are_not_normalised_are_from_0_to_1(tmp_path):
    save_clip(tmp_path)
    given = {"do_normalize": False, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(given))
    family = family_of(str(tmp_path), {}, PETS, PROMPT)
    assert torch.equal(family.build({}).pixels(images()), images() * 0.5 + 0.5)


@pytest.mark.parametrize("file", ["preprocessor_config.json", "processor_config.json"])
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("do_flip_channel_order", True),
        ("rescale_factor", 1 / 127.5),
        ("rescale_offset", True),
        ("do_rescale", False),
    ],
)
def test_images_that_are_prepared_otherwise_are_refused(name, value, file, tmp_path):
    plain = {
        "do_flip_channel_order": False,
        "rescale_factor": 0.00392156862745098,
        "rescale_offset": False,
        "do_rescale": True,
        "do_normalize": False,
    }

    def write(given) -> None:
        held = given if file.startswith("pre") else {"image_processor": given}
        (tmp_path / file).write_text(json.dumps(held))

    write(plain)
    assert scaling_of(tmp_path) == Scaling((0.0,), (1.0,))
    write({**plain, name: value})
    with pytest.raises(ModelError, match=f"{file} has {name} {value}"):
        scaling_of(tmp_path)


def test_its_axes_are_found():
    model = HuggingFace(config="clip", options=CLIP, prompt=PROMPT).build_model(PETS)
    assert {"text.embed", "vision.embed", "text.mlp", "projection"} <= set(model.cuttable)
    assert set(model.depths) == {"text.layers", "vision.layers"}
    assert "classes" not in model.widths
    submodel = model.slice({"vision.mlp": range(16), "text.embed": [0, 2]})
    module = put(model.module(submodel.sizes), cut(moved(model), submodel))
    with torch.no_grad():
        assert module(images()).logits.shape == (4, 3)


def save_clip_with_words(folder, eos_token_id: int) -> None:
    """A model with CLIP's own tokenizer of lower-case words, as a downloaded folder has it."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    pieces = [*letters, *(letter + "</w>" for letter in letters), "ca", "cat</w>"]
    words = [*pieces, "<|startoftext|>", "<|endoftext|>"]
    tokenizer = transformers.CLIPTokenizer(
        vocab={word: number for number, word in enumerate(words)},
        merges=[("c", "a"), ("ca", "t</w>")],
    )
    tokenizer.save_pretrained(folder)
    parts = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 1}
    text = {**parts, "vocab_size": 56, "eos_token_id": eos_token_id, "bos_token_id": 54}
    config = transformers.CLIPConfig(
        text_config={**text, "pad_token_id": 1},
        vision_config={**parts, "patch_size": 4, "image_size": 16},
        projection_dim=24,
    )
    transformers.CLIPModel(config).save_pretrained(folder)


@pytest.mark.parametrize("eos_token_id", [55, 2])  # 2: old configs, which read the largest id
def test_the_folders_own_tokenizer_reads_the_sentences(eos_token_id, tmp_path):
    save_clip_with_words(tmp_path / "base", eos_token_id)
    family = family_of(str(tmp_path / "base"), {}, PETS, "a {}")
    assert family.texts.ids == [
        [54, 26, 53, *[55] * 5],  # "cat" is one token
        [54, 26, 3, 14, 32, *[55] * 3],
        [54, 26, 7, 14, 17, 18, 30, 55],
    ]
    model = Prompts(config=str(tmp_path / "base"), context=2).build_model(PETS)
    assert model.module().class_ids[0].tolist() == [54, *[53] * 3, *[55] * 5]
    model.save(model.module(), str(tmp_path / "out"))
    again = family_of(str(tmp_path / "out"), {}, PETS, "a {}")
    assert again.texts.ids == family.texts.ids


# ---- low-rank adapters


def lora(**changes) -> LoRA:
    return LoRA(**({"config": "clip", "options": CLIP, "rank": 4, "prompt": PROMPT} | changes))


def test_adapters_are_in_both_towers_and_no_head_is_trained():
    model = lora().build_model(PETS)
    expected = {
        f"model.{tower}_model.encoder.layers.{block}.self_attn.{part}.lora_{factor}.default.weight"
        for tower in ("text", "vision")
        for block in (0, 1)
        for part in ("q_proj", "v_proj")
        for factor in "AB"
    }
    assert set(model.shapes) == expected
    assert set(model.widths) == {"rank"}
    assert set(model.depths) == {"text.layers", "vision.layers"}
    one_tower = lora(targets=(r".*vision_model.*\.q_proj",)).build_model(PETS)
    assert len(one_tower.low_rank) == 2 and set(one_tower.depths) == {"vision.layers"}


def test_the_adapters_of_both_towers_move_the_logits_and_get_gradients():
    model = lora().build_model(PETS)
    params = model.init(0)
    start = put(model.module(), params)(images()).logits
    for tower in ("text_model", "vision_model"):
        changed = {n: v if tower not in n else moved(model)[n] for n, v in params.items()}
        with torch.no_grad():
            assert (put(model.module(), changed)(images()).logits - start).abs().max() > 1e-3
    module = put(model.module(), moved(model))
    torch.nn.functional.cross_entropy(
        module(images()).logits, torch.tensor([0, 1, 2, 0])
    ).backward()
    assert all(p.grad is not None and p.grad.any() for p in module.parameters())


def test_all_modules_hold_the_same_frozen_weights():
    model = lora().build_model(PETS)
    places = [
        {n: b.data_ptr() for n, b in model.module({**model.sizes, "rank": r}).named_buffers()}
        for r in (4, 2, 1)
    ]
    assert places[0] == places[1] == places[2]
    assert any("logit_scale" in name for name in places[0])


def test_the_merged_model_and_the_adapter_load_without_us(tmp_path):
    import peft

    save_clip(tmp_path / "base")
    model = lora(config=str(tmp_path / "base"), options={}).build_model(PETS)
    module = put(model.module(), moved(model))
    model.save(module, str(tmp_path / "out"))
    given = {"input_ids": module.class_ids, "pixel_values": images()}
    with torch.no_grad():
        ours = module(images()).logits
        merged = transformers.CLIPModel.from_pretrained(tmp_path / "out").eval()
        assert torch.allclose(merged(**given).logits_per_image, ours, atol=1e-3)
        base = transformers.CLIPModel.from_pretrained(tmp_path / "base")
        adapted = peft.PeftModel.from_pretrained(base, tmp_path / "out" / "adapter").eval()
        assert torch.allclose(adapted(**given).logits_per_image, ours, atol=1e-3)
    again = lora(config=str(tmp_path / "base"), options={}, adapter=tmp_path / "out" / "adapter")
    params = again.build_model(PETS).init(9)
    assert all(torch.equal(params[name], value) for name, value in moved(model).items())


def test_costs_count_the_text_tower():
    training, labels = Training(), torch.tensor([0, 1, 2, 0])
    few = lora().build_model(PETS)
    classes = tuple(f"animal {i}" for i in range(30))
    many = lora().build_model(replace(PETS, num_classes=30, class_names=classes))
    costs = [costs_of(m, m.whole(), training, images(), labels) for m in (few, many)]
    assert 2 * costs[0].flops_per_example < costs[1].flops_per_example


# ---- what is refused


TEXTS = Spec(
    kind="tokens",
    task="text-classification",
    shape=(12,),
    num_classes=2,
    class_names=("bad", "good"),
    vocab_size=40,
)


@pytest.mark.parametrize(
    ("changes", "spec", "kind", "message"),
    [
        ({"prompt": "a photo"}, PETS, ConfigError, "write {} once"),
        ({"prompt": "{} and {}"}, PETS, ConfigError, "write {} once"),
        ({"config": "vit", "options": {}}, PETS, ConfigError, "'vit' has no tower"),
        ({"config": "bert", "options": {}}, TEXTS, ConfigError, "for text-classification"),
        ({}, replace(PETS, class_names=()), ModelError, "do not name their classes"),
        ({}, replace(PETS, class_names=("cat", "dog", "cat")), ModelError, "'a photo of a cat'"),
        (
            {"prompt": "{}"},
            replace(PETS, class_names=("cat", " ", "horse")),
            ModelError,
            "class 1 is called ' ', so its sentence with model.prompt '{}' is empty",
        ),
        (
            {
                "config": "altclip",  # the first places of its texts are padding's: 257 + 1 of them
                "options": {**CLIP, "text_config.max_position_embeddings": 258 + 19},
            },
            PETS,
            ModelError,
            "'a photo of a horse' has 20 tokens; the text tower reads 19",
        ),
        (
            {"options": {**CLIP, "text_config.max_position_embeddings": 19}},
            PETS,
            ModelError,
            "'a photo of a horse' has 20 tokens; the text tower reads 19",
        ),
    ],
)
def test_what_does_not_fit_is_refused(changes, spec, kind, message):
    for settings in (HuggingFace, LoRA):
        with pytest.raises(kind, match=message.replace("{", r"\{").replace("}", r"\}")):
            settings(
                **({"config": "clip", "options": CLIP, "prompt": PROMPT} | changes)
            ).build_model(spec)


def test_weights_without_a_tokenizer_are_refused(tmp_path):
    save_clip(tmp_path)
    for path in tmp_path.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(ModelError, match="weights and no tokenizer"):
        lora(config=str(tmp_path), options={}).build_model(PETS)


def test_another_models_tokenizer_is_refused(tmp_path):
    """Its ids are unknown, or the tower does not find the end of a text."""
    save_clip(tmp_path / "base")
    shutil.copytree(tmp_path / "base", tmp_path / "other")
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    config["text_config"]["eos_token_id"] = 7
    (tmp_path / "other" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="does not tell two classes' sentences apart"):
        lora(config=str(tmp_path / "other"), options={}).build_model(PETS)
    with pytest.raises(ModelError, match="gave id 257, the text tower knows 200"):
        options = {"text_config.vocab_size": 200}
        lora(config=str(tmp_path / "base"), options=options).build_model(PETS)
