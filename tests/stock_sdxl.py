"""Stock diffusers' SDXL and ours from the same noise, for the tests that compare their latents and pictures."""

from __future__ import annotations

import numpy as np
import torch
from diffusers import DDIMScheduler, DiffusionPipeline

from fastloop.config import ModelConfig, SamplingConfig
from fastloop.denoisers.files import read_json
from fastloop.kernels.reference import initial_noise, normal
from fastloop.rollout import rollout
from fastloop.transitions import transition_table

SEED = 5
PROMPTS = ["a red circle", "two blue squares left of a dog " * 4, ""]


def stock(path, **kwargs) -> DiffusionPipeline:
    """diffusers' own pipeline of a folder, of whichever family."""
    pipeline = DiffusionPipeline.from_pretrained(path, **kwargs)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def gap(a: torch.Tensor, b: torch.Tensor) -> float:
    assert a.shape == b.shape
    return (a - b).abs().max().item()


def levels(a: np.ndarray, b: np.ndarray) -> int:
    assert a.shape == b.shape
    return int(np.abs(a.astype(int) - b.astype(int)).max())


class OurNoise(DDIMScheduler):
    """diffusers' scheduler with fastloop's noise in place of its own."""

    def step(self, model_output, timestep, sample, eta=0.0, return_dict=True):
        step = self.timesteps.tolist().index(int(timestep))
        noise = normal(SEED, torch.arange(len(sample)), step, sample[0].numel()).view_as(sample)
        return super().step(model_output, timestep, sample, eta=eta, variance_noise=noise, return_dict=return_dict)


def stock_run(pipeline, sampling: SamplingConfig, shape) -> tuple[torch.Tensor, np.ndarray, list]:
    """Last latents and pictures of stock diffusers from our noise, and what went in and out of its UNet."""
    scheduler = read_json(pipeline.config._name_or_path, ModelConfig(), "scheduler_config.json", "scheduler")
    pipeline.scheduler = OurNoise.from_config(scheduler, clip_sample=False, set_alpha_to_one=False)
    calls = []

    def keep(_, args, kwargs, output):
        calls.append((args, kwargs, output))

    hook = pipeline.unet.register_forward_hook(keep, with_kwargs=True)
    latents = pipeline(
        PROMPTS,
        negative_prompt=[sampling.negative_prompt] * len(PROMPTS) if sampling.negative_prompt else None,
        num_inference_steps=sampling.steps,
        guidance_scale=sampling.guidance_scale,
        eta=sampling.eta,
        height=sampling.height,
        width=sampling.width,
        original_size=sampling.original_size,
        crops_coords_top_left=sampling.crop_top_left,
        target_size=sampling.target_size,
        latents=initial_noise(SEED, torch.arange(len(PROMPTS)), shape),
        output_type="latent",
    ).images
    hook.remove()
    decoded = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor).sample.detach()
    images = pipeline.image_processor.postprocess(decoded)
    return latents, np.stack([np.asarray(image) for image in images]), calls


def our_run(denoiser, sampling: SamplingConfig):
    scheduler = read_json(denoiser.path, ModelConfig(), "scheduler_config.json", "scheduler")
    table = transition_table(scheduler, sampling.steps, sampling.eta)
    return rollout(
        denoiser,
        table,
        PROMPTS,
        torch.arange(len(PROMPTS)),
        sampling=sampling,
        seed=SEED,
        batch=2,
        vae_batch=2,
        backend="reference",
    )


def pictures(trainer_or_denoiser, sampling: SamplingConfig) -> np.ndarray:
    return our_run(getattr(trainer_or_denoiser, "denoiser", trainer_or_denoiser), sampling).images
