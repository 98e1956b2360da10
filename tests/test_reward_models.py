"""The rewards with models, on tiny random models in the layouts of the published checkpoints, against independent sums."""

from __future__ import annotations

import json
import math
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from safetensors.torch import save_file
from transformers import (
    BertTokenizer,
    BlipConfig,
    BlipForQuestionAnswering,
    CLIPConfig,
    CLIPModel,
    CLIPTokenizer,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from fastloop.config import RewardConfig
from fastloop.denoisers.files import ASSETS
from fastloop.errors import UserError
from fastloop.prompts import Prompt
from fastloop.rewards.blip_scores import split_image_reward
from fastloop.rewards.clip_scores import from_open_clip
from fastloop.rewards.models import Pixels, Predictor, read_tensors
from fastloop.rewards.noun_phrases import by_rule
from fastloop.rewards.ocr import accuracy, asked_text
from fastloop.rewards.registry import build
from fastloop.rewards.scoring import Rewards

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (5, 40, 56, 3), dtype=np.uint8)
PROMPTS = ["a red cup", "a blue cup and a green plate", "a cat", "a red cup", "two dogs on a sofa"]
NOTHING = [{}] * 5
WORDS = "[PAD] [UNK] [CLS] [SEP] yes no a red blue green cup plate cat two dogs on sofa and ? picture answer".split()  # noqa: SIM905


def spread(model: torch.nn.Module, seed: int = 2) -> torch.nn.Module:
    """Weights large enough for outputs that differ."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            drawn = p.ndim > 1 or name.endswith("class_embedding")  # else ones and zeros, not whatever was drawn before
            p.copy_(0.6 * noise if drawn else p + 0.1 * noise)
    return model.eval()


def make(name: str, **params):
    return build(RewardConfig(name=name, params=params), "rewards.0")


def scores(name: str, images=IMAGES, prompts=PROMPTS, metadata=NOTHING, **params) -> np.ndarray:
    return make(name, **params)(images, prompts, metadata)


# --- tiny models on disk ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("clip")
    tokenizer = CLIPTokenizer.from_pretrained(ASSETS / "shapes" / "tokenizer")
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 48,
        "hidden_act": "gelu",
    }
    text = {"vocab_size": len(tokenizer), "max_position_embeddings": tokenizer.model_max_length, "eos_token_id": 2}
    vision = {"image_size": 28, "patch_size": 14}
    config = CLIPConfig(text_config={**sizes, **text}, vision_config={**sizes, **vision}, projection_dim=24)
    model = spread(CLIPModel(config))
    with torch.no_grad():
        model.logit_scale.fill_(math.log(100))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> str:
    """A tokenizer as BERT's, with few words."""
    folder = tmp_path_factory.mktemp("words")
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def blip_vqa(tmp_path_factory, words) -> str:
    folder = tmp_path_factory.mktemp("blip")
    text = {
        "vocab_size": len(WORDS) + 2,  # and [DEC], [ENC], as BLIP has them
        "bos_token_id": len(WORDS),
        "hidden_size": 32,
        "encoder_hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 48,
        "max_position_embeddings": 64,
    }
    vision = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    vision |= {"image_size": 32, "patch_size": 16}
    spread(BlipForQuestionAnswering(BlipConfig(text_config=text, vision_config=vision))).save_pretrained(folder)
    BertTokenizer.from_pretrained(words).save_pretrained(folder)
    BlipImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    return str(folder)


TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %} answer"
)


@pytest.fixture(scope="module")
def vlm(tmp_path_factory) -> str:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("vlm")
    vocabulary = {word: i for i, word in enumerate([*WORDS, "Yes", "No", "<image>"])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[UNK]", pad_token="[PAD]", model_max_length=256)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=CLIPVisionConfig(**sizes, image_size=28, patch_size=14),
            text_config=LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=len(vocabulary)),
            image_token_index=vocabulary["<image>"],
            vision_feature_layer=-1,
        )
    )
    spread(model).save_pretrained(folder)
    LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}),
        tokenizer=tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    ).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def head(tmp_path_factory) -> str:
    """The aesthetic predictor's layers as published, for the tiny CLIP's width."""
    path = tmp_path_factory.mktemp("head") / "aesthetic-model.pth"
    torch.save(spread(Predictor(24)).state_dict(), path)
    assert set(torch.load(path, weights_only=True)) == {f"layers.{i}.{k}" for i in (0, 2, 4, 6, 7) for k in ("weight", "bias")}
    return str(path)


def vit(p: dict, pixels: torch.Tensor, heads: int, names: dict) -> torch.Tensor:
    """A pre-norm ViT in plain tensors, from an embedded (n, length, width) sequence on."""
    x = pixels
    for i in range(names["layers"]):
        b = f"{names['block']}{i}."
        h = F.layer_norm(x, x.shape[-1:], p[f"{b}{names['ln1']}.weight"], p[f"{b}{names['ln1']}.bias"], names["eps"])
        qkv = h @ p[b + names["qkv"][0]].T + p[b + names["qkv"][1]]
        q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in qkv.chunk(3, -1))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=names["causal"]).transpose(1, 2).flatten(2)
        x = x + F.linear(mixed, p[f"{b}{names['out']}.weight"], p[f"{b}{names['out']}.bias"])
        h = F.layer_norm(x, x.shape[-1:], p[f"{b}{names['ln2']}.weight"], p[f"{b}{names['ln2']}.bias"], names["eps"])
        h = F.gelu(F.linear(h, p[f"{b}{names['fc1']}.weight"], p[f"{b}{names['fc1']}.bias"]))
        x = x + F.linear(h, p[f"{b}{names['fc2']}.weight"], p[f"{b}{names['fc2']}.bias"])
    return x


# --- code beside the weights ------------------------------------------------------------------------------------------

OWN_CODE = {  # reward: the file of its model that asks for code, what it asks for
    "a tokenizer": ("clipscore", "clip", "tokenizer_config.json", "AutoTokenizer", "tokenizer_class"),
    "an image processor": ("clipscore", "clip", "preprocessor_config.json", "AutoImageProcessor", "image_processor_type"),
    "a processor": ("vlm_judge", "vlm", "processor_config.json", "AutoProcessor", "processor_class"),
    "a model": ("vlm_judge", "vlm", "config.json", "AutoModelForImageTextToText", "model_type"),
}


@pytest.mark.parametrize("case", OWN_CODE)
def test_code_that_comes_with_a_rewards_model_is_neither_run_nor_asked_about(case, request, tmp_path, monkeypatch):
    name, fixture, file, auto, kind = OWN_CODE[case]
    folder = tmp_path / "model"
    shutil.copytree(request.getfixturevalue(fixture), folder)
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    values = json.loads((folder / file).read_text())
    code = ["evil.Evil", None] if auto == "AutoTokenizer" else "evil.Evil"
    values |= {"auto_map": {"AutoConfig": "evil.Evil", auto: code}, kind: "Evil"}
    (folder / file).write_text(json.dumps(values))
    if auto == "AutoTokenizer":  # else transformers takes its own class, by the kind of the model
        (folder / "config.json").unlink()
    monkeypatch.setattr("builtins.input", lambda *args: pytest.fail("it asks on the terminal"))
    rewards = Rewards([RewardConfig(name=name, params={"model": str(folder)})], [], None)
    with pytest.raises(UserError) as caught:
        rewards.start()
    assert str(caught.value) == (
        f"rewards.0: {name} cannot start: {folder} comes with code of its own, which is not run: choose a model that "
        "transformers itself knows, or load this one in a reward of your own, MODULE:FUNCTION"
    )
    assert not (tmp_path / "ran").exists()


# --- pictures to pixels -----------------------------------------------------------------------------------------------

SIZES = [(40, 56), (57, 33), (28, 28), (64, 64), (300, 200)]


@pytest.mark.parametrize("size", SIZES)
def test_pixels_are_those_of_the_official_processors(size, clip, blip_vqa):
    images = RNG.integers(0, 256, (2, *size, 3), dtype=np.uint8)
    for folder, processor in ((clip, CLIPImageProcessorPil), (blip_vqa, BlipImageProcessorPil)):
        official = processor.from_pretrained(folder)(images=[Image.fromarray(i) for i in images], return_tensors="pt")
        assert torch.allclose(Pixels.of(folder)(images), official["pixel_values"], atol=1e-5)


def test_the_default_processors_of_clip_and_blip_have_the_sizes_that_are_expected(tmp_path):
    for processor, expected in ((CLIPImageProcessorPil, Pixels(224, "crop")), (BlipImageProcessorPil, Pixels(384, "squash"))):
        processor().save_pretrained(tmp_path)
        found = Pixels.of(str(tmp_path))
        assert (found.size, found.fit) == (expected.size, expected.fit)
        assert np.allclose([*found.mean, *found.std], [*expected.mean, *expected.std])


def test_hpsv2_puts_the_whole_picture_in_the_middle_of_black():
    wide = np.full((1, 20, 40, 3), 255, np.uint8)
    pixels = Pixels(28, "pad", (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))(wide)[0, 0]
    assert pixels[:7].eq(0).all() and pixels[21:].eq(0).all() and pixels[7:21].eq(1).all()


def test_a_processor_that_resizes_in_another_way_is_refused(tmp_path):
    CLIPImageProcessorPil(size={"shortest_edge": 30}, crop_size={"height": 28, "width": 28}).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="resizes in a way that is not known here"):
        Pixels.of(str(tmp_path))


# --- CLIP -------------------------------------------------------------------------------------------------------------


def official_clip(folder: str):
    """Cosines (5,) and image embeddings (5, width) by the model's own forward."""
    model, tokenizer = CLIPModel.from_pretrained(folder), CLIPTokenizer.from_pretrained(folder)
    pixels = CLIPImageProcessorPil.from_pretrained(folder)(images=[Image.fromarray(i) for i in IMAGES], return_tensors="pt")
    with torch.no_grad():
        out = model(**tokenizer(PROMPTS, padding=True, return_tensors="pt"), **pixels)
    assert torch.allclose(out.image_embeds.norm(dim=-1), torch.ones(5))
    return out.logits_per_image.diagonal() / model.logit_scale.exp().detach(), out.image_embeds


def test_clipscore_and_pickscore_are_scaled_cosines_of_the_official_forward(clip):
    cosine, _ = official_clip(clip)
    assert np.allclose(scores("clipscore", model=clip), 100 * cosine.clamp(min=0), rtol=1e-4)
    assert np.allclose(scores("pickscore", model=clip, processor=clip), 100 * cosine, rtol=1e-4)
    assert cosine.std() > 1e-3


def test_aesthetic_is_the_published_head_on_the_normalised_embedding_from_pth_or_safetensors(clip, head, tmp_path):
    _, embeddings = official_clip(clip)
    layers = torch.load(head, weights_only=True)
    expected = embeddings
    for i in (0, 2, 4, 6, 7):
        expected = expected @ layers[f"layers.{i}.weight"].T + layers[f"layers.{i}.bias"]
    found = scores("aesthetic", model=clip, head=head)
    assert np.allclose(found, expected[:, 0], rtol=1e-4) and found.std() > 1e-3
    save_file(layers, tmp_path / "head.safetensors")
    assert np.allclose(found, scores("aesthetic", model=clip, head=str(tmp_path / "head.safetensors")), rtol=1e-5)


def open_clip_tensors(width=32, layers=2, out=24, vocabulary=300, length=16, patch=14, image=28) -> dict[str, torch.Tensor]:
    """A random ViT under open_clip's names."""
    g = torch.Generator().manual_seed(1)

    def random(*shape, scale=0.3):
        return torch.randn(*shape, generator=g) * scale

    p = {
        "positional_embedding": random(length, width),
        "text_projection": random(width, out),
        "logit_scale": torch.tensor(4.6),
        "token_embedding.weight": random(vocabulary, width),
        "visual.class_embedding": random(width),
        "visual.positional_embedding": random((image // patch) ** 2 + 1, width),
        "visual.proj": random(width, out),
        "visual.conv1.weight": random(width, 3, patch, patch, scale=0.05),
    }
    norms = ["ln_final", "visual.ln_pre", "visual.ln_post"]
    for tower in ("", "visual."):
        for i in range(layers):
            b = f"{tower}transformer.resblocks.{i}."
            norms += [f"{b}ln_1", f"{b}ln_2"]
            p |= {f"{b}attn.in_proj_weight": random(3 * width, width), f"{b}attn.in_proj_bias": random(3 * width)}
            for name, rows, columns in (
                ("attn.out_proj", width, width),
                ("mlp.c_fc", 48, width),
                ("mlp.c_proj", width, 48),
            ):
                p |= {f"{b}{name}.weight": random(rows, columns), f"{b}{name}.bias": random(rows)}
    for norm in norms:
        p |= {f"{norm}.weight": 1 + random(width), f"{norm}.bias": random(width)}
    return p


OPEN_CLIP = {
    "ln1": "ln_1", "ln2": "ln_2", "qkv": ("attn.in_proj_weight", "attn.in_proj_bias"), "out": "attn.out_proj",
    "fc1": "mlp.c_fc", "fc2": "mlp.c_proj", "layers": 2, "eps": 1e-5,
}  # fmt: skip


def open_clip_cosine(p: dict, pixels: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """open_clip's forward, written out: exact GELU, text pooled at its end token, the highest id."""
    x = F.conv2d(pixels, p["visual.conv1.weight"], stride=14).flatten(2).transpose(1, 2)
    x = torch.cat([p["visual.class_embedding"].expand(len(x), 1, -1), x], 1) + p["visual.positional_embedding"]
    x = F.layer_norm(x, (32,), p["visual.ln_pre.weight"], p["visual.ln_pre.bias"])
    x = vit(p, x, 2, {**OPEN_CLIP, "block": "visual.transformer.resblocks.", "causal": False})
    image = F.layer_norm(x[:, 0], (32,), p["visual.ln_post.weight"], p["visual.ln_post.bias"]) @ p["visual.proj"]
    x = p["token_embedding.weight"][ids] + p["positional_embedding"][: ids.shape[1]]
    x = vit(p, x, 2, {**OPEN_CLIP, "block": "transformer.resblocks.", "causal": True})
    x = F.layer_norm(x, (32,), p["ln_final.weight"], p["ln_final.bias"])
    text = x[torch.arange(len(x)), ids.argmax(-1)] @ p["text_projection"]
    return F.cosine_similarity(image, text)


@pytest.fixture(scope="module")
def hps(tmp_path_factory, clip) -> dict:
    folder = tmp_path_factory.mktemp("hps")
    tokenizer = CLIPTokenizer.from_pretrained(clip)
    tensors = open_clip_tensors(vocabulary=len(tokenizer), length=tokenizer.model_max_length)
    torch.save({"epoch": 1, "state_dict": tensors}, folder / "HPS.pt")
    return {"weights": str(folder / "HPS.pt"), "model": clip}


def test_hpsv2_reads_open_clip_weights_and_gives_open_clips_cosines(hps):
    tokenizer = CLIPTokenizer.from_pretrained(hps["model"])
    ids = tokenizer(PROMPTS, padding="max_length", return_tensors="pt").input_ids
    expected = open_clip_cosine(read_tensors(hps["weights"]), Pixels(28, "pad")(IMAGES), ids)
    found = scores("hpsv2", **hps)
    assert np.allclose(found, expected, atol=1e-5) and found.std() > 1e-3


def test_an_open_clip_model_of_another_kind_is_refused():
    with pytest.raises(ValueError, match="visual.trunk.blocks.0.norm1.weight is no part of an open_clip ViT"):
        from_open_clip({"visual.trunk.blocks.0.norm1.weight": torch.zeros(1)})


# --- BLIP -------------------------------------------------------------------------------------------------------------


def image_reward_tensors(width=128, hidden=128, layers=2, vocabulary=23) -> dict[str, torch.Tensor]:
    """Random weights under the names of ImageReward.pt."""
    g = torch.Generator().manual_seed(2)

    def random(*shape, scale=0.15):
        return torch.randn(*shape, generator=g) * scale

    p: dict[str, torch.Tensor] = {}

    def linear(name, rows, columns):
        p.update({f"{name}.weight": random(rows, columns), f"{name}.bias": random(rows)})

    def norm(name, size):
        p.update({f"{name}.weight": 1 + random(size), f"{name}.bias": random(size)})

    v, t = "blip.visual_encoder.", "blip.text_encoder."
    p |= {f"{v}cls_token": random(1, 1, width), f"{v}pos_embed": random(1, 5, width)}
    p |= {f"{v}patch_embed.proj.weight": random(width, 3, 16, 16, scale=0.03), f"{v}patch_embed.proj.bias": random(width)}
    norm(f"{v}norm", width)
    for i in range(layers):
        b = f"{v}blocks.{i}."
        norm(f"{b}norm1", width), norm(f"{b}norm2", width)
        linear(f"{b}attn.qkv", 3 * width, width), linear(f"{b}attn.proj", width, width)
        linear(f"{b}mlp.fc1", 96, width), linear(f"{b}mlp.fc2", width, 96)
    p |= {f"{t}embeddings.position_ids": torch.arange(40)[None]}
    p |= {f"{t}embeddings.word_embeddings.weight": random(vocabulary, hidden)}
    p |= {f"{t}embeddings.position_embeddings.weight": random(40, hidden)}
    norm(f"{t}embeddings.LayerNorm", hidden)
    for i in range(layers):
        b = f"{t}encoder.layer.{i}."
        for attention, source in (("attention", hidden), ("crossattention", width)):
            linear(f"{b}{attention}.self.query", hidden, hidden)
            linear(f"{b}{attention}.self.key", hidden, source), linear(f"{b}{attention}.self.value", hidden, source)
            linear(f"{b}{attention}.output.dense", hidden, hidden), norm(f"{b}{attention}.output.LayerNorm", hidden)
        linear(f"{b}intermediate.dense", 96, hidden), linear(f"{b}output.dense", hidden, 96)
        norm(f"{b}output.LayerNorm", hidden)
    for i, (rows, columns) in zip((0, 2, 4, 6, 7), ((1024, hidden), (128, 1024), (64, 128), (16, 64), (1, 16)), strict=True):
        linear(f"mlp.layers.{i}", rows, columns)
    return p


def image_reward(p: dict, pixels: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """ImageReward's forward, written out."""
    names = {
        "block": "blip.visual_encoder.blocks.", "ln1": "norm1", "ln2": "norm2", "qkv": ("attn.qkv.weight", "attn.qkv.bias"),
        "out": "attn.proj", "fc1": "mlp.fc1", "fc2": "mlp.fc2", "layers": 2, "eps": 1e-6, "causal": False,
    }  # fmt: skip
    v, t = "blip.visual_encoder.", "blip.text_encoder."
    x = F.conv2d(pixels, p[f"{v}patch_embed.proj.weight"], p[f"{v}patch_embed.proj.bias"], stride=16)
    x = x.flatten(2).transpose(1, 2)
    x = vit(p, torch.cat([p[f"{v}cls_token"].expand(len(x), -1, -1), x], 1) + p[f"{v}pos_embed"], 2, names)
    seen = F.layer_norm(x, x.shape[-1:], p[f"{v}norm.weight"], p[f"{v}norm.bias"], 1e-6)

    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], p[f"{name}.weight"], p[f"{name}.bias"], 1e-12)

    def attend(x, source, name, mask):
        def heads(of, part):
            h = F.linear(of, p[f"{name}.self.{part}.weight"], p[f"{name}.self.{part}.bias"])
            return h.unflatten(-1, (2, -1)).transpose(1, 2)

        h = F.scaled_dot_product_attention(heads(x, "query"), heads(source, "key"), heads(source, "value"), attn_mask=mask)
        h = F.linear(h.transpose(1, 2).flatten(2), p[f"{name}.output.dense.weight"], p[f"{name}.output.dense.bias"])
        return norm(x + h, f"{name}.output.LayerNorm")

    x = p[f"{t}embeddings.word_embeddings.weight"][ids] + p[f"{t}embeddings.position_embeddings.weight"][: ids.shape[1]]
    x = norm(x, f"{t}embeddings.LayerNorm")
    for i in range(2):
        b = f"{t}encoder.layer.{i}."
        x = attend(x, x, f"{b}attention", mask.bool()[:, None, None])
        x = attend(x, seen, f"{b}crossattention", None)
        h = F.gelu(F.linear(x, p[f"{b}intermediate.dense.weight"], p[f"{b}intermediate.dense.bias"]))
        x = norm(x + F.linear(h, p[f"{b}output.dense.weight"], p[f"{b}output.dense.bias"]), f"{b}output.LayerNorm")
    x = x[:, 0]
    for i in (0, 2, 4, 6, 7):
        x = F.linear(x, p[f"mlp.layers.{i}.weight"], p[f"mlp.layers.{i}.bias"])
    return (x[:, 0] - 0.16717362830052426) / 1.0333394966054072


@pytest.fixture(scope="module")
def reward_pt(tmp_path_factory, words) -> dict:
    path = tmp_path_factory.mktemp("imagereward") / "ImageReward.pt"
    torch.save(image_reward_tensors(), path)
    return {"weights": str(path), "tokenizer": words}


def test_imagereward_reads_the_published_layout_and_gives_its_scores(reward_pt):
    tokens = BertTokenizer.from_pretrained(reward_pt["tokenizer"])(
        PROMPTS, padding="max_length", truncation=True, max_length=35, return_tensors="pt"
    )
    pixels = Pixels(32, "crop")(IMAGES)
    expected = image_reward(read_tensors(reward_pt["weights"]), pixels, tokens.input_ids, tokens.attention_mask)
    found = scores("imagereward", **reward_pt)
    assert np.allclose(found, expected, rtol=1e-3, atol=1e-4) and found.std() > 1e-2


@pytest.mark.parametrize(
    "change, says",
    [
        (lambda p: p.pop("mlp.layers.4.bias"), "layers.4.bias is absent, expected [64]"),
        (lambda p: p.pop("blip.visual_encoder.cls_token"), "lacks embeddings.class_embedding"),
        (lambda p: p.update({"blip.visual_encoder.norm.bias": torch.zeros(7)}), "post_layernorm.bias is [7], expected [128]"),
        (lambda p: p.update({"optimizer": torch.zeros(7)}), "optimizer is no part of ImageReward"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_with_what_is_wrong(tmp_path, words, change, says):
    tensors = image_reward_tensors()
    change(tensors)
    torch.save(tensors, tmp_path / "odd.pt")
    rewards = Rewards(
        [RewardConfig(name="imagereward", params={"weights": str(tmp_path / "odd.pt"), "tokenizer": words})], [], (40, 56)
    )
    with pytest.raises(UserError) as caught:
        rewards.start()
    assert str(caught.value).startswith("rewards.0: imagereward cannot start: ") and says in str(caught.value)


def test_the_layout_has_a_vision_a_text_and_a_head_part():
    with pytest.raises(ValueError, match="lacks its text part"):
        split_image_reward({n: v for n, v in image_reward_tensors().items() if "text_encoder" not in n})


def test_blip_vqa_is_the_product_of_the_answers_to_one_question_each(blip_vqa):
    model, tokenizer = BlipForQuestionAnswering.from_pretrained(blip_vqa), BertTokenizer.from_pretrained(blip_vqa)
    processor = BlipImageProcessorPil.from_pretrained(blip_vqa)
    expected = []
    for image, prompt in zip(IMAGES, PROMPTS, strict=True):
        pixels = processor(images=Image.fromarray(image), return_tensors="pt").pixel_values
        product = 1.0
        for phrase in by_rule(prompt):
            ids = tokenizer(f"{phrase}?", return_tensors="pt").input_ids
            ids[:, 0] = len(WORDS) + 1  # [ENC]
            with torch.no_grad():
                seen = model.vision_model(pixels)[0]
                states = model.text_encoder(ids, encoder_hidden_states=seen)[0]
                start = torch.tensor([[len(WORDS)]])  # [DEC]
                logits = model.text_decoder(start, encoder_hidden_states=states).logits[0, 0]
            yes, no = logits.softmax(-1)[[WORDS.index("yes"), WORDS.index("no")]].tolist()
            product *= yes / (yes + no)
        expected.append(product)
    found = scores("blip_vqa", model=blip_vqa)
    assert np.allclose(found, expected, rtol=1e-4) and found.std() > 1e-3
    assert all(0 < value < 1 for value in found)


def test_blip_vqa_asks_about_at_most_so_many_things(blip_vqa):
    prompt = "a red cup and a blue cup and a green cup"
    one, all_three = (scores("blip_vqa", IMAGES[:1], [prompt], [{}], model=blip_vqa, max_phrases=n) for n in (1, 3))
    assert one == pytest.approx(scores("blip_vqa", IMAGES[:1], ["a red cup"], [{}], model=blip_vqa)) and all_three < one


def test_blip_vqa_refuses_a_prompt_that_names_nothing(blip_vqa):
    with pytest.raises(UserError, match="^rewards.0.name: blip_vqa finds nothing to ask about in the prompt 'of the and'"):
        Rewards([RewardConfig(name="blip_vqa", params={"model": blip_vqa})], [Prompt("a cup"), Prompt("of the and")], (8, 8))


def test_spacy_is_used_where_asked_for_and_its_absence_told(blip_vqa, monkeypatch):
    import sys
    import types

    monkeypatch.setitem(sys.modules, "spacy", None)
    with pytest.raises(UserError, match=r"blip_vqa: spaCy is not installed: pip install fastloop\[spacy\]"):
        make("blip_vqa", model=blip_vqa, noun_phrases="spacy")

    def nlp(text):
        return types.SimpleNamespace(noun_chunks=[types.SimpleNamespace(text=part) for part in text.split(" near ")])

    monkeypatch.setitem(sys.modules, "spacy", types.SimpleNamespace(load=lambda name: nlp))
    assert make("blip_vqa", model=blip_vqa, noun_phrases="spacy").phrases("A Cup near the sea") == ["a cup", "the sea"]


@pytest.mark.parametrize(
    "prompt, phrases",
    [
        ("a red book and a yellow vase", ["a red book", "a yellow vase"]),
        ("The fluffy cat is sitting on the wooden chair.", ["the fluffy cat", "the wooden chair"]),
        ("a bathroom with green tile and a red shower curtain", ["a bathroom", "green tile", "a red shower curtain"]),
        ("a dog on the left of a chair", ["a dog", "a chair"]),
        ("two cats and three dogs", ["two cats", "three dogs"]),
        ("rubber ball, plastic bottle", ["rubber ball", "plastic bottle"]),
        ("a wooden dining table and a blue building", ["a wooden dining table", "a blue building"]),
        ("a woman is holding a phone", ["a woman", "a phone"]),
        ("a sleeping cat", ["a sleeping cat"]),
        ("cat", ["cat"]),
        ("a bird flies over a fly on the left shoe", ["a bird", "a fly", "the left shoe"]),
        ("of the and", []),
    ],
)
def test_noun_phrases_by_the_light_rule(prompt, phrases):
    assert by_rule(prompt) == phrases


# --- a judge, and reading ---------------------------------------------------------------------------------------------


def test_the_judge_is_yes_against_no_in_the_first_token_of_the_answer(vlm):
    from transformers import AutoProcessor

    model, processor = LlavaForConditionalGeneration.from_pretrained(vlm), AutoProcessor.from_pretrained(vlm)
    expected = []
    for image, prompt in zip(IMAGES, PROMPTS, strict=True):
        text = f"<image> picture {prompt} ? answer"
        inputs = processor(images=Image.fromarray(image), text=text, return_tensors="pt")
        with torch.no_grad():
            p = model(**inputs).logits[0, -1].softmax(-1)
        ids = processor.tokenizer.convert_tokens_to_ids
        yes, no = (p[ids([word, word.capitalize()])].sum().item() for word in ("yes", "no"))
        expected.append(yes / (yes + no))
    question = " picture {prompt} ?"
    found = scores("vlm_judge", model=vlm, question=question)
    assert np.allclose(found, expected, rtol=1e-3) and found.std() > 1e-3
    about = [{"thing": "cup"}] * 5
    named = scores("vlm_judge", metadata=about, model=vlm, question=" picture {thing} ?")
    assert np.allclose(named, scores("vlm_judge", prompts=["cup"] * 5, model=vlm, question=question), rtol=1e-5)


def test_a_question_that_is_no_template_is_refused(vlm):
    with pytest.raises(UserError, match=r"rewards.0.params: vlm_judge: question 'is it \{' is no template"):
        make("vlm_judge", model=vlm, question="is it {")


def test_ocr_reads_what_is_written_and_costs_letters_that_are_missing_or_too_many():
    def picture(text):
        image = Image.new("RGB", (384, 128), "white")
        ImageDraw.Draw(image).text((20, 25), text, fill="black", font=ImageFont.load_default(60))
        return np.asarray(image)

    found = scores(
        "ocr", np.stack([picture("OPEN"), picture("")]), ["a sign", 'a sign that says "open"'], [{"text": "OVEN"}, {}]
    )
    assert found.tolist() == [3 / 4, 0]


def test_the_distance_of_texts():
    pairs = [("cat", "cat"), ("c at", "CAT"), ("cut", "cat"), ("cats", "cat"), ("", "cat"), ("xxxxxxx", "cat")]
    assert [accuracy(*pair) for pair in pairs] == pytest.approx([1, 1, 2 / 3, 2 / 3, 0, 0])


def test_the_text_comes_from_the_metadata_or_from_quotes():
    assert asked_text("a sign", {"text": "OPEN"}) == "OPEN"
    assert asked_text('"GRAND" above "OPENING"', {}) == "GRAND OPENING"
    assert asked_text("a sign that reads 'don't panic'", {}) == "don't panic"
    assert asked_text("“hello” on a wall", {}) == "hello"
    for prompt, metadata in (("a dog's sign", {}), ("a sign", {"text": " "}), ("a sign", {"text": 7})):
        with pytest.raises(ValueError, match="no text to read for the prompt"):
            asked_text(prompt, metadata)


# --- all of them ------------------------------------------------------------------------------------------------------


@pytest.fixture
def every(clip, head, hps, reward_pt, blip_vqa, vlm) -> dict[str, dict]:
    return {
        "aesthetic": {"model": clip, "head": head},
        "clipscore": {"model": clip},
        "pickscore": {"model": clip, "processor": clip},
        "hpsv2": hps,
        "imagereward": reward_pt,
        "blip_vqa": {"model": blip_vqa},
        "vlm_judge": {"model": vlm},
    }


@pytest.mark.parametrize("name", ["aesthetic", "clipscore", "pickscore", "hpsv2", "imagereward", "blip_vqa", "vlm_judge"])
def test_scores_are_those_of_other_batches_and_dtypes_to_rounding(name, every):
    params = every[name]
    alone = np.concatenate([scores(name, IMAGES[i : i + 1], PROMPTS[i : i + 1], [{}], **params) for i in range(5)])
    for batch in (2, 5):
        assert np.allclose(scores(name, batch=batch, **params), alone, rtol=1e-4, atol=1e-5)
    half = scores(name, dtype="bf16", device="cpu", **params)
    assert np.isfinite(half).all() and not np.array_equal(half, alone)
    assert np.allclose(half, alone, atol=0.25 * np.abs(alone).max())


def test_a_model_is_loaded_once_for_training_and_evaluation_and_not_before_the_start(clip, monkeypatch):
    loads = []
    original = CLIPModel.from_pretrained.__func__
    monkeypatch.setattr(
        CLIPModel, "from_pretrained", classmethod(lambda cls, *a, **k: loads.append(a) or original(cls, *a, **k))
    )
    config = RewardConfig(name="clipscore", params={"model": clip})
    train = Rewards([config], [], (40, 56))
    evaluation = Rewards([config.model_copy(update={"weight": 2.0})], [], (40, 56), "eval.rewards", share=train)
    assert not loads
    train.start(), evaluation.start()
    prompts = [Prompt(text) for text in PROMPTS]
    assert np.array_equal(2 * train.score(IMAGES, prompts).total, evaluation.score(IMAGES, prompts).total)
    assert len(loads) == 1


@pytest.mark.parametrize(
    "name, params, says",
    [
        ("clipscore", {"dtype": "int8"}, "dtype 'int8' is not one of fp32, bf16, fp16"),
        ("clipscore", {"device": "cuda:99"}, "device cuda:99: this machine has "),
        ("clipscore", {"device": "tpu"}, "device 'tpu' is not auto, cpu, cuda or cuda:N"),
        ("clipscore", {"batch": 0}, "batch must be a whole number from 1, not 0"),
        ("clipscore", {"batches": 3}, "unexpected keyword argument 'batches'"),
        ("clipscore", {"model": "/no/such/folder"}, "no folder /no/such/folder: give a local folder or a hub id"),
        ("aesthetic", {"head": "/no/such/file.pth"}, "no file /no/such/file.pth: give a local file, or OWNER/NAME/FILE"),
        ("hpsv2", {"weights": "HPS.pt"}, "no file HPS.pt"),
        ("blip_vqa", {"noun_phrases": "nltk"}, "noun_phrases 'nltk' is not rule or spacy"),
    ],
)
def test_bad_params_are_refused_before_anything_is_loaded(name, params, says):
    with pytest.raises(UserError) as caught:
        make(name, **params)
    assert str(caught.value).startswith(f"rewards.0.params: {name}: ") and says in str(caught.value)


def test_nothing_but_tensors_is_unpickled(tmp_path, clip):
    class Payload:
        def __reduce__(self):
            return open, (str(tmp_path / "owned"), "w")

    torch.save({"layers.0.weight": Payload()}, tmp_path / "evil.pth")
    rewards = Rewards(
        [RewardConfig(name="aesthetic", params={"model": clip, "head": str(tmp_path / "evil.pth")})], [], (40, 56)
    )
    with pytest.raises(UserError, match="aesthetic cannot start: cannot read tensors from"):
        rewards.start()
    assert not (tmp_path / "owned").exists()
    torch.save({"state_dict": {"a": 1}}, tmp_path / "odd.pth")
    with pytest.raises(ValueError, match="holds no dictionary of tensors"):
        read_tensors(str(tmp_path / "odd.pth"))
    (tmp_path / "text.json").write_text(json.dumps({}))
    with pytest.raises(ValueError, match="cannot read tensors"):
        read_tensors(str(tmp_path / "text.json"))
