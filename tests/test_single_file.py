"""Models in one file: read as stock diffusers reads them, trained, exported, and refused where they are something else."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, StableDiffusionXLPipeline
from ldm_files import names_of, save, vae_names
from tiny_pipelines import make_sd, make_sdxl
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from fastloop.config import ModelConfig, SamplingConfig
from fastloop.denoisers import build_skeleton, load_denoiser
from fastloop.denoisers.files import ARCHITECTURES
from fastloop.denoisers.weights import check_files
from fastloop.errors import UserError
from fastloop.preflight import preflight
from fastloop.recipes import parse_config
from fastloop.rollout import sampler_table
from fastloop.trainer import Trainer

CPU = torch.device("cpu")
WORDS = 49408  # of CLIP's tokenizer


def pipeline_of(folder: Path, kind: type):
    """A tiny pipeline, whose text encoders know all of CLIP's words, without tokenizers."""
    (make_sdxl if kind is StableDiffusionXLPipeline else make_sd)(folder)
    torch.manual_seed(1)
    encoders = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}
    for name, of in encoders.items():
        if (folder / name).exists():
            config = of.config_class.from_pretrained(folder / name)
            config.vocab_size, config.eos_token_id = WORDS, 2
            of(config).save_pretrained(folder / name)
    return kind.from_pretrained(
        folder, tokenizer=None, **({"tokenizer_2": None} if (folder / "text_encoder_2").exists() else {})
    )


@pytest.fixture(scope="module")
def tiny_files(tmp_path_factory):
    """Files of tiny models of each kind, and the folder of their configs."""
    root = tmp_path_factory.mktemp("single")
    for name, kind in {
        "sd15": StableDiffusionPipeline,
        "sd2": StableDiffusionPipeline,
        "sdxl": StableDiffusionXLPipeline,
    }.items():
        folder = root / "architectures" / name
        weights = names_of(pipeline_of(folder, kind), second_like=name == "sd2")
        save(weights, root / f"{name}.safetensors")
        shutil.copytree(folder, root / f"{name}_folder")
        for file in (*folder.rglob("*.safetensors"), *folder.rglob("*token*")):
            shutil.rmtree(file) if file.is_dir() else file.unlink(missing_ok=True)
        (folder / "model_index.json").write_text(json.dumps({"_class_name": kind.__name__}))
    return root


@pytest.fixture(autouse=True)
def tiny_architectures(tiny_files, monkeypatch):
    monkeypatch.setattr("fastloop.denoisers.files.ARCHITECTURES", tiny_files / "architectures")


def state(denoiser) -> dict[str, torch.Tensor]:
    return {f"{part}.{name}": p for part, module in denoiser.parts.items() for name, p in module.state_dict().items()}


@pytest.mark.parametrize("name", ["sd15", "sd2", "sdxl"])
def test_one_file_is_the_model_that_its_folder_is(tiny_files, tmp_path, name):
    file = tiny_files / f"{name}.safetensors"
    found = load_denoiser(ModelConfig(path=str(file)), CPU)
    kind = found.pipeline_class
    stock = kind.from_pretrained(tiny_files / f"{name}_folder", **found.tokenizers)
    for part, module in found.parts.items():
        theirs = getattr(stock, part).state_dict()
        assert {key: value.shape for key, value in module.state_dict().items()} == {k: v.shape for k, v in theirs.items()}
        assert all(torch.equal(value, theirs[key]) for key, value in module.state_dict().items())
    cond, _ = found.encode(["a photo of a cat, naïve"], SamplingConfig(guidance_scale=1))
    theirs = stock.encode_prompt(
        "a photo of a cat, naïve", device=CPU, num_images_per_prompt=1, do_classifier_free_guidance=False
    )[0]
    assert torch.allclose(cond.text if name == "sdxl" else cond, theirs, atol=1e-6)
    assert "one file, by its keys a Stable Diffusion" in found.notes[0] and len(found.notes) == (2 if name == "sd2" else 1)
    assert build_skeleton(ModelConfig(path=str(file))).notes == found.notes


def test_the_tokenizers_are_clips(tiny_files):
    """The ids are those of OpenAI's CLIP, which they are known by; Stable Diffusion 2 and XL's second one pad with 0."""
    of = {
        name: load_denoiser(ModelConfig(path=str(tiny_files / f"{name}.safetensors")), CPU).tokenizers
        for name in ("sd2", "sdxl")
    }
    first, second = of["sdxl"].values()
    ids = [49406, 320, 1125, 539, 320, 2368, 49407]
    assert first("a photo of a cat").input_ids == second("A photo of a CAT").input_ids == ids
    length = first.model_max_length
    assert first("a", padding="max_length").input_ids == [49406, 320] + [49407] * (length - 2)
    assert second("a", padding="max_length").input_ids == [49406, 320, 49407] + [0] * (length - 3)
    assert of["sd2"]["tokenizer"].pad_token_id == 0
    assert length == 16  # that of the tiny text encoder
    assert json.loads((ARCHITECTURES / "sdxl/text_encoder/config.json").read_text())["vocab_size"] == len(first) == WORDS


def test_pickles_are_read_without_running_code_and_a_file_trains_and_is_exported_whole(tiny_files, tmp_path, make_config):
    weights = names_of(StableDiffusionPipeline.from_pretrained(tiny_files / "sd15_folder", tokenizer=None))
    save(weights, tmp_path / "model.ckpt")
    same = state(load_denoiser(ModelConfig(path=str(tiny_files / "sd15.safetensors")), CPU))
    assert all(
        torch.equal(value, same[key])
        for key, value in state(load_denoiser(ModelConfig(path=str(tmp_path / "model.ckpt")), CPU)).items()
    )
    model = {"path": str(tmp_path / "model.ckpt"), "adapter": "full"}
    few = {"every": 9, "images_per_prompt": 1, "grid": 1, "prompts": {"source": "animals", "limit": 1}}
    config = make_config(model=model, eval=few, iterations=1, output_dir=str(tmp_path / "run"))
    trainer = Trainer(config, leave_out=("report",))
    trainer.train()
    (tmp_path / "model.ckpt").rename(tmp_path / "moved.ckpt")
    stock = StableDiffusionPipeline.from_pretrained(tmp_path / "run" / "export")
    ours = trainer.denoiser.network.state_dict()
    assert all(torch.equal(value, ours[key]) for key, value in stock.unet.state_dict().items())
    assert any(not torch.equal(value, same[f"unet.{key}"]) for key, value in ours.items())
    assert {"vocab.json", "merges.txt", "tokenizer_config.json"} <= {
        f.name for f in (tmp_path / "run/export/tokenizer").iterdir()
    }
    assert stock("a cat", num_inference_steps=1, output_type="latent").images.isfinite().all()
    torch.save({"state_dict": weights, "callbacks": Refused()}, tmp_path / "code.ckpt")
    with pytest.raises(
        UserError, match="^model.path: cannot read .*code.ckpt.*nothing but tensors is unpickled: convert it to"
    ):
        build_skeleton(ModelConfig(path=str(tmp_path / "code.ckpt")))


class Refused:
    """What weights_only does not unpickle."""


@pytest.mark.parametrize("told", [{"metadata": {"modelspec.prediction_type": "v"}}, {"key": "v_pred"}], ids=str)
def test_what_a_file_says_of_its_prediction_is_taken(tiny_files, tmp_path, told):
    weights = names_of(StableDiffusionXLPipeline.from_pretrained(tiny_files / "sdxl_folder", tokenizer=None, tokenizer_2=None))
    if "key" in told:
        weights |= {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}
    save(weights, tmp_path / "v.safetensors", told.get("metadata"))
    table = sampler_table(ModelConfig(path=str(tmp_path / "v.safetensors")), SamplingConfig(steps=4, guidance_scale=1))
    assert table.schedule.prediction == "v_prediction"
    assert (table.schedule.alphas[-1].item() == 0) == ("key" in told)


def test_what_is_no_whole_model_is_refused_in_one_line_that_names_the_remedy(tiny_files, tmp_path, make_config):
    weights = names_of(StableDiffusionPipeline.from_pretrained(tiny_files / "sd15_folder", tokenizer=None))
    inpainting = dict(weights)
    inpainting["model.diffusion_model.input_blocks.0.0.weight"] = torch.zeros(8, 9, 3, 3)
    cases = {
        "novae": (
            {k: v for k, v in weights.items() if "first_stage" not in k},
            "has no vae in it: give a file that has one as model.vae.path",
        ),
        "unet": (
            {k: v for k, v in weights.items() if "diffusion" in k},
            "has no text encoder: one file must be a whole Stable",
        ),
        "lora": ({"lora_unet_a.lora_down.weight": torch.zeros(1)}, "holds adapters, no model: give it as model.lora.path"),
        "inpaint": (inpainting, "takes 9 channels: it is made for inpainting"),
        "flux": (
            {"double_blocks.0.img_attn.qkv.weight": torch.zeros(1)},
            "has keys such as double_blocks.0.img_attn.qkv.weight",
        ),
        "refiner": ({"conditioner.embedders.0.model.ln_final.weight": torch.zeros(1)}, "is SDXL's refiner"),
        "clip": (
            {k: v[:, :8].contiguous() if "token_embedding" in k else v for k, v in weights.items()},
            "the text encoder of FILE is another than its configs say (its table of words is (49408, 8), not (49408, 16))",
        ),
        "more": (weights | {"model.diffusion_model.input_blocks.1.0.emb_layers.1.extra": torch.zeros(1)}, "or new)"),
        "part": (
            {k: v for k, v in weights.items() if "out.2" not in k},
            "the unet of FILE is another than its configs say (conv_out.weight is missing",
        ),
    }
    for name, (keys, says) in cases.items():
        file = tmp_path / f"{name}.safetensors"
        save(keys, file)
        config = make_config(model={"path": str(file)})
        with pytest.raises(UserError) as caught:
            preflight(config)
        assert says in str(caught.value).replace(str(file), "FILE") and "\n" not in str(caught.value)
    torch.save({1: torch.zeros(1)}, tmp_path / "numbers.ckpt")
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    (tmp_path / "pointer.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    (tmp_path / "cut.safetensors").write_bytes((tiny_files / "sd15.safetensors").read_bytes()[:1000])
    good = str(tiny_files / "sd15.safetensors")
    for values, says in (
        ({"path": str(tmp_path / "model.gguf")}, "is a file of another kind than .safetensors"),
        ({"path": str(tmp_path / "pointer.safetensors")}, "is a pointer of git-LFS: run git lfs pull"),
        ({"path": str(tmp_path / "cut.safetensors")}, "cannot read"),
        ({"path": str(tmp_path / "none.safetensors")}, "no folder or file"),
        ({"path": str(tmp_path / "numbers.ckpt")}, "has keys such as none"),
        ({"path": good, "variant": "fp16"}, "model.variant: fp16, but"),
        (
            {"path": "https://huggingface.co/a/b/blob/main/c/d.safetensors"},
            "run hf download a/b c/d.safetensors --local-dir . and",
        ),
        ({"path": "https://huggingface.co/datasets/a/b"}, "is no model's address: give a model's"),
        ({"path": "https://huggingface.co/a/b/tree/fp16"}, "set model.path=a/b model.revision=fp16"),
    ):
        with pytest.raises(UserError) as caught:
            build_skeleton(ModelConfig(**values))
        assert says in str(caught.value) and "\n" not in str(caught.value)


def test_a_vae_from_elsewhere_decodes_and_is_exported(tiny_files, tmp_path):
    """A file with A1111's names, with diffusers', its folder and a whole pipeline are the same VAE."""
    weights = names_of(StableDiffusionPipeline.from_pretrained(tiny_files / "sd15_folder", tokenizer=None))
    prefix, model = "first_stage_model.", tmp_path / "model.safetensors"
    save({key: value for key, value in weights.items() if not key.startswith(prefix)}, model)
    torch.manual_seed(5)
    vae = AutoencoderKL.from_config(AutoencoderKL.load_config(tiny_files / "sd15_folder/vae"))
    vae.save_pretrained(tmp_path / "vae")
    save({key: value for key, value in vae_names(vae).items()}, tmp_path / "bare.safetensors")
    save({prefix + key: value for key, value in vae_names(vae).items()}, tmp_path / "prefixed.pt")
    shutil.copytree(tiny_files / "sd15_folder", tmp_path / "pipeline")
    shutil.copytree(tmp_path / "vae", tmp_path / "pipeline/vae", dirs_exist_ok=True)
    oldest = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    renamed = {}
    for key, value in vae.state_dict().items():
        for new, old in oldest.items():
            key = key.replace(new, old)
        renamed[key] = value
    save(renamed, tmp_path / "oldest.safetensors")
    places = ("vae", "vae/diffusion_pytorch_model.safetensors", "bare.safetensors", "prefixed.pt", "pipeline")
    places += ("oldest.safetensors",)
    for place in places:
        config = ModelConfig(path=str(model), vae={"path": str(tmp_path / place)})
        check_files(build_skeleton(config).parts, config.path, config)
        found = load_denoiser(config, CPU).vae.state_dict()
        assert all(torch.equal(value, found[key]) for key, value in vae.state_dict().items()), place
    denoiser = load_denoiser(
        ModelConfig(path=str(model), vae={"path": str(tmp_path / "bare.safetensors")}, adapter="full"), CPU
    )
    assert denoiser.notes[-1] == f"the VAE is that of {tmp_path / 'bare.safetensors'}"
    denoiser.export(tmp_path / "export")
    exported = AutoencoderKL.from_pretrained(tmp_path / "export", subfolder="vae").state_dict()
    assert all(torch.equal(value, exported[key]) for key, value in vae.state_dict().items())

    AutoencoderKL.from_config({**vae.config, "latent_channels": 8}).save_pretrained(tmp_path / "wide")
    edit = json.loads((tmp_path / "wide/config.json").read_text()) | {"_class_name": "AsymmetricAutoencoderKL"}
    shutil.copytree(tmp_path / "wide", tmp_path / "other")
    (tmp_path / "other/config.json").write_text(json.dumps(edit))
    save({"a": torch.zeros(1)}, tmp_path / "not.safetensors")
    (tmp_path / "empty").mkdir()
    for place, says in {
        "wide": f"model.vae.path: the VAE of {tmp_path / 'wide'} gives 8 channels, the UNet takes 4 (in_channels)",
        "other": "is a AsymmetricAutoencoderKL, and only a AutoencoderKL can be trained here",
        "not.safetensors": "model.vae.path:", "empty": "model.vae.path:", "gone": "model.vae.path: no folder or file",
    }.items():  # fmt: skip
        config = ModelConfig(path=str(model), vae={"path": str(tmp_path / place)})
        with pytest.raises(UserError) as caught:
            check_files(build_skeleton(config).parts, config.path, config)
        assert says in str(caught.value) and "\n" not in str(caught.value), place
    with pytest.raises(UserError, match="model.vae.path: x, but model.random_init=sd15 reads no files"):
        parse_config({"rewards": [{"name": "jpeg"}], "model": {"random_init": "sd15", "vae": {"path": "x"}}}, "a test")
