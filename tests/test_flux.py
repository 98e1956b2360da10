"""The FLUX adapter against stock diffusers on the same files, runs of tiny FLUXes, their exports and their plans."""

from __future__ import annotations

import json
from functools import partial

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline
from flow_runs import FULL, PROMPTS, SEED, SIZE, our_run
from run_files import equal
from stock_sdxl import gap, levels, stock
from test_sdxl import load, trainable

from fastloop.cli import main
from fastloop.config import SamplingConfig
from fastloop.denoisers import build_skeleton
from fastloop.errors import UserError
from fastloop.kernels.reference import initial_noise
from fastloop.plan import overview
from fastloop.preflight import preflight
from fastloop.recipes import dump_config
from fastloop.rollout import sampler_table
from fastloop.stopping import Stopped
from fastloop.trainer import Trainer

CPU = torch.device("cpu")
PLAIN = SamplingConfig(steps=4, guidance_scale=1.0, eta=0.0, **SIZE)


def stock_run(pipeline: FluxPipeline, sampling: SamplingConfig, prompts=PROMPTS, **call):
    """Last latents and pictures of stock diffusers from our x_T, and what went in and out of its transformer."""
    calls, h, w, n = [], sampling.height // 2, sampling.width // 2, len(prompts)
    hook = pipeline.transformer.register_forward_hook(lambda _, a, kw, out: calls.append((kw, out[0])), with_kwargs=True)
    told = {} if sampling.embedded_guidance is None else {"guidance_scale": sampling.embedded_guidance}
    packed = pipeline(
        prompts,
        negative_prompt=[sampling.negative_prompt] * n,
        true_cfg_scale=sampling.guidance_scale,
        num_inference_steps=sampling.steps,
        height=sampling.height,
        width=sampling.width,
        latents=pipeline._pack_latents(initial_noise(SEED, torch.arange(n), (16, h, w)), n, 16, h, w),
        output_type="latent",
        **told,
        **call,
    ).images
    hook.remove()
    latents, config = pipeline._unpack_latents(packed, sampling.height, sampling.width, 2), pipeline.vae.config
    decoded = pipeline.vae.decode(latents / config.scaling_factor + config.shift_factor).sample.detach()
    return latents, np.stack([np.asarray(image) for image in pipeline.image_processor.postprocess(decoded)]), calls


# --- conditioning and prediction -----------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("path, length", [("tiny_flux", None), ("tiny_flux", 20), ("tiny_schnell", None)])
def test_embeddings_equal_stock_diffusers(request, path, length) -> None:
    path, own = request.getfixturevalue(path), 256 if path == "tiny_schnell" else 512
    sampling = SamplingConfig(guidance_scale=3.0, negative_prompt="a dog", embedded_guidance=2.0)
    cond, uncond = load(path, max_sequence_length=length).encode(PROMPTS, sampling)
    for ours, prompts in ((cond, PROMPTS), (uncond, ["a dog"] * 3)):
        for i, prompt in enumerate(prompts):  # one by one, as ours: sums of another batch are rounded otherwise
            tokens, pooled, _ = stock(path).encode_prompt(prompt, device=CPU, max_sequence_length=length or own)
            assert ours.text[i].equal(tokens[0]) and ours.pooled[i].equal(pooled[0])
        assert ours.text.shape == (3, length or own, 48)
    assert gap(cond.pooled[0], cond.pooled[1]) > 0.1
    rows = cond[torch.tensor([2, 0])]
    assert rows.text.equal(cond.text[[2, 0]]) and rows.pooled.equal(cond.pooled[[2, 0]])
    assert rows.guidance is None if own == 256 else rows.guidance.tolist() == [2.0, 2.0]


@pytest.mark.parametrize(
    "path, changes",
    [
        ("tiny_flux", {}),
        ("tiny_flux", {"guidance_scale": 3.0, "negative_prompt": "a dog", "height": 24, "width": 20}),
        ("tiny_flux", {"noise": "dance", "embedded_guidance": 1.0, "height": 32, "steps": 3}),
        ("tiny_schnell", {"noise": "cps"}),
        ("tiny_schnell", {"guidance_scale": 2.0}),
    ],
    ids=str,
)
def test_without_noise_predictions_latents_and_pictures_are_those_of_stock(request, path, changes) -> None:
    """Stock guides as u + w (c - u), and without a negative prompt not at all: ours is then the empty text."""
    path, sampling = request.getfixturevalue(path), PLAIN.model_copy(update=changes)
    denoiser, n = load(path, max_sequence_length=12), len(PROMPTS)
    latents, images, calls = stock_run(stock(path), sampling, max_sequence_length=12)
    branches = [calls] if sampling.guidance_scale == 1 else [calls[::2], calls[1::2]]
    cond, uncond = denoiser.encode(PROMPTS, sampling)
    times = sampler_table(denoiser.config, sampling).timesteps
    assert torch.stack([call["timestep"][0] for call, _ in branches[0]]).equal(times / 1000)
    for step, t in enumerate(times):
        packed = branches[0][step][0]["hidden_states"]
        x = FluxPipeline._unpack_latents(packed, sampling.height, sampling.width, 2)
        with torch.no_grad():
            outputs = denoiser.predict(x, t.expand(n), cond, uncond)
        for ours, branch in zip(outputs, branches, strict=False):
            wanted = FluxPipeline._unpack_latents(branch[step][1], sampling.height, sampling.width, 2)
            assert gap(ours, wanted) < 1e-5 and wanted.std() > 0.1
        assert uncond is None or gap(*outputs) > 1e-3
    sampled = our_run(denoiser, sampling)
    assert gap(sampled.latents[-1], latents) < 1e-4
    assert levels(sampled.images, images) <= 1 and images.std() > 5


def test_guidance_that_is_told_changes_the_picture_and_is_stocks_own_where_it_is_left_out(tiny_flux) -> None:
    told = [None, 3.5, 1.0]
    denoiser = load(tiny_flux, max_sequence_length=12)
    drawn = [our_run(denoiser, PLAIN.model_copy(update={"embedded_guidance": w})).latents[-1] for w in told]
    assert drawn[0].equal(drawn[1]) and gap(drawn[1], drawn[2]) > 1e-3


@pytest.mark.parametrize("path", ["tiny_flux", "tiny_schnell"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_the_transformer_is_fed_what_stock_feeds_it_bit_for_bit(request, path, dtype) -> None:
    path, fed, kind = request.getfixturevalue(path), [], {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    sampling = PLAIN.model_copy(update={"height": 24, "width": 20, "steps": 7})
    denoiser = load(path, dtype=dtype, max_sequence_length=12)
    denoiser.network.register_forward_pre_hook(lambda _, args, kwargs: fed.append(kwargs), with_kwargs=True)
    _, _, calls = stock_run(stock(path, torch_dtype=kind[dtype]), sampling, PROMPTS[:1], max_sequence_length=12)
    ours = our_run(denoiser, sampling, PROMPTS[:1])
    assert ours.latents.dtype == torch.float32
    names = ["timestep", "guidance", "pooled_projections", "encoder_hidden_states", "txt_ids", "img_ids"]
    for step, (mine, (theirs, _)) in enumerate(zip(fed, calls, strict=True)):
        for name in [*names, "hidden_states"] if step == 0 else names:
            if theirs[name] is None:
                assert mine[name] is None and name == "guidance" and path.endswith("schnell0")
            else:
                assert mine[name].dtype == theirs[name].dtype and mine[name].equal(theirs[name]), name
        assert gap(mine["hidden_states"].float(), theirs["hidden_states"].float()) < {"fp32": 1e-5}.get(dtype, 0.1)


# --- exports -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def make_run(make_flow_run, tiny_flux):
    return partial(make_flow_run, tiny_flux, 12)


@pytest.mark.parametrize(
    "path, model", [("tiny_flux", {}), ("tiny_schnell", {}), ("tiny_flux", FULL), ("tiny_schnell", FULL)], ids=str
)
def test_an_export_gives_the_same_pictures_in_stock_diffusers(make_run, request, path, model) -> None:
    path = request.getfixturevalue(path)
    lora = {"lora": {"rank": 3, "alpha": 6.0}} if model != FULL else {}
    trainer = make_run("run", model={"path": path, **lora, **model}, iterations=1, optimizer={"lr": 1e-3 if model else 0.1})
    export = trainer.folder / "export"
    if model == FULL:
        pipeline = stock(export)
        again = trainable(export, **FULL)
        assert equal(again.network.state_dict(), trainer.denoiser.network.state_dict())
    else:
        pipeline = stock(path)
        pipeline.load_lora_weights(export)
    call = json.loads((export / "call.json").read_text())
    assert call == {"max_sequence_length": 12}
    ours, before = our_run(trainer.denoiser, PLAIN).images, our_run(load(path, max_sequence_length=12), PLAIN).images
    assert levels(ours, stock_run(pipeline, PLAIN, **call)[1]) <= 1
    assert levels(ours, before) > 5


# --- the plan, what is refused -------------------------------------------------------------------------------------------


def test_schnell_is_warned_of_in_plan_and_at_the_start_and_dev_is_not(
    make_config, tiny_flux, tiny_schnell, tmp_path, monkeypatch, capsys
) -> None:
    def stopped(self):
        raise Stopped("SIGINT", 0)

    warned = {}
    for path in (tiny_flux, tiny_schnell):
        checked = preflight(make_config(model={"path": path}, sampling={"guidance_scale": 1.0, "eta": 0.7}))
        warned[path] = [line for line in overview(checked) if line.startswith("warning")]
        assert checked.skeleton.latent_shape(None, None) == (16, 128, 128)  # whatever the files say, as stock
    assert not warned[tiny_flux] and len(warned[tiny_schnell]) == 1
    monkeypatch.setattr(Trainer, "train", stopped)
    (tmp_path / "schnell.yaml").write_text(
        dump_config(make_config(model={"path": tiny_schnell}, sampling={"eta": 0.7, **SIZE}))
    )
    assert main(["train", str(tmp_path / "schnell.yaml")]) == 130
    assert warned[tiny_schnell][0] in capsys.readouterr().out.splitlines()
    assert warned[tiny_schnell][0].startswith("warning      this is FLUX.1 schnell, distilled to 1 to 4 steps without noise")


@pytest.mark.parametrize("path", ["tiny_schnell", "tiny_sd3", "tiny_klein", "tiny_sd"])
def test_a_guidance_to_be_told_is_refused_by_all_but_dev(request, make_config, path) -> None:
    sampling = {"embedded_guidance": 3.5, "guidance_scale": 1.0}
    with pytest.raises(UserError, match="^sampling.embedded_guidance: .* only FLUX.1 dev is: leave it out"):
        preflight(make_config(model={"path": request.getfixturevalue(path)}, sampling=sampling))


def test_a_text_longer_than_schnells_is_refused(make_config, tiny_schnell) -> None:
    model = {"path": tiny_schnell, "max_sequence_length": 257}
    with pytest.raises(UserError, match="max_sequence_length: 257, but FLUX.1 schnell takes 256"):
        preflight(make_config(model=model, sampling={"guidance_scale": 1.0}))


def test_guidance_is_chosen_in_the_file_since_sd_s_default_would_be_another_picture(make_config, tiny_flux, tiny_sd3) -> None:
    left_out = SamplingConfig(steps=4, eta=0.7, **SIZE)
    for path in (tiny_flux, tiny_sd3):
        config = make_config(model={"path": path}).model_copy(update={"sampling": left_out})
        if path == tiny_sd3:
            preflight(config)
            continue
        with pytest.raises(UserError, match="^sampling.guidance_scale: FLUX has no default: set it to 1, stock's and none"):
            preflight(config)
    # a file that names it, a run's own file that is read again, an evaluation that changes another key
    config = make_config(model={"path": tiny_flux}, eval={"sampling": {"eta": 0.0}}, sampling={"eta": 0.7, **SIZE})
    preflight(type(config).model_validate(config.model_dump()))


@pytest.mark.parametrize(
    "part, values, says",
    [
        (
            "transformer",
            {"joint_attention_dim": 40},
            "the second text encoder of FOLDER gives 48 channels, its transformer takes 40",
        ),
        (
            "transformer",
            {"pooled_projection_dim": 20},
            "the text encoder of FOLDER gives 16 channels, its transformer takes 20",
        ),
        (
            "transformer",
            {"in_channels": 16},
            "the VAE, packed, of FOLDER gives 64 channels, the transformer takes 16 (in_chan",
        ),
        ("scheduler", {"_class_name": "FlowMatchHeunDiscreteScheduler"}, "this model is a flow"),
        ("scheduler", {"use_exponential_sigmas": True}, "scheduler use_exponential_sigmas=true: "),
    ],
)
def test_parts_that_do_not_fit_are_refused(refuses_parts, tiny_flux, part, values, says) -> None:
    refuses_parts(tiny_flux, part, values, says)


def test_the_skeleton_has_the_parts_and_embeddings_that_the_files_have(tiny_flux, tiny_schnell) -> None:
    for path, dtype in ((tiny_flux, "fp32"), (tiny_flux, "fp16"), (tiny_schnell, "bf16")):
        loaded = load(path, dtype=dtype)
        skeleton = build_skeleton(loaded.config)
        assert set(skeleton.parts) == set(loaded.parts)
        for own, real in zip(
            skeleton.blank_embedding(), loaded.embed([loaded.tokens(name, "a dog") for name in loaded.tokenizers]), strict=True
        ):
            assert own.shape == real.shape and own.dtype == real.dtype
