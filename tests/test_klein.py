"""The klein adapter against stock diffusers on the same files, runs of a tiny klein, its exports and its plans."""

from __future__ import annotations

import json
import shutil
from functools import partial

import numpy as np
import pytest
import torch
from diffusers import Flux2KleinPipeline
from flow_runs import FULL, PROMPTS, SEED, SIZE, our_run
from run_files import equal
from stock_sdxl import gap, levels, stock
from test_sdxl import load, trainable
from tiny_pipelines import make_klein

from fastloop.config import ModelConfig, SamplingConfig
from fastloop.denoisers import build_skeleton, load_denoiser
from fastloop.errors import UserError
from fastloop.kernels.reference import initial_noise
from fastloop.plan import overview
from fastloop.preflight import preflight
from fastloop.rollout import sampler_table

CPU = torch.device("cpu")
GUIDED = SamplingConfig(steps=4, guidance_scale=3.0, eta=0.0, **SIZE)


def stock_run(pipeline: Flux2KleinPipeline, sampling: SamplingConfig, prompts=PROMPTS, **call):
    """Last latents as the VAE takes them, and pictures, of stock diffusers from our x_T; what its transformer was fed."""
    calls, h, w, n = [], sampling.height // 4, sampling.width // 4, len(prompts)
    hook = pipeline.transformer.register_forward_hook(lambda _, a, kw, out: calls.append((kw, out[0])), with_kwargs=True)
    latents = pipeline(
        prompt=prompts,
        num_inference_steps=sampling.steps,
        guidance_scale=sampling.guidance_scale,
        height=sampling.height,
        width=sampling.width,
        latents=initial_noise(SEED, torch.arange(n), (32, h, w)),
        output_type="latent",
        **call,
    ).images
    hook.remove()
    decoded = pipeline.vae.decode(latents).sample.detach()
    return latents, np.stack([np.asarray(image) for image in pipeline.image_processor.postprocess(decoded)]), calls


# --- conditioning and prediction -----------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("length", [None, 60])
def test_embeddings_equal_stock_diffusers(tiny_klein, length) -> None:
    sampling = SamplingConfig(guidance_scale=3.0, negative_prompt="a dog")
    cond, uncond = load(tiny_klein, max_sequence_length=length).encode(PROMPTS, sampling)
    for ours, prompts in ((cond, PROMPTS), (uncond, ["a dog"] * 3)):
        for i, prompt in enumerate(prompts):  # one by one, as ours: sums of another batch are rounded otherwise
            tokens, _ = stock(tiny_klein).encode_prompt(prompt, device=CPU, max_sequence_length=length or 512)
            assert ours[i].equal(tokens[0])
        assert ours.shape == (3, length or 512, 24)
    assert gap(cond[0], cond[2]) > 0.1


@pytest.mark.parametrize(
    "changes",
    [{}, {"guidance_scale": 1.0, "noise": "cps"}, {"height": 24, "width": 20}, {"noise": "dance", "height": 32, "steps": 3}],
    ids=str,
)
def test_without_noise_predictions_latents_and_pictures_are_those_of_stock(tiny_klein, changes) -> None:
    sampling = GUIDED.model_copy(update=changes)
    denoiser, n = load(tiny_klein, max_sequence_length=60), len(PROMPTS)
    latents, images, calls = stock_run(stock(tiny_klein), sampling, max_sequence_length=60)
    branches = [calls] if sampling.guidance_scale == 1 else [calls[::2], calls[1::2]]
    cond, uncond = denoiser.encode(PROMPTS, sampling)
    times = sampler_table(denoiser.config, sampling).timesteps
    assert torch.stack([call["timestep"][0] for call, _ in branches[0]]).equal(times / 1000)
    shape = (n, *denoiser.latent_shape(sampling.height, sampling.width))
    for step, t in enumerate(times):
        x = branches[0][step][0]["hidden_states"].transpose(1, 2).reshape(shape)
        with torch.no_grad():
            outputs = denoiser.predict(x, t.expand(n), cond, uncond)
        for ours, branch in zip(outputs, branches, strict=False):
            wanted = branch[step][1].transpose(1, 2).reshape(shape)
            assert gap(ours, wanted) < 1e-5 and wanted.std() > 0.1
        assert uncond is None or gap(*outputs) > 1e-3
    sampled = our_run(denoiser, sampling)
    assert gap(denoiser._unscaled(sampled.latents[-1]), latents) < 1e-4
    assert levels(sampled.images, images) <= 1 and images.std() > 5


def test_the_times_follow_from_the_number_of_steps_too(tiny_klein) -> None:
    config, large = ModelConfig(path=tiny_klein), {"height": 128, "width": 128}
    second = [sampler_table(config, GUIDED.model_copy(update={"steps": n, **large})).timesteps[n // 2] for n in (8, 28)]
    assert second[0] > second[1] + 1  # the same share of the way, but another shift


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_the_transformer_is_fed_what_stock_feeds_it_bit_for_bit(tiny_klein, dtype) -> None:
    fed, kind = [], {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    sampling = GUIDED.model_copy(update={"height": 24, "width": 20, "steps": 7, "guidance_scale": 1.0})
    denoiser = load(tiny_klein, dtype=dtype, max_sequence_length=60)
    denoiser.network.register_forward_pre_hook(lambda _, args, kwargs: fed.append(kwargs), with_kwargs=True)
    _, _, calls = stock_run(stock(tiny_klein, torch_dtype=kind), sampling, PROMPTS[:1], max_sequence_length=60)
    assert our_run(denoiser, sampling, PROMPTS[:1]).latents.dtype == torch.float32
    for step, (mine, (theirs, _)) in enumerate(zip(fed, calls, strict=True)):
        for name in ["timestep", "encoder_hidden_states", *(["hidden_states"] if step == 0 else [])]:
            assert mine[name].dtype == theirs[name].dtype and mine[name].equal(theirs[name]), name
        for name in ("txt_ids", "img_ids"):  # of which the transformer takes the first of the batch
            assert mine[name].dtype == theirs[name].dtype and mine[name].equal(theirs[name][0]), name
        assert mine["guidance"] is theirs["guidance"] is None
        assert gap(mine["hidden_states"].float(), theirs["hidden_states"].float()) < {"fp32": 1e-5}.get(dtype, 0.1)


# --- exports -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def make_run(make_flow_run, tiny_klein):
    return partial(make_flow_run, tiny_klein, 40)


@pytest.mark.parametrize("model", [{}, FULL], ids=str)
def test_an_export_gives_the_same_pictures_in_stock_diffusers(make_run, tiny_klein, model) -> None:
    lora = {"lora": {"rank": 3, "alpha": 6.0}} if model != FULL else {}
    trainer = make_run("run", model={**lora, **model}, iterations=1, optimizer={"lr": 3e-3 if model else 0.1})
    export = trainer.folder / "export"
    if model == FULL:
        pipeline = stock(export)
        again = trainable(export, **FULL)
        assert equal(again.network.state_dict(), trainer.denoiser.network.state_dict())
    else:
        pipeline = stock(tiny_klein)
        pipeline.load_lora_weights(export)
    call = json.loads((export / "call.json").read_text())
    assert call == {"max_sequence_length": 40}
    ours, before = our_run(trainer.denoiser, GUIDED).images, our_run(load(tiny_klein, max_sequence_length=40), GUIDED).images
    assert levels(ours, stock_run(pipeline, GUIDED, **call)[1]) <= 1
    assert levels(ours, before) > 5


def test_a_model_without_files_has_a_tokenizer_too_and_its_export_loads(tiny_klein, tmp_path, monkeypatch) -> None:
    folder = tmp_path / "architectures" / "klein_base_4b"
    shutil.copytree(tiny_klein, folder, ignore=shutil.ignore_patterns("*.safetensors", "tokenizer*"))
    monkeypatch.setattr("fastloop.denoisers.files.ARCHITECTURES", folder.parent)
    denoiser = load_denoiser(ModelConfig(path=None, random_init="klein_base_4b", **FULL), CPU)
    denoiser.train_adapter(False, 0)
    denoiser.export(tmp_path / "export")
    again = load(tmp_path / "export", **FULL)
    assert all(equal(again.parts[name].state_dict(), part.state_dict()) for name, part in denoiser.parts.items())
    (cond, _), (wanted, _) = (of.encode(PROMPTS, SamplingConfig(guidance_scale=1.0)) for of in (again, denoiser))
    assert cond.equal(wanted) and gap(cond[0], cond[1]) > 0.1


# --- the plan, what is refused -------------------------------------------------------------------------------------------


def test_a_distilled_klein_is_warned_of_and_not_guided_and_base_is_neither(make_config, tiny_klein, tmp_path) -> None:
    distilled = make_klein(tmp_path / "distilled", distilled=True)
    for path in (tiny_klein, distilled):
        checked = preflight(make_config(model={"path": path}, sampling={"guidance_scale": 1.0, "eta": 0.7}))
        warned = [line for line in overview(checked) if line.startswith("warning      this klein is distilled to 4 steps")]
        assert len(warned) == (path == distilled)
        assert checked.skeleton.latent_shape(None, None) == (32, 64, 64)  # whatever the files say, as stock
    with pytest.raises(
        UserError, match="^sampling.guidance_scale: this klein is distilled, and stock draws it without guidan"
    ):
        preflight(make_config(model={"path": distilled}))


@pytest.mark.parametrize(
    "part, values, says",
    [
        ("transformer", {"joint_attention_dim": 40}, "the text encoder, three layers of it, of FOLDER gives 24 channels, its"),
        (
            "transformer",
            {"in_channels": 16},
            "the VAE, packed, of FOLDER gives 32 channels, the transformer takes 16 (in_chan",
        ),
        (
            "text_encoder",
            {"num_hidden_layers": 20, "layer_types": ["full_attention"] * 20},
            "the text encoder of FOLDER has 20 layers: it must have 27",
        ),
        ("scheduler", {"use_karras_sigmas": True}, "scheduler use_karras_sigmas=true: "),
    ],
)
def test_parts_that_do_not_fit_are_refused(refuses_parts, tiny_klein, part, values, says) -> None:
    refuses_parts(tiny_klein, part, values, says)


def test_the_skeleton_has_the_parts_and_embeddings_that_the_files_have(tiny_klein) -> None:
    for dtype in ("fp32", "bf16"):
        loaded = load(tiny_klein, dtype=dtype)
        skeleton = build_skeleton(loaded.config)
        assert set(skeleton.parts) == set(loaded.parts)
        (own,), cond = skeleton.blank_embedding(), loaded.encode(["a dog"], SamplingConfig(guidance_scale=1.0))[0]
        assert own.shape == cond[0].shape and own.dtype == cond.dtype
    tiled = load(tiny_klein, vae={"tile": 64})  # pixels of the VAE, which has 2 x 2 in a latent, and the latents 4 x 4
    assert (tiled.vae.tile_latent_min_size, tiled.scale_factor) == (32, 4)
