"""What runs every step or iteration beside the model, under pytest-benchmark.

    pytest bench/test_loop.py [-k checkpoint] [--benchmark-json=FILE]

Sizes are those of a rollout of SD 1.5 at 512 px: 64 images of 50 steps, except where a name says otherwise.
"""

from __future__ import annotations

import itertools

import pytest
import torch

from fastloop.advantages import ADVANTAGES
from fastloop.checkpoints import save_checkpoint
from fastloop.config import ModelConfig, SamplingConfig
from fastloop.denoisers import build_skeleton, load_denoiser
from fastloop.denoisers.files import ARCHITECTURES
from fastloop.prompts import PER_CATEGORY
from fastloop.rollout import Trajectories
from fastloop.shapes.grammar import split
from fastloop.transitions import transition_table

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
IMAGES, STEPS, LATENT = 64, 50, (4, 64, 64)


def finished(call):
    """The call with the wait for the device at its end."""

    def run():
        result = call()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        return result

    return run


@pytest.mark.parametrize("steps", [10, 50])
def test_transition_table(benchmark, steps):
    import json

    config = json.loads((ARCHITECTURES / "sd15/scheduler/scheduler_config.json").read_text())
    assert len(benchmark(transition_table, config, steps, 1.0)) == steps


@pytest.mark.parametrize("name", ADVANTAGES)
def test_advantages(benchmark, name):
    rewards = torch.rand(IMAGES // 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    prompts = [f"prompt {i}" for i in range(len(rewards))]
    advantage = ADVANTAGES[name]()
    assert benchmark(lambda: advantage(prompts, {"reward": rewards}, {"reward": 1.0})).shape == rewards.shape


@pytest.fixture(scope="module")
def denoiser():
    return load_denoiser(ModelConfig(), DEVICE)


@pytest.mark.parametrize("known", [True, False], ids=["all in the cache", "none in the cache"])
def test_prompt_cache(benchmark, denoiser, known):
    prompts = [request.prompt for request in split("color", held_out=False)[:PER_CATEGORY]]
    stretches = itertools.cycle(prompts[i : i + 16] for i in range(0, len(prompts) - 16, 16))
    same, sampling = prompts[:16], SamplingConfig()

    def setup():
        if not known:
            denoiser._embeddings.clear()
        return (same if known else next(stretches), sampling), {}

    denoiser.encode(same, sampling)
    cond, _ = benchmark.pedantic(denoiser.encode, setup=setup, rounds=30)
    assert len(cond) == 16


def test_storing_a_denoising_step(benchmark):
    latents = torch.empty((STEPS + 1, IMAGES, *LATENT), device=DEVICE)
    x, step = torch.randn(IMAGES, *LATENT, device=DEVICE), itertools.cycle(range(STEPS))
    benchmark.extra_info["bytes"] = x.nbytes
    benchmark(finished(lambda: latents[next(step)].copy_(x, non_blocking=True)))
    assert torch.equal(latents[0], x)


def test_taking_a_micro_batch_of_rows(benchmark):
    latents = torch.randn((STEPS + 1, IMAGES, *LATENT), device=DEVICE)
    log_probs, ids = torch.zeros(STEPS, IMAGES, device=DEVICE), torch.arange(IMAGES, device=DEVICE)
    transitions = Trajectories(latents, log_probs, [""] * IMAGES, ids, None).transitions(torch.arange(STEPS))
    rows = torch.randperm(len(transitions))[:IMAGES]
    x_t, x_prev = benchmark(finished(lambda: transitions.latents(transitions.at(rows))))
    assert x_t.shape == x_prev.shape == (IMAGES, *LATENT)


def test_writing_a_checkpoint_of_lora_weights(benchmark, tmp_path):
    denoiser = build_skeleton(ModelConfig(random_init="sd15"))
    denoiser.train_adapter(gradient_checkpointing=False, seed=0)
    weights = {name: torch.randn(p.shape) for name, p in denoiser.trainable().items()}
    state = {"optimizer": {name: (torch.zeros_like(w), torch.zeros_like(w)) for name, w in weights.items()}}
    number = itertools.count(1)
    benchmark.extra_info["bytes"] = 3 * sum(w.nbytes for w in weights.values())
    benchmark.pedantic(lambda: save_checkpoint(tmp_path, next(number), weights, None, state, keep=2), rounds=5)
    assert len(list(tmp_path.iterdir())) == min(2, next(number) - 1)
