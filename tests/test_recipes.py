"""The recipes: every file parses, its rewards can be built, and each reward has one for SD 1.5 and one for SDXL."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fastloop.batches import Batches, trained_steps
from fastloop.prompts import ANIMALS
from fastloop.recipes import load_config
from fastloop.rewards.noun_phrases import by_rule
from fastloop.rewards.registry import REGISTRY
from fastloop.rewards.scoring import Rewards
from fastloop.rollout import sampler_table

RECIPES = sorted((Path(__file__).resolve().parent.parent / "configs").glob("*.yaml"))
MODELS = {"sd15": "stable-diffusion-v1-5/stable-diffusion-v1-5", "sdxl": "stabilityai/stable-diffusion-xl-base-1.0"}
FLOWS = {
    "sd35": ("stabilityai/stable-diffusion-3.5-medium", "sd35_medium"),
    "flux": ("black-forest-labs/FLUX.1-dev", "flux_dev"),
    "klein": ("black-forest-labs/FLUX.2-klein-base-4B", "klein_base_4b"),
}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_parses_writes_to_its_own_folder_and_its_rewards_can_be_built(path):
    config = load_config(path)
    assert config.output_dir == f"runs/{path.stem}"
    family = path.stem.partition("_")[0]
    assert config.model.path == MODELS.get(family, config.model.path)
    for rewards in (config.rewards, config.eval.rewards or []):
        assert list(Rewards(rewards, [], None).terms) == [reward.key for reward in rewards]


@pytest.mark.parametrize("family", MODELS)
def test_every_reward_of_real_pictures_has_a_recipe(family):
    recipes = [load_config(path) for path in RECIPES if path.stem.startswith(f"{family}_")]
    assert {reward.name for recipe in recipes for reward in recipe.rewards} == {
        name for name in REGISTRY if not name.startswith("shapes") and name != "http"
    }


@pytest.mark.parametrize(
    "name, trained, kept",
    [
        ("sd35_pickscore", [1, 2, 3, 4, 5], 2),
        ("sd35_noguidance", [0, 1, 2, 3, 4], 3),
        ("sd35_ocr", list(range(9)), 9),
        ("flux_pickscore", [1, 2, 3], 1),
        ("flux_dancegrpo", list(range(15)), 9),
        ("klein_pickscore", [1, 2, 3], 1),
    ],
)
def test_recipes_of_flows_train_the_published_steps_of_their_models(name, trained, kept):
    path, random_init = FLOWS[name.partition("_")[0]]
    config = load_config(next(recipe for recipe in RECIPES if recipe.stem == name))
    assert config.model.path == path and config.eval_sampling.eta == 0 and config.eval_sampling.steps > config.sampling.steps
    model = config.model.model_copy(update={"path": None, "random_init": random_init})
    steps = trained_steps(sampler_table(model, config.sampling), config)
    assert steps.tolist() == trained and Batches(config, steps).kept == kept
    assert len(sampler_table(model, config.eval_sampling)) == config.eval_sampling.steps


def test_the_clip_range_of_cps_is_the_published_one_in_units_of_the_log_density():
    """Theirs, 1e-4, is of 2 sigma^2 times the log-ratio: of the trained steps on average."""
    config = load_config(next(recipe for recipe in RECIPES if recipe.stem == "sd35_noguidance"))
    model = config.model.model_copy(update={"path": None, "random_init": "sd35_medium"})
    sigma = sampler_table(model, config.sampling).sigma[:5]
    assert config.clip_range == pytest.approx(1e-4 / (2 * sigma.square()).mean().item(), rel=0.03)


@pytest.mark.parametrize("name", ["aesthetic", "pickscore", "blip_vqa"])
def test_recipes_for_sd15_have_the_published_settings_of_ddpo(name):
    config = load_config(next(path for path in RECIPES if path.stem == f"sd15_{name}"))
    assert (config.sampling.steps, config.sampling.eta, config.sampling.guidance_scale) == (50, 1.0, 5.0)
    assert (config.images_per_rollout, config.clip_range, config.optimizer.max_grad_norm) == (256, 1e-4, 1.0)
    assert (config.optimizer.lr, config.optimizer.betas, config.optimizer.weight_decay) == (3e-4, (0.9, 0.999), 1e-4)
    watched = [reward for reward in config.eval.rewards if reward.weight == 0]
    assert watched and watched[0].name != name  # a second opinion, which counts nothing


def test_the_animals_can_be_asked_about():
    assert all(by_rule(animal) == [animal] for animal in ANIMALS)


@pytest.mark.parametrize("name, weighs", [("dpok", 10), ("dpok_prompts", 1000)])
def test_recipes_of_dpok_have_its_settings_in_units_of_a_reward_that_weighs_1(name, weighs):
    config = load_config(next(path for path in RECIPES if path.stem == f"sd15_{name}"))
    assert config.kl.form == "epsilon" and config.kl.weight * weighs == pytest.approx({10: 0.01, 1000: 0.1}[weighs])
    optimizer, value = config.optimizer, config.value
    assert (optimizer.max_grad_norm * weighs, optimizer.eps * weighs) == pytest.approx((0.1, 1e-8))
    assert (optimizer.lr, optimizer.weight_decay, value.lr, value.width, value.batch) == (1e-5, 0, 1e-4, 256, 5 * 256)
    assert (config.images_per_rollout, config.replay.rollouts, config.clip_range) == (10, 2, 1e-4)
    batches = Batches(config, torch.arange(50))
    assert batches.trajectories * len(batches.steps) == 1000 and batches.update_rows == [48] * 5
