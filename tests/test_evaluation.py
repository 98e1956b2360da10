"""The held-out score: its standard error counts distinct prompts, and its pictures depend on eval.seed alone."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fastloop.denoisers import load_denoiser
from fastloop.evaluation import EVAL_STREAM, Evaluation, evaluate, summarize
from fastloop.prompts import Prompt, load_prompts
from fastloop.rewards.scoring import Rewards
from fastloop.rollout import rollout, sampler_table

RNG = np.random.default_rng(0)


def names(count: int) -> np.ndarray:
    return np.array([f"prompt {i}" for i in range(count)])


# --- the standard error -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p, m", [(2, 1), (5, 1), (7, 3), (50, 2)])
def test_where_every_prompt_comes_once_the_error_is_that_of_the_prompts_means(p, m):
    scores = RNG.normal(size=(p, m))
    expected = {"mean": scores.mean(), "stderr": scores.mean(1).std(ddof=1) / math.sqrt(p), "n": p}
    assert summarize(scores, names(p)) == pytest.approx(expected, rel=1e-12)


def test_images_that_say_the_same_tell_nothing_new():
    per_prompt = RNG.normal(size=6)
    expected = summarize(per_prompt[:, None], names(6))
    for m in (2, 50):
        assert summarize(np.repeat(per_prompt[:, None], m, axis=1), names(6)) == pytest.approx(expected)


@pytest.mark.parametrize("times", [2, 5])
def test_prompts_that_all_come_again_with_the_same_scores_tell_nothing_new(times):
    scores, prompts = RNG.normal(size=(6, 2)), names(6)
    expected = summarize(scores, prompts)
    assert expected["n"] == 6
    for again in (np.tile, np.repeat):  # one list after the other, or each prompt's rows together
        rows = again(np.arange(6), times)
        assert summarize(scores[rows], prompts[rows]) == pytest.approx(expected)


def test_unequal_repeats_agree_with_the_formula_worked_out_by_hand():
    rows = [0, 1, 2, 0, 3, 1, 0, 4, 4, 0]
    scores, prompts = RNG.normal(size=(10, 3)), names(5)[rows]
    mean = sum(scores.flatten()) / 30
    squares = 0.0
    for name in set(prompts):
        deviation = sum(score - mean for row, text in zip(scores, prompts, strict=True) if text == name for score in row)
        squares += deviation**2
    expected = {"mean": mean, "stderr": math.sqrt(5 / 4 * squares) / 30, "n": 5}
    assert summarize(scores, prompts) == pytest.approx(expected, rel=1e-12)


def test_images_of_one_prompt_that_differ_and_cancel_leave_no_error():
    scores = np.array([[0.0, 1.0], [1.0, 0.0], [0.5, 0.5]])
    assert summarize(scores, names(3)) == {"mean": 0.5, "stderr": 0.0, "n": 3}


@pytest.mark.parametrize("repeats", [[1] * 20, [1] * 10 + [3] * 10], ids=["once", "unequal"])
def test_the_error_is_the_spread_of_repeated_experiments(repeats):
    rng = np.random.default_rng(1)
    rows = np.repeat(np.arange(20), repeats)

    def experiment():  # prompts of different difficulty, 3 images each time that a prompt comes
        return rng.normal(size=(20, 1))[rows] + 0.5 * rng.normal(size=(len(rows), 3))

    runs = [summarize(experiment(), names(20)[rows]) for _ in range(800)]
    spread = np.std([run["mean"] for run in runs])
    assert np.mean([run["stderr"] for run in runs]) == pytest.approx(spread, rel=0.1)


@pytest.mark.parametrize("rows", [1, 3])
def test_one_prompt_has_no_standard_error_however_often_it_comes(rows):
    summary = summarize(RNG.normal(size=(rows, 2)), np.repeat(names(1), rows))
    assert math.isnan(summary["stderr"]) and summary["n"] == 1 and math.isfinite(summary["mean"])


# --- categories and rows ----------------------------------------------------------------------------------------------


def make_evaluation() -> Evaluation:
    categories = ["shape", "color", "shape", None, "shape"]
    texts = ["a", "b", "c", "d", "a"]  # the last one comes again
    prompts = [Prompt(text, {} if c is None else {"category": c}) for text, c in zip(texts, categories, strict=True)]
    scores = np.array([[0.0, 0.2], [1.0, 1.0], [0.4, 0.6], [0.0, 0.0], [0.0, 0.2]])
    return Evaluation(prompts, scores, {"a": scores, "b": 1 - scores}, np.zeros((5, 2, 1, 1, 3), np.uint8))


def test_categories_are_summarized_apart_in_the_order_of_their_prompts():
    categories = make_evaluation().categories()
    assert list(categories) == ["shape", "color"]
    # a has 4 images of 0.1 on average, c has 2 of 0.5: the summed deviations are opposite
    deviation = 2 * (0.5 - 0.7 / 3)
    shape = {"mean": 0.7 / 3, "stderr": math.sqrt(2 / 1 * 2 * deviation**2) / 6, "n": 2}
    assert categories["shape"] == pytest.approx(shape)
    assert categories["color"]["mean"] == 1.0 and categories["color"]["n"] == 1
    assert math.isnan(categories["color"]["stderr"])


def test_prompts_without_categories_have_none():
    result = make_evaluation()
    bare = [Prompt(prompt.text) for prompt in result.prompts]
    assert Evaluation(bare, result.scores, result.terms, result.images).categories() == {}


def test_a_row_holds_the_score_its_terms_and_the_categories():
    result = make_evaluation()
    row, texts = result.row(), np.array(["a", "b", "c", "d", "a"])
    assert row["score"] == summarize(result.scores, texts)
    assert (row["score"]["mean"], row["score"]["stderr"], row["score"]["n"]) == (result.mean, result.stderr, 4)
    assert row["rewards"] == {"a": summarize(result.scores, texts), "b": summarize(1 - result.scores, texts)}
    assert list(row["categories"]) == ["shape", "color"]


# --- sampling ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def measure(make_config):
    """A function of overrides that evaluates the tiny model, its prompts in the given order."""
    denoiser = load_denoiser(make_config().model, torch.device("cpu"))

    def measure(order=slice(None), **overrides) -> Evaluation:
        config = make_config(**overrides)
        prompts = load_prompts(config.eval.prompts)[order]
        size = denoiser.image_size(config.eval_sampling)
        rewards = Rewards(config.eval.rewards or config.rewards, prompts, size)
        try:
            return evaluate(denoiser, config, prompts, rewards)
        finally:
            rewards.close()

    return measure


def test_the_pictures_do_not_depend_on_the_batches(measure):
    whole = measure(memory={"rollout_batch": 6, "vae_batch": 6})
    assert whole.images.shape == (3, 2, 16, 16, 3) and whole.images.dtype == np.uint8
    assert [prompt.text for prompt in whole.prompts] == ["cat", "dog", "horse"]
    for batch in (1, 4):
        parts = measure(memory={"rollout_batch": batch, "vae_batch": batch})
        # a float32 sum in another order may move a value over a rounding edge
        assert abs(parts.images.astype(int) - whole.images).max() <= 1
        np.testing.assert_allclose(parts.scores, whole.scores, atol=0.02)


def test_the_same_evaluation_twice_gives_the_same_pictures_and_scores(measure):
    one, two = measure(), measure()
    assert np.array_equal(one.images, two.images) and np.array_equal(one.scores, two.scores)


def test_another_eval_seed_gives_other_pictures_and_the_training_seed_does_not(measure):
    base, other = measure(), measure(eval={"seed": 1})
    assert (base.images != other.images).mean() > 0.5
    assert np.array_equal(base.images, measure(seed=1).images)


def test_every_picture_has_its_own_noise(measure):
    images = measure().images.reshape(6, -1)
    assert all((images[i] != images[j]).mean() > 0.5 for i in range(6) for j in range(i))


def test_the_sampler_of_an_evaluation_is_its_own(measure):
    base = measure()
    said = {"steps": 4, "eta": 1.0, "guidance_scale": 2.0, "negative_prompt": ""}
    assert np.array_equal(measure(eval={"sampling": said}).images, base.images)  # what `sampling` has
    for key, value in (("steps", 2), ("eta", 0.0), ("guidance_scale", 1.0), ("negative_prompt", "dull")):
        assert (measure(eval={"sampling": {key: value}}).images != base.images).mean() > 0.1, key
    assert measure(eval={"sampling": {"height": 32, "width": 24}}).images.shape == (3, 2, 32, 24, 3)
    guided = measure(sampling={"guidance_scale": 1.0}, eval={"sampling": said})  # in calls of half as many trajectories
    assert abs(guided.images.astype(int) - base.images).max() <= 1


def test_scores_and_terms_belong_to_their_pictures(measure, make_config):
    terms = [{"name": "jpeg_compressibility", "weight": 0.5}, {"name": "jpeg_incompressibility", "weight": 2.0}]
    result = measure(eval={"rewards": terms})
    prompts = [prompt for prompt in result.prompts for _ in range(2)]
    rewards = Rewards(make_config(rewards=terms).rewards, prompts, (16, 16))
    expected = rewards.score(result.images.reshape(6, 16, 16, 3), prompts)
    rewards.close()
    assert np.array_equal(result.scores, expected.total.reshape(3, 2))
    assert {name: values.flatten().tolist() for name, values in result.terms.items()} == {
        name: values.tolist() for name, values in expected.terms.items()
    }
    assert len(np.unique(result.scores)) > 1


def test_no_training_rollout_shares_its_noise_with_an_evaluation_of_the_same_seed(measure, make_config):
    config = make_config()
    result = measure()
    rest = {"batch": 6, "vae_batch": 6, "backend": "reference"}
    table, denoiser = sampler_table(config.model, config.sampling), load_denoiser(config.model, torch.device("cpu"))
    texts = [prompt.text for prompt in result.prompts for _ in range(2)]

    def images(seed):
        return rollout(denoiser, table, texts, torch.arange(6), sampling=config.sampling, seed=seed, **rest).images

    assert (images(config.eval.seed).reshape(result.images.shape) != result.images).mean() > 0.5
    evaluated = images(EVAL_STREAM | config.eval.seed).reshape(result.images.shape)
    assert abs(evaluated.astype(int) - result.images).max() <= 1
