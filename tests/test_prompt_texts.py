"""How prompts become embeddings where people want it otherwise: layers skipped, long prompts in chunks, words of their own."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from known_traces import trace_nothing
from safetensors.torch import save_file

from fastloop.cli import main
from fastloop.config import ModelConfig, SamplingConfig
from fastloop.denoisers import load_denoiser
from fastloop.errors import UserError
from fastloop.plan import plan
from fastloop.preflight import preflight
from fastloop.rollout import sampler_table
from fastloop.trainer import Trainer

CPU = torch.device("cpu")
GUIDED = SamplingConfig(guidance_scale=3, negative_prompt="a blue square")
PIPELINES = {"tiny_sd": StableDiffusionPipeline, "tiny_sdxl": StableDiffusionXLPipeline}


def text_of(cond) -> torch.Tensor:
    return getattr(cond, "text", cond)


@pytest.fixture
def deep(tmp_path) -> dict[str, str]:
    """Models whose text encoders have layers to skip."""
    from tiny_pipelines import make_sd, make_sdxl
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    found = {"tiny_sd": make_sd(tmp_path / "sd"), "tiny_sdxl": make_sdxl(tmp_path / "xl")}
    for path in found.values():
        for name, kind in (("text_encoder", CLIPTextModel), ("text_encoder_2", CLIPTextModelWithProjection)):
            if (Path(path) / name).exists():
                config = kind.config_class.from_pretrained(Path(path) / name)
                config.num_hidden_layers = 4
                torch.manual_seed(2)
                kind(config).save_pretrained(Path(path) / name)
    return found


@pytest.mark.parametrize("name", PIPELINES)
def test_layers_are_skipped_for_prompts_as_stock_does_and_the_export_says_so(deep, tmp_path, name):
    stock = PIPELINES[name].from_pretrained(deep[name])
    if not hasattr(stock.text_encoder, "text_model"):  # where transformers has taken that level away, stock's code fails
        object.__setattr__(stock.text_encoder, "text_model", stock.text_encoder)
    told = {"device": CPU, "num_images_per_prompt": 1, "do_classifier_free_guidance": True, "negative_prompt": "a blue square"}
    for skip in (1, 2):
        denoiser = load_denoiser(ModelConfig(path=deep[name], clip_skip=skip), CPU)
        with torch.no_grad():
            theirs = stock.encode_prompt("a red circle", **told, clip_skip=skip)
        for ours, of_stock in zip(denoiser.encode(["a red circle"], GUIDED), theirs, strict=False):
            assert torch.allclose(text_of(ours), of_stock, atol=1e-6)
        same, negative = denoiser.encode(["a blue square"], GUIDED)  # one text in both places
        assert not torch.allclose(text_of(same), text_of(negative), atol=1e-3)
    denoiser.train_adapter(gradient_checkpointing=False, seed=0)
    denoiser.export(tmp_path / "export")
    assert json.loads((tmp_path / "export/call.json").read_text()) == {"clip_skip": 2}
    assert denoiser.notes == ("of prompts the last 2 layers of CLIP are skipped",)
    with pytest.raises(UserError, match="^model.clip_skip: 3 of 4 layers: at most 2 can be skipped$"):
        sampler_table(ModelConfig(path=deep[name], clip_skip=3), SamplingConfig())


@pytest.mark.parametrize("name", PIPELINES)
def test_a_long_prompt_is_encoded_in_chunks_whose_number_the_run_decides(request, make_config, tmp_path, monkeypatch, name):
    """75 tokens at a time in real text encoders, 14 here; each chunk by itself, short prompts filled up with empty ones."""
    trace_nothing(monkeypatch)
    path = request.getfixturevalue(name)
    plain = load_denoiser(ModelConfig(path=path), CPU)
    words = plain.tokenizers["tokenizer"].model_max_length - 2
    first, second, third = (" ".join([word] * words) for word in ("red", "circle", "blue"))
    (tmp_path / "prompts.txt").write_text(f"{first} {second} {third}\na red circle\n")
    long = {"source": str(tmp_path / "prompts.txt"), "too_long": "chunk"}
    config = make_config(model={"path": path}, prompts=long, eval={"prompts": {"source": "animals", "limit": 1}})
    checked = preflight(config)
    assert checked.config.model.prompt_chunks == 3 and checked.cut == [] and "warning" not in plan(config)
    assert "note         every text is encoded in 3 chunks" in plan(config)
    denoiser = load_denoiser(checked.config.model, CPU)
    sampling = SamplingConfig(guidance_scale=3)
    conds, unconds = denoiser.encode([f"{first} {second} {third}", "a red circle"], sampling)
    alone = [text_of(plain.encode([text], sampling)[0])[0] for text in (first, second, third, "a red circle", "")]
    assert torch.allclose(text_of(conds)[0], torch.cat(alone[:3]), atol=1e-6)
    assert torch.allclose(text_of(conds)[1], torch.cat([alone[3], alone[4], alone[4]]), atol=1e-6)
    assert text_of(unconds).shape == text_of(conds).shape
    if name == "tiny_sdxl":
        pooled = plain.encode([first, "a red circle"], sampling)[0].pooled
        assert torch.allclose(conds.pooled, pooled, atol=1e-6)  # of the first chunk
    assert [tensor.shape for tensor in denoiser.blank_embedding()] == [
        t.shape for t in denoiser._embeddings["a red circle", 0]
    ]


def test_a_run_in_chunks_trains_says_so_in_its_config_and_resumes(make_config, tiny_sd, tmp_path):
    (tmp_path / "prompts.txt").write_text(" ".join(["red"] * 20) + "\na red circle\n")
    long = {"source": str(tmp_path / "prompts.txt"), "too_long": "chunk"}
    few = {"every": 9, "images_per_prompt": 1, "grid": 1, "prompts": {"limit": 1}}
    values = {"model": {"path": tiny_sd, "lora": {"text_encoders": True}}, "prompts": long, "eval": few}
    values |= {"sampling": {"guidance_scale": 2, "steps": 2}, "output_dir": str(tmp_path / "run")}
    Trainer(make_config(**values, iterations=1), leave_out=("report", "export")).train()
    assert "prompt_chunks: 2" in (tmp_path / "run/config.yaml").read_text()
    Trainer(make_config(**values, iterations=2), resume=True, leave_out=("report", "export")).train()
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [row["iteration"] for row in rows if "reward/mean" in row] == [1, 2]


def test_sample_warns_of_a_prompt_that_is_cut_and_refuses_files_before_weights_load(tiny_sd, tmp_path, capsys, monkeypatch):
    (tmp_path / "recipe.yaml").write_text(
        f"model: {{path: {tiny_sd}}}\nrewards: [{{name: jpeg_compressibility}}]\nprompts: {{source: animals}}\n"
        "sampling: {steps: 2, guidance_scale: 1}\n"
    )
    told = ["sample", str(tmp_path / "recipe.yaml"), "--images", "1", "--out", str(tmp_path / "out")]
    assert main([*told, "--prompt", "a red circle", "--prompt", " ".join(["red"] * 20)]) == 0
    out = capsys.readouterr().out
    assert out.count("warning: the text encoders do not see the end of 'red red") == 1
    monkeypatch.setattr("fastloop.denoisers.base.Denoiser.load", lambda *_: pytest.fail("weights were loaded"))
    for key in ("lora.path", "textual_inversion"):
        value = f"model.{key}={{x: /gone.pt}}" if key == "textual_inversion" else f"model.{key}=/gone.pt"
        assert main([*told, "--prompt", "a", value]) == 2
        assert f"model.{key}" in capsys.readouterr().err


def test_chunks_and_skipped_layers_are_for_stable_diffusions_text_encoders(make_config, tiny_sd3, tiny_sd):
    for changes, says in (
        (
            {"model": {"path": tiny_sd3}, "prompts": {"too_long": "chunk"}},
            "prompts.too_long: chunk is for Stable Diffusion 1.x",
        ),
        ({"model": {"path": tiny_sd3, "clip_skip": 1}}, "model.clip_skip: only the text encoders of Stable Diffusion 1.x"),
        ({"model": {"path": tiny_sd3, "prompt_chunks": 2}}, "model.prompt_chunks: only the text encoders of Stable Diffusion"),
    ):
        with pytest.raises(UserError, match=f"^{re.escape(says)}"):
            preflight(make_config(**changes))
    with pytest.raises(UserError, match="model.clip_skip: layers that are skipped would have adapters"):
        make_config(model={"path": tiny_sd, "clip_skip": 1, "lora": {"text_encoders": True}})


@pytest.mark.parametrize("name", PIPELINES)
def test_words_of_ones_own_are_those_that_stock_loads_with_all_of_their_vectors(request, tmp_path, make_config, name):
    """Three vectors are three tokens; a pipeline that was saved with them has them as well."""
    path = request.getfixturevalue(name)
    torch.manual_seed(3)
    vectors, one = (
        {"clip_l": torch.randn(3, 16), "clip_g": torch.randn(3, 24)},
        {"clip_l": torch.randn(16), "clip_g": torch.randn(24)},
    )
    widths = ("clip_l", "clip_g") if name == "tiny_sdxl" else ("clip_l",)
    save_file({key: vectors[key] for key in widths}, tmp_path / "three.safetensors")
    torch.save({"string_to_param": {"*": vectors["clip_l"]}, "name": "x"}, tmp_path / "a1111.pt")
    (tmp_path / "folder").mkdir()
    save_file({key: one[key] for key in widths}, tmp_path / "folder/learned_embeds.safetensors")
    words = {"<three>": str(tmp_path / "three.safetensors"), "<one>": str(tmp_path / "folder")}
    stock = PIPELINES[name].from_pretrained(path)
    for key, encoder, tokenizer in (("clip_l", "text_encoder", "tokenizer"), ("clip_g", "text_encoder_2", "tokenizer_2")):
        if key in widths:
            of = {"text_encoder": getattr(stock, encoder), "tokenizer": getattr(stock, tokenizer)}
            stock.load_textual_inversion({"<three>": vectors[key]}, **of)
            stock.load_textual_inversion({"<one>": one[key]}, **of)
    stock.save_pretrained(tmp_path / "saved")
    text = "a <three> beside a <one>"
    told = {"device": CPU, "num_images_per_prompt": 1, "do_classifier_free_guidance": False}
    with torch.no_grad():
        expected = stock.encode_prompt(text, **told)[0]
    for model in (ModelConfig(path=path, textual_inversion=words), ModelConfig(path=str(tmp_path / "saved"))):
        denoiser = load_denoiser(model, CPU)
        ours = text_of(denoiser.encode([text], SamplingConfig(guidance_scale=1))[0])
        assert torch.allclose(ours, expected, atol=1e-6)
        assert denoiser.notes == tuple(
            f"the word {word} has the vectors of {file}" for word, file in model.textual_inversion.items()
        )
        tokenizer = denoiser.tokenizers["tokenizer"]
        assert [len(ids) for ids in denoiser._ids(tokenizer, ["<three>", "<THREE>", "<three> <three>"])] == [5, 5, 8]
    if name == "tiny_sdxl":  # in the published config the end of a text is 2, by which CLIP would take the largest id
        for part in ("text_encoder", "text_encoder_2"):
            edited = json.loads((Path(path) / part / "config.json").read_text()) | {"eos_token_id": 2}
            copy = Path(shutil.copytree(path, tmp_path / f"copy-{part}", dirs_exist_ok=True))
            (copy / part / "config.json").write_text(json.dumps(edited))
        denoiser = load_denoiser(ModelConfig(path=str(copy), textual_inversion=words), CPU)
        both = denoiser.encode(["<three> a red circle", "<three> a blue square"], SamplingConfig(guidance_scale=1))[0].pooled
        assert not torch.allclose(*both, atol=1e-3)
    else:
        old = load_denoiser(ModelConfig(path=path, textual_inversion={"<three>": str(tmp_path / "a1111.pt")}), CPU)
        new = load_denoiser(ModelConfig(path=path, textual_inversion={"<three>": words["<three>"]}), CPU)
        both = [text_of(d.encode(["<three>"], SamplingConfig(guidance_scale=1))[0]) for d in (old, new)]
        assert torch.equal(*both)
    save_file({"<b>": torch.zeros(1, 16), "<c>": torch.zeros(1, 16)}, tmp_path / "words.safetensors")
    save_file({"a": torch.full((1, 16), torch.nan)}, tmp_path / "nan.safetensors")
    save_file({"a": torch.zeros(1, 5)}, tmp_path / "wide.safetensors")
    save_file({"a": torch.zeros(1, 5, dtype=torch.int64)}, tmp_path / "none.safetensors")
    for word, file, says in (
        ("<a>", "wide.safetensors", "has vectors of 5 numbers and the text_encoder 16: it is of another model"),
        ("<a>", "none.safetensors", "holds no vectors for such a word, it has a: give a file of textual inversion"),
        ("<a>", "words.safetensors", "holds no vectors for such a word, it has "),  # of several words, none of this name
        ("<a>", "nan.safetensors", "holds no vectors for such a word"),
        (" ", "three.safetensors", "is no word: give a name"),
        ("<a>", "gone.pt", "no file"),
        ("red</w>", "three.safetensors", "the tokenizer knows the word 'red</w>' already: choose another"),
    ):
        with pytest.raises(UserError) as caught:
            preflight(make_config(model={"path": path, "textual_inversion": {word: str(tmp_path / file)}}))
        assert str(caught.value).startswith(f"model.textual_inversion.{word}: ") and says in str(caught.value)
