"""Noise PPO: the policy and its loss against float64 formulas, learning, exact resume, sampling of a run, export, refusals."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from known_traces import trace_nothing
from recorded import same, weights
from safetensors import safe_open

from fastloop import cli
from fastloop.denoisers import ready_denoiser
from fastloop.errors import RunFailed, UserError
from fastloop.noise_policy import NoisePolicy, kl_to_normal, log_prob, noise_terms
from fastloop.noise_trainer import FILE, NoiseTrainer
from fastloop.plan import plan, planned_memory
from fastloop.preflight import preflight
from fastloop.rollout import rollout, sampler_table
from fastloop.runs import open_model
from fastloop.tracking import read_rows

ROOT = Path(__file__).resolve().parent.parent
NOISE = {"algorithm": "noise_ppo", "model": {"lora": {"rank": 16}}, "memory": {"rollout_batch": 6, "update_batch": 64}}


def brightness(images, prompts, metadata) -> list[float]:
    """A reward: the mean of all values, in [0, 1]."""
    return [float(np.mean(image)) / 255 for image in images]


@pytest.fixture
def make(make_config, no_report):
    def make(resume: bool = False, **changes) -> NoiseTrainer:
        values = {**NOISE, "clip_range": 0.2, **changes}
        return NoiseTrainer(make_config(**values), resume)

    return make


def a_policy(grid: int = 3, spread: float = 0.3) -> NoisePolicy:
    """Of random weights, over latents of 2 channels."""
    torch.manual_seed(0)
    policy = NoisePolicy(features=5, channels=2, hidden=7, grid=grid)
    for p in policy.parameters():
        torch.nn.init.normal_(p, std=spread)
    return policy


# --- the policy and its loss ------------------------------------------------------------------------------------------


def test_it_starts_at_exactly_n_0_i_and_grids_are_linear_in_between():
    policy, noise = NoisePolicy(5, 2, hidden=7, grid=2), torch.randn(4, 2, 6, 8)
    features = torch.randn(4, 5)
    assert policy.sample(noise, features).equal(noise)
    mean, log_scale = policy(features, (6, 8))
    assert not mean.any() and not log_scale.any() and not kl_to_normal(mean, log_scale).any()
    coarse = a_policy(grid=2)
    mean, _ = coarse(features, (2, 2))
    hidden = torch.nn.functional.silu(coarse.inner(torch.nn.functional.layer_norm(features, (5,))))
    assert mean.allclose(coarse.outer(hidden)[:, :8].view(4, 2, 2, 2))
    (fine, log_scale), one = coarse(features, (6, 8)), a_policy(grid=1)(features, (6, 8))[0]
    assert fine[:, :, 0, 0].allclose(mean[:, :, 0, 0]) and fine.amax() <= mean.amax() + 1e-6
    assert one.allclose(one[:, :, :1, :1].expand_as(one)) and fine.shape == log_scale.shape == (4, 2, 6, 8)


@pytest.mark.parametrize("objective", ["clipped", "clip_only", "score_function"])
def test_the_gradient_is_that_of_the_formula_in_float64(objective):
    """Of the sum over D, with rows inside and outside of the clip's window and advantages of both signs."""
    policy, features, n, size = a_policy(), torch.randn(8, 5), 8, (4, 3)
    latents, advantages = torch.randn(n, 2, *size), torch.tensor([1.0, -1, 0.5, -0.5, 2, -2, 1, -1])
    old = log_prob(latents, *policy(features, size)).detach() + torch.tensor([0, 0, 1, 1, -1, -1, 0.1, -0.1])
    noise_terms(latents, *policy(features, size), old, advantages, objective, 0.2, 0.05).loss.mean().backward()
    ours = [p.grad.clone() for p in policy.parameters()]
    policy.zero_grad()
    policy.double()
    mean, log_scale = policy(features.double(), size)
    normal = torch.distributions.Normal(mean, log_scale.exp())
    now, a = normal.log_prob(latents.double()).sum((1, 2, 3)), advantages.double()
    ratio, kl = (now - old).exp(), torch.distributions.kl_divergence(normal, torch.distributions.Normal(0, 1)).sum((1, 2, 3))
    loss = {
        "clipped": -torch.minimum(ratio * a, ratio.clamp(0.8, 1.2) * a),
        "clip_only": -ratio.clamp(0.8, 1.2) * a,
        "score_function": -now * a,
    }[objective]
    (loss + 0.05 * kl).mean().backward()
    for got, p in zip(ours, policy.parameters(), strict=True):
        assert (got - p.grad).norm() <= 1e-5 * p.grad.norm()


# --- training ---------------------------------------------------------------------------------------------------------


def test_it_learns_a_toy_reward_starts_from_a_ratio_of_1_and_leaves_the_model_as_it_is(make):
    trainer = make(
        rewards=[{"name": "test_noise_ppo:brightness"}],
        prompts_per_step=4,
        images_per_prompt=4,
        iterations=12,
        optimizer={"lr": 2e-2},
        kl={"weight": 0.0},
        eval={"every": 99, "prompts": {"source": "animals", "limit": 8}, "images_per_prompt": 4},
    )
    before = {name: p.clone() for name, p in trainer.denoiser.network.state_dict().items()}
    trainer.train()
    rows, (first, last) = read_rows(trainer.folder / "metrics.jsonl"), read_rows(trainer.folder / "eval.jsonl")
    first, last = first["score"], last["score"]
    assert last["mean"] > first["mean"] + 3 * np.hypot(first["stderr"], last["stderr"])
    assert all(row["policy/ratio_first_dev"] < 1e-5 for row in rows) and rows[0]["policy/ratio_max_dev"] > 1e-3
    defined = set(re.findall(r"`([\w/]+)`", (ROOT / "docs/metrics.md").read_text()))
    assert set(rows[0]) - defined == {"reward/test_noise_ppo:brightness"}  # stands there as reward/NAME
    assert rows[0]["policy/kl_reference"] < rows[-1]["policy/kl_reference"]
    assert same(before, trainer.denoiser.network.state_dict()) and set(trainer.parameters) == {
        f"{layer}.{kind}" for layer in ("inner", "outer") for kind in ("weight", "bias")
    }


@pytest.mark.parametrize("changes", [{}, {"ema": {"decay": 0.5}, "advantage": "prompt_tracker"}], ids=["plain", "average"])
def test_a_resumed_run_is_the_whole_one_bit_for_bit_and_its_folder_draws_with_the_policy(make, tmp_path, changes):
    changes = {**changes, "optimizer": {"lr": 0.05}}  # so that two updates show in the pictures
    whole = make(output_dir=str(tmp_path / "whole"), **changes)
    whole.train()
    make(output_dir=str(tmp_path / "cut"), iterations=1, **changes).train()
    resumed = make(resume=True, output_dir=str(tmp_path / "cut"), **changes)
    assert resumed.iteration == 1
    resumed.train()
    assert same(weights(resumed), weights(whole))
    rows = [[row["score"]["mean"] for row in read_rows(run.folder / "eval.jsonl")] for run in (whole, resumed)]
    assert rows[0][-1] == rows[1][-1]
    out = tmp_path / "eval.json"
    assert cli.main(["eval", str(whole.folder), "--json", str(out)]) == 0
    assert json.loads(out.read_text())["score"]["mean"] == rows[0][-1] != rows[0][0]
    config, load = open_model(str(whole.folder), [])
    drawn = load().noise_policy.state_dict()
    assert same(drawn, whole.ema.average if whole.ema else {name: p.detach() for name, p in whole.parameters.items()})


def test_a_loss_that_is_not_finite_ends_the_run_and_nothing_is_stepped(make):
    trainer = make()
    with torch.no_grad():
        trainer.policy.outer.bias.fill_(torch.nan)
    before = trainer.policy.outer.weight.clone()
    with pytest.raises(RunFailed, match="the loss is not finite in iteration 1: the last good checkpoint is kept"):
        trainer.update(["cat"] * 6, torch.arange(6), torch.ones(6))
    assert trainer.policy.outer.weight.equal(before)


def test_every_rank_makes_the_same_updates_whatever_its_share(make, tmp_path):
    """Initial noise and features are those of all trajectories; only the pictures are shared out."""
    one, other = make(), make(output_dir=str(tmp_path / "other"))
    advantages = torch.tensor([1.0, -1, 0.5, -0.5, 0, 0])
    first = one.update(["cat", "cat", "dog", "dog", "cow", "cow"], torch.arange(6), advantages)
    other.denoiser.encode(["cow", "pig"], other.config.sampling)  # another share, so others in its cache
    second = other.update(["cat", "cat", "dog", "dog", "cow", "cow"], torch.arange(6), advantages)
    assert first == second and same(weights(one), weights(other))


# --- export, plan and refusals ----------------------------------------------------------------------------------------


def test_the_code_in_the_docs_draws_with_a_stock_pipeline_what_the_run_draws(make, tmp_path, monkeypatch):
    trainer = make(
        model={"path": "assets:shapes", "lora": {"rank": 16}},
        prompts={"source": "shapes_train"},
        eval={"every": 9, "prompts": {"source": "shapes_heldout", "limit": 1}, "images_per_prompt": 1},
        sampling={"steps": 4, "guidance_scale": 1.0},
        iterations=1,
        optimizer={"lr": 3e-2},
        noise_policy={"grid": 2},
    )
    trainer.train()
    with safe_open(trainer.folder / "export" / FILE, "pt") as file:
        assert file.metadata() == {"channels": "8", "grid": "2", "features": "mean of tokens"}
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/method.md").read_text().split("## Noise PPO")[1], re.S)
    code = code.replace("MODEL", str(ROOT / "fastloop/assets/shapes")).replace("RUN", str(trainer.folder))
    code = code.replace("PROMPT", "a red circle and a blue square").replace("STEPS", "4").replace("GUIDANCE", "1.0")
    found: dict = {}
    exec(code, found)
    config, load = open_model(str(trainer.folder), [])
    denoiser = load()
    monkeypatch.setattr("fastloop.kernels.reference.initial_noise", lambda seed, ids, shape: found["noise"])
    drawn = rollout(
        denoiser,
        sampler_table(config.model, config.sampling),
        ["a red circle and a blue square"],
        torch.tensor([0]),
        sampling=config.sampling,
        seed=0,
        batch=1,
        vae_batch=1,
        backend="reference",
        keep="none",
    ).images[0]
    base = ready_denoiser(config, torch.device("cpu"), adapter=False)
    assert base.initial_latents(found["noise"], ["cat"]) is found["noise"]
    off = np.abs(np.asarray(found["image"]).astype(int) - drawn)
    assert off.max() <= 3 and off.mean() < 0.1


def test_the_plan_has_no_updates_of_the_model(make_config, monkeypatch):
    needs = planned_memory(make_config(**NOISE, clip_range=0.2))
    assert needs.phases["update"] < needs.phases["rollout"] and "self-check" not in needs.parts
    trace_nothing(monkeypatch)
    lines = plan(make_config(**NOISE, clip_range=0.2), ranks=2, it_per_s=10)
    text = "\n".join(lines)
    assert "8 forwards in the rollout, none in the updates" in text and "s rollout + 0.0 s update" in text
    assert "sampling.eta=0" in text and "gradient_checkpointing" not in text


@pytest.mark.parametrize(
    "changes, says",
    [
        (
            {"model": {"lora": {"rank": 4}}},
            "model.lora.rank: algorithm=noise_ppo trains no weights of the model, so it has no",
        ),
        (
            {"model": {"lora": {"target_modules": ["to_q"]}}},
            "model.lora.target_modules: algorithm=noise_ppo trains no weights",
        ),
        ({"model": {"adapter": "full"}}, "model.adapter: algorithm=noise_ppo trains no weights of the model: leave it out"),
        (
            {"sampling": {"eta": 1}},
            "sampling.eta: 1, but with algorithm=noise_ppo a picture must follow from its initial noise",
        ),
        (
            {"objective": "kl_mask"},
            "objective: kl_mask is not for the initial noise: set clipped, clip_only or score_function",
        ),
        ({"objective": "forward_process"}, "objective: forward_process is not for the initial noise: set clipped"),
        ({"last_steps": {"drop": 1}}, "last_steps.drop: algorithm=noise_ppo trains the initial noise, not single steps"),
        ({"timestep_fraction": 0.5}, "timestep_fraction: algorithm=noise_ppo trains the initial noise"),
        ({"forward": {"levels": 3}}, "forward.levels: algorithm=noise_ppo trains the initial noise"),
        ({"dlpo": {"beta": 1}}, "dlpo.beta: algorithm=noise_ppo trains the initial noise"),
        ({"sampling": {"noise_steps": [0, 1]}}, "sampling.noise_steps: algorithm=noise_ppo trains the initial noise"),
        (
            {"kl": {"form": "epsilon"}},
            "kl.form: epsilon, but with algorithm=noise_ppo the KL is that of two Gaussians: set it",
        ),
        ({"kl": {"every": 2}}, "kl.every: algorithm=noise_ppo has the KL of its policy in every update"),
        ({"engine": {"name": "deepspeed"}}, "engine.name: algorithm=noise_ppo has no gradients of the model to share out"),
        (
            {"memory": {"rollout_batch": "auto"}},
            "memory.rollout_batch: auto goes by the model's gradients, and algorithm=noise",
        ),
        ({"memory": {"trajectories": "host"}}, "memory.trajectories: updates of algorithm=noise_ppo do not run the model"),
        ({"model": {"compile": "auto"}}, "model.compile: auto goes by the model's updates, and algorithm=noise_ppo has none"),
        (
            {"export": {"dtype": "bf16"}},
            "export.dtype: the policy of algorithm=noise_ppo is exported in float32 and one format: leave it out",
        ),
        ({"noise_policy": {"grid": 99}}, "noise_policy.grid: 99 is finer than the latents"),
        ({"algorithm": "loop", "noise_policy": {"grid": 2}}, "noise_policy.grid: only algorithm=noise_ppo has a policy over"),
    ],
    ids=str,
)
def test_what_does_not_go_together_is_refused_in_one_line(make_config, changes, says):
    values = {**NOISE, "clip_range": 0.2}
    for key, value in changes.items():
        values[key] = {**values.get(key, {}), **value} if isinstance(value, dict) else value
    with pytest.raises(UserError) as caught:
        preflight(make_config(**values))
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_features_are_the_whole_text_where_a_family_has_it_and_else_the_mean_of_the_tokens(tiny_sd, tiny_sdxl, make_config):
    for path, pools in ((tiny_sd, False), (tiny_sdxl, True)):
        config = make_config(**{**NOISE, "model": {**NOISE["model"], "path": path}}, clip_range=0.2)
        denoiser = ready_denoiser(config, torch.device("cpu"), adapter=False)
        found = denoiser.features(["a cat", "a dog"])
        embedding = denoiser._embeddings["a cat", 0]
        assert found.shape == (2, denoiser.feature_size) and found.dtype == torch.float32 and denoiser.pools_texts is pools
        assert found[0].allclose(embedding[1] if pools else embedding[0].mean(0))
