"""The SDXL adapter against stock diffusers on the same files, runs of a tiny SDXL on both engines, and the VAE's guard."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from known_traces import trace_nothing
from on_ranks import FEW, ON_RANKS, SHARED, train_all, zero
from run_files import distance, equal, weights
from safetensors.torch import load_file, save_file
from stock_sdxl import PROMPTS, gap, levels, our_run, pictures, stock, stock_run
from tiny_pipelines import make_sdxl

from fastloop.config import ModelConfig, SamplingConfig
from fastloop.denoisers import build_skeleton, load_denoiser, ready_denoiser
from fastloop.errors import RunFailed, UserError
from fastloop.kernels.reference import initial_noise
from fastloop.memory.traces import LiveBytes, Traced
from fastloop.plan import plan
from fastloop.preflight import preflight
from fastloop.tracking import read_rows
from fastloop.trainer import Trainer

CPU = torch.device("cpu")
PARTS = ("unet", "vae", "text_encoder", "text_encoder_2")
SIZES = {"original_size": (31, 17), "crop_top_left": (3, 1), "target_size": (12, 40)}


def load(path, **model):
    return load_denoiser(ModelConfig(path=str(path), **model), CPU)


def trainable(path, size: float = 0.0, **model):
    """Ready for training; with a size, some way into it."""
    denoiser = load(path, **{"lora": {"rank": 2}, **model})
    denoiser.train_adapter(False, 0)
    generator = torch.Generator().manual_seed(0)
    for parameter in denoiser.trainable().values():
        parameter.data += size * torch.randn(parameter.shape, generator=generator)
    return denoiser


# --- conditioning and prediction -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("path, negative", [("tiny_sdxl", "a dog"), ("tiny_sdxl", ""), ("tiny_sdxl_v", "")])
def test_embeddings_equal_stock_diffusers(request, path: str, negative: str) -> None:
    path = request.getfixturevalue(path)
    cond, uncond = load(path).encode(PROMPTS, SamplingConfig(guidance_scale=3.0, negative_prompt=negative))
    wanted = stock(path).encode_prompt(
        PROMPTS, device=CPU, negative_prompt=[negative] * len(PROMPTS) if negative else None, do_classifier_free_guidance=True
    )
    for ours, theirs in zip((cond.text, uncond.text, cond.pooled, uncond.pooled), wanted, strict=True):
        assert gap(ours, theirs) < 1e-5
    assert gap(cond.pooled[0], cond.pooled[1]) > 0.1
    zeros = path.endswith("sdxl0") and not negative
    assert (uncond.text == 0).all() == (uncond.pooled == 0).all() == zeros


@pytest.mark.parametrize("changes", [{}, {"height": 24, "width": 32}, SIZES, {"height": 8, "target_size": (5, 6)}], ids=str)
def test_time_ids_equal_stock_diffusers(tiny_sdxl, changes: dict) -> None:
    sampling = SamplingConfig(guidance_scale=3.0, **changes)
    for conditioning in load(tiny_sdxl).encode(["a dog", "a cat"], sampling):
        size = sampling.height or 16, sampling.width or 16
        wanted = stock(tiny_sdxl)._get_add_time_ids(
            sampling.original_size or size,
            sampling.crop_top_left,
            sampling.target_size or size,
            dtype=torch.float32,
            text_encoder_projection_dim=12,
        )
        assert torch.equal(conditioning.time_ids, wanted.repeat(2, 1))


def test_rows_of_a_conditioning_are_taken_together(tiny_sdxl) -> None:
    cond, _ = load(tiny_sdxl).encode(PROMPTS, SamplingConfig())
    rows = cond[torch.tensor([2, 0, 2])]
    for name in ("text", "pooled", "time_ids"):
        whole = getattr(cond, name)
        assert torch.equal(getattr(rows, name), torch.stack([whole[2], whole[0], whole[2]]))


def test_each_text_is_encoded_once_by_each_encoder(tiny_sdxl) -> None:
    denoiser, calls = load(tiny_sdxl), []
    for name, encoder in denoiser.text_encoders.items():
        encoder.register_forward_pre_hook(lambda *_, name=name: calls.append(name))
    for _ in range(2):
        denoiser.encode(["a dog", "a cat", "a dog"], SamplingConfig(guidance_scale=3.0))
    assert sorted(calls) == 2 * ["text_encoder"] + 2 * ["text_encoder_2"]  # none for the zeros


@pytest.mark.parametrize(
    "path, changes",
    [
        ("tiny_sdxl", {}),
        ("tiny_sdxl", {"negative_prompt": "a dog", **SIZES}),
        ("tiny_sdxl", {"guidance_scale": 1.0, "height": 24, "width": 32}),
        ("tiny_sdxl_v", {"height": 16, "width": 40}),
    ],
    ids=str,
)
def test_same_latents_in_same_prediction_out_and_the_same_latents_and_pictures_in_the_end(request, path, changes) -> None:
    path = request.getfixturevalue(path)
    sampling = SamplingConfig(**{"steps": 4, "guidance_scale": 3.0, **changes})
    denoiser = load(path)
    shape = denoiser.latent_shape(sampling.height, sampling.width)
    latents, images, calls = stock_run(stock(path), sampling, shape)
    cond, uncond = denoiser.encode(PROMPTS, sampling)
    for (sample, timestep), _, (output,) in calls:
        n = len(PROMPTS)
        with torch.no_grad():
            ours, without = denoiser.predict(sample[-n:], timestep.expand(n), cond, uncond)
        assert gap(ours, output[-n:]) < 1e-5
        if uncond is not None:
            assert gap(without, output[:n]) < 1e-5
            assert gap(ours, without) > 1e-3
    sampled = our_run(denoiser, sampling)
    assert gap(sampled.latents[-1], latents) < 1e-3
    assert levels(sampled.images, images) <= 1
    assert images.std() > 5


def test_encoding_reads_the_models_index_once(tiny_sdxl, monkeypatch) -> None:
    denoiser, seen = load(tiny_sdxl), []
    monkeypatch.setattr("fastloop.denoisers.sdxl.read_json", lambda *args: seen.append(args) or {})
    denoiser._keep = lambda new: None  # as with text encoders that are trained
    for _ in range(3):
        denoiser.encode(PROMPTS, SamplingConfig(guidance_scale=3.0))
    assert len(seen) == 1


def test_the_prediction_depends_on_the_sizes_and_the_pooled_embedding(tiny_sdxl) -> None:
    denoiser = load(tiny_sdxl)
    x, t = initial_noise(0, torch.arange(3), (4, 8, 8)), torch.tensor([500] * 3)
    plain, sized = (denoiser.encode(PROMPTS, SamplingConfig(guidance_scale=1, **sizes))[0] for sizes in ({}, SIZES))
    mixed = type(plain)(plain.text, plain.pooled[[1, 2, 0]], plain.time_ids)
    with torch.no_grad():
        first, *others = (denoiser.predict(x, t, cond, None)[0] for cond in (plain, sized, mixed))
    assert all(gap(first, other) > 1e-4 for other in others)


# --- what is loaded, what is refused -------------------------------------------------------------------------------------


def test_half_precision_variant_files_are_read(tiny_sdxl, tmp_path) -> None:
    stock(tiny_sdxl).to(torch.float16).save_pretrained(tmp_path, variant="fp16")
    half, whole = load(tmp_path, variant="fp16"), load(tiny_sdxl)
    for part in PARTS:
        read, wanted = half.parts[part].state_dict(), whole.parts[part].state_dict()
        assert all(
            torch.equal(read[name], value.half().float()) for name, value in wanted.items() if value.is_floating_point()
        )


def edit_json(file: Path, **values) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.mark.parametrize(
    "file, values, says",
    [
        ("unet", {"addition_embed_type": None}, "has addition_embed_type=None, which this trainer knows nothing to give to"),
        ("unet", {"cross_attention_dim": 16}, "gives 40 channels, its UNet takes 16 (cross_attention_dim)"),
        ("unet", {"projection_class_embeddings_input_dim": 52}, "gives 60 channels, its UNet takes 52 (projection_class_"),
        ("unet", {"in_channels": 9, "out_channels": 9}, "the VAE of FOLDER gives 4 channels, the UNet takes 9 (in_channels)"),
        ("text_encoder_2", {"projection_dim": 20}, "gives 68 channels, its UNet takes 60"),
    ],
)
def test_parts_that_do_not_fit_are_refused(tiny_sdxl, tmp_path, file, values, says) -> None:
    folder = Path(shutil.copytree(tiny_sdxl, tmp_path / "copy"))
    edit_json(folder / file / "config.json", **values)
    with pytest.raises(UserError) as caught:
        build_skeleton(ModelConfig(path=str(folder)))
    assert says.replace("FOLDER", str(folder)) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("key", SIZES)
def test_sizes_as_a_condition_are_refused_for_other_models(make_config, key) -> None:
    with pytest.raises(UserError, match=f"^sampling.{key}: only SDXL is told of picture sizes"):
        preflight(make_config(sampling={key: SIZES[key]}))


def test_the_plan_counts_both_text_encoders_and_what_a_real_forward_keeps(make_config, tiny_sdxl, monkeypatch) -> None:
    config = make_config(model={"path": tiny_sdxl})
    denoiser = load(tiny_sdxl)
    with monkeypatch.context() as patch:
        trace_nothing(patch)
        rows = [line.split() for line in plan(config)]
    for name in ("text_encoder", "text_encoder_2"):
        assert [*name.split("_"), f"{sum(p.numel() for p in denoiser.parts[name].parameters()):,}"] in rows
    denoiser = ready_denoiser(config, CPU, trained=True)
    with LiveBytes() as live:
        x, text = torch.empty(3, 4, 8, 8).normal_(), denoiser.condition([denoiser.blank_embedding()] * 3, config.sampling)
        outputs = denoiser.predict(x, torch.zeros(3, dtype=torch.int64), text, text)
        (outputs[0] - outputs[1]).square().sum().backward()
    traced = Traced(config, preflight(config).skeleton, accumulates=False, on_gpu=False)
    assert traced.update.peak(3) == pytest.approx(live.peak, rel=0.05)


# --- whole runs ----------------------------------------------------------------------------------------------------------

FULL = {"adapter": "full"}


@pytest.fixture
def make_run(make_config, tiny_sdxl, tmp_path, monkeypatch):
    """A function that trains a tiny SDXL in a folder of that name."""
    monkeypatch.setattr("fastloop.training_run.write_report", lambda folder: None)  # takes longer than these runs

    def make(name: str, resume: bool = False, model: dict | None = None, **changes) -> Trainer:
        small = {"eval": FEW, "checkpoint": {"every": 1, "keep": 9}, "memory": {"rollout_batch": 5, "update_batch": 5}}
        changes = small | changes
        config = make_config(model={"path": tiny_sdxl, **(model or {})}, output_dir=str(tmp_path / name), **changes)
        trainer = Trainer(config, resume)
        trainer.train()
        return trainer

    return make


@pytest.mark.parametrize("model", [{}, FULL, {"dtype": "bf16"}], ids=str)
def test_it_trains_from_a_ratio_of_exactly_1_and_resumes_to_the_same_weights(make_run, model: dict) -> None:
    changes = {"model": model, "kl": {"weight": 0.1}} | ({"safety": {"max_ratio_dev": 0}} if "dtype" not in model else {})
    one = {"prompts_per_step": 1, "images_per_prompt": 5}  # a rollout is one batch, as large as the first update's
    whole = make_run("whole", **changes, **one)
    first = read_rows(whole.folder / "metrics.jsonl")[0]
    assert first["policy/replay_max_dev"] == 0
    start, end = weights(whole.folder, 0), weights(whole.folder, 2)
    assert all((start[name] != end[name]).any() for name in start if "lora_B" in name or "conv_in" in name)
    make_run("broken", iterations=1, **changes, **one)
    broken = make_run("broken", resume=True, **changes, **one)
    assert equal(weights(broken.folder, 2), end)


@pytest.mark.parametrize(
    "lora", [{"rank": 2}, {"rank": 3, "alpha": 8.0, "target_modules": ["to_q", "ff.net.0.proj", "conv1"]}]
)
def test_a_trained_lora_gives_the_same_pictures_in_stock_diffusers(make_run, tiny_sdxl, lora: dict) -> None:
    trainer = make_run("run", model={"lora": lora}, optimizer={"lr": 0.1})
    sampling = SamplingConfig(steps=4, guidance_scale=3.0)
    pipeline = stock(tiny_sdxl)
    before = stock_run(pipeline, sampling, (4, 8, 8))[1]
    pipeline.load_lora_weights(trainer.folder / "export")
    after = stock_run(pipeline, sampling, (4, 8, 8))[1]
    assert levels(pictures(trainer, sampling), after) <= 1
    assert levels(before, after) > 5


def test_a_full_fine_tune_gives_the_same_pictures_in_stock_diffusers_and_can_be_trained_again(make_run) -> None:
    trainer = make_run("run", model=FULL, optimizer={"lr": 1e-3})
    sampling = SamplingConfig(steps=4, guidance_scale=3.0)
    pipeline = stock(trainer.folder / "export")
    assert {getattr(pipeline, part).dtype for part in PARTS} == {torch.float32}
    assert pipeline.config.force_zeros_for_empty_prompt is True
    ours = pictures(trainer, sampling)
    assert levels(ours, stock_run(pipeline, sampling, (4, 8, 8))[1]) <= 1
    assert levels(ours, pictures(load(trainer.config.model.path), sampling)) > 5
    again = trainable(trainer.folder / "export", **FULL)
    assert equal(again.network.state_dict(), trainer.denoiser.network.state_dict())


@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_an_export_in_half_precision_holds_the_rounded_weights_and_leaves_the_trained_ones(
    tiny_sdxl, tmp_path, adapter
) -> None:
    denoiser = trainable(tiny_sdxl, 0.05, adapter=adapter)
    before = {name: p.clone() for name, p in denoiser.trainable().items()}
    denoiser.export(tmp_path, "fp16")
    assert equal(before, denoiser.trainable())
    files = sorted(tmp_path.rglob("*.safetensors"))
    assert {value.dtype for file in files for value in load_file(file).values()} == {torch.float16}
    if adapter == "full":
        assert len(files) == len(PARTS)
        exported = stock(tmp_path, torch_dtype=torch.float16).unet.state_dict()
        assert all(torch.equal(exported[name], value.half()) for name, value in before.items())
    else:
        stock(tiny_sdxl).load_lora_weights(tmp_path)


@pytest.mark.timeout(600)
def test_deepspeed_trains_lora_and_full_on_two_ranks_and_on_one_and_resumes_exactly(make_run, tiny_sdxl, tmp_path) -> None:
    base = {**ON_RANKS, "model": {"path": tiny_sdxl, "lora": {"rank": 2}}}
    full = {**base, **zero(3), "model": {**base["model"], **FULL}}
    one, *two = (
        {**values, "output_dir": str(tmp_path / name), **more}
        for name, values, more in (
            ("one", base | zero(2), {}),
            ("lora", base | zero(2), {}),
            ("full", full, {}),
            ("resumed", full, {"resume": str(tmp_path / "full")}),
        )
    )
    train_all(tmp_path, 1, [one])
    train_all(tmp_path, 2, two)
    same = {key: ON_RANKS[key] for key in SHARED}
    for adapter, names in (("lora", ("one", "lora")), ("full", ("full",))):
        wanted = make_run(f"torch-{adapter}", model={"adapter": adapter}, **same).folder
        for name in names:
            start = weights(wanted, 0)
            assert equal(weights(tmp_path / name, 0), start)
            assert distance(weights(tmp_path / name), weights(wanted), start) < 1e-3
            assert read_rows(tmp_path / name / "metrics.jsonl")[0]["policy/replay_max_dev"] < 1e-5
    assert json.loads((tmp_path / "resumed" / "resumed.json").read_text()) == [1, None]
    assert equal(weights(tmp_path / "resumed"), weights(tmp_path / "full"))
    assert not equal(weights(tmp_path / "full"), weights(tmp_path / "full", 1))
    stock(tiny_sdxl).load_lora_weights(tmp_path / "lora" / "export")
    exported, master = stock(tmp_path / "full" / "export").unet.state_dict(), weights(tmp_path / "full")
    assert all(torch.equal(exported[name], value) for name, value in master.items())


# --- the VAE's guard -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def overflowing(tmp_path_factory) -> str:
    """A tiny SDXL whose VAE, like the real one, passes 65,504 inside for some latents; its last norm takes it back."""
    folder = make_sdxl(tmp_path_factory.mktemp("overflowing"))
    file = Path(folder) / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    for name in ("decoder.conv_in.weight", "decoder.conv_in.bias"):
        tensors[name] = tensors[name] * 2e4
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


def latents_of(sizes: list[float]) -> torch.Tensor:
    """One picture's latents for each size: the larger, the larger inside the VAE."""
    noise = torch.randn(len(sizes), 4, 8, 8, generator=torch.Generator().manual_seed(1))
    return noise * torch.tensor(sizes).view(-1, 1, 1, 1)


def decoded(folder: str, latents: torch.Tensor) -> np.ndarray:
    """By the stock VAE in float32, with the weights that a half-precision VAE has."""
    vae = AutoencoderKL.from_pretrained(folder, subfolder="vae").half().float()
    with torch.no_grad():
        x = vae.decode(latents / vae.config.scaling_factor).sample
    return ((x / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()


def test_the_tiny_vae_does_overflow(overflowing) -> None:
    vae = AutoencoderKL.from_pretrained(overflowing, subfolder="vae", torch_dtype=torch.float16)
    with torch.no_grad():
        x = vae.decode((latents_of([0.01, 1.0]) / vae.config.scaling_factor).half()).sample
    assert x[0].isfinite().all() and not x[1].isfinite().all()


def test_a_picture_that_overflows_is_decoded_again_in_float32_and_the_others_are_not(overflowing) -> None:
    denoiser = load(overflowing, dtype="fp16", vae={"dtype": "fp16"})
    latents, calls = latents_of([0.01, 1.0, 0.01, 1.0, 1.0]), []
    denoiser.vae.decoder.register_forward_pre_hook(lambda _, args: calls.append((args[0].dtype, len(args[0]))))
    images, wanted = denoiser.decode(latents, 2), decoded(overflowing, latents)
    assert calls == [(torch.float16, 2), (torch.float32, 1)] * 2 + [(torch.float16, 1), (torch.float32, 1)]
    assert levels(images[[1, 3, 4]], wanted[[1, 3, 4]]) == 0
    assert levels(images, wanted) <= 3
    assert all(image.std() > 5 for image in images)  # neither black nor grey
    assert denoiser.vae.dtype == torch.float16
    again = AutoencoderKL.from_pretrained(overflowing, subfolder="vae", torch_dtype=torch.float16).state_dict()
    assert equal(denoiser.vae.state_dict(), again)


@pytest.mark.parametrize(
    "dtype, own, expected", [("fp16", "auto", "float32"), ("bf16", "auto", "bfloat16"), ("fp16", "bf16", "bfloat16")]
)
def test_force_upcast_decodes_in_float32_from_the_start_in_fp16(overflowing, dtype, own, expected) -> None:
    config = ModelConfig(path=overflowing, dtype=dtype, vae={"dtype": own})
    for denoiser in (load_denoiser(config, CPU), build_skeleton(config)):
        assert denoiser.vae.dtype == getattr(torch, expected)
    latents = latents_of([1.0, 1.0])
    images = load_denoiser(config, CPU).decode(latents, 2)
    assert levels(images, decoded(overflowing, latents)) <= (2 if expected == "float32" else 12)


def test_without_force_upcast_the_vae_keeps_the_models_dtype_and_is_guarded_all_the_same(overflowing, tmp_path) -> None:
    folder = Path(shutil.copytree(overflowing, tmp_path / "copy"))
    edit_json(folder / "vae" / "config.json", force_upcast=False)
    denoiser = load(folder, dtype="fp16")
    assert denoiser.vae.dtype == torch.float16
    latents = latents_of([1.0])
    assert levels(denoiser.decode(latents, 1), decoded(overflowing, latents)) == 0


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_what_overflows_in_float32_too_ends_the_run_and_is_no_picture(tiny_sdxl, dtype) -> None:
    denoiser = load(tiny_sdxl, dtype=dtype, vae={"dtype": dtype})
    with pytest.raises(RunFailed, match="the decoded pictures are not finite, in float32 either"):
        denoiser.decode(torch.full((1, 4, 8, 8), 3e38), 1)


def test_large_pictures_are_decoded_in_tiles_and_small_ones_whole(tiny_sdxl) -> None:
    whole, tiled = load(tiny_sdxl), load(tiny_sdxl, vae={"tile": 64})
    sizes = []
    tiled.vae.decoder.register_forward_pre_hook(lambda _, args: sizes.append(tuple(args[0].shape[-2:])))
    small, large = torch.randn(1, 4, 32, 32), torch.randn(1, 4, 48, 64)
    assert np.array_equal(tiled.decode(small, 1), whole.decode(small, 1))
    assert sizes == [(32, 32)]
    images, wanted = tiled.decode(large, 1), whole.decode(large, 1)
    assert len(sizes) > 4 and max(max(size) for size in sizes) == 32
    assert images.shape == wanted.shape == (1, 96, 128, 3)
    difference = np.abs(images.astype(int) - wanted.astype(int))
    assert 0 < difference.mean() < wanted.std() / 4  # the tiles' group norms see less of the picture


@pytest.mark.parametrize("tile", [0, 32, 100, True])
def test_a_tile_that_is_no_multiple_of_64_pixels_is_refused(make_config, tile) -> None:
    with pytest.raises(UserError, match=r"model\.vae\.tile: "):
        make_config(model={"vae": {"tile": tile}})
