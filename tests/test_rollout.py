"""Rollouts with a small real model: what is stored, what it depends on, and that replaying it gives ratio 1."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from fastloop.batches import trained_steps
from fastloop.config import ModelConfig, SamplingConfig
from fastloop.denoisers import load_denoiser
from fastloop.errors import UserError
from fastloop.kernels.reference import MicroBatch, initial_noise, normal, policy_loss, sample_transition
from fastloop.rollout import rollout, sampler_table

SEED = 7
PROMPTS = ["cat", "cat", "dog", "dog", "a red circle", "a red circle"]
IDS = torch.tensor([40, 41, 42, 43, 44, 2**33 + 5])
GUIDED = SamplingConfig(steps=4, guidance_scale=3.0)
PLAIN = SamplingConfig(steps=4, guidance_scale=1.0)


@pytest.fixture(scope="module")
def model(tiny_sd) -> ModelConfig:
    return ModelConfig(path=tiny_sd, lora={"rank": 2})


@pytest.fixture(scope="module")
def denoiser(model):
    """With adapters that do something, as in the middle of a run."""
    denoiser = load_denoiser(model, torch.device("cpu"))
    denoiser.train_adapter(gradient_checkpointing=False, seed=0)
    with torch.no_grad():
        for parameter in denoiser.trainable().values():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return denoiser


def sample(denoiser, *, sampling=GUIDED, prompts=PROMPTS, ids=IDS, seed=SEED, batch=4, **kwargs):
    table = sampler_table(denoiser.config, sampling)
    kwargs = {"vae_batch": 4, "backend": "reference", **kwargs}
    return rollout(denoiser, table, prompts, ids, sampling=sampling, seed=seed, batch=batch, **kwargs)


@pytest.fixture(scope="module")
def guided(denoiser):
    return sample(denoiser)


def replay(denoiser, sampling, trajectories, step: int, chunk: slice):
    """Model outputs and coefficients of a stored step."""
    table = sampler_table(denoiser.config, sampling)
    n = len(trajectories.prompts[chunk])
    cond, uncond = denoiser.encode(trajectories.prompts[chunk], sampling)
    outputs = denoiser.predict(trajectories.latents[step, chunk], table.timesteps[step].expand(n), cond, uncond)
    return outputs, [column[step].float().expand(n) for column in (table.a, table.b, table.sigma)]


def test_a_rollout_holds_latents_log_probs_and_images_of_every_trajectory(guided):
    assert guided.latents.shape == (5, 6, 4, 8, 8) and guided.latents.dtype == torch.float32
    assert guided.log_probs.shape == (4, 6) and guided.log_probs.dtype == torch.float32
    assert guided.images.shape == (6, 16, 16, 3) and guided.images.dtype == np.uint8
    assert guided.latents.isfinite().all() and guided.log_probs.isfinite().all()
    assert guided.prompts == PROMPTS and guided.ids.equal(IDS)
    assert not guided.latents.requires_grad and not guided.log_probs.requires_grad
    assert len({image.tobytes() for image in guided.images}) == 6


# --- noise ------------------------------------------------------------------------------------------------------------


def test_the_stored_steps_hold_exactly_the_noise_of_seed_trajectory_and_step(denoiser, guided):
    # each trajectory's noise drawn alone, in an order of its own
    assert guided.latents[0].equal(torch.cat([initial_noise(SEED, number[None], (4, 8, 8)) for number in IDS]))
    for step in range(4):
        noise = {int(number): normal(SEED, number[None], step, 256) for number in reversed(IDS)}
        for chunk in (slice(0, 4), slice(4, 6)):
            (cond, uncond), (a, b, sigma) = replay(denoiser, GUIDED, guided, step, chunk)
            z = torch.cat([noise[int(number)] for number in IDS[chunk]]).view(-1, 4, 8, 8)
            a, b, sigma = (column.view(-1, 1, 1, 1) for column in (a, b, sigma))
            mean = a * guided.latents[step, chunk] + b * (uncond + 3.0 * (cond - uncond))
            assert guided.latents[step + 1, chunk].equal(mean + sigma * z)


@pytest.mark.parametrize("batch", [1, 3, 6, 64])
def test_trajectories_do_not_depend_on_the_micro_batch(denoiser, guided, batch):
    other = sample(denoiser, batch=batch, vae_batch=batch)
    assert other.latents[0].equal(guided.latents[0])
    torch.testing.assert_close(other.latents, guided.latents, rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(other.log_probs, guided.log_probs, rtol=1e-6, atol=1e-6)
    assert np.abs(other.images.astype(int) - guided.images).max() <= 1


def test_the_same_call_gives_the_same_trajectories_bit_for_bit(denoiser, guided):
    torch.manual_seed(123)  # no generator plays a part
    again = sample(denoiser)
    assert again.latents.equal(guided.latents) and again.log_probs.equal(guided.log_probs)
    assert (again.images == guided.images).all()


def test_a_trajectory_does_not_depend_on_its_place_or_its_company(denoiser, guided):
    other = sample(denoiser, prompts=["dog", "llama", "cat"], ids=IDS[[3, 0, 1]])
    for place, was in ((0, 3), (2, 1)):
        assert other.latents[0, place].equal(guided.latents[0, was])
        torch.testing.assert_close(other.latents[:, place], guided.latents[:, was], rtol=1e-5, atol=2e-5)
    assert other.latents[0, 1].equal(guided.latents[0, 0])  # another prompt: the same start, then another way
    assert (other.latents[1, 1] - guided.latents[1, 0]).abs().max() > 1e-3


def test_seeds_and_trajectory_numbers_have_noise_of_their_own(denoiser, guided):
    other = sample(denoiser, seed=SEED + 1)
    assert (other.latents[0] != guided.latents[0]).float().mean() > 0.99
    starts = torch.cat([guided.latents[0], other.latents[0]]).flatten(1)
    correlation = torch.corrcoef(starts) - torch.eye(12)
    assert correlation.abs().max() < 5 / math.sqrt(256)


# --- log-probs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampling", [GUIDED, PLAIN], ids=["guided", "plain"])
def test_log_probs_are_those_of_the_normal_distribution_in_float64(denoiser, sampling):
    trajectories = sample(denoiser, sampling=sampling)
    table = sampler_table(denoiser.config, sampling)
    x = trajectories.latents.double()
    with torch.no_grad():
        for step in range(4):
            outputs = zip(
                *(replay(denoiser, sampling, trajectories, step, c)[0] for c in (slice(4), slice(4, 6))), strict=True
            )
            if sampling is PLAIN:
                m = torch.cat(next(iter(outputs))).double()
            else:
                cond, uncond = (torch.cat(parts).double() for parts in outputs)
                m = uncond + sampling.guidance_scale * (cond - uncond)
            policy = torch.distributions.Normal(table.a[step] * x[step] + table.b[step] * m, table.sigma[step])
            expected = policy.log_prob(x[step + 1]).flatten(1).mean(1)
            torch.testing.assert_close(trajectories.log_probs[step].double(), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("grad", [True, False], ids=["with gradients", "without"])
@pytest.mark.parametrize("sampling", [GUIDED, PLAIN], ids=["guided", "plain"])
def test_replaying_stored_latents_gives_ratio_exactly_one(denoiser, sampling, grad):
    trajectories = sample(denoiser, sampling=sampling)
    worst = 0.0
    for step in range(4):
        for chunk in (slice(0, 4), slice(4, 6)):  # batches as they were sampled
            with torch.set_grad_enabled(grad):
                outputs, coefficients = replay(denoiser, sampling, trajectories, step, chunk)
                assert (outputs[1] is None) == (sampling is PLAIN)
                batch = MicroBatch(
                    trajectories.latents[step, chunk],
                    trajectories.latents[step + 1, chunk],
                    *coefficients,
                    log_prob_old=trajectories.log_probs[step, chunk],
                    advantage=torch.ones(len(outputs[0])),
                )
                settings = {"guidance": sampling.guidance_scale, "clip_range": 1e-4, "objective": "clipped"}
                terms = policy_loss(*outputs, batch, **settings)
            assert terms.loss.requires_grad == grad
            worst = max(worst, (terms.ratio - 1).abs().max().item())
    assert worst == 0.0


def test_the_last_latents_are_what_is_decoded(denoiser, guided):
    assert (denoiser.decode(guided.latents[-1], 4) == guided.images).all()


# --- what is called along the way -------------------------------------------------------------------------------------


def test_images_are_handed_on_in_order_as_soon_as_a_batch_is_decoded(denoiser, guided):
    seen, steps = [], []
    result = sample(
        denoiser,
        on_images=lambda start, images: seen.append((start, sum(steps), images)),
        on_step=steps.append,
    )
    assert [(start, done, len(images)) for start, done, images in seen] == [(0, 16, 4), (4, 24, 2)]
    assert steps == [4] * 4 + [2] * 4
    assert (np.concatenate([images for *_, images in seen]) == result.images).all()
    assert (result.images == guided.images).all()


def test_an_exception_in_a_callback_ends_the_rollout(denoiser):
    class Leave(Exception):
        pass

    steps = []

    def on_step(n: int) -> None:
        steps.append(n)
        if len(steps) == 3:
            raise Leave

    with pytest.raises(Leave):
        sample(denoiser, on_step=on_step)
    assert steps == [4, 4, 4]


def test_without_latents_the_images_are_the_same(denoiser, guided):
    images_only = sample(denoiser, keep="none")
    assert images_only.latents.numel() == 0
    assert (images_only.images == guided.images).all() and images_only.log_probs.equal(guided.log_probs)


# --- which steps ------------------------------------------------------------------------------------------------------


def with_scheduler(model: ModelConfig, folder: Path, **changes) -> ModelConfig:
    """The model with another scheduler config, which only SD's pipeline would correct."""
    shutil.copytree(model.path, folder)
    index = folder / "model_index.json"
    index.write_text(index.read_text().replace("StableDiffusionPipeline", "StableDiffusionXLPipeline"))
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return model.model_copy(update={"path": str(folder)})


def test_steps_without_noise_are_sampled_and_not_trained(model, denoiser, make_config, tmp_path):
    changed = with_scheduler(model, tmp_path / "model", steps_offset=0)
    table = sampler_table(changed, GUIDED)
    assert table.timesteps.tolist() == [750, 500, 250, 0] and table.sigma[-1] == 0
    config = make_config(model={"path": changed.path})
    assert trained_steps(table, config).tolist() == [0, 1, 2]
    sampled = rollout(denoiser, table, PROMPTS, IDS, sampling=GUIDED, seed=SEED, batch=4, vae_batch=4, backend="reference")
    assert sampled.latents[4].equal(sampled.latents[3]) and not sampled.latents[3].equal(sampled.latents[2])
    assert (sampled.log_probs[3] == 0).all() and (sampled.log_probs[:3] != 0).all()
    assert (sampled.images == denoiser.decode(sampled.latents[3], 4)).all()


def test_last_steps_drop_leaves_out_the_last_steps_that_have_noise(model, make_config, tmp_path):
    table = sampler_table(model, GUIDED)
    offset_0 = sampler_table(with_scheduler(model, tmp_path / "model", steps_offset=0), GUIDED)
    for drop, expected, expected_offset_0 in ((0, [0, 1, 2, 3], [0, 1, 2]), (2, [0, 1], [0])):
        config = make_config(last_steps={"drop": drop})
        assert trained_steps(table, config).tolist() == expected
        assert trained_steps(offset_0, config).tolist() == expected_offset_0
    with pytest.raises(UserError, match=r"sampling\.steps: none of 4 steps can be trained.*last_steps\.drop"):
        trained_steps(offset_0, make_config(last_steps={"drop": 3}))


def test_noise_steps_alone_have_noise_and_are_trained(model, denoiser, make_config):
    sampling = GUIDED.model_copy(update={"noise_steps": (1, 2)})
    table = sampler_table(model, sampling)
    settings = {"sampling": sampling, "batch": 4, "vae_batch": 4, "backend": "reference"}
    config = make_config(sampling={"noise_steps": [1, 2]})
    assert trained_steps(table, config).tolist() == [1, 2]
    sampled = rollout(denoiser, table, PROMPTS, IDS, seed=SEED, **settings)
    assert (sampled.log_probs[[0, 3]] == 0).all() and (sampled.log_probs[1:3] != 0).all()
    alone = sampler_table(model, GUIDED.model_copy(update={"eta": 0.0}))
    for step in (0, 3):  # as without any noise
        x, after = sampled.latents[step], sampled.latents[step + 1]
        cond, uncond = denoiser.encode(PROMPTS, sampling)
        c, u = denoiser.predict(x, table.timesteps[step].expand(len(x)), cond, uncond)
        m = u + sampling.guidance_scale * (c - u)
        torch.testing.assert_close(after, (alone.a[step] * x + alone.b[step] * m).float(), rtol=0, atol=1e-4)
    with pytest.raises(UserError, match=r"none of 4 steps can be trained.*, or widen sampling\.noise_steps$"):
        trained_steps(table, make_config(sampling={"noise_steps": [1, 2]}, last_steps={"drop": 2}))


def test_more_updates_than_pairs_are_refused(model, make_config):
    table = sampler_table(model, GUIDED)
    few = {"prompts_per_step": 1, "images_per_prompt": 2, "timestep_fraction": 0.5}  # 2 trajectories, 2 steps of each
    assert len(trained_steps(table, make_config(**few, updates_per_rollout=4))) == 4
    with pytest.raises(UserError, match=r"updates_per_rollout: 5 updates, but a rollout has only 4 .* pairs"):
        trained_steps(table, make_config(**few, updates_per_rollout=5))
    assert len(trained_steps(table, make_config(**few, updates_per_rollout=8, passes_per_rollout=2))) == 4


def test_a_scheduler_that_clips_is_refused_by_its_key(model, tmp_path):
    clips = with_scheduler(model, tmp_path / "model", clip_sample=True)
    with pytest.raises(UserError) as caught:
        sampler_table(clips, GUIDED)
    assert str(caught.value).startswith(f"the scheduler of model.path={clips.path}: scheduler clip_sample=true: ")


def test_eta_below_one_samples_with_less_noise_and_still_has_a_density(denoiser, guided):
    calm = SamplingConfig(steps=4, guidance_scale=3.0, eta=0.3)
    table, full = sampler_table(denoiser.config, calm), sampler_table(denoiser.config, GUIDED)
    torch.testing.assert_close(table.sigma, 0.3 * full.sigma)
    sampled = sample(denoiser, sampling=calm)
    assert sampled.latents[0].equal(guided.latents[0]) and not sampled.latents[1].equal(guided.latents[1])
    (cond, uncond), coefficients = replay(denoiser, calm, sampled, 0, slice(4))
    x, _ = sample_transition(cond, uncond, sampled.latents[0, :4], *coefficients, 3.0, SEED, IDS[:4], 0)
    assert x.equal(sampled.latents[1, :4])
    # E log p = -1/2 - log sigma - log(2 pi) / 2 per element
    expected = -0.5 - table.sigma.log() - 0.5 * math.log(2 * math.pi)
    torch.testing.assert_close(sampled.log_probs.double().mean(1), expected, rtol=0, atol=0.1)
