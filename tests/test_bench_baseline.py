"""The plain PPO of bench/ computes what fastloop's `algorithm: ppo` computes, to rounding, on the same data."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastloop.advantages import finish
from fastloop.rewards.scoring import Scores
from fastloop.rollout import Texts, Trajectories, gather_scores
from fastloop.trainer import Trainer

PPO = {"algorithm": "ppo", "images_per_prompt": 1, "prompts_per_step": 4, "clip_range": 1e-3}
MODELS = [("tiny_sd", "lora", 2.0), ("tiny_sd", "full", 1.0), ("tiny_sd_v", "lora", 1.0), ("tiny_sd_v", "full", 3.0)]
MODELS += [("tiny_sdxl", "lora", 2.0), ("tiny_sdxl", "full", 1.0)]
MODELS += [("tiny_sd3", "lora", 2.0), ("tiny_sd3", "full", 1.0), ("tiny_sd3_plain", "lora", 1.0)]
FLOW = {"model": {"max_sequence_length": 12}, "sampling": {"eta": 0.7, "steps": 5}, "clip_range": 2e-5}


@pytest.fixture(scope="module")
def bench(bench_module):
    module = bench_module("baseline_ppo")
    module.FlowPPO = bench_module("baseline_flow").FlowPPO
    return module


def make_baseline(bench, config, reward=lambda images, prompts: np.zeros(len(images))):
    """The baseline with the settings of a configuration of fastloop."""
    pipe = bench.load_pipeline(config.model, torch.device("cpu"))
    kind = bench.FlowPPO if hasattr(pipe, "transformer") else bench.BaselinePPO
    return kind(pipe, reward, bench.settings_of(config))


@pytest.fixture(params=MODELS, ids=lambda case: "-".join(map(str, case)))
def pair(request, bench, make_config):
    """A trainer and the baseline with the same weights, which are not those that sampled, and a rollout of the trainer."""
    name, adapter, guidance = request.param
    flow = FLOW if "sd3" in name else {"model": {}, "sampling": {}, "clip_range": PPO["clip_range"]}
    model = {"path": request.getfixturevalue(name), "adapter": adapter, **flow["model"]}
    sampling = {"guidance_scale": guidance, **flow["sampling"]}
    config = make_config(**{**PPO, "clip_range": flow["clip_range"]}, model=model, sampling=sampling)
    trainer, baseline = Trainer(config), make_baseline(bench, config)
    prompts = trainer.prompts.draw(0, 4)
    trajectories = trainer.rollout(prompts, torch.arange(4))
    gather_scores(trainer.rewards, trainer.ranks, 4)
    torch.manual_seed(1)
    with torch.no_grad():
        for ours, theirs in zip(trainer.parameters.values(), baseline.parameters, strict=True):
            ours += (0.02 if adapter == "lora" else 0.005) * torch.randn_like(ours)
            theirs.copy_(ours)
    return trainer, baseline, trajectories


def test_losses_and_gradients_agree_on_the_same_data(pair):
    trainer, baseline, trajectories = pair
    i, step = (index.flatten() for index in torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij"))
    advantages = torch.tensor([1.5, -0.7, 0.2, -5.0])
    own = Texts(trainer.denoiser, trajectories.prompts, trainer.config.sampling)
    transitions = trajectories.transitions(torch.arange(4))
    terms, ours, _ = trainer.update.loss(transitions, advantages[i], torch.arange(16), own)
    text = {name: value[i] for name, value in baseline.encode(trajectories.prompts).items()}
    theirs, logged = baseline.loss(
        trajectories.latents[step, i],
        trajectories.latents[step + 1, i],
        baseline.scheduler.timesteps[step],
        trajectories.log_probs[step, i],
        advantages[i],
        text,
    )
    clipped = (terms.ratio - 1).abs() > trainer.config.clip_range
    assert 0 < clipped.sum() < len(clipped)  # both branches of the objective are there
    torch.testing.assert_close(theirs, ours, rtol=0, atol=2e-5)
    assert torch.equal(logged["clipfrac"].bool(), clipped)
    ours.sum().backward()
    theirs.sum().backward()
    gradients = [torch.cat([p.grad.flatten() for p in ps]) for ps in (trainer.parameters.values(), baseline.parameters)]
    assert gradients[0].norm() > 0
    assert (gradients[0] - gradients[1]).norm() < 1e-4 * gradients[0].norm()


def test_a_step_that_the_baseline_samples_has_the_log_prob_that_fastloop_gives_it(pair):
    trainer, baseline, _ = pair
    prompts = ["cat", "dog", "deer", "ant"]
    samples = baseline.sample(prompts)
    latents, log_probs = samples["latents"].transpose(0, 1), samples["log_probs"].T
    replayed = Trajectories(latents, log_probs, prompts, torch.arange(4), samples["images"])
    text = Texts(trainer.denoiser, prompts, trainer.config.sampling)
    transitions = replayed.transitions(torch.arange(4))
    for step in range(4):
        terms, *_ = trainer.update.loss(transitions, torch.zeros(16), torch.arange(4) * 4 + step, text)
        torch.testing.assert_close(terms.log_prob, log_probs[step], rtol=1e-5, atol=1e-5)


def test_advantages_agree_before_and_after_a_prompt_is_known(bench, make_config):
    config = make_config(**PPO)
    trainer, baseline = Trainer(config), make_baseline(bench, config)
    prompts = ["cat", "dog", "cat", "deer"]
    rng = np.random.default_rng(0)
    for _ in range(40):  # more than the tracker remembers
        rewards = rng.normal(10, 3, 4).round(3)
        ours = trainer.advantages(prompts, Scores(rewards, {}, {"jpeg_incompressibility": rewards}))
        theirs = finish(baseline.advantages(prompts, rewards), baseline.settings.advantage_clip, normalize=False)
        torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-4)


@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_one_update_on_the_same_data_gives_the_same_weights(bench, make_config, adapter):
    config = make_config(**PPO, model={"adapter": adapter}, updates_per_rollout=1, optimizer={"lr": 1e-3})
    trainer, baseline = Trainer(config), make_baseline(bench, config)
    with torch.no_grad():
        for ours, theirs in zip(trainer.parameters.values(), baseline.parameters, strict=True):
            theirs.copy_(ours)
    before = torch.cat([p.detach().flatten().clone() for p in baseline.parameters])
    samples = baseline.sample(["cat", "dog", "deer", "ant"])
    latents, log_probs = samples["latents"].transpose(0, 1), samples["log_probs"].T
    trajectories = Trajectories(latents, log_probs, ["cat", "dog", "deer", "ant"], torch.arange(4), samples["images"])
    samples["advantages"] = torch.tensor([1.5, -0.7, 0.2, -1.0])
    ours, theirs = trainer.update(trajectories, samples["advantages"], 0), baseline.update(samples)
    assert theirs["approx_kl"] == pytest.approx(ours["policy/approx_kl"], abs=1e-10)
    moved = [
        torch.cat([p.detach().flatten() for p in ps]) - before for ps in (trainer.parameters.values(), baseline.parameters)
    ]
    assert moved[0].norm() > 0 and (moved[0] - moved[1]).norm() < 0.01 * moved[0].norm()
