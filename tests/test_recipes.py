"""The recipes: every file parses, its rewards can be built, and each reward has one for SD 1.5 and one for SDXL."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastloop.prompts import ANIMALS
from fastloop.recipes import load_config
from fastloop.rewards.noun_phrases import by_rule
from fastloop.rewards.registry import REGISTRY
from fastloop.rewards.scoring import Rewards

RECIPES = sorted((Path(__file__).resolve().parent.parent / "configs").glob("*.yaml"))
MODELS = {"sd15": "stable-diffusion-v1-5/stable-diffusion-v1-5", "sdxl": "stabilityai/stable-diffusion-xl-base-1.0"}


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
