"""The SD3 adapter against stock diffusers on the same files, runs of tiny SD3s, their exports and their plans."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from flow_runs import FULL, PROMPTS, SEED, our_run
from run_files import equal
from stock_sdxl import gap, levels
from stock_sdxl import stock as stock_pipeline
from test_sdxl import edit_json, load, trainable
from tiny_pipelines import make_sd3

from fastloop.config import ModelConfig, SamplingConfig
from fastloop.denoisers import build_skeleton, load_denoiser
from fastloop.errors import UserError
from fastloop.kernels.reference import initial_noise
from fastloop.preflight import preflight
from fastloop.rollout import sampler_table

CPU = torch.device("cpu")
GUIDED = SamplingConfig(steps=4, guidance_scale=3.0, eta=0.0)


@pytest.fixture(scope="session")
def tiny_sd3_shifting(tmp_path_factory) -> str:
    """With times that follow from the size of the picture, which SD3's pipeline knows as well."""
    shifting = {"use_dynamic_shifting": True, "base_image_seq_len": 16, "max_image_seq_len": 64}
    return make_sd3(tmp_path_factory.mktemp("sd3_shifting"), **shifting)


def stock(path, **kwargs) -> StableDiffusion3Pipeline:
    """diffusers' own pipeline of a folder; where the folder has no T5 it wants to be told so."""
    absent = {} if (Path(path) / "text_encoder_3").exists() else {"text_encoder_3": None, "tokenizer_3": None}
    return stock_pipeline(path, **absent, **kwargs)


def stock_run(
    pipeline: StableDiffusion3Pipeline, sampling: SamplingConfig, shape, **call
) -> tuple[torch.Tensor, np.ndarray, list]:
    """Last latents and pictures of stock diffusers from our x_T, and what went in and out of its transformer."""
    calls = []
    hook = pipeline.transformer.register_forward_hook(lambda _, a, kw, out: calls.append((kw, out[0])), with_kwargs=True)
    latents = pipeline(
        PROMPTS,
        negative_prompt=[sampling.negative_prompt] * len(PROMPTS) if sampling.negative_prompt else None,
        num_inference_steps=sampling.steps,
        guidance_scale=sampling.guidance_scale,
        height=sampling.height,
        width=sampling.width,
        latents=initial_noise(SEED, torch.arange(len(PROMPTS)), shape),
        output_type="latent",
        **call,
    ).images
    hook.remove()
    config = pipeline.vae.config
    decoded = pipeline.vae.decode(latents / config.scaling_factor + config.shift_factor).sample.detach()
    return latents, np.stack([np.asarray(image) for image in pipeline.image_processor.postprocess(decoded)]), calls


# --- conditioning and prediction -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [None, 20])
@pytest.mark.parametrize("path, negative", [("tiny_sd3", "a dog"), ("tiny_sd3", ""), ("tiny_sd3_plain", "")])
def test_embeddings_equal_stock_diffusers(request, path, negative, length) -> None:
    path = request.getfixturevalue(path)
    sampling = SamplingConfig(guidance_scale=3.0, negative_prompt=negative)
    cond, uncond = load(path, max_sequence_length=length).encode(PROMPTS, sampling)
    wanted = stock(path).encode_prompt(
        PROMPTS, None, None, device=CPU, negative_prompt=negative, **({"max_sequence_length": length} if length else {})
    )
    for ours, theirs in zip((cond.text, uncond.text, cond.pooled, uncond.pooled), wanted, strict=True):
        assert gap(ours, theirs) < 1e-5
    assert cond.text.shape == (3, 16 + (length or 256), 48)
    assert (cond.text[:, 16:] == 0).all() == path.endswith("plain0")  # T5's tokens
    assert gap(cond.pooled[0], cond.pooled[1]) > 0.1
    rows = cond[torch.tensor([2, 0])]
    assert rows.text.equal(cond.text[[2, 0]]) and rows.pooled.equal(cond.pooled[[2, 0]])


@pytest.mark.parametrize(
    "path, changes",
    [
        ("tiny_sd3", {"negative_prompt": "a dog", "height": 24, "width": 20}),
        ("tiny_sd3", {"guidance_scale": 1.0}),
        ("tiny_sd3_plain", {"noise": "cps"}),
        ("tiny_sd3_shifting", {"noise": "dance", "height": 32}),
    ],
    ids=str,
)
def test_without_noise_inputs_predictions_latents_and_pictures_are_those_of_stock(request, path, changes) -> None:
    path, sampling = request.getfixturevalue(path), GUIDED.model_copy(update=changes)
    denoiser, n = load(path), len(PROMPTS)
    latents, images, calls = stock_run(stock(path), sampling, denoiser.latent_shape(sampling.height, sampling.width))
    cond, uncond = denoiser.encode(PROMPTS, sampling)
    table = sampler_table(denoiser.config, sampling)
    assert table.timesteps.equal(torch.stack([call["timestep"][0] for call, _ in calls]))
    fed = []
    denoiser.network.register_forward_pre_hook(lambda _, args, kwargs: fed.append(kwargs["timestep"]), with_kwargs=True)
    for call, output in calls:
        sample, timestep = call["hidden_states"], call["timestep"]
        with torch.no_grad():
            ours, without = denoiser.predict(sample[-n:], timestep[-n:], cond, uncond)
        assert fed[-1].dtype == timestep.dtype == torch.float32 and fed[-1].equal(timestep)
        assert gap(ours, output[-n:]) < 1e-5
        if uncond is not None:
            assert gap(without, output[:n]) < 1e-5 and gap(ours, without) > 1e-3
    sampled = our_run(denoiser, sampling)
    assert gap(sampled.latents[-1], latents) < 1e-4
    assert levels(sampled.images, images) <= 1 and images.std() > 5


def test_half_precision_is_fed_float32_times_as_stock_is(tiny_sd3) -> None:
    denoiser, fed = load(tiny_sd3, dtype="bf16"), []
    denoiser.network.register_forward_pre_hook(lambda _, args, kwargs: fed.append(kwargs), with_kwargs=True)
    sampling = GUIDED.model_copy(update={"guidance_scale": 1.0})
    latents, _, calls = stock_run(stock(tiny_sd3, torch_dtype=torch.bfloat16), sampling, (16, 8, 8))
    ours = our_run(denoiser, sampling)
    for ours_in, (theirs, _) in zip(fed[:4], calls, strict=True):
        assert ours_in["timestep"].dtype == torch.float32 and ours_in["timestep"][0] == theirs["timestep"][0]
        names = ("hidden_states", "encoder_hidden_states", "pooled_projections")
        assert {ours_in[name].dtype for name in names} == {theirs[name].dtype for name in names} == {torch.bfloat16}
    assert ours.latents.dtype == torch.float32 and gap(ours.latents[-1], latents.float()) < 0.1


# --- exports -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def make_run(make_flow_run, tiny_sd3):
    return partial(make_flow_run, tiny_sd3, 12)


@pytest.mark.parametrize(
    "path, model", [("tiny_sd3", {}), ("tiny_sd3_plain", {}), ("tiny_sd3", FULL), ("tiny_sd3_plain", FULL)], ids=str
)
def test_an_export_gives_the_same_pictures_in_stock_diffusers(make_run, request, path, model) -> None:
    path = request.getfixturevalue(path)
    lora = {"lora": {"rank": 3, "alpha": 6.0}} if model != FULL else {}
    trainer = make_run("run", model={"path": path, **lora, **model}, iterations=1, optimizer={"lr": 1e-3 if model else 0.1})
    export = trainer.folder / "export"
    if model == FULL:
        pipeline = stock(export)
        assert (pipeline.text_encoder_3 is None) == path.endswith("plain0")
        again = trainable(export, **FULL)
        assert equal(again.network.state_dict(), trainer.denoiser.network.state_dict())
    else:
        pipeline = stock(path)
        pipeline.load_lora_weights(export)
    call = json.loads((export / "call.json").read_text())
    assert call == {"max_sequence_length": 12}
    ours, before = our_run(trainer.denoiser, GUIDED).images, our_run(load(path, max_sequence_length=12), GUIDED).images
    assert levels(ours, stock_run(pipeline, GUIDED, (16, 8, 8), **call)[1]) <= 1
    assert levels(ours, before) > 5


def test_a_model_without_files_has_a_tokenizer_for_t5_too_and_its_export_loads(tiny_sd3, tmp_path, monkeypatch) -> None:
    folder = tmp_path / "architectures" / "sd35_medium"
    shutil.copytree(tiny_sd3, folder, ignore=shutil.ignore_patterns("*.safetensors", "tokenizer*"))
    edit_json(folder / "text_encoder_3" / "config.json", vocab_size=1000)
    monkeypatch.setattr("fastloop.denoisers.files.ARCHITECTURES", folder.parent)
    denoiser = load_denoiser(ModelConfig(path=None, random_init="sd35_medium", **FULL), CPU)
    denoiser.train_adapter(False, 0)
    denoiser.export(tmp_path / "export")
    again = load(tmp_path / "export", **FULL)
    assert all(equal(again.parts[name].state_dict(), part.state_dict()) for name, part in denoiser.parts.items())
    assert denoiser.tokens("tokenizer_3", "red circle")[0, :3].tolist()[2] == 1  # two words, and the end
    (cond, _), (wanted, _) = (of.encode(PROMPTS, SamplingConfig(guidance_scale=1.0)) for of in (again, denoiser))
    assert cond.text.shape == (3, 16 + 256, 48) and gap(cond.text, wanted.text) == 0


# --- the plan, what is refused -------------------------------------------------------------------------------------------


def test_a_size_beyond_the_transformers_positions_is_refused(make_config, tiny_sd3) -> None:
    with pytest.raises(UserError, match="sampling.height: 80 pixels: this model has positions for 64 at most"):
        preflight(make_config(model={"path": tiny_sd3}, sampling={"height": 80}))


def test_a_sequence_length_is_refused_for_models_without_one(make_config) -> None:
    with pytest.raises(UserError, match="^model.max_sequence_length: .* has a length of its own: leave it out$"):
        preflight(make_config(model={"max_sequence_length": 77}))
    with pytest.raises(UserError, match="model.max_sequence_length"):
        make_config(model={"max_sequence_length": 513})


@pytest.mark.parametrize(
    "part, values, says",
    [
        (
            "transformer",
            {"joint_attention_dim": 40},
            "the third text encoder of FOLDER gives 48 channels, its transformer takes 40",
        ),
        (
            "transformer",
            {"joint_attention_dim": 32},
            "the pair of CLIPs of FOLDER gives 40 channels, its transformer takes 32",
        ),
        (
            "transformer",
            {"pooled_projection_dim": 20},
            "the pair of CLIPs of FOLDER gives 28 channels, its transformer takes 20",
        ),
        ("transformer", {"in_channels": 4}, "the VAE of FOLDER gives 16 channels, the transformer takes 4 (in_channels)"),
        (
            "scheduler",
            {"_class_name": "FlowMatchHeunDiscreteScheduler"},
            "_class_name=FlowMatchHeunDiscreteScheduler: this model is",
        ),
        ("scheduler", {"use_karras_sigmas": True}, "scheduler use_karras_sigmas=true: "),
    ],
)
def test_parts_that_do_not_fit_are_refused(refuses_parts, tiny_sd3, part, values, says) -> None:
    refuses_parts(tiny_sd3, part, values, says)


@pytest.mark.parametrize("missing", ["tokenizer.json", "tokenizer_config.json"])
def test_a_tokenizer_of_t5_without_its_files_is_refused(tiny_sd3, tmp_path, missing) -> None:
    """transformers would make one without words, and every prompt alike."""
    folder = Path(shutil.copytree(tiny_sd3, tmp_path / "copy"))
    (folder / "tokenizer_3" / "tokenizer.json").unlink()
    (folder / "tokenizer_3" / missing).unlink(missing_ok=True)
    with pytest.raises(UserError, match="model.path: the tokenizer_3 of .* words .*: are all files of the folder tokenizer_3"):
        load(folder)


def test_the_skeleton_has_the_parts_that_the_files_have(tiny_sd3, tiny_sd3_plain) -> None:
    for path, t5, dtype in ((tiny_sd3, True, "fp32"), (tiny_sd3, True, "fp16"), (tiny_sd3_plain, False, "bf16")):
        loaded = load(path, dtype=dtype)
        skeleton = build_skeleton(loaded.config)
        assert set(skeleton.parts) == set(loaded.parts) and ("text_encoder_3" in skeleton.parts) == t5
        for own, real in zip(
            skeleton.blank_embedding(), loaded.embed([loaded.tokens(name, "a dog") for name in loaded.tokenizers]), strict=True
        ):
            assert own.shape == real.shape and own.dtype == real.dtype
        for name, part in loaded.parts.items():
            dtypes = {key: value.dtype for key, value in skeleton.parts[name].state_dict().items()}
            assert dtypes == {key: value.dtype for key, value in part.state_dict().items()}


def test_a_turbo_is_warned_of_by_its_name(tiny_sd3, tmp_path):
    path = shutil.copytree(tiny_sd3, tmp_path / "stable-diffusion-3.5-large-turbo")
    for model, words in ((str(path), "this is a turbo, distilled to 4 steps"), (tiny_sd3, None)):
        caution = build_skeleton(ModelConfig(path=model)).caution
        assert caution is None if words is None else words in caution
