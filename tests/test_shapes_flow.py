"""The bundled flow model: small, as its card says, and fastloop's steps on it are those of float64."""

from __future__ import annotations

import json
import math
import re

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from torch.distributions import Normal

from fastloop.config import ModelConfig, SamplingConfig
from fastloop.denoisers import load_denoiser
from fastloop.denoisers.files import ASSETS
from fastloop.recipes import load_config
from fastloop.rollout import rollout, sampler_table

FOLDER = ASSETS / "shapes_flow"
MODEL = ModelConfig(path="assets:shapes_flow", max_sequence_length=1)
PROMPTS = ["a red circle and a blue square", "three yellow rings", "a green triangle left of a white square"]
GUIDANCE, STEPS = 3.0, 8


@pytest.fixture(scope="module")
def denoiser():
    return load_denoiser(MODEL, torch.device("cpu"))


@pytest.fixture(scope="module")
def stock() -> StableDiffusion3Pipeline:
    return StableDiffusion3Pipeline.from_pretrained(FOLDER, text_encoder_3=None, tokenizer_3=None)


def independent_step(noise: str, eta: float, s: float, after: float, x: torch.Tensor, v: torch.Tensor):
    """The mean of a step from the time s and its standard deviation, written out from the papers' formulas."""
    if noise == "cps":  # Flow-CPS: predicted picture and noise, of which a share is drawn anew
        x_0, eps = x - s * v, x + (1 - s) * v
        return (1 - after) * x_0 + after * math.cos(eta * math.pi / 2) * eps, after * math.sin(eta * math.pi / 2)
    g = 0.0 if after == 0 else eta if noise == "dance" else eta * math.sqrt(s / (1 - (after if s == 1 else s)))
    drift = v + g**2 / (2 * s) * (x + (1 - s) * v)
    return x + drift * (after - s), g * math.sqrt(s - after)


@pytest.mark.parametrize("noise, eta", [("sde", 0.7), ("dance", 0.3), ("cps", 0.7)])
def test_step_means_and_log_probs_are_those_of_an_independent_float64_computation(denoiser, stock, noise, eta):
    sampling = SamplingConfig(steps=STEPS, noise=noise, eta=eta, guidance_scale=GUIDANCE)
    table, ids = sampler_table(MODEL, sampling), torch.arange(3)
    settings = {"sampling": sampling, "seed": 0, "batch": 3, "vae_batch": 3, "backend": "reference"}
    found = rollout(denoiser, table, PROMPTS, ids, **settings)
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(stock.scheduler.config)
    scheduler.set_timesteps(STEPS)
    times = scheduler.sigmas.double().tolist()
    parts = [part.double() for part in (stock.transformer, stock.text_encoder, stock.text_encoder_2)]
    with torch.no_grad():
        text, no_text, pooled, no_pooled = stock.encode_prompt(PROMPTS, None, None, max_sequence_length=1)
        for i, (s, after) in enumerate(zip(times[:-1], times[1:], strict=True)):
            x, following = found.latents[i].double(), found.latents[i + 1].double()
            timestep = torch.full((3,), 1000 * s, dtype=torch.float64)
            c, u = (parts[0](x, *of, timestep).sample for of in ((text, pooled), (no_text, no_pooled)))
            v = u + GUIDANCE * (c - u)
            mean, sigma = independent_step(noise, eta, s, after, x, v)
            torch.testing.assert_close(table.a[i] * x + table.b[i] * v, mean, rtol=0, atol=1e-6)
            if sigma == 0:
                torch.testing.assert_close(following, mean, rtol=0, atol=1e-4)
                assert i == STEPS - 1 and not found.log_probs[i].any()
            else:
                exact = Normal(mean, sigma).log_prob(following).flatten(1).mean(1)
                torch.testing.assert_close(found.log_probs[i].double(), exact, rtol=0, atol=2e-4)
    for part in parts:
        part.float()


def test_it_has_at_most_6_mb_and_its_cards_figures_are_those_of_its_log():
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) <= 6e6
    rows = [json.loads(line) for line in (FOLDER / "training_log.jsonl").read_text().splitlines()]
    card = (FOLDER / "README.md").read_text()
    for row in (row for row in rows if row.get("stage") == "final"):
        names = ("color", "shape", "texture", "spatial", "numeracy", "mean")
        assert f"| {row['guidance']:g} | {' | '.join(f'{row[name]:.3f}' for name in names)} |" in card
    minutes = [row["minutes"] for row in rows if "minutes" in row][-1]
    assert f"{rows[0]['settings']['steps']:,} steps" in card and f"{minutes:.0f} minutes" in card


def test_the_recipe_trains_it_as_its_card_says():
    config = load_config("configs/shapes_flow.yaml")
    assert (config.model.path, config.model.max_sequence_length) == (MODEL.path, MODEL.max_sequence_length)
    assert re.search(r"max_sequence_length=1\b", (FOLDER / "README.md").read_text())
