"""The Stable Diffusion adapter against stock diffusers on the same files: sampling, adapters, exports; what it refuses."""

import json
import os
import shutil
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file

from fastloop.config import ModelConfig, SamplingConfig
from fastloop.denoisers import build_skeleton, family, load_denoiser
from fastloop.denoisers.files import read_json, resolve_path
from fastloop.denoisers.parts import DTYPES
from fastloop.errors import RunFailed, UserError
from fastloop.kernels.reference import initial_noise, normal
from fastloop.machine import xformers_problem
from fastloop.rollout import rollout, sampler_table
from fastloop.shapes.pretrain import build_pipeline
from fastloop.shapes.pretraining import save
from fastloop.transitions import transition_table

CPU = torch.device("cpu")
SEED = 5
PROMPTS = ["a red circle", "two blue squares", "a dog"]
GUIDED = SamplingConfig(guidance_scale=3.0, negative_prompt="a striped triangle")
UNET_FILE, TEXT_FILE = "unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"
VAE_FILE = "vae/diffusion_pytorch_model.safetensors"


def load(path, **model):
    return load_denoiser(ModelConfig(path=str(path), **model), CPU)


def trainable(path, checkpointing: bool = False, seed: int = 0, **model):
    denoiser = load(path, **{"lora": {"rank": 2}, **model})
    denoiser.train_adapter(checkpointing, seed)
    return denoiser


def stock(path, **kwargs) -> StableDiffusionPipeline:
    pipeline = StableDiffusionPipeline.from_pretrained(resolve_path(str(path)), **kwargs)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def batch(denoiser, guided: bool = True) -> tuple:
    """Arguments of `predict` for three rows at different timesteps."""
    latents = torch.randn(3, *denoiser.latent_shape(None, None), generator=torch.Generator().manual_seed(1))
    cond, uncond = denoiser.encode(PROMPTS, GUIDED)
    return latents, torch.tensor([981, 501, 1]), cond, uncond if guided else None


@torch.no_grad()
def outputs(denoiser) -> torch.Tensor:
    """`predict` with and without the prompt, stacked: float32 (2, 3, C, H, W)."""
    return torch.stack(denoiser.predict(*batch(denoiser))).float()


@torch.no_grad()
def stock_outputs(unet, denoiser) -> torch.Tensor:
    latents, timesteps, cond, uncond = batch(denoiser)
    return torch.stack([unet(latents, timesteps, text.float()).sample for text in (cond, uncond)])


def gap(a: torch.Tensor, b: torch.Tensor) -> float:
    assert a.shape == b.shape
    return (a - b).abs().max().item()


def levels(a: np.ndarray, b: np.ndarray) -> int:
    assert a.shape == b.shape
    assert a.dtype == b.dtype == np.uint8
    return int(np.abs(a.astype(int) - b.astype(int)).max())


def change(denoiser, seed: int = 0, size: float = 0.3) -> None:
    """Random trained weights."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in denoiser.trainable().values():
        parameter.data += size * torch.randn(parameter.shape, generator=generator)


def loss(denoiser) -> torch.Tensor:
    return sum(output.float().square().sum() for output in denoiser.predict(*batch(denoiser)))


def gradients(denoiser) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in denoiser.trainable().items()}


def count_calls(module: torch.nn.Module) -> list:
    """A list that grows by the first input's shape with each call of the module."""
    calls = []
    module.register_forward_pre_hook(lambda _, args: calls.append(tuple(args[0].shape)))
    return calls


def files(folder) -> set[str]:
    return {str(p.relative_to(folder)) for p in Path(folder).rglob("*") if p.is_file()}


def edit_json(file: Path, **values) -> None:
    file.write_text(json.dumps({k: v for k, v in (json.loads(file.read_text()) | values).items() if v is not None}))


def edit_weights(file: Path, edit) -> None:
    weights = load_file(file)
    save_file(edit(weights), file, metadata={"format": "pt"})


@pytest.fixture
def copy(tiny_sd, tmp_path) -> Path:
    """A copy of the tiny model that a test may damage."""
    return Path(shutil.copytree(tiny_sd, tmp_path / "copy"))


def refused(call, *words: str, key: str = "model.path") -> None:
    with pytest.raises(UserError) as error:
        call()
    message = str(error.value)
    assert "\n" not in message
    for word in (key, *words):
        assert word in message


# --- what is loaded, what is refused -------------------------------------------------------------------------------------


def test_bundled_model_is_found_by_its_name() -> None:
    folder = Path(resolve_path("assets:shapes"))
    assert json.loads((folder / "model_index.json").read_text())["_class_name"] == "StableDiffusionPipeline"


def test_unknown_asset_is_refused_with_those_there_are() -> None:
    refused(lambda: resolve_path("assets:shape"), "'shape'", "assets:shapes")


def test_folder_of_no_pipeline_is_refused(tmp_path) -> None:
    refused(lambda: resolve_path(str(tmp_path)), str(tmp_path), "model_index.json")


@pytest.mark.parametrize("path", ["/no/folder", "./folder", "~/folder", "folder", "a/b/c"])
def test_missing_folder_is_refused_before_any_hub_is_asked(path: str) -> None:
    refused(lambda: resolve_path(path), path)


def test_folder_may_be_given_from_the_home_directory(tiny_sd, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(Path(tiny_sd).parent))
    assert resolve_path(f"~/{Path(tiny_sd).name}") == tiny_sd


def test_a_folder_of_an_owners_name_blocks_no_hub_id_and_a_mistyped_folder_is_named(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    assert resolve_path("models/mysd") == "models/mysd"
    refused(
        lambda: load("models/mysd"),
        "cannot read model_index.json of models/mysd: ",
        ", and there is no folder models/mysd here",
    )


def test_what_the_hub_says_of_a_model_is_said_whole(monkeypatch) -> None:
    """Its hints, to log in or to ask for access, are in its later lines."""

    def gated(*args, **kwargs):
        raise OSError("403 Client Error.\n\nCannot access gated repo.\nVisit https://hub/owner/name to ask for access.")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", gated)
    refused(lambda: load("owner/name"), "403 Client Error. Cannot access gated repo. Visit https://hub/owner/name to ask")


@pytest.mark.parametrize("path", ["/" + 300 * "a", "a\0b"])
def test_what_cannot_be_a_path_is_refused(path: str) -> None:
    with pytest.raises(UserError, match="^model.path: "):
        resolve_path(path)


def test_a_model_without_a_size_of_its_own_needs_both_sides(tiny_sd: str, tmp_path) -> None:
    copy = tmp_path / "model"
    shutil.copytree(tiny_sd, copy)
    edit_json(copy / "unet" / "config.json", sample_size=None)
    skeleton = build_skeleton(ModelConfig(path=str(copy)))
    assert skeleton.latent_shape(16, 32) == (4, 8, 16)
    with pytest.raises(UserError, match="^sampling: the model states no size of its own: set sampling.height and"):
        skeleton.latent_shape(16, None)


def test_hub_id_that_cannot_be_fetched_is_refused() -> None:
    assert resolve_path("owner/name") == "owner/name"
    refused(lambda: load("owner/name"), "owner/name", "model_index.json")


def test_other_pipeline_class_is_refused_with_those_supported(copy) -> None:
    edit_json(copy / "model_index.json", _class_name="KolorsPipeline")
    for build in (load_denoiser, lambda config, _: build_skeleton(config)):
        refused(lambda build=build: build(ModelConfig(path=str(copy)), CPU), "KolorsPipeline", "StableDiffusionPipeline")


@pytest.mark.parametrize("text", ["{", "[]", ""])
def test_damaged_json_file_is_refused_by_its_name(copy, text: str) -> None:
    (copy / "model_index.json").write_text(text)
    refused(lambda: family(str(copy), ModelConfig()), "model_index.json")


def test_missing_json_file_is_refused_by_its_name(copy) -> None:
    assert read_json(str(copy), ModelConfig(), "config.json", "unet")["in_channels"] == 4
    (copy / "unet" / "config.json").unlink()
    refused(lambda: read_json(str(copy), ModelConfig(), "config.json", "unet"), "unet/config.json")
    refused(lambda: build_skeleton(ModelConfig(path=str(copy))), "unet/config.json")


def delete(file: Path) -> None:
    file.unlink()


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def overwrite(file: Path) -> None:
    file.write_bytes(b"no weights" * 20)


def pickle_instead(file: Path) -> None:
    name = "pytorch_model.bin" if file.name.startswith("model") else "diffusion_pytorch_model.bin"
    torch.save(load_file(file), file.with_name(name))
    file.unlink()


def drop_a_weight(file: Path) -> None:
    edit_weights(file, lambda weights: {k: v for k, v in weights.items() if k != sorted(weights)[3]})


def reshape_a_weight(file: Path) -> None:
    edit_weights(file, lambda weights: weights | {sorted(weights)[3]: torch.zeros(3)})


@pytest.mark.parametrize("file", [UNET_FILE, VAE_FILE, TEXT_FILE])
@pytest.mark.parametrize("damage", [delete, truncate, overwrite, drop_a_weight, reshape_a_weight])
def test_missing_or_damaged_weights_are_refused(copy, file: str, damage) -> None:
    damage(copy / file)
    refused(lambda: load(copy), f"cannot load the {Path(file).parent} of {copy}")


def test_tensors_without_safetensors_are_read_and_nothing_else_is_unpickled(copy, tiny_sd) -> None:
    for file in (UNET_FILE, VAE_FILE, TEXT_FILE):
        pickle_instead(copy / file)
    for part, module in load(copy).parts.items():
        assert all(value.equal(load(tiny_sd).parts[part].state_dict()[name]) for name, value in module.state_dict().items())
    for name, folder in (("pytorch_model.bin", "text_encoder"), ("diffusion_pytorch_model.bin", "unet")):
        kept = (copy / folder / name).read_bytes()
        torch.save({"weight": os.system}, copy / folder / name)
        refused(lambda: load(copy), f"cannot load the {folder} of {copy}")
        (copy / folder / name).write_bytes(kept)


def test_missing_weight_is_refused_by_its_name(copy) -> None:
    edit_weights(copy / UNET_FILE, lambda weights: {k: v for k, v in weights.items() if not k.startswith("conv_out")})
    refused(lambda: load(copy), "lacks conv_out.bias and 1 more")


@pytest.mark.parametrize("part", ["tokenizer", "text_encoder", "vae", "unet"])
def test_pipeline_without_one_of_its_folders_is_refused(copy, part: str) -> None:
    shutil.rmtree(copy / part)
    refused(lambda: load(copy), part)


def test_variant_reads_the_files_of_that_name(tiny_sd, tmp_path) -> None:
    stock(tiny_sd).to(torch.float16).save_pretrained(tmp_path / "half", variant="fp16")
    refused(
        lambda: load(tmp_path / "half"), "has files of the variant fp16 alone: set model.variant=fp16", key="model.variant"
    )
    half, whole = load(tmp_path / "half", variant="fp16").network.state_dict(), load(tiny_sd).network.state_dict()
    assert all(torch.equal(half[name], value.half().float()) for name, value in whole.items())
    trainable(tmp_path / "half", variant="fp16", adapter="full").export(tmp_path / "export")
    exported = stock(tmp_path / "export")
    assert all(torch.equal(half[name], value) for name, value in exported.unet.state_dict().items())
    assert {part.dtype for part in (exported.unet, exported.vae, exported.text_encoder)} == {torch.float32}


def test_weight_names_of_old_repositories_are_understood(tiny_sd, copy) -> None:
    # as stable-diffusion-v1-5 ships them
    edit_weights(
        copy / TEXT_FILE,
        lambda weights: (
            {f"text_model.{k}": v for k, v in weights.items()} | {"text_model.embeddings.position_ids": torch.arange(16)[None]}
        ),
    )
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def rename(name: str) -> str:
        for new, before in old.items():
            name = name.replace(f"attentions.0.{new}.", f"attentions.0.{before}.")
        return name

    edit_weights(copy / VAE_FILE, lambda weights: {rename(k): v for k, v in weights.items()})
    assert "decoder.mid_block.attentions.0.proj_attn.weight" in load_file(copy / VAE_FILE)
    renamed, ours = load(copy), load(tiny_sd)
    assert torch.equal(renamed.encode(PROMPTS, GUIDED)[0], ours.encode(PROMPTS, GUIDED)[0])
    latents = torch.randn(2, 4, 8, 8)
    assert np.array_equal(renamed.decode(latents, 2), ours.decode(latents, 2))


@pytest.mark.parametrize("model", [{}, {"adapter": "full", "dtype": "bf16"}])
def test_skeleton_has_the_shapes_of_the_model_and_no_weights(tiny_sd, model: dict) -> None:
    skeleton, loaded = build_skeleton(ModelConfig(path=tiny_sd, **model)), load(tiny_sd, **model)
    for denoiser in (skeleton, loaded):
        denoiser.train_adapter(False, 0)
    for part in ("unet", "vae", "text_encoder"):
        described, real = (
            {name: (p.shape, p.dtype, p.requires_grad) for name, p in denoiser.parts[part].named_parameters()}
            for denoiser in (skeleton, loaded)
        )
        assert described == real
        assert {p.device.type for p in skeleton.parts[part].parameters()} == {"meta"}


@pytest.mark.skipif(xformers_problem() is None, reason="xformers works here")
def test_xformers_is_refused_where_it_cannot_work(tiny_sd) -> None:
    config = ModelConfig(path=tiny_sd, attention="xformers")
    refused(lambda: load_denoiser(config, CPU), "xformers", "sdpa", key="model.attention")
    refused(lambda: build_skeleton(config), "xformers", "sdpa", key="model.attention")


# --- sizes ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "height, width, latents",
    [(None, None, (8, 8)), (16, 16, (8, 8)), (32, None, (16, 8)), (None, 24, (8, 12)), (4, 20, (2, 10))],
)
def test_latents_have_the_models_own_size_or_the_one_asked_for(tiny_sd, height, width, latents) -> None:
    denoiser = load(tiny_sd)
    assert denoiser.latent_shape(height, width) == (4, *latents)
    sampling = SamplingConfig(height=height, width=width)
    assert denoiser.image_size(sampling) == (2 * latents[0], 2 * latents[1])
    assert denoiser.decode(torch.zeros(1, 4, *latents), 1).shape == (1, *denoiser.image_size(sampling), 3)


def test_own_size_may_be_two_numbers(copy) -> None:
    edit_json(copy / "unet" / "config.json", sample_size=[8, 12])
    assert load(copy).latent_shape(None, None) == (4, 8, 12)
    assert load(copy).latent_shape(16, None) == (4, 8, 12)


def test_bundled_model_makes_64_pixels_and_multiples_of_16() -> None:
    skeleton = build_skeleton(ModelConfig(path="assets:shapes"))
    assert skeleton.image_size(SamplingConfig()) == (64, 64)
    assert skeleton.image_size(SamplingConfig(height=48, width=80)) == (48, 80)
    refused(lambda: skeleton.image_size(SamplingConfig(height=56)), "56", "16", key="sampling.height")


@pytest.mark.parametrize("key, size", [("height", 18), ("width", 2), ("width", 15)])
def test_size_that_the_model_cannot_halve_is_refused(tiny_sd, key: str, size: int) -> None:
    denoiser = load(tiny_sd)
    refused(lambda: denoiser.image_size(SamplingConfig(**{key: size})), str(size), "multiple of 4", key=f"sampling.{key}")


# --- encode --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["tiny_sd", "assets:shapes"])
def test_embeddings_equal_stock_diffusers(request, path: str) -> None:
    path = request.getfixturevalue(path) if path == "tiny_sd" else path
    prompts = [*PROMPTS, "", "a red circle left of a blue square and " * 10]
    cond, uncond = load(path).encode(prompts, GUIDED)
    theirs = stock(path).encode_prompt(prompts, CPU, 1, True, [GUIDED.negative_prompt] * len(prompts))
    assert gap(cond, theirs[0]) < 1e-5
    assert gap(uncond, theirs[1]) < 1e-5
    assert gap(cond[0], cond[1]) > 0.1


def test_negative_prompt_is_the_one_configured(tiny_sd) -> None:
    denoiser = load(tiny_sd)
    _, configured = denoiser.encode(["a dog"], GUIDED)
    _, empty = denoiser.encode(["a dog"], SamplingConfig(guidance_scale=3.0))
    cond, _ = denoiser.encode([GUIDED.negative_prompt, ""], GUIDED)
    assert torch.equal(torch.cat([configured, empty]), cond)
    assert gap(configured, empty) > 0.1


def test_each_text_is_encoded_once(tiny_sd) -> None:
    denoiser = load(tiny_sd)
    calls = count_calls(denoiser.parts["text_encoder"])
    denoiser.encode(["a dog", "a cat", "a dog"], GUIDED)
    assert len(calls) == 3  # two prompts and the negative one
    denoiser.encode(["a cat", "a horse", GUIDED.negative_prompt], GUIDED)
    assert len(calls) == 4


def test_without_guidance_the_negative_prompt_is_not_encoded(tiny_sd) -> None:
    denoiser = load(tiny_sd)
    calls = count_calls(denoiser.parts["text_encoder"])
    cond, uncond = denoiser.encode(["a dog"], SamplingConfig(guidance_scale=1.0))
    assert uncond is None
    assert cond.shape == (1, 16, 16)
    assert len(calls) == 1


def test_embedding_does_not_depend_on_which_prompts_came_along(tiny_sd) -> None:
    together, _ = load(tiny_sd).encode(PROMPTS, GUIDED)
    alone = torch.cat([load(tiny_sd).encode([prompt], GUIDED)[0] for prompt in PROMPTS])
    backwards, _ = load(tiny_sd).encode(PROMPTS[::-1], GUIDED)
    assert torch.equal(together, alone)
    assert torch.equal(together, backwards.flip(0))


def test_long_prompt_is_cut_to_the_text_encoders_length(tiny_sd, copy) -> None:
    edit_json(copy / "tokenizer" / "tokenizer_config.json", model_max_length=None)  # then transformers knows no limit
    start = "a red circle " * 5
    for path in (tiny_sd, copy):
        cond, _ = load(path).encode([start + "left of a dog", start + "above a cat", "a red circle"], GUIDED)
        assert cond.shape == (3, 16, 16)
        assert torch.equal(cond[0], cond[1])
        assert gap(cond[0], cond[2]) > 0.1


def test_more_prompts_than_the_cache_holds_are_all_encoded(tiny_sd, monkeypatch) -> None:
    prompts = ["a red circle", "a dog", "a cat", "a horse", "a dog"]
    expected = load(tiny_sd).encode(prompts, GUIDED)
    monkeypatch.setattr("fastloop.denoisers.texts.CACHE_BYTES", 2 * 16 * 16 * 4)
    denoiser = load(tiny_sd)
    for _ in range(2):
        for ours, theirs in zip(denoiser.encode(prompts, GUIDED), expected, strict=True):
            assert torch.equal(ours, theirs)
        assert len(denoiser._embeddings) == 2


def test_full_cache_does_not_lose_a_prompt_of_the_same_call(tiny_sd, monkeypatch) -> None:
    monkeypatch.setattr("fastloop.denoisers.texts.CACHE_BYTES", 2 * 16 * 16 * 4)
    denoiser = load(tiny_sd)
    without = SamplingConfig(guidance_scale=1.0)
    first, _ = denoiser.encode(["a dog", "a cat"], without)
    again, _ = denoiser.encode(["a dog", "a horse"], without)  # the horse takes the place of the cat
    assert torch.equal(again[0], first[0]) and [text for text, _ in denoiser._embeddings] == ["a dog", "a horse"]
    denoiser.encode(["a dog", "a bee"], without)  # of two, the one that was used last stays
    assert [text for text, _ in denoiser._embeddings] == ["a dog", "a bee"]


# --- predict -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["tiny_sd", "tiny_sd_v"])
def test_prediction_equals_the_unet_called_by_hand(request, path: str) -> None:
    path = request.getfixturevalue(path)
    denoiser = load(path)
    latents, timesteps, cond, uncond = batch(denoiser)
    unet = UNet2DConditionModel.from_pretrained(path, subfolder="unet").eval()
    rows = [
        [unet(latents[i : i + 1], timesteps[i], text[i : i + 1]).sample for i in range(3)]  # each row at its own timestep
        for text in (cond, uncond)
    ]
    expected = torch.stack([torch.cat(row) for row in rows])
    ours = outputs(denoiser)
    assert gap(ours, expected) < 1e-5
    assert gap(ours[0], ours[1]) > 1e-2


def test_both_branches_of_guidance_share_one_forward(tiny_sd) -> None:
    denoiser = load(tiny_sd)
    calls = count_calls(denoiser.network)
    with torch.no_grad():
        cond, uncond = denoiser.predict(*batch(denoiser))
        assert calls == [(6, 4, 8, 8)]
        alone, nothing = denoiser.predict(*batch(denoiser, guided=False))
    assert calls == [(6, 4, 8, 8), (3, 4, 8, 8)]
    assert nothing is None
    assert gap(alone, cond) < 1e-5
    assert cond.shape == uncond.shape == (3, 4, 8, 8)


# --- a whole rollout -----------------------------------------------------------------------------------------------------


class OurNoise(DDIMScheduler):
    """diffusers' scheduler with fastloop's noise in place of its own."""

    def step(self, model_output, timestep, sample, eta=0.0, return_dict=True):
        step = self.timesteps.tolist().index(int(timestep))
        noise = normal(SEED, torch.arange(len(sample)), step, sample[0].numel()).view_as(sample)
        noise = noise if eta else None
        return super().step(model_output, timestep, sample, eta=eta, variance_noise=noise, return_dict=return_dict)


def stock_images(pipeline, sampling: SamplingConfig, eta: float, shape) -> tuple[torch.Tensor, np.ndarray]:
    """Last latents and pictures of stock diffusers, started from the noise of trajectories 0, 1, ..."""
    scheduler = read_json(pipeline.config._name_or_path, ModelConfig(), "scheduler_config.json", "scheduler")
    pipeline.scheduler = OurNoise.from_config(scheduler, clip_sample=False)
    found = [
        pipeline(
            PROMPTS,
            negative_prompt=[sampling.negative_prompt] * len(PROMPTS),
            num_inference_steps=sampling.steps,
            guidance_scale=sampling.guidance_scale,
            eta=eta,
            height=sampling.height,
            width=sampling.width,
            latents=initial_noise(SEED, torch.arange(len(PROMPTS)), shape),
            output_type=output,
        ).images
        for output in ("latent", "pil")
    ]
    return found[0], np.stack([np.asarray(image) for image in found[1]])


def our_rollout(denoiser, table, sampling: SamplingConfig, size: int = 2):
    return rollout(
        denoiser,
        table,
        PROMPTS,
        torch.arange(len(PROMPTS)),
        sampling=sampling,
        seed=SEED,
        batch=size,
        vae_batch=2,
        backend="reference",
    )


@pytest.mark.parametrize(
    "path, eta, changes",
    [
        ("tiny_sd", 0.0, {}),
        ("tiny_sd", 1.0, {}),
        ("tiny_sd", 1.0, {"guidance_scale": 1.0}),
        ("tiny_sd", 0.5, {"height": 24, "width": 32}),
        ("tiny_sd_v", 0.0, {}),
        ("tiny_sd_v", 1.0, {}),
        ("assets:shapes", 0.0, {}),
        ("assets:shapes", 1.0, {}),
    ],
)
def test_rollout_gives_the_latents_and_pictures_of_stock_diffusers(request, path: str, eta: float, changes: dict) -> None:
    path = resolve_path(path) if ":" in path else request.getfixturevalue(path)
    sampling = GUIDED.model_copy(update={"steps": 5, **changes})
    denoiser = load(path)
    # a configuration has eta > 0, the table may also be without noise
    table = transition_table(read_json(path, ModelConfig(), "scheduler_config.json", "scheduler"), sampling.steps, eta)
    ours = our_rollout(denoiser, table, sampling)
    shape = denoiser.latent_shape(sampling.height, sampling.width)
    latents, images = stock_images(stock(path), sampling, eta, shape)
    assert ours.latents.shape == (6, 3, *shape)
    assert gap(ours.latents[-1], latents) < 1e-3
    assert levels(ours.images, images) <= 1
    assert ours.images.std() > 5


@pytest.mark.parametrize("adapter", ["lora", "full"])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_half_precision_models_keep_latents_and_log_probs_in_float32(tiny_sd, adapter: str, dtype: str) -> None:
    sampling = GUIDED.model_copy(update={"steps": 4})
    table = sampler_table(ModelConfig(path=tiny_sd), sampling)
    whole = our_rollout(trainable(tiny_sd), table, sampling)
    denoiser = trainable(tiny_sd, adapter=adapter, dtype=dtype)
    assert {output.dtype for output in denoiser.predict(*batch(denoiser))} == {DTYPES[dtype]}
    half = our_rollout(denoiser, table, sampling)
    assert half.latents.dtype == half.log_probs.dtype == torch.float32
    assert half.log_probs.isfinite().all()
    assert 0 < gap(half.latents, whole.latents) < 0.03 * whole.latents.abs().max()
    assert levels(half.images, whole.images) < 25


# --- decode --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["tiny_sd", "assets:shapes"])
def test_pictures_equal_the_stock_vae_and_image_processor(request, path: str) -> None:
    path = request.getfixturevalue(path) if path == "tiny_sd" else path
    denoiser, pipeline = load(path), stock(path)
    latents = torch.randn(3, *denoiser.latent_shape(None, None), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        decoded = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor).sample
    expected = np.stack([np.asarray(image) for image in pipeline.image_processor.postprocess(decoded)])
    ours = denoiser.decode(latents, 3)
    assert levels(ours, expected) <= 1
    assert np.mean(ours != expected) < 0.01  # rounded, not cut
    assert expected.std() > 20


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_pictures_do_not_depend_on_how_many_are_decoded_at_a_time(tiny_sd, dtype: str) -> None:
    denoiser = load(tiny_sd, dtype=dtype)
    calls = count_calls(denoiser.vae.decoder)
    latents = torch.randn(5, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    whole = denoiser.decode(latents, 8)
    chunked = denoiser.decode(latents, 2)
    assert [shape[0] for shape in calls] == [5, 2, 2, 1]
    assert whole.shape == (5, 16, 16, 3)
    assert levels(whole, chunked) <= 1


def test_pictures_are_clamped_to_uint8(tiny_sd) -> None:
    denoiser = load(tiny_sd)
    denoiser.vae.decoder.conv_out.weight *= 20
    images = denoiser.decode(torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), 2)
    assert images.dtype == np.uint8
    assert min(np.mean(images == 0), np.mean(images == 255)) > 0.2  # without the clamp they would wrap around


# --- LoRA ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank, alpha, scale", [(3, 5.0, 5 / 3), (4, None, 1.0)])
def test_adapter_has_the_rank_and_the_scale_configured(tiny_sd, rank: int, alpha: float | None, scale: float) -> None:
    denoiser = trainable(tiny_sd, lora={"rank": rank, "alpha": alpha})
    change(denoiser)
    weights = denoiser.trainable()
    layer = "mid_block.attentions.0.transformer_blocks.0.attn1.to_v"
    down, up = (weights[f"{layer}.lora_{side}.default.weight"] for side in "AB")
    assert down.shape == (rank, 16)
    assert up.shape == (16, rank)
    module = denoiser.network.get_submodule(layer)
    x = torch.randn(5, 16)
    assert torch.allclose(module(x) - module.base_layer(x), scale * x @ down.T @ up.T, atol=1e-5)


@pytest.mark.parametrize("targets", [["to_q"], ["to_q", "to_k", "to_v", "to_out.0"], ["conv1", "ff.net.0.proj"]])
def test_adapters_are_on_all_modules_of_the_given_endings_and_no_others(tiny_sd, targets: list[str]) -> None:
    plain = load(tiny_sd)
    named = {name for name, _ in plain.network.named_modules() if any(name.endswith(f".{target}") for target in targets)}
    denoiser = trainable(tiny_sd, lora={"rank": 2, "target_modules": targets})
    assert {name.split(".lora_")[0] for name in denoiser.trainable()} == named
    assert len(denoiser.trainable()) == 2 * len(named) > 0


@pytest.mark.parametrize("targets", [["to_query"], ["to_q", "to_query"], ["o_q"], ["norm1"]])
def test_target_module_that_cannot_be_adapted_is_refused(tiny_sd, targets: list[str]) -> None:
    wrong = "GroupNorm" if targets == ["norm1"] else repr(targets[-1])
    refused(lambda: trainable(tiny_sd, lora={"target_modules": targets}), wrong, key="model.lora.target_modules")


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_only_float32_adapters_are_trained_whatever_the_models_dtype(tiny_sd, dtype: str) -> None:
    denoiser = trainable(tiny_sd, dtype=dtype)
    parameters = dict(denoiser.network.named_parameters())
    adapters = {name for name in parameters if ".lora_" in name}
    assert {name for name, p in parameters.items() if p.requires_grad} == adapters == set(denoiser.trainable())
    assert {parameters[name].dtype for name in adapters} == {torch.float32}
    assert {p.dtype for name, p in parameters.items() if name not in adapters} == {DTYPES[dtype]}
    assert not any(p.requires_grad for part in (denoiser.vae, denoiser.parts["text_encoder"]) for p in part.parameters())
    loss(denoiser).backward()
    assert all(grad.dtype == torch.float32 and grad.isfinite().all() for grad in gradients(denoiser).values())
    assert all(grad.any() for name, grad in gradients(denoiser).items() if ".lora_B." in name)


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_fresh_adapter_leaves_the_outputs_as_they_are(tiny_sd, dtype: str) -> None:
    denoiser = load(tiny_sd, dtype=dtype)
    before = outputs(denoiser)
    denoiser.train_adapter(False, 0)
    assert denoiser.trainable()
    assert torch.equal(outputs(denoiser), before)


def test_seed_decides_the_fresh_adapter(tiny_sd) -> None:
    torch.manual_seed(1)
    first = trainable(tiny_sd, seed=7).trainable()
    torch.manual_seed(2)
    same, other = trainable(tiny_sd, seed=7).trainable(), trainable(tiny_sd, seed=8).trainable()
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first if ".lora_A." in name)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_reference_gives_the_outputs_before_training_and_leaves_the_trained_weights(tiny_sd, adapter: str, dtype: str) -> None:
    denoiser = trainable(tiny_sd, adapter=adapter, dtype=dtype)
    before = outputs(denoiser)
    denoiser.keep_reference()
    change(denoiser, size=0.3 if adapter == "lora" else 0.05)
    after = outputs(denoiser)
    assert gap(before, after) > 1e-2
    names = set(denoiser.trainable())
    with denoiser.reference():
        assert torch.equal(outputs(denoiser), before)
    assert torch.equal(outputs(denoiser), after)
    with pytest.raises(KeyError), denoiser.reference():
        raise KeyError
    assert torch.equal(outputs(denoiser), after)
    assert set(denoiser.trainable()) == names


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_reference_between_forward_and_backward_leaves_the_gradients(tiny_sd, adapter: str, checkpointing: bool) -> None:
    found = []
    for interrupt in (False, True):
        denoiser = trainable(tiny_sd, checkpointing, adapter=adapter)
        denoiser.keep_reference()
        change(denoiser, size=0.05)
        value = loss(denoiser)
        if interrupt:
            with denoiser.reference():
                outputs(denoiser)
        value.backward()
        found.append(gradients(denoiser))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


# --- full fine-tuning and gradient checkpointing -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_full_fine_tuning_trains_every_weight_of_the_unet_in_float32(tiny_sd, dtype: str) -> None:
    denoiser = trainable(tiny_sd, adapter="full", dtype=dtype)
    file = load_file(Path(tiny_sd) / UNET_FILE)
    assert all(torch.equal(p, file[name]) for name, p in denoiser.trainable().items())  # not rounded to dtype
    assert set(denoiser.trainable()) == {name for name, _ in denoiser.network.named_parameters()}
    assert {p.dtype for p in denoiser.trainable().values()} == {torch.float32}
    assert denoiser.vae.dtype == denoiser.parts["text_encoder"].dtype == DTYPES[dtype]
    loss(denoiser).backward()
    assert all(grad.dtype == torch.float32 and grad.isfinite().all() for grad in gradients(denoiser).values())


def test_change_too_small_for_bfloat16_is_kept_in_full_fine_tuning(tiny_sd) -> None:
    denoiser = trainable(tiny_sd, adapter="full", dtype="bf16")
    before = {name: p.detach().clone() for name, p in denoiser.trainable().items()}
    optimizer = torch.optim.SGD(denoiser.trainable().values(), lr=1e-7)
    loss(denoiser).backward()
    optimizer.step()
    moved = {name: (p - before[name]).abs().max() for name, p in denoiser.trainable().items()}
    name = "conv_out.weight"
    assert 0 < moved[name] < before[name].abs().max() * 2**-9


@pytest.mark.parametrize("adapter, dtype", [("lora", "fp32"), ("lora", "bf16"), ("full", "fp32"), ("full", "bf16")])
def test_gradient_checkpointing_computes_again_and_gives_the_same_gradients(tiny_sd, adapter: str, dtype: str) -> None:
    found = []
    for checkpointing in (False, True):
        denoiser = trainable(tiny_sd, checkpointing, adapter=adapter, dtype=dtype)
        change(denoiser, size=0.05)
        predictions = outputs(denoiser)
        counts = [
            count_calls(denoiser.network.get_submodule(name))
            for name in ("mid_block.attentions.0.transformer_blocks.0", "up_blocks.0.resnets.1", "up_blocks.1.resnets.0")
        ]
        value = loss(denoiser)
        value.backward()
        assert [len(calls) for calls in counts] == [2 if checkpointing else 1] * 3
        found.append((predictions, value, gradients(denoiser)))
    (predictions, value, grads), (predictions_again, value_again, grads_again) = found
    assert torch.equal(predictions, predictions_again)
    assert torch.equal(value, value_again)
    assert all(torch.equal(grads[name], grads_again[name]) for name in grads)
    assert any(grad.any() for grad in grads.values())


def test_checkpointing_of_some_blocks_computes_those_again_and_gives_the_same_gradients(tiny_sd) -> None:
    found = []
    for chosen in (False, ["up_blocks.0", "mid_block.attentions"]):
        denoiser = trainable(tiny_sd, chosen)
        change(denoiser, size=0.05)
        names = ("mid_block.attentions.0.transformer_blocks.0", "up_blocks.0.resnets.1", "up_blocks.1.resnets.0")
        counts = [count_calls(denoiser.network.get_submodule(name)) for name in names]
        loss(denoiser).backward()
        assert [len(calls) for calls in counts] == ([2, 2, 1] if chosen else [1, 1, 1])
        found.append(gradients(denoiser))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_there_is_no_dropout_in_training_even_with_gradient_checkpointing(copy, adapter: str) -> None:
    edit_json(copy / "unet" / "config.json", dropout=0.5)
    edit_json(copy / "text_encoder" / "config.json", attention_dropout=0.5)
    denoiser = trainable(copy, checkpointing=True, adapter=adapter)
    assert any(module.p == 0.5 for module in denoiser.network.modules() if isinstance(module, torch.nn.Dropout))
    assert torch.equal(loss(denoiser), loss(denoiser))
    assert torch.equal(denoiser.encode(PROMPTS, GUIDED)[0], load(copy).encode(PROMPTS, GUIDED)[0])


# --- exports in stock diffusers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "lora",
    [
        {"rank": 2},
        {"rank": 3, "alpha": 8.0},
        {"rank": 4, "alpha": 1.5, "target_modules": ["to_q", "conv1", "ff.net.0.proj"]},
    ],
)
def test_exported_lora_does_the_same_in_stock_diffusers(tiny_sd, tmp_path, lora: dict) -> None:
    denoiser = trainable(tiny_sd, lora=lora)
    before = outputs(denoiser)
    change(denoiser, size=0.1)
    trained = outputs(denoiser)
    assert gap(trained, before) > 0.05
    for format in ("kohya", "diffusers"):
        denoiser.export(tmp_path / format, format=format)
        assert files(tmp_path / format) == {"pytorch_lora_weights.safetensors"}
        pipeline = stock(tiny_sd)
        pipeline.load_lora_weights(tmp_path / format)
        assert gap(stock_outputs(pipeline.unet, denoiser), trained) < 1e-5
        settings = pipeline.unet.peft_config["default_0"]
        assert settings.lora_alpha == settings.r == lora["rank"]  # which is what readers take that know no alpha
    names = load_file(tmp_path / "kohya" / "pytorch_lora_weights.safetensors").keys()
    assert {name.rsplit(".", 2)[-2] for name in names} >= {"lora_down", "lora_up"}
    assert all(name.startswith("lora_unet_") and name.count(".") in (1, 2) for name in names)
    sampling = GUIDED.model_copy(update={"steps": 4})
    ours = our_rollout(denoiser, sampler_table(ModelConfig(path=tiny_sd), sampling), sampling)
    latents, images = stock_images(pipeline, sampling, 1.0, (4, 8, 8))
    assert gap(ours.latents[-1], latents) < 1e-4
    assert levels(ours.images, images) <= 1


@pytest.mark.parametrize("path", ["tiny_sd_v", "assets:shapes"])
def test_exported_lora_of_a_bf16_model_is_not_rounded_and_runs(request, tmp_path, path: str) -> None:
    path = request.getfixturevalue(path) if path == "tiny_sd_v" else path
    denoiser = trainable(path, dtype="bf16", lora={"rank": 2, "alpha": 6.0})
    change(denoiser)
    denoiser.export(tmp_path)
    saved = load_file(tmp_path / "pytorch_lora_weights.safetensors")
    trained = {f"unet.{name.replace('.default.', '.')}": p for name, p in denoiser.trainable().items()}
    assert saved.keys() == trained.keys()
    assert all(torch.equal(saved[name], trained[name] * (3 if ".lora_B." in name else 1)) for name in saved)  # alpha / rank
    pipeline = stock(path, torch_dtype=torch.bfloat16)
    pipeline.load_lora_weights(tmp_path)
    image = pipeline("a dog", num_inference_steps=2).images[0]
    assert image.size == denoiser.image_size(SamplingConfig())[::-1]


@pytest.mark.parametrize("path, dtype", [("tiny_sd", "fp32"), ("tiny_sd_v", "bf16"), ("tiny_sd", "fp16")])
def test_exported_pipeline_is_the_trained_one_in_one_dtype(request, tmp_path, path: str, dtype: str) -> None:
    path = request.getfixturevalue(path)
    denoiser = trainable(path, adapter="full", dtype=dtype)
    change(denoiser, size=0.05)
    trained, folder = outputs(denoiser), tmp_path / "export"
    denoiser.export(folder)
    assert torch.equal(outputs(denoiser), trained)
    assert denoiser.vae.dtype == denoiser.parts["text_encoder"].dtype == DTYPES[dtype]

    assert {file for file in files(folder) if not file.endswith((".json", ".txt"))} == {UNET_FILE, VAE_FILE, TEXT_FILE}
    pipeline = stock(folder)
    assert {part.dtype for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder)} == {torch.float32}
    weights = denoiser.trainable()
    assert all(torch.equal(p, weights[name]) for name, p in pipeline.unet.named_parameters())
    for file in (VAE_FILE, TEXT_FILE):
        before, after = load_file(Path(path) / file), load_file(folder / file)
        after = {name.removeprefix("text_model."): value for name, value in after.items()}  # for transformers before 5.6
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)
    if dtype == "fp32":
        assert gap(stock_outputs(pipeline.unet, denoiser), trained) < 1e-5
    kept = [json.loads(Path(f, "scheduler", "scheduler_config.json").read_text()) for f in (path, folder)]
    assert kept[0] == kept[1]
    assert pipeline("a dog", num_inference_steps=2).images[0].size == (16, 16)


def test_exported_pipeline_can_be_trained_again(tiny_sd_v, tmp_path) -> None:
    first = trainable(tiny_sd_v, adapter="full")
    change(first, size=0.05)
    first.export(tmp_path / "export")
    for adapter in ("lora", "full"):
        again = trainable(tmp_path / "export", adapter=adapter)
        assert torch.equal(outputs(again), outputs(first))
        loss(again).backward()
        assert any(grad.any() for grad in gradients(again).values())
    assert build_skeleton(ModelConfig(path=str(tmp_path / "export"))).image_size(SamplingConfig()) == (16, 16)
    sampling = SamplingConfig(steps=4)
    tables = [sampler_table(ModelConfig(path=str(path)), sampling) for path in (tiny_sd_v, tmp_path / "export")]
    assert torch.equal(tables[0].b, tables[1].b)


# --- the bundled model in stock diffusers --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
def test_bundled_model_loads_in_one_dtype_and_runs_in_stock_diffusers(dtype) -> None:
    pipeline = stock("assets:shapes", **({} if dtype is None else {"torch_dtype": dtype}))
    assert {part.dtype for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder)} == {dtype or torch.float32}
    assert pipeline("a red circle", num_inference_steps=2).images[0].size == (64, 64)


def test_pretraining_saves_half_precision_files_that_load_in_one_dtype(tmp_path) -> None:
    pipeline = build_pipeline()
    weight = pipeline.text_encoder.state_dict()["final_layer_norm.weight"].clone()
    save(pipeline, tmp_path, [], Namespace(out=tmp_path, steps=1))
    assert torch.equal(pipeline.text_encoder.state_dict()["final_layer_norm.weight"], weight)
    assert {v.dtype for file in (UNET_FILE, VAE_FILE, TEXT_FILE) for v in load_file(tmp_path / file).values()} == {
        torch.float16
    }
    loaded = stock(tmp_path)
    assert {part.dtype for part in (loaded.unet, loaded.vae, loaded.text_encoder)} == {torch.float32}


def test_pictures_that_are_not_finite_stop_the_run_instead_of_being_scored(tiny_sd):
    denoiser = load(tiny_sd)
    latents = torch.zeros(3, 4, 8, 8)
    latents[1, 0, 0, 0] = float("nan")
    with pytest.raises(RunFailed, match="decoded pictures are not finite"):
        denoiser.decode(latents, batch=2)
